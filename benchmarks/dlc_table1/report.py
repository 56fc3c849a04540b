"""From cells to tables: means over the seeds, paired differences, and which arms beat the controls."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cells
import numpy as np
from lora import KEEPS as LORA_KEEPS
from lora import lora_file
from rich.console import Console
from rich.table import Table

from serpette.evaluate import paired_over_seeds

# Jiang et al. 2025, table 1: average over 5 data sets and 9 shares kept, fully pre-trained models
PAPER = {
    "random": 59.21,
    "herding_compat+top_hard": 54.31,  # their baselines' herding takes argmax where herding takes argmin
    "k_center+top_hard": 58.34,
    "forgetting+top_hard": 59.15,
    "least_confidence+top_hard": 59.06,
    "entropy+top_hard": 59.14,
    "margin+top_hard": 59.03,
    "contextual_diversity+top_hard": 57.48,
    "grand+top_hard": 56.88,
    "el2n+top_hard": 56.43,
    "ssp+top_hard": 58.63,
    "dlc+flex_rand": 60.45,
}
REFERENCES = {"vs_random": "random", "vs_stratified": "stratified_random", "vs_equal": "equal_quotas"}


def heads(folder: Path, plans: tuple[cells.Plan, ...], seeds: int) -> dict[str, Any]:
    """Every table of the head-only part; tasks and shares whose seeds are not all there are left out."""
    grid: dict[tuple[str, float], list[dict]] = {}
    for plan in plans:
        for keep in plan.keeps:
            files = [cells.cell_file(folder, plan.name, keep, seed) for seed in range(seeds)]
            if all(file.exists() for file in files):
                grid[plan.name, keep] = [json.loads(file.read_text()) for file in files]
    rows = [_row(found, arm) for found in grid.values() for arm in found[0]["arms"]]
    compared = [row for row in rows if _is_method(row["arm"])]
    corrected = 1 - 0.05 / max(1, len(compared))
    for row in compared:
        row["vs_control"] = row["vs_equal"] if row["arm"].endswith("/equal") else row["vs_stratified"]
        control = "equal_quotas" if row["arm"].endswith("/equal") else "stratified_random"
        difference = _differences(grid[row["task"], row["keep"]], row["arm"], control, corrected)
        row["sure_after_correction"] = bool(difference[1] > 0 or difference[2] < 0)
    auc: dict[str, dict[str, float]] = {}
    for (task, _), found in grid.items():
        if found[0]["detection_auc"]:
            auc[task] = {
                name: float(np.mean([c["detection_auc"][name] for c in found]))
                for name in found[0]["detection_auc"]
            }
    parts = {part for found in grid.values() for part in found[0]["seconds"]}
    searched = {f"{task} {keep:g}": _gammas(found) for (task, keep), found in grid.items()}
    return {
        "seeds": seeds,
        "comparisons": len(compared),
        "expected_by_chance": round(0.025 * len(compared), 1),  # above; as many below
        "tasks": {plan.name: _facts(plan, grid) for plan in plans if (plan.name, plan.keeps[0]) in grid},
        "summary": _summary(grid, rows),
        "masked_path_adds": _path_adds(grid),
        "beats_stratified": _beyond(compared, above=True),
        "below_stratified": len(_beyond(compared, above=False)),
        "detection_auc": auc,
        "seconds": {part: _mean_seconds(grid, part) for part in sorted(parts)},
        "gamma_of_dlc": searched,
        "rows": rows,
    }


def _is_method(arm: str) -> bool:
    return arm not in (*cells.CONTROLS, "no_pruning")


def _values(found: list[dict], arm: str, what: str = "accuracy") -> np.ndarray:
    return 100 * np.array([cell["arms"][arm][what] for cell in found])


def _differences(found: list[dict], arm: str, control: str, level: float = 0.95) -> list[float]:
    return list(paired_over_seeds(_values(found, arm), _values(found, control), level))


def _row(found: list[dict], arm: str) -> dict[str, Any]:
    kept = np.array([cell["arms"][arm]["kept_by_class"] for cell in found])
    row = {
        "task": found[0]["task"],
        "keep": found[0]["keep"],
        "arm": arm,
        "accuracy": float(_values(found, arm).mean()),
        "worst_class": float(_values(found, arm, "worst_class").mean()),
        "calibration_error": float(_values(found, arm, "calibration_error").mean()),
        "least_kept_class": float(100 * kept.min(1).mean()),
        "most_kept_class": float(100 * kept.max(1).mean()),
        "wrong_labels_kept": float(_values(found, arm, "wrong_kept").mean()),
    }
    return row | {name: _differences(found, arm, control) for name, control in REFERENCES.items()}


def _facts(plan: cells.Plan, grid: dict) -> dict[str, Any]:
    cell = grid[plan.name, plan.keeps[0]][0]
    shares = [keep for keep in plan.keeps if (plan.name, keep) in grid]
    kept = {f"{keep:g}": grid[plan.name, keep][0]["kept"] for keep in shares}
    return {
        "features": plan.source,
        "make_up": plan.make_up,
        "kept": kept,
        "points": 5,
        "penalty": cell["penalty"],
    }


def _summary(grid: dict, rows: list[dict]) -> list[dict[str, Any]]:
    """Each arm's mean over tasks and shares; the interval is over the seeds' means."""
    summary = []
    for arm in next(iter(grid.values()))[0]["arms"] if grid else ():
        mean = {a: np.mean([_values(f, a) for f in grid.values()], 0) for a in (arm, *REFERENCES.values())}
        own = [row for row in rows if row["arm"] == arm]
        entry: dict[str, Any] = {"arm": arm, "accuracy": float(mean[arm].mean())}
        for name, control in REFERENCES.items():
            entry[name] = list(paired_over_seeds(mean[arm], mean[control]))
        entry["above"] = sum(row["vs_stratified"][1] > 0 for row in own)
        entry["below"] = sum(row["vs_stratified"][2] < 0 for row in own)
        entry["cells"] = len(own)
        entry["paper"] = PAPER.get(arm)
        summary.append(entry)
    return sorted(summary, key=lambda entry: -entry["accuracy"])


def _path_adds(grid: dict) -> dict[str, list[float]]:
    """DLC minus the plain unmasked loss, with the same selector, mean over tasks and shares kept."""
    found = {}
    for selector in ("flex_rand", "top_hard", "top_easy", "top_flexible", "mixed_flexible", "ccs"):
        dlc, plain = (
            np.mean([_values(cells_, f"{scorer}+{selector}") for cells_ in grid.values()], 0)
            for scorer in ("dlc", "unmasked_loss")
        )
        found[selector] = list(paired_over_seeds(dlc, plain))
    return found


def _beyond(rows: list[dict], above: bool) -> list[dict[str, Any]]:
    found = [r for r in rows if (r["vs_control"][1] > 0 if above else r["vs_control"][2] < 0)]
    columns = ("task", "keep", "arm", "accuracy", "vs_control", "sure_after_correction")
    return sorted(({c: r[c] for c in columns} for r in found), key=lambda r: -abs(r["vs_control"][0]))


def _mean_seconds(grid: dict, part: str) -> dict[str, float]:
    """By task, a mean over seeds and shares."""
    by_task: dict[str, list[float]] = {}
    for (task, _), found in grid.items():
        by_task.setdefault(task, []).extend(cell["seconds"][part] for cell in found)
    return {task: float(np.mean(values)) for task, values in by_task.items()}


def _gammas(found: list[dict]) -> float:
    chosen = [cell["searched"]["dlc+flex_rand"].split("gamma=")[1].rstrip(")") for cell in found]
    return float(np.mean([float(gamma) for gamma in chosen]))


def lora(folder: Path, seeds: int) -> dict[str, Any]:
    """The LoRA part: means, and differences paired over the seeds; shares whose seeds are all there."""
    rows, settings = [], {}
    for keep in (*LORA_KEEPS, 1.0):
        files = [lora_file(folder, keep, seed) for seed in range(seeds)]
        if not all(file.exists() for file in files):
            continue
        found = [json.loads(file.read_text()) for file in files]
        settings = found[0]["settings"]
        for arm in found[0]["arms"]:
            if not all(arm in f["arms"] for f in found):
                continue
            accuracy = _values(found, arm)
            row: dict[str, Any] = {"keep": keep, "arm": arm, "accuracy": float(accuracy.mean())}
            row["worst_class"] = float(_values(found, arm, "worst_class").mean())
            row["seconds_training"] = float(np.mean([f["arms"][arm]["seconds"] for f in found]))
            for name, control in (("vs_random", "random"), ("vs_stratified", "stratified_random")):
                if all(control in f["arms"] for f in found):
                    row[name] = list(paired_over_seeds(accuracy, _values(found, control)))
            rows.append(row)
    if not rows:
        return {}
    comparisons = sum("+" in row["arm"] for row in rows)
    return {"seeds": seeds, "comparisons": comparisons, "settings": settings, "rows": rows}


COLUMNS = (
    "task", "keep", "arm", "accuracy", "worst_class", "calibration_error",
    "least_kept_class", "most_kept_class", "wrong_labels_kept", "sure_after_correction",
)  # fmt: skip


def write_rows(file: Path, rows: list[dict]) -> None:
    """Every row as CSV: points, and each difference with the ends of its 95 % interval."""
    with open(file, "w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        ends = [f"{name}{end}" for name in REFERENCES for end in ("", "_low", "_high")]
        table.writerow([*COLUMNS, *ends])
        for row in rows:
            differences = [f"{value:.3f}" for name in REFERENCES for value in row[name]]
            plain = [row.get(c, "") for c in COLUMNS]
            table.writerow([f"{v:.3f}" if isinstance(v, float) else v for v in plain] + differences)


def show(console: Console, table: dict[str, Any]) -> None:
    """The tables, on a terminal."""
    console.print(_summary_table(table))
    for task in table["tasks"]:
        console.print(_task_table(table, task))
    title = (
        f"Above stratified random in {len(table['beats_stratified'])} of {table['comparisons']} comparisons"
    )
    title += f" (by chance: {table['expected_by_chance']}); below in {table['below_stratified']}"
    beats = Table("task", "keep", "arm", "accuracy", "difference", "after correction", title=title)
    for row in table["beats_stratified"]:
        sure = "yes" if row["sure_after_correction"] else ""
        cells_ = (row["task"], f"{row['keep']:.0%}", row["arm"], f"{row['accuracy']:.1f}")
        beats.add_row(*cells_, interval(row["vs_control"]), sure)
    console.print(beats)
    for task, auc in table["detection_auc"].items():
        ranked = sorted(auc.items(), key=lambda pair: -pair[1])
        console.print(
            f"Detection of wrong labels, {task} (AUC): " + ", ".join(f"{n} {v:.3f}" for n, v in ranked)
        )
    if table.get("lora"):
        part = table["lora"]
        fine = Table(
            "keep", "arm", "accuracy", "to random", "to stratified", title=f"LoRA, {part['seeds']} seeds"
        )
        for row in part["rows"]:
            fine.add_row(
                f"{row['keep']:.0%}",
                row["arm"],
                f"{row['accuracy']:.2f}",
                interval(row.get("vs_random")),
                interval(row.get("vs_stratified")),
            )
        console.print(fine)


def _summary_table(table: dict[str, Any]) -> Table:
    title = f"Mean over {len(table['tasks'])} tasks and all shares kept, {table['seeds']} seeds, points"
    grid = Table("arm", "accuracy", "to random", "to stratified", "above / below", "paper", title=title)
    for row in table["summary"]:
        grid.add_row(
            row["arm"],
            f"{row['accuracy']:.2f}",
            interval(row["vs_random"]),
            interval(row["vs_stratified"]),
            f"{row['above']} / {row['below']} of {row['cells']}",
            f"{row['paper']:.2f}" if row["paper"] else "",
        )
    return grid


def _task_table(table: dict[str, Any], task: str) -> Table:
    rows = [row for row in table["rows"] if row["task"] == task]
    keeps = sorted({row["keep"] for row in rows})
    equal = "long_tail" in task
    title = f"{task}: accuracy, and difference to {'equal quotas' if equal else 'stratified random'}"
    grid = Table("arm", *(f"{keep:.0%}" for keep in keeps), title=title)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["keep"]: row for row in rows if row["arm"] == arm}
        against = "vs_equal" if equal else "vs_stratified"
        grid.add_row(arm, *(f"{own[k]['accuracy']:.1f}  {interval(own[k][against])}" for k in keeps))
    return grid


def interval(difference: list[float] | None) -> str:
    """`+0.5 [-0.1, +1.1]`, points."""
    if difference is None:
        return ""
    return f"{difference[0]:+.1f} \\[{difference[1]:+.1f}, {difference[2]:+.1f}]"
