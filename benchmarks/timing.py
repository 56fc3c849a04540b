"""Times that can be trusted on a shared machine: interleaved pairs, processor beside clock, kept on disk."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from serpette import zoo
from serpette.cost import versions
from serpette.data.examples import Examples
from serpette.files import write_json

console = Console()


class Decoded(torch.utils.data.Dataset):
    """Images decoded once: rows of `pixel_values` and `labels`, for pure compute."""

    def __init__(self, entry: str, images: int, image_size: int):
        self.encoded = zoo.load_dataset("fashion-mnist", limit=images)
        self.processor = zoo.load_processor(entry, image_size=image_size)
        _, inputs, self.targets, _ = Examples(self.encoded, processing_class=self.processor).read(
            range(images)
        )
        self.pixel_values = inputs["pixel_values"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[i], "labels": self.targets[i]}


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}, result


def interleaved(
    a: Callable[[], Any], b: Callable[[], Any], keep: Callable[[int], Path], pairs: int
) -> dict[str, Any]:
    """Ratios a / b of `pairs` pairs; a pair that was taken before is read from its file `keep(number)`."""
    taken = []
    for number in range(pairs):
        file = keep(number)
        if not file.exists():
            first, second = (a, b) if number % 2 == 0 else (b, a)
            one, two = timed(first)[0], timed(second)[0]
            write_json(file, dict(zip("ab" if number % 2 == 0 else "ba", (one, two), strict=True)))
        taken.append(json.loads(file.read_text()))
        console.print(
            f"  {file.stem}: {ratio(taken[-1:], 'clock')['median']:.3f} by the clock", highlight=False
        )
    return {kind: ratio(taken, kind) for kind in ("clock", "processor")} | {"pairs": taken}


def ratio(pairs: list[dict], kind: str) -> dict[str, float]:
    ratios = [pair["a"][kind] / pair["b"][kind] for pair in pairs]
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "a_seconds": statistics.median(p["a"][kind] for p in pairs),
        "b_seconds": statistics.median(p["b"][kind] for p in pairs),
    }


def run_parts(
    name: str,
    parts: dict[str, Callable[[Path, bool], dict]],
    out: Path,
    args: list[str],
    facts: dict,
    kept: str = "",
) -> None:
    """Runs the `parts` that `args` name, or all, and writes each to `result.json` as soon as it is done."""
    quick, wanted = "--quick" in args, [a for a in args if not a.startswith("--")]
    if unknown := [a for a in wanted if a not in parts]:
        raise ValueError(f"unknown part {unknown[0]!r}; known: {', '.join(parts)}")
    torch.set_num_threads(1)
    folder = zoo.cache_dir() / "benchmarks" / f"{kept or name}{'-quick' if quick else ''}"
    if "--fresh" in args:
        for file in folder.glob("*.json"):
            file.unlink()
    file = folder / "result.json" if quick else out / "result.json"
    for number, part in enumerate(wanted or parts):
        console.print(f"[{number + 1}/{len(wanted or parts)}] {part}", markup=False)
        found = parts[part](folder, quick)
        result = json.loads(file.read_text()) if file.exists() else {"parts": {}}
        result["parts"][part] = found
        result |= {"command": f"serpette bench {name}", "quick": quick, "versions": versions(), **facts}
        write_json(file, result)
    console.print(f"written: {file}")
