"""loraprune_speed: a step that prunes over the same step with plain LoRA, in time and in what autograd keeps.

    serpette bench loraprune_speed [part ...] [--quick] [--fresh]

Times are taken in interleaved pairs (A B, B A, A B ...), one thread, as processor seconds beside the clock;
each finished piece is kept in the cache of the zoo, and a stopped run goes on from it. With a GPU the work is
done there, at more tokens, and the clock counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, shared by the benchmarks

import readme
from timing import Decoded, interleaved, run_parts

from serpette import zoo
from serpette.cost import hardware
from serpette.data.features import find_head
from serpette.memory import saved_bytes
from serpette.tuning import trainable
from serpette.weights import PruneConfig, Pruner, attach
from serpette.weights.masked import MaskedLoraLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS, RANK = 5, 8
# what a step does beside LoRA's own -> settings of the Pruner
KINDS: dict[str, dict[str, Any]] = {
    "ste": {},
    "cv": {"mask_grad": "cv"},
    "exact": {"mask_grad": "exact"},
    "naive": {},
    "ste, scored": {},
    "original gradient, scored": {"importance": "original_gradient", "mask_grad": "exact"},
    "structured, masked": {"pattern": "structured"},
    "structured, shrunk": {"pattern": "structured", "shrink": True},
}
HEAD = ("a step", "vit-s", "minilm", "smollm2")


class Naive(MaskedLoraLinear):
    """The masked product left to autograd."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = self.factors()
        weight = self.frozen() + self.scale * (B @ A)
        assert self.cut is not None
        return linear(x, weight * ~self.cut, self.get_base_layer().bias)


def models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """{name: (maker of the model, a batch)}: 1,542, 1,536 and 1,536 tokens; on a GPU eight times more."""
    more = 8 if DEVICE.type == "cuda" else 1
    pixels = Decoded("vit-s", 6 * more, 224)
    ids = torch.randint(0, 1000, (12 * more, 128), generator=torch.Generator().manual_seed(0))
    return {
        "vit-s": (
            lambda: zoo.load_model("vit-s", num_labels=10, layers=4, image_size=224),
            {"pixel_values": pixels.pixel_values, "labels": torch.tensor(pixels.targets)},
        ),
        "minilm": (
            lambda: zoo.load_model("minilm-l6", num_labels=2),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(12 * more) % 2},
        ),
        "smollm2": (
            _smollm2,
            {"input_ids": ids.view(-1, 256), "labels": ids.view(-1, 256)},
        ),
    }


def _smollm2() -> nn.Module:
    """The first 8 of its 30 blocks."""
    found: Any = zoo.load_model("smollm2-135m")
    found.model.layers = found.model.layers[:8]
    found.config.num_hidden_layers = 8
    return found


def lora(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with LoRA on all linear layers but the head; B is not zero."""
    torch.manual_seed(0)
    found = make()
    head = find_head(found) if getattr(found, "classifier", None) is not None else None
    found = trainable(found, head, "lora", rank=RANK, alpha=2 * RANK).to(DEVICE).train()
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return found


def half_pruned(kind: str, make: Callable[[], nn.Module]) -> tuple[nn.Module, Pruner, Any]:
    """The model with half of its weights or units cut, in the midst of a training."""
    model, settings = lora(make), {"importance": "lora_prune", **KINDS[kind]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6, fused=True)
    pruner = attach(model, PruneConfig(sparsity=0.5, **settings), 1000, optimizer)
    method, pruner.method = pruner.method, PruneConfig("magnitude", 0.5).method()
    pruner.cut(0.5)
    pruner.method = method
    if settings.get("shrink"):
        pruner._shrink()
    for layer in pruner.layers:
        layer.collect("original" in kind)
        if kind == "naive":
            layer.module.__class__ = Naive
    return model, pruner, optimizer


def model(folder: Path, quick: bool) -> dict:
    """Forward, backward and AdamW of whole models, half of whose weights are cut, over plain LoRA."""
    table: dict[str, Any] = {}
    for name, (make, batch) in models().items():
        batch = {k: v.to(DEVICE) for k, v in batch.items()}
        plain = lora(make)
        optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-6, fused=True)
        kept = {"lora": saved_bytes(plain, batch)}
        table[name] = {"saved_bytes": kept}
        for kind in KINDS:
            other, pruner, its = half_pruned(kind, make)
            kept[kind] = saved_bytes(other, batch)
            scored = pruner if "scored" in kind else None
            file = folder / f"{name}-{kind.replace(', ', '-').replace(' ', '_')}-{{}}.json"
            a, b = _step(other, its, batch, scored), _step(plain, optimizer, batch, None)
            table[name][kind] = _pairs(a, b, file, quick)
    return {"over_lora": table, "rank": RANK, "sparsity": 0.5}


def _step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor], pruner: Pruner | None):
    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if pruner is not None:
            pruner.score()
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def _pairs(a: Callable[[], None], b: Callable[[], None], file: Path, quick: bool) -> dict[str, Any]:
    a(), b()  # the first call allocates
    found = interleaved(a, b, lambda i: file.with_name(file.name.format(i)), 1 if quick else PAIRS)
    return {kind: found[kind] for kind in ("clock", "processor")}


PARTS = {"model": model}


def main(out: Path, args: list[str]) -> None:
    run_parts(
        "loraprune_speed", PARTS, out, args, {"hardware": hardware(DEVICE)}, f"loraprune_speed-{DEVICE.type}"
    )
    if "--quick" not in args:
        found = json.loads((out / "result.json").read_text())["parts"]["model"]["over_lora"]
        readme.fill(out / "README.md", model=_table(found, _cell), memory=_table(found, _bytes))


def _table(found: dict[str, Any], cell: Callable[[dict[str, Any], str], str]) -> str:
    return readme.table(HEAD, [(kind, *(cell(found[name], kind) for name in found)) for kind in KINDS])


def _cell(entry: dict[str, Any], kind: str) -> str:
    time = "processor" if DEVICE.type == "cpu" else "clock"
    return "{median:.2f} ({least:.2f} to {most:.2f})".format(**entry[kind][time])


def _bytes(entry: dict[str, Any], kind: str) -> str:
    kept = entry["saved_bytes"]
    return f"{kept[kind] / kept['lora']:.3f} of {kept['lora'] / 2**20:.0f} MiB"
