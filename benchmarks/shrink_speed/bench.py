"""shrink_speed: latency and size of models with half of their heads and channels, over the whole ones.

    serpette bench shrink_speed [model ...] [--quick]

Both models run in turns, one thread, or on a GPU if there is one; each finished model is kept in the cache of
the zoo. The weights are pruned by magnitude without tuning: only their shapes matter here.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import readme
import tasks

from serpette import prune, shrink, zoo
from serpette.cost import hardware, versions
from serpette.files import write_json
from serpette.weights.measure import compare_cost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 40.0  # for each batch size, both models together
REACH = {"time_ratio": 1 / 1.6, "file_share": 0.55}


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], tuple[int, ...]]]:
    """{name: (maker, inputs of a batch size, batch sizes)}."""

    def texts(tokens: int) -> Callable[[int], Any]:
        return lambda n: {"input_ids": torch.arange(n * tokens, device=DEVICE).view(n, tokens) % 1000}

    return {
        "vit-s, 257 tokens": (
            lambda: zoo.load_model("vit-s", num_labels=10, image_size=224),
            lambda n: {"pixel_values": torch.rand(n, 3, 224, 224, device=DEVICE)},
            (1, 8, 32),
        ),
        "minilm, 128 tokens": (lambda: zoo.load_model("minilm-l6", num_labels=2), texts(128), (1, 8, 32)),
        "smollm2, 128 tokens": (
            lambda: zoo.load_model("smollm2-135m"),
            lambda n: texts(128)(n) | {"use_cache": False},
            (1, 8),
        ),
    }


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Of one model: costs before and after, the share of the pruned part that is left, the difference."""
    make, inputs, sizes = models()[name]
    whole = make().eval().to(DEVICE)
    masked = copy.deepcopy(whole)
    pruner = prune(masked, "magnitude", 0.5, pattern="structured", progress=False)
    small = shrink(masked)
    found = compare_cost(whole, small, inputs, sizes if seconds > 1 else (1,), seconds)
    batch = inputs(2)
    with torch.inference_mode():
        difference = (masked(**batch).logits - small(**batch).logits).abs().max()
    names = [*pruner.masks_]
    weights = [sum(m.get_submodule(n).weight.numel() for n in names) for m in (whole, small)]  # type: ignore
    return found | {
        "pruned_part": {"weights_before": weights[0], "weights_after": weights[1]},
        "greatest_difference_to_masked": float(difference),
        "stock": small.shrunk["stock"],  # type: ignore[index]
    }


def main(out: Path, args: list[str]) -> None:
    quick, wanted = "--quick" in args, [a for a in args if not a.startswith("--")]
    torch.set_num_threads(1)
    folder, found = tasks.cache() / f"shrink_speed-{DEVICE.type}", {}
    for name in models():
        if wanted and not any(name.startswith(w) for w in wanted):
            continue
        file = folder / f"{name.split(',')[0]}.json"
        if quick or not file.exists():
            entry = measure(name, 0.1 if quick else SECONDS)
            if quick:
                print(name, entry["speed"], entry["pruned_part"], entry["greatest_difference_to_masked"])
                continue
            write_json(file, entry)
        found[name] = json.loads(file.read_text())
    if quick:
        return
    result = {
        "benchmark": "shrink_speed",
        "command": "serpette bench shrink_speed",
        "versions": versions(),
        "hardware": hardware(DEVICE),
        "threads": 1,
        "reach": REACH,
        "models": found,
    }
    write_json(out / "result.json", json.loads(json.dumps(result), parse_float=tasks.four_digits))
    head = ("model", "batch", "seconds before", "after", "times faster", "FLOPs", "pruned part", "file")
    text = readme.table(head, [line for name, entry in found.items() for line in lines(name, entry)])
    print(text)
    readme.fill(out / "README.md", table=text)


def lines(name: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of the table, one a batch size."""
    before, after, part = entry["before"], entry["after"], entry["pruned_part"]
    rows = []
    for size, speed in entry["speed"].items():
        low, high = speed["interval"]
        rows.append(
            (
                name,
                size,
                f"{before['latency_seconds'][size]:.3f}",
                f"{after['latency_seconds'][size]:.3f}",
                f"{1 / speed['time_ratio']:.2f} [{1 / high:.2f}, {1 / low:.2f}]",
                f"{after['flops_per_example'] / before['flops_per_example']:.2f}",
                f"{part['weights_after'] / part['weights_before']:.2f}",
                f"{after['file_bytes'] / before['file_bytes']:.2f}",
            )
        )
    return rows
