"""From cells to tables: means over the seeds, differences paired seed by seed, costs, pictures.

Seconds are medians: the first scores of a process pay for its imports.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import numpy as np
import readme
from rich.console import Console
from rich.table import Table

from serpette.evaluate import paired_over_seeds, seeds_interval, spearman

# LoPrune (CVPR 2026), half of the data pruned: accuracy and total seconds, ViT-S
PAPER = {
    "CIFAR-100": {
        "no_pruning": (90.05, 561.1), "random": (88.85, 343.3), "moso+top_hard": (89.25, 893.3),
        "tsa+top_hard/global": (89.59, 371.5),
    },
    "Tiny-ImageNet": {
        "no_pruning": (84.91, 992.1), "random": (83.86, 561.4), "moso+top_hard": (84.17, 2394.3),
        "tsa+top_hard/global": (84.78, 622.1),
    },
}  # fmt: skip
CONTROLS = {"vs_random": "random", "vs_stratified": "stratified_random", "vs_equal": "equal_quotas"}
LOSS_OF = {"tsa+top_hard/global": "loss+top_hard/global", "tsa+top_hard": "loss+top_hard"}
EVERY = (*cells.CORE, *cells.OTHERS, *cells.LATER, *cells.SAME_STEPS)


def collect(folder: Path, seeds: int) -> dict[str, Any]:
    """Every table; arms whose seeds are not all there are left out of their task and share."""
    rows = []
    grid: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for task in cells.TASKS:
        for keep in sorted({*cells.KEEPS, 1.0}):
            files = [cells.cell_file(folder, task, keep, seed) for seed in range(seeds)]
            if all(file.exists() for file in files):
                found = [json.loads(file.read_text())["arms"] for file in files]
                arms = [a for a in ("no_pruning", *EVERY) if all(a in f for f in found)]
                grid[task, keep] = {arm: [f[arm] for f in found] for arm in arms}
    for (task, keep), arms in grid.items():
        whole = grid.get((task, 1.0), {}).get("no_pruning")
        rows += [_row(task, keep, arm, arms, whole) for arm in arms]
    methods = [row for row in rows if "+" in row["arm"]]
    each_low = 1 - 0.05 / max(1, len(methods))
    for row in methods:
        arms = grid[row["task"], row["keep"]]
        if "stratified_random" in arms and seeds > 1:
            difference = _difference(arms, row["arm"], "stratified_random", each_low)
            row["sure_after_correction"] = bool(difference[1] > 0 or difference[2] < 0)
    compared = [row for row in methods if row.get("vs_stratified")]
    return {
        "settings": cells.SETTINGS | {"learning_rate": _rates(folder)},
        "comparisons": len(compared),
        "expected_by_chance": round(0.025 * len(compared), 1),  # above; as many below
        "above_stratified": sum(row["vs_stratified"][1] > 0 for row in compared),
        "below_stratified": sum(row["vs_stratified"][2] < 0 for row in compared),
        "scores": _scores(folder, seeds),
        "paper": PAPER,
        "rows": rows,
    }


def _rates(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("rate-*.json"))
    return {file.stem.partition("-")[2]: json.loads(file.read_text()) for file in files}


def _values(found: list[dict], what: str = "accuracy") -> np.ndarray:
    return 100 * np.array([cell[what] for cell in found])


def _difference(arms: dict[str, list[dict]], arm: str, control: str, level: float = 0.95) -> list[float]:
    return list(paired_over_seeds(_values(arms[arm]), _values(arms[control]), level))


def _row(task: str, keep: float, arm: str, arms: dict[str, list[dict]], whole: list[dict] | None) -> dict:
    found = arms[arm]
    seconds, scoring = (np.array([cell[k] for cell in found]) for k in ("seconds", "scoring"))
    row: dict[str, Any] = {
        "task": task,
        "keep": keep,
        "arm": arm,
        "accuracy": float(_values(found).mean()),
        "interval": list(seeds_interval(_values(found))) if len(found) > 1 else None,
        "worst_class": float(_values(found, "worst_class").mean()),
        "wrong_kept": float(_values(found, "wrong_kept").mean()),
        "least_kept_class": float(_values(found, "least_kept_class").mean()),
        "seconds_scoring": float(np.median(scoring)),
        "seconds_training": float(np.median(seconds)),
        "seconds": float(np.median(scoring) + np.median(seconds)),
    }
    if whole:
        row["seconds_of_no_pruning"] = row["seconds"] / float(np.median([cell["seconds"] for cell in whole]))
    if len(found) > 1:
        same = "random/same_steps"
        for name, control in CONTROLS.items():
            control = same if arm.endswith("same_steps") and name == "vs_random" else control
            if control in arms and control != arm and not (arm.endswith("same_steps") and control != same):
                row[name] = _difference(arms, arm, control)
        if LOSS_OF.get(arm) in arms:
            row["vs_loss"] = _difference(arms, arm, LOSS_OF[arm])
        if whole and arm != "no_pruning":
            row["vs_no_pruning"] = list(paired_over_seeds(_values(found), _values(whole)))
    return row


def _scores(folder: Path, seeds: int) -> dict[str, Any]:
    """By task: rank correlation of TSA with the loss, detection of wrong labels, CPU seconds of scoring."""
    tables = {}
    for task in cells.TASKS:
        files = [folder / task.replace("/", "-") / f"scores-seed{seed}.json" for seed in range(seeds)]
        if all(file.exists() for file in files):
            held = [json.loads(file.read_text()) for file in files]
            rho = [spearman(h["scores"]["tsa"], h["scores"]["loss"]) for h in held]
            tables[task] = {
                "spearman_tsa_loss": [float(np.mean(rho)), min(rho), max(rho)],
                "detection_auc": _over_seeds(np.mean, [h["detection_auc"] for h in held]),
                "seconds": _over_seeds(np.median, [h["seconds"] for h in held]),
                "peak_bytes": max(h["peak_bytes"] for h in held),
            }
    return tables


def _over_seeds(mean: Callable, tables: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(mean([table[name] for table in tables])) for name in tables[0]}


def show(console: Console, table: dict[str, Any]) -> None:
    """The tables, on a terminal."""
    for task, keep in dict.fromkeys((row["task"], row["keep"]) for row in table["rows"]):
        grid = Table(
            "arm", "accuracy", "to random", "to stratified", "to the loss", "worst class", "wrong kept",
            "scoring + training s", title=f"{task}, keep {keep:.0%}",
        )  # fmt: skip
        for row in table["rows"]:
            if (row["task"], row["keep"]) == (task, keep):
                grid.add_row(
                    row["arm"],
                    f"{row['accuracy']:.1f}",
                    *(interval(row.get(name)) for name in ("vs_random", "vs_stratified", "vs_loss")),
                    f"{row['worst_class']:.0f}",
                    f"{row['wrong_kept']:.0f} %",
                    f"{row['seconds_scoring']:.1f} + {row['seconds_training']:.1f}",
                )
        console.print(grid)
    for task, held in table["scores"].items():
        mean, low, high = held["spearman_tsa_loss"]
        ranked = ", ".join(
            f"{n} {v:.2f}" for n, v in sorted(held["detection_auc"].items(), key=lambda p: -p[1])
        )
        console.print(f"{task}: Spearman of TSA with the loss {mean:.2f} ({low:.2f} to {high:.2f}); {ranked}")
    console.print(
        f"{table['comparisons']} comparisons with stratified random: {table['above_stratified']} above, "
        f"{table['below_stratified']} below (by chance {table['expected_by_chance']} each)"
    )


def interval(difference: list[float] | None) -> str:
    """`+0.5 [-0.1, +1.1]`, points."""
    if difference is None:
        return ""
    return f"{difference[0]:+.1f} \\[{difference[1]:+.1f}, {difference[2]:+.1f}]"


SHOWN = {
    "random": ("#999999", "s"),
    "stratified_random": ("#222222", "o"),
    "tsa+top_hard/global": ("#c0562f", "v"),
    "loss+top_hard/global": ("#d9a441", "^"),
    "tsa+flex_rand": ("#0b6e4f", "D"),
    "dlc+flex_rand": ("#3b5b92", "P"),
    "moso+top_hard": ("#7a4a8c", "X"),
}


def pictures(out: Path, table: dict[str, Any]) -> None:
    """`accuracy.svg`, against the share kept, and `seconds.svg`, against the CPU seconds in all."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "serpette", "font.size": 9}
    plt.rcParams |= style | {"axes.spines.top": False, "axes.spines.right": False}
    tasks = list(dict.fromkeys(row["task"] for row in table["rows"]))
    for name in ("accuracy", "seconds"):
        figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.8), squeeze=False)
        for ax, task in zip(axes.flat, tasks, strict=False):
            rows = [row for row in table["rows"] if row["task"] == task]
            for number, (arm, (color, marker)) in enumerate(SHOWN.items()):
                own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["keep"])
                if not own:
                    continue
                y = [row["accuracy"] for row in own]
                errors = np.abs(np.array([row["interval"][1:] for row in own]).T - y)
                shift = 0.4 * (number - 3)
                x = [100 * row["keep"] + shift if name == "accuracy" else row["seconds"] for row in own]
                ax.errorbar(x, y, errors, color=color, marker=marker, ms=4, lw=1, elinewidth=0.7, label=arm)
            whole = [row for row in rows if row["arm"] == "no_pruning"]
            for row in whole:
                ax.axhline(row["accuracy"], color="#222222", lw=0.8, ls=":", label="no pruning")
                if name == "seconds":
                    ax.plot(row["seconds"], row["accuracy"], "*", color="#222222", ms=9)
            ax.set(title=task, ylabel="accuracy, %")
            ax.set_xlabel("kept, %" if name == "accuracy" else "CPU seconds: scoring + training")
        axes[0, 0].legend(frameon=False, fontsize=7)
        figure.tight_layout()
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


