"""Turn what was fetched into what transformers and datasets load; each runs once, inside the fetch."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np


def vit_from_onnx(folder: Path) -> None:
    """`model.onnx` -> a Dinov2 checkpoint with the names of the hub (transformers 4 and 5 read them).

    The exporter folded the position embeddings into two constants and dropped the names of the weights of
    linear layers; the path of the node that uses a weight gives its name back. The decoder is left out.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph = onnx.load(str(folder / "model.onnx")).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            path = node.name.strip("/").split("/")[1:-1]  # backbone/encoder/layer.0/.../MatMul
            state[".".join(path) + ".weight"] = arrays[node.input[1]].T
    cls = next(v for k, v in arrays.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patches = next(v for v in arrays.values() if v.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    state = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 518,
        "layer_norm_eps": 1e-6,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "model.onnx").unlink()


def lite0_from_pth(folder: Path) -> None:
    """`model.pth` (tensors only, no pickled code) -> safetensors with the names of our network."""
    import torch
    from safetensors.torch import save_file

    from .efficientnet_lite import EfficientNetLiteConfig, from_original_name

    state = torch.load(folder / "model.pth", map_location="cpu", weights_only=True)
    state = {from_original_name(k): v.contiguous() for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = EfficientNetLiteConfig(architectures=["EfficientNetLiteForImageClassification"], num_labels=1000)
    config.save_pretrained(folder)
    (folder / "model.pth").unlink()


def llama_from_gguf(folder: Path) -> None:
    """`model.gguf` -> float32 safetensors and tokenizer files; takes half a minute."""
    if not (folder / "model.gguf").exists():
        return  # the hub gives safetensors
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
        model = model.to(torch.float32)
        # the weights are plain floats now; without these marks save_pretrained takes them for quantised ones
        for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized")):
            if name in vars(owner):
                delattr(owner, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


def fashion_to_parquet(folder: Path) -> None:
    """The four idx files -> `train.parquet` and `test.parquet` with PNG images, as the hub has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    for split, prefix in (("train", "train"), ("test", "t10k")):
        if (folder / f"{split}.parquet").exists():
            continue
        images = _idx(folder / f"{prefix}-images.gz")  # (N, 28, 28)
        labels = _idx(folder / f"{prefix}-labels.gz")  # (N,)
        pngs = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=6)
            pngs.append({"bytes": buffer.getvalue(), "path": None})
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"image": pa.array(pngs, kind), "label": pa.array(labels.astype(np.int64))})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=5000, compression="none")
        for part in ("images", "labels"):
            (folder / f"{prefix}-{part}.gz").unlink()


def _idx(path: Path) -> np.ndarray:
    """An idx file: two zero bytes, a type (8: uint8), the number of dimensions, the dimensions, the data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an idx file of bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def movies_from_tar(folder: Path) -> None:
    """`hutto.tar.gz` -> `movies.tsv` (number, mean rating, text)."""
    with tarfile.open(folder / "hutto.tar.gz") as archive:
        stream = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert stream is not None
        (folder / "movies.tsv").write_bytes(stream.read())
    (folder / "hutto.tar.gz").unlink()
