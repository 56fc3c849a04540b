"""LoRAPrune's Figure 3 in shape: 50 to 95 % of the weights cut, by LoRA's gradients or by their own.

`serpette bench loraprune_figure3` goes on where it stopped and shares its cells with `loraprune_table`;
`--report` only reads what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import pruned
import readme
import tasks

from serpette.cost import hardware, versions
from serpette.files import write_json

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
METHODS = ("lora_prune", "original_gradient", "map_lora")
ARMS = tuple(f"{method}@{sparsity:g}" for sparsity in SPARSITIES for method in METHODS)
NAMES = {"fashion-vit": "ViT, Fashion-MNIST", "movies-minilm": "MiniLM, movie snippets"}
HEAD = ("sparsity", "LoRA's gradients", "the weights' gradients", "magnitude", "LoRA's to the weights'")


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing and writes `result.json`, the README's tables and the figure."""
    parser = argparse.ArgumentParser("serpette bench loraprune_figure3")
    parser.add_argument("--report", action="store_true", help="the figure of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tasks.cache() / "loraprune"
    if not chosen.report:
        rates = [(name, folder) for name in pruned.MODELS]
        tasks.in_parallel(pruned.choose_rates, rates, chosen.workers, "learning rates")
        tasks.in_parallel(pruned.run, pruned.jobs(folder, ARMS), chosen.workers, "seeds")
    rows = pruned.table(folder, ARMS, {"vs_original": pruned.at("original_gradient")})
    result = {
        "benchmark": "loraprune_figure3",
        "command": "serpette bench loraprune_figure3",
        "versions": versions(),
        "hardware": hardware(),
        "settings": pruned.FACTS | {"learning_rates": pruned.chosen_rates(folder)},
        "rows": rows,
    }
    write_json(out / "result.json", json.loads(json.dumps(result), parse_float=tasks.four_digits))
    parts = [
        f"**{NAMES[name]}**\n\n{readme.table(HEAD, [line(name, s, rows) for s in SPARSITIES])}\n"
        for name in pruned.MODELS
    ]
    print("\n".join(parts))
    readme.fill(out / "README.md", tables="\n".join(parts))
    picture(out, rows)


def of(rows: list[dict[str, Any]], name: str, method: str, sparsity: float) -> dict[str, Any] | None:
    """The row of an arm, if its seeds are there."""
    arm = f"{method}@{sparsity:g}"
    return next((row for row in rows if (row["model"], row["arm"]) == (name, arm)), None)


def line(name: str, sparsity: float, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of a table."""
    found = [of(rows, name, method, sparsity) for method in METHODS]
    cells = [
        "" if r is None else "{:.1f} [{:.1f}, {:.1f}]".format(r["accuracy"], *r["interval"]) for r in found
    ]
    mine = found[0]
    return f"{sparsity:.0%}", *cells, readme.interval(mine.get("vs_original") if mine else None)


def picture(out: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over sparsity, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(pruned.MODELS), figsize=(9, 3.6), layout="constrained")
    labels = dict(zip(METHODS, HEAD[1:4], strict=True))
    for ax, name in zip(axes, pruned.MODELS, strict=True):
        for method, colour in zip(METHODS, ("#2a6f97", "#c8553d", "#555555"), strict=True):
            found = [(100 * s, r) for s in SPARSITIES if (r := of(rows, name, method, s)) is not None]
            if not found:
                continue
            x = [s for s, _ in found]
            ax.plot(x, [r["accuracy"] for _, r in found], "o-", color=colour, ms=4, label=labels[method])
            low, high = zip(*(r["interval"] for _, r in found), strict=True)
            ax.fill_between(x, low, high, color=colour, alpha=0.12)
        ax.set_xlabel("weights cut, %")
        ax.set_title(NAMES[name], fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8)
    fig.savefig(out / "accuracy.svg", metadata={"Date": None})
    plt.close(fig)