COSTS = (
    "no_pruning",
    "random",
    "tsa+top_hard/global",
    "loss+top_hard/global",
    "dlc+flex_rand",
    "moso+top_hard",
)
BESIDE_PAPER = {"random": "random", "MoSo": "moso+top_hard", "LoPrune": "tsa+top_hard/global"}
DETECTORS = ("tsa", "loss", "unmasked_loss", "dlc", "el2n", "forgetting", "grand", "moso")


def write_readme(file: Path, table: dict[str, Any]) -> None:
    """Fills the README's tables."""
    row_of = {(row["task"], row["keep"], row["arm"]): row for row in table["rows"]}
    shares = sorted({row["keep"] for row in table["rows"] if row["keep"] < 1})
    found = {"accuracy": "\n\n".join(_accuracy_table(row_of, keep) for keep in shares)}
    found["count"] = _count(table)
    lines = []
    for name, arm in BESIDE_PAPER.items():
        paper = [
            (held[arm][0] - held["no_pruning"][0], held[arm][1] / held["no_pruning"][1])
            for held in PAPER.values()
        ]
        rows = [row_of.get((task, 0.5, arm)) for task in cells.TASKS[:2]]
        ours = [(r["vs_no_pruning"][0], r["seconds_of_no_pruning"]) for r in rows if r]
        lines.append((name, *(f"{points:+.2f}, {share:.0%}" for points, share in paper + ours)))
    head = ("", "CIFAR-100, paper", "Tiny-ImageNet, paper", "Fashion-MNIST clean, here", "wrong labels, here")
    found["paper"] = readme.table(head, lines)
    lines = []
    for arm in COSTS:
        rows = [row_of.get((task, 1.0 if arm == "no_pruning" else 0.5, arm)) for task in cells.TASKS]
        lines.append((arm, *(r and _seconds(r) or "" for r in rows)))
    found["cost"] = readme.table(("keep 50 %", *cells.TASKS), lines)
    lines = []
    for task, held in table["scores"].items():
        areas = (held["detection_auc"].get(name) for name in DETECTORS)
        rho = "{:.2f} ({:.2f} to {:.2f})".format(*held["spearman_tsa_loss"])
        lines.append((task, rho, *("" if area is None else f"{area:.2f}" for area in areas)))
    found["detection"] = readme.table(("task", "Spearman of TSA and the loss", *DETECTORS), lines)
    readme.fill(file, **found)


