"""importance_cost: the Taylor importance of every linear layer from activations, beside weight gradients.

    serpette bench importance_cost [--quick] [--fresh]

Both take one forward and one backward pass over the same batches. From weight gradients: the gradients of all
weights are accumulated over the batches, then w_i . dL/dw_i is summed over each row, as the paper does. From
activations: `serpette.rows.statistics.observe_neurons`. Times are interleaved pairs, in one thread, processor
seconds beside the clock. Memory is of one batch: bytes that the forward pass keeps for the backward pass or
for the importance beyond parameters and inputs, and bytes of weight gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, shared by the benchmarks

import readme
from timing import Decoded, console, interleaved, run_parts

from serpette import zoo
from serpette.cost import hardware
from serpette.rows.statistics import observe_neurons

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 8


def vit(number: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    data = Decoded("vit-s", number, 112)
    labels = torch.tensor(data.targets)
    batches = [
        {"pixel_values": data.pixel_values[rows], "labels": labels[rows]}
        for rows in torch.arange(number).split(BATCH)
    ]
    return zoo.load_model("vit-s", num_labels=10, image_size=112), batches


def minilm(number: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    ids = tokens("minilm-l6", number, 128)
    labels = torch.arange(number) % 2
    batches = [
        {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}
        for rows in torch.arange(number).split(BATCH)
    ]
    return zoo.load_model("minilm-l6", num_labels=2), batches


def smollm2(number: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    ids = tokens("smollm2-135m", number // 4, 256)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    return zoo.load_model("smollm2-135m"), batches


def tokens(model: str, rows: int, width: int) -> Tensor:
    """Movie snippets put together, (rows, width), so that nothing is padded."""
    data, tokenizer = zoo.load_dataset("movie-snippets", limit=2000), zoo.load_processor(model)
    ids = tokenizer(" ".join(data["text"][:]))["input_ids"][: rows * width]
    assert len(ids) == rows * width, "not enough text"
    return torch.tensor(ids).view(rows, width)


MODELS = {
    "ViT-S, 12 layers, 112 px (65 tokens), batch 8": vit,
    "MiniLM, 6 layers, 128 tokens, batch 8": minilm,
    "SmolLM2-135M, 30 layers, 256 tokens, batch 2": smollm2,
}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def from_weights(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """w_i . dL/dw_i of each row, mean over the batches, which are of one size."""
    layers = layers_of(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
        layer.weight.grad = None
    for batch in batches:
        model(**batch).loss.backward()
    found = {
        name: (layer.weight.detach() * layer.weight.grad).sum(1).double() / len(batches)
        for name, layer in layers.items()
    }
    for layer in layers.values():
        layer.weight.grad = None
    _wait()
    return found


def from_activations(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stats = observe_neurons(model, batches, layers_of(model), {"contribution"}, num_classes=0, progress=False)
    _wait()
    return {name: s.contribution[0] for name, s in stats.items()}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Greatest difference, relative to the greatest value of its layer."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def kept_bytes(work: Any, model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of distinct storages that are alive for the backward pass when it begins."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    def hold(module: nn.Module, args: tuple, output: Tensor) -> None:
        pack(output)

    hooks = []
    if work is from_activations:  # it holds the outputs of the layers, whatever autograd saves
        hooks = [layer.register_forward_hook(hold) for layer in layers_of(model).values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        work(model, [batch])
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for address, storage in seen.items() if address not in known)


def cost(folder: Path, quick: bool) -> dict[str, Any]:
    found = {}
    for name, make in MODELS.items():
        model, batches = make(BATCH if quick else 2 * BATCH)
        model, slug = model.to(DEVICE).eval(), name.split(",")[0]
        batches = [{k: v.to(DEVICE) for k, v in batch.items()} for batch in batches]
        ours, theirs = from_activations(model, batches), from_weights(model, batches)
        exact = [m(model.double(), [_double(batches[0])]) for m in (from_activations, from_weights)]
        model.float()
        times = interleaved(
            lambda m=model, b=batches: from_activations(m, b),
            lambda m=model, b=batches: from_weights(m, b),
            lambda i, s=slug: folder / f"{s}-{i}.json",
            1 if quick else 3,
        )
        gradients = sum(layer.weight.numel() * 4 for layer in layers_of(model).values())
        found[name] = {
            "activations_over_weights": times,
            "kept_bytes_from_activations": kept_bytes(from_activations, model, batches[0]),
            "kept_bytes_from_weights": kept_bytes(from_weights, model, batches[0]),
            "gradient_bytes_from_weights": gradients,
            "difference_float32": difference(ours, theirs),
            "difference_float64": difference(*exact),
        }
        console.print(f"  {slug}: {found[name]['difference_float64']:.1e}", highlight=False)
    return found


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def main(out: Path, args: list[str]) -> None:
    facts = {"batch_size": BATCH, "seed": 0, "hardware": hardware(DEVICE)}
    run_parts("importance_cost", {"cost": cost}, out, args, facts, f"importance_cost-{DEVICE.type}")
    if "--quick" not in args:
        found = json.loads((out / "result.json").read_text())["parts"]["cost"]
        readme.fill(out / "README.md", cost=_table(found))


def _table(found: dict[str, Any]) -> str:
    kind = "processor" if DEVICE.type == "cpu" else "clock"
    lines = []
    for name, row in found.items():
        ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**row["activations_over_weights"][kind])
        parts = ("kept_bytes_from_activations", "kept_bytes_from_weights", "gradient_bytes_from_weights")
        memory = (f"{row[part] / 2**20:.0f}" for part in parts)
        same = f"{row['difference_float64']:.1e} ({row['difference_float32']:.1e})"
        lines.append((name, ratio, *memory, same))
    head = (
        "model", "time, activations / weights", "kept for backward, activations", "kept, weights",
        "weight gradients on top", "greatest difference, float64 (float32)",
    )  # fmt: skip
    return readme.table(head, lines)
