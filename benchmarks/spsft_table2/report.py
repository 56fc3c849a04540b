"""From cells to tables: means over the seeds, differences paired seed by seed, cost, a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cells
import numpy as np
import readme
from rich.console import Console
from rich.table import Table

from serpette.evaluate import paired_over_seeds, seeds_interval

# SPSFT, Tables 2 and 4, 5 epochs on CIFAR-100: accuracy
PAPER = {
    "DeiT": {
        "full": 90.18, "head": 80.25,
        "rows/magnitude": 88.05, "rows/taylor": 88.70, "rows/qm_taylor": 89.37,
    },
    "ViT": {"full": 90.13, "head": 74.78, "rows/taylor": 88.13},
    "ResNet101": {"full": 86.21, "head": 60.78, "rows/taylor": 82.36},
    "ResNeXt101": {"full": 87.30, "head": 65.07, "rows/taylor": 85.94},
}  # fmt: skip
CONTROLS = {"vs_full": "full", "vs_head": "head", "vs_lora": "lora", "vs_random_rows": "rows/random"}
NAMES = {"fashion-vit": "ViT, Fashion-MNIST", "fashion-effnet": "EfficientNet-lite0, Fashion-MNIST"}
NAMES["movies-minilm"] = "MiniLM, movie snippets"


def collect(folder: Path, seeds: int) -> dict[str, Any]:
    """Every table; an arm whose seeds are not all there is left out."""
    rows, rates = [], {}
    for name in cells.SETTINGS:
        files = [cells.cell_file(folder, name, seed) for seed in range(seeds)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if len(found) < seeds:
            continue
        rates[name] = json.loads(cells.rate_file(folder, name).read_text())
        complete = {a: [f[a] for f in found] for a in cells.arms(name) if all(a in f for f in found)}
        rows += [_row(name, arm, complete) for arm in complete]
    compared = [row for row in rows if "vs_random_rows" in row]
    return {
        "settings": cells.FACTS | {"learning_rates": rates},
        "comparisons_with_random_rows": len(compared),
        "above_random_rows": sum(row["vs_random_rows"][1] > 0 for row in compared),
        "below_random_rows": sum(row["vs_random_rows"][2] < 0 for row in compared),
        "paper": PAPER,
        "rows": rows,
    }


def _row(name: str, arm: str, complete: dict[str, list[dict]]) -> dict[str, Any]:
    found = complete[arm]
    accuracy = _percent(found)
    row: dict[str, Any] = {
        "task": name,
        "arm": arm,
        "accuracy": float(accuracy.mean()),
        "interval": list(seeds_interval(accuracy)[1:]) if len(found) > 1 else None,
        "worst_class": float(_percent(found, "worst_class").mean()),
        "loss": float(np.mean([cell["loss"] for cell in found])),
        "trained": found[0]["trained"],
        "trained_share": found[0]["trained"] / found[0]["parameters"],
        "seconds": float(np.median([cell["seconds"] for cell in found])),
        "ranking_seconds": float(np.median([cell["ranking_seconds"] for cell in found])),
    }
    for key, control in CONTROLS.items():
        belongs = arm.startswith("rows/") if key == "vs_random_rows" else True
        if control in complete and control != arm and belongs and len(found) > 1:
            row[key] = list(paired_over_seeds(accuracy, _percent(complete[control])))
    return row


def _percent(found: list[dict], what: str = "accuracy") -> np.ndarray:
    return 100 * np.array([cell[what] for cell in found])


HEAD = (
    "arm",
    "accuracy",
    "worst class",
    "to full",
    "to LoRA",
    "to random rows",
    "trained",
    "seconds + ranking",
)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    low_high = "" if row["interval"] is None else f" [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]"
    return (
        row["arm"],
        f"{row['accuracy']:.1f}{low_high}",
        f"{row['worst_class']:.1f}",
        *(readme.interval(row.get(key)) for key in ("vs_full", "vs_lora", "vs_random_rows")),
        f"{row['trained']:,} ({row['trained_share']:.1%})",
        f"{row['seconds']:.1f} + {row['ranking_seconds']:.1f}",
    )


def show(console: Console, table: dict[str, Any]) -> None:
    """The tables in the terminal."""
    for name in cells.SETTINGS:
        printed = Table(*HEAD, title=NAMES[name])
        for row in table["rows"]:
            if row["task"] == name:
                printed.add_row(*_line(row))
        if printed.row_count:
            console.print(printed)


def write_readme(file: Path, table: dict[str, Any]) -> None:
    """Fills the README's tables."""
    parts = []
    for name in cells.SETTINGS:
        lines = [_line(row) for row in table["rows"] if row["task"] == name]
        if lines:
            parts.append(f"**{NAMES[name]}**\n\n{readme.table(HEAD, lines)}\n")
    count = (
        f"{table['comparisons_with_random_rows']} choices of rows are compared with random rows: "
        f"{table['above_random_rows']} are above, {table['below_random_rows']} below, by 95 % intervals."
    )
    readme.fill(file, tables="\n".join(parts), count=count)


def picture(out: Path, table: dict[str, Any]) -> None:
    """Accuracy of each arm with its interval, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in cells.SETTINGS if any(row["task"] == name for row in table["rows"])]
    if not names:
        return
    fig, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 4.4), layout="constrained")
    for ax, name in zip(np.atleast_1d(axes), names, strict=True):
        rows = [row for row in table["rows"] if row["task"] == name][::-1]
        for i, row in enumerate(rows):
            low, high = row["interval"]
            colour = {"rows": "#2a6f97", "lora": "#c8553d"}.get(cells.family(row["arm"]), "#555555")
            ax.plot([low, high], [i, i], color=colour, lw=1.5)
            ax.plot(row["accuracy"], i, "o", color=colour, ms=5)
        ax.set_yticks(range(len(rows)), [row["arm"].replace("_", " ") for row in rows], fontsize=8)
        ax.set_xlabel("test accuracy, %")
        ax.set_title(NAMES[name], fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    fig.savefig(out / "accuracy.svg", metadata={"Date": None})
    plt.close(fig)
