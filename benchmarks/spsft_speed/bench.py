"""spsft_speed: a step with trained rows over the same step with LoRA, and one layer over the frozen layer.

    serpette bench spsft_speed [part ...] [--quick] [--fresh]

Times are taken in interleaved pairs (A B, B A, A B ...), one thread, as processor seconds beside the clock;
each finished piece is kept in the cache of the zoo, and a stopped run goes on from it. With a GPU the work is
done there, at more tokens, and the clock counts.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, shared by the benchmarks

import readme
from timing import Decoded, interleaved, run_parts

from serpette import zoo
from serpette.cost import hardware
from serpette.data.features import find_head
from serpette.rows import RowConfig
from serpette.tuning import trainable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = 5
SHAPES = {"768x768": (768, 768, 1576), "1024x2752": (1024, 2752, 1024)}  # inputs, outputs, tokens
LORA_RANK = 16
# processor time of a linear layer over the frozen one, from an earlier measurement of the same forms
EARLIER = {"dense": 1.51, "lora": (1.20, 1.14), "lora_dropout": (1.49, 1.18), "rows": (1.10, 1.09)}
EARLIER |= {"live": (1.05, 1.04), "columns": (1.06, 1.04)}


class Wrapped(nn.Module):
    """A layer with a name that peft can target."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def matched_rows(inputs: int, outputs: int, rank: int, side: str) -> int:
    """Rows or columns with as many weights as a LoRA of `rank`."""
    return rank * (inputs + outputs) // (inputs if side == "rows" else outputs)


def layers(shape: str) -> dict[str, nn.Module]:
    """One linear layer with each kind of training, at about equal numbers of weights."""
    inputs, outputs, _ = SHAPES[shape]
    rank = LORA_RANK
    torch.manual_seed(0)
    frozen = Wrapped(nn.Linear(inputs, outputs)).requires_grad_(False)

    def adapted(config: Any) -> nn.Module:
        model = get_peft_model(copy.deepcopy(frozen), config)  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.01)
        return model

    def rows(side: str, **more: Any) -> nn.Module:
        r = matched_rows(inputs, outputs, rank, side)
        return adapted(RowConfig(r=r, modes=side, target_modules=["layer"], **more))

    found = {
        "frozen": frozen,
        "dense": copy.deepcopy(frozen).requires_grad_(True),
        "lora": adapted(LoraConfig(r=rank, target_modules=["layer"])),
        "lora_dropout": adapted(LoraConfig(r=rank, lora_dropout=0.1, target_modules=["layer"])),
        "rows": rows("rows"),
        "live": rows("rows", kernel="live"),
        "columns": rows("columns"),
    }
    return {name: model.to(DEVICE).train() for name, model in found.items()}


def layer(folder: Path, quick: bool) -> dict:
    """Forward, gradient of the input and of what trains: each kind over the frozen layer."""
    table = {}
    for shape, (inputs, outputs, tokens) in SHAPES.items():
        models = layers(shape)
        x = torch.randn(tokens, inputs, device=DEVICE, requires_grad=True)
        g = torch.randn(tokens, outputs, device=DEVICE)
        repeats = 2 if quick else 30 if DEVICE.type == "cpu" else 300

        def work(
            model: nn.Module, x: Tensor = x, g: Tensor = g, repeats: int = repeats
        ) -> Callable[[], None]:
            def steps() -> None:
                for _ in range(repeats):
                    model.zero_grad(set_to_none=True)
                    x.grad = None
                    model(x).backward(g)
                _wait()

            return steps

        table[shape] = {"weights": {n: _trained(m) for n, m in models.items()}}
        for name, model in models.items():
            if name != "frozen":
                file = folder / f"layer-{shape}-{name}-{{}}.json"
                table[shape][name] = _pairs(work(model), work(models["frozen"]), file, quick)
    return {"shapes": SHAPES, "lora_rank": LORA_RANK, "over_frozen": table, "earlier": EARLIER}


