"""LoRAPrune's accuracy tables in shape: ways to prune while tuning, at 50 and 90 %, beside unpruned tuning.

`serpette bench loraprune_table` goes on where it stopped; `--quick` is a smoke run, `--report` only reads
what is there. Activations and cells lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import language
import numpy as np
import pruned
import readme
import tasks
from rich.console import Console
from rich.table import Table

from serpette.cost import hardware, versions
from serpette.files import write_json

METHODS = (
    "map", "mvp", "rap", "map_lora", "pst", "lora_prune", "lora_prune_exact", "lora_prune_seq",
    "original_gradient",
)  # fmt: skip
STRUCTURED = ("rap", "map_lora", "lora_prune", "taylor_once")
HALF = tuple(f"{m}@0.5" for m in METHODS)
MOST = tuple(f"{m}@0.9" for m in METHODS if m != "lora_prune_exact")
UNITS = tuple(f"structured/{m}@0.5" for m in STRUCTURED)
ARMS = (*pruned.UNPRUNED, *HALF, *MOST, *UNITS)
ORDER = (("lora", *HALF[:1], *HALF[2:4], *HALF[5:6]), UNITS, HALF, pruned.UNPRUNED, MOST)
CONTROLS = {
    "vs_lora": lambda arm: "lora",
    "vs_map_lora": pruned.at("map_lora"),
    "vs_random": pruned.at("rap"),
}
# Table 1 at 50 %: VTAB-1k and FGVC mean accuracy; Table 2: GLUE at 50 and 90 %
PAPER = {
    "map": (66.3, 84.6, 82.7, 71.4), "mvp": (67.7, 84.9, 82.1, 74.2), "rap": (55.2, 73.1, None, None),
    "map_lora": (70.3, 83.1, None, None), "pst": (69.1, 85.1, 81.0, 75.9),
    "lora_prune": (72.0, 85.4, 82.2, 75.7), "lora_prune_seq": (70.9, 85.7, None, None),
    "full": (69.0, 88.5, 82.0, None), "head": (57.6, 79.3, None, None), "partial1": (60.7, 82.6, None, None),
    "lora": (74.9, 86.0, None, None), "lora16": (75.0, 84.8, None, None),
}  # fmt: skip
NAMES = {"fashion-vit": "ViT, Fashion-MNIST", "movies-minilm": "MiniLM, movie snippets"}
HEAD = (
    "arm", "accuracy", "worst class", "to LoRA", "to magnitude", "to random", "trained", "seconds (pruning)",
)  # fmt: skip


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing, prints the tables and writes `result.json`, a picture and the README's tables."""
    parser = argparse.ArgumentParser("serpette bench loraprune_table")
    parser.add_argument(
        "--quick", action="store_true", help="three arms of one small seed, nothing committed"
    )
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", choices=("classifiers", "language"), help="one of the two parts")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tasks.cache() / ("loraprune-quick" if chosen.quick else "loraprune")
    if chosen.quick:
        pruned.make_small()
        rates = {kind: rates[1] for kind, rates in pruned.RATES.items()}
        for arm in ("lora", "lora_prune@0.5", "structured/lora_prune@0.5"):
            print(arm, pruned.run_arm("movies-minilm", arm, 0, rates))
        return
    if not chosen.report and chosen.only != "language":
        rates = [(name, folder) for name in pruned.MODELS]
        tasks.in_parallel(pruned.choose_rates, rates, chosen.workers, "learning rates")
        for arms in ORDER:
            tasks.in_parallel(pruned.run, pruned.jobs(folder, arms), chosen.workers, "seeds")
    if not chosen.report and chosen.only != "classifiers":
        tasks.in_parallel(language.run, language.jobs(folder), chosen.workers, "SmolLM2")
    rows = pruned.table(folder, ARMS, CONTROLS)
    texts = language.table(folder)
    compared = [row for row in rows if "vs_map_lora" in row]
    result = {
        "benchmark": "loraprune_table",
        "command": "serpette bench loraprune_table",
        "versions": versions(),
        "hardware": hardware(),
        "settings": pruned.FACTS | {"learning_rates": pruned.chosen_rates(folder)},
        "comparisons_with_magnitude": len(compared),
        "above_magnitude": sum(row["vs_map_lora"][1] > 0 for row in compared),
        "below_magnitude": sum(row["vs_map_lora"][2] < 0 for row in compared),
        "paper": PAPER,
        "rows": rows,
        "language": {"settings": language.FACTS, "rows": texts},
    }
    write_json(out / "result.json", json.loads(json.dumps(result), parse_float=tasks.four_digits))
    show(rows, texts)
    picture(out, rows)
    fill(out / "README.md", result)


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a classifier's row."""
    low, high = row["interval"]
    return (
        row["arm"],
        f"{row['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
        f"{row['worst_class']:.1f}",
        *(readme.interval(row.get(key)) for key in CONTROLS),
        f"{row['trained_share']:.1%}",
        f"{row['seconds']:.0f} ({row['pruning_seconds']:.1f})",
    )


def show(rows: list[dict[str, Any]], texts: list[dict[str, Any]]) -> None:
    """The tables in the terminal."""
    console = Console()
    for name in pruned.MODELS:
        printed = Table(*HEAD, title=NAMES[name])
        for row in rows:
            if row["model"] == name:
                printed.add_row(*line(row))
        console.print(printed)
    printed = Table(*language.HEAD, title="SmolLM2-135M, structured")
    for row in texts:
        printed.add_row(*language.line(row))
    console.print(printed)


def fill(file: Path, result: dict[str, Any]) -> None:
    """The README's tables."""
    parts = []
    for name in pruned.MODELS:
        lines = [line(row) for row in result["rows"] if row["model"] == name]
        parts.append(f"**{NAMES[name]}**\n\n{readme.table(HEAD, lines)}\n")
    count = (
        f"{result['comparisons_with_magnitude']} prunings are compared with magnitude at the same sparsity: "
        f"{result['above_magnitude']} are above, {result['below_magnitude']} below, by 95 % intervals."
    )
    texts = readme.table(language.HEAD, [language.line(row) for row in result["language"]["rows"]])
    readme.fill(file, tables="\n".join(parts), count=count, language=texts)


def picture(out: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy of each arm with its interval, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(pruned.MODELS), figsize=(11, 7), layout="constrained")
    for ax, name in zip(np.atleast_1d(axes), pruned.MODELS, strict=True):
        mine = [row for row in rows if row["model"] == name][::-1]
        for i, row in enumerate(mine):
            how, _, sparsity = pruned.parse(row["arm"])
            colour = "#555555" if not sparsity else "#c8553d" if how else "#2a6f97"
            ax.plot(row["interval"], [i, i], color=colour, lw=1.5)
            ax.plot(row["accuracy"], i, "o", color=colour, ms=5)
        ax.set_yticks(range(len(mine)), [row["arm"].replace("_", " ") for row in mine], fontsize=8)
        ax.set_xlabel("test accuracy, %")
        ax.set_title(NAMES[name], fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    fig.savefig(out / "accuracy.svg", metadata={"Date": None})
    plt.close(fig)