def _accuracy_table(row_of: dict[tuple, dict[str, Any]], keep: float) -> str:
    whole = [row_of.get((task, 1.0, "no_pruning")) for task in cells.TASKS]
    lines = [("no pruning", *(f"{row['accuracy']:.1f}" if row else "" for row in whole))]
    for arm in EVERY:
        rows = [row_of.get((task, keep, arm)) for task in cells.TASKS]
        if any(rows):
            against = "vs_random" if arm.endswith("same_steps") else "vs_stratified"
            shown = (
                f"{r['accuracy']:.1f} {readme.interval(r.get(against))}".strip() if r else "" for r in rows
            )
            lines.append((arm, *shown))
    return f"Keep {keep:.0%}\n\n{readme.table(('arm', *cells.TASKS), lines)}"


def _count(table: dict[str, Any]) -> str:
    above = [r for r in table["rows"] if "+" in r["arm"] and r.get("vs_stratified", [0, 0])[1] > 0]
    named = "; ".join(
        f"{r['arm']}, {r['task']}, keep {r['keep']:.0%}, {readme.interval(r['vs_stratified'])}"
        + (" (holds after a Bonferroni correction)" if r["sure_after_correction"] else "")
        for r in above
    )
    return (
        f"{table['comparisons']} comparisons with stratified random, so about {table['expected_by_chance']} "
        f"intervals above it and as many below by chance alone; found {table['above_stratified']} above and "
        f"{table['below_stratified']} below. Above: {named or 'none'}. Those not marked do not hold after a "
        "Bonferroni correction."
    )


def _seconds(row: dict[str, Any]) -> str:
    share = row["seconds_of_no_pruning"]
    return f"{row['seconds_scoring']:.1f} + {row['seconds_training']:.1f} ({share:.0%})"