def models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """{name: (maker of the model, a batch of it)}."""
    pixels = Decoded("vit-s", 16, 224)
    ids = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    return {
        "vit-s, 257 tokens": (
            lambda: zoo.load_model("vit-s", num_labels=10, layers=4, image_size=224),
            {"pixel_values": pixels.pixel_values, "labels": torch.tensor(pixels.targets)},
        ),
        "minilm, 128 tokens": (
            lambda: zoo.load_model("minilm-l6", num_labels=2),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2},
        ),
        "smollm2, 256 tokens": (
            lambda: zoo.load_model("smollm2-135m"),
            {"input_ids": ids.view(4, 256)[:2], "labels": ids.view(4, 256)[:2]},
        ),
    }


KINDS: dict[str, dict[str, Any]] = {
    "lora_dropout": {"method": "lora", "rank": 16, "dropout": 0.1},
    "dora": {"method": "dora", "rank": 16},
    "shira": {"method": "shira", "rank": 16},
    "rows": {"method": "rows"},
    "live": {"method": "rows", "kernel": "live"},
    "columns": {"method": "rows", "modes": "columns"},
    "full": {"method": "full"},
}


def model(folder: Path, quick: bool) -> dict:
    """Forward, backward and AdamW of whole models: each kind over LoRA with dropout 0 and rank 16."""
    table: dict[str, Any] = {}
    for name, (make, batch) in models().items():
        batch = {k: v.to(DEVICE) for k, v in batch.items()}
        lora = _tuned(make, {"method": "lora", "rank": 16})
        table[name] = {"weights": {"lora": _trained(lora)}}
        for kind, options in KINDS.items():
            if options["method"] == "rows":
                share = _trained(lora) / sum(
                    m.weight.numel() for m in _linears(make()) if m.weight.requires_grad
                )
                options = options | {"fraction": share}
            other = _tuned(make, options)
            table[name]["weights"][kind] = _trained(other)
            short = name.split(",")[0]
            file = folder / f"model-{short}-{kind}-{{}}.json"
            table[name][kind] = _pairs(_step(other, batch), _step(lora, batch), file, quick)
    return {"over_lora": table}


def _linears(model: Any) -> list[nn.Linear]:
    head = (
        find_head(model) if getattr(model, "classifier", None) is not None else model.get_output_embeddings()
    )
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _tuned(make: Callable[[], nn.Module], options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    found = make()
    head = find_head(found) if getattr(found, "classifier", None) is not None else None
    return trainable(found, head, **options).to(DEVICE).train()


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        _wait()

    return step


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _pairs(a: Callable[[], None], b: Callable[[], None], file: Path, quick: bool) -> dict[str, Any]:
    a(), b()  # the first call allocates
    found = interleaved(a, b, lambda i: file.with_name(file.name.format(i)), 1 if quick else PAIRS)
    return {kind: found[kind] for kind in ("clock", "processor")}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


PARTS = {"layer": layer, "model": model}


def main(out: Path, args: list[str]) -> None:
    run_parts("spsft_speed", PARTS, out, args, {"hardware": hardware(DEVICE)}, f"spsft_speed-{DEVICE.type}")
    if "--quick" not in args:
        parts = json.loads((out / "result.json").read_text())["parts"]
        found = {name: TABLES[name](part) for name, part in parts.items()}
        readme.fill(out / "README.md", **found)


def _cell(entry: dict[str, Any] | None) -> str:
    kind = "processor" if DEVICE.type == "cpu" else "clock"
    return "" if entry is None else "{median:.2f} ({least:.2f} to {most:.2f})".format(**entry[kind])


def _layer_table(part: dict[str, Any]) -> str:
    shapes = part["over_frozen"]
    kinds = [k for k in next(iter(shapes.values())) if k != "weights"]
    lines = [(kind, *(_cell(shapes[s].get(kind)) for s in shapes)) for kind in kinds]
    return readme.table(("what trains", *shapes), lines)


def _model_table(part: dict[str, Any]) -> str:
    names = part["over_lora"]
    cells = [
        (kind, *(f"{_cell(names[n].get(kind))}, {names[n]['weights'][kind]:,}" for n in names))
        for kind in KINDS
    ]
    return readme.table(("what trains", *names), cells)


TABLES = {"layer": _layer_table, "model": _model_table}
