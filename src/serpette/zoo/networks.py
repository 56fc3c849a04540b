"""Cached files -> transformers models and their processing classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import Entry
from .quiet import quiet_transformers

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
LITE = {"image_mean": [0.498] * 3, "image_std": [0.502] * 3}
PATCH = 14


def build_model(
    entry: Entry, folder: Path, task: str | None, num_labels: int | None, options: dict[str, Any]
) -> nn.Module:
    """The model of `entry` in float32 and eval mode; see `serpette.zoo.load_model`."""
    import transformers as hf

    heads = {
        "vit-s": (hf.Dinov2Model, hf.Dinov2ForImageClassification),
        "minilm-l6": (hf.BertModel, hf.BertForSequenceClassification),
        "smollm2-135m": (hf.LlamaForCausalLM, hf.LlamaForSequenceClassification),
    }
    if entry.name == "efficientnet-lite0":
        from . import efficientnet_lite as lite

        heads[entry.name] = (lite.EfficientNetLiteModel, lite.EfficientNetLiteForImageClassification)
    bare, with_head = heads[entry.name]
    settings: dict[str, Any] = {}
    if entry.name == "efficientnet-lite0" and task == "classification" and num_labels is None:
        num_labels, settings = 1000, {"num_labels": 1000}  # the head of the checkpoint
        fresh_head = False
    else:
        fresh_head = task in ("classification", "regression")
        if fresh_head:
            settings["num_labels"] = num_labels
            settings["problem_type"] = "regression" if task == "regression" else "single_label_classification"
    if "layers" in options:
        settings["num_hidden_layers"] = options["layers"]
    cls = with_head if num_labels is not None else bare
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        config = _config(entry, folder, settings)
        model, info = cls.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=fresh_head
        )
    model = model.float().eval()
    if fresh_head:
        _fill_head(model, info, options["seed"])
    if entry.name == "vit-s":
        _resize_positions(model, options["image_size"])
    if entry.name == "efficientnet-lite0":
        model.config.image_size = options["image_size"]
    if entry.name == "smollm2-135m" and model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model


def _config(entry: Entry, folder: Path, settings: dict[str, Any]):
    """The configuration made anew with `settings`, because fields such as the stages depend on the depth."""
    from transformers import AutoConfig

    fields = json.loads((folder / "config.json").read_text())
    if "num_hidden_layers" in settings:
        layers, deepest = settings["num_hidden_layers"], fields["num_hidden_layers"]
        if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= deepest:
            raise ValueError(
                f"layers={layers!r} must be a whole number from 1 to {deepest}, the depth of {entry.name}"
            )
    if "num_labels" in settings:  # names of classes would win over the number
        for names in ("id2label", "label2id"):
            fields.pop(names, None)
    return AutoConfig.for_model(fields.pop("model_type"), **{**fields, **settings})


def _fill_head(model: nn.Module, info: dict[str, Any], seed: int) -> None:
    """Weights of the head from a normal of width 0.02, biases 0: equal for every transformers version."""
    missing = set(info["missing_keys"]) | {str(key[0]) for key in info.get("mismatched_keys", ())}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing:
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
                else:
                    parameter.zero_()


def _resize_positions(model: nn.Module, image_size: int) -> None:
    """Interpolate the position embeddings once, as Dinov2 would in each forward pass at this size."""
    embeddings: Any = model.get_submodule("dinov2.embeddings" if hasattr(model, "dinov2") else "embeddings")
    table_1ND = embeddings.position_embeddings.detach()
    cls_11D, grid_1ND = table_1ND[:, :1], table_1ND[:, 1:]
    side, new_side = round(grid_1ND.shape[1] ** 0.5), image_size // PATCH
    grid_1DHW = grid_1ND.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=(new_side, new_side), mode="bicubic", align_corners=False)
    table_1ND = torch.cat([cls_11D, grid_1DHW.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(table_1ND.contiguous())
    patches = embeddings.patch_embeddings
    patches.image_size, patches.num_patches = (image_size, image_size), new_side**2
    model.config.image_size = image_size  # type: ignore[union-attr]


def check_image_size(entry: Entry, size: Any) -> None:
    """ValueError unless whole patches (`vit-s`), or enough pixels for five halvings, fit."""
    step, least = (PATCH, PATCH) if entry.name == "vit-s" else (1, 32)
    if not isinstance(size, int) or isinstance(size, bool) or size < least or size % step:
        near = max(least, round(size / step) * step) if isinstance(size, (int, float)) else 84
        raise ValueError(f"image_size={size!r} must be a multiple of {step}, at least {least}; try {near}")


def build_processor(entry: Entry, folder: Path, options: dict[str, Any]):
    """The image processor (PIL, no torchvision) or tokenizer; see `serpette.zoo.load_processor`."""
    import transformers as hf

    if "image_size" not in entry.options:
        with quiet_transformers():
            tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    size = options["image_size"]
    return image_processor(size, **(IMAGENET if entry.name == "vit-s" else LITE))


def image_processor(size: int, image_mean: list[float], image_std: list[float]):
    """Greyscale to RGB, resize to (size, size) bicubic, scale to [0, 1], normalise; no crop."""
    import transformers as hf

    cls = getattr(hf, "BitImageProcessorPil", None) or hf.BitImageProcessor
    return cls(
        size={"height": size, "width": size},
        resample=3,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=image_mean,
        image_std=image_std,
    )
