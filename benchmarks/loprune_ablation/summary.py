"""From groups and cells to the ablation's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import readme
import variants
from rich.console import Console
from rich.table import Table

from serpette.evaluate import paired_over_seeds, spearman
from serpette.types import uniform_of

# LoPrune (CVPR 2026), CIFAR-100: accuracy, seconds
PAPER = {"full_space": (86.88, 2114), "exact_inverse": (89.64, 5542), "tsa": (89.59, 371.5)}


def collect(folder: Path, seeds: int) -> dict[str, Any]:
    """Groups and shares whose seeds are all there."""
    return {
        "settings": variants.SETTINGS,
        "scores": [
            row for task in variants.TASKS for g in variants.GROUPS for row in _group(folder, task, g, seeds)
        ],
        "rows": [
            row
            for task in variants.TASKS
            for keep in variants.KEEPS
            for row in _share(folder, task, keep, seeds)
        ],
        "paper": PAPER,
    }


def _read(folder: Path, task: str, group: str, seeds: int) -> list[dict]:
    files = [variants.group_file(folder, task, group, seed) for seed in range(seeds)]
    return [json.loads(f.read_text()) for f in files] if all(f.exists() for f in files) else []


def _group(folder: Path, task: str, group: str, seeds: int) -> list[dict[str, Any]]:
    """One row a variant: rank correlation with the reference, the loss and the stream; seconds; detection."""
    held, base = _read(folder, task, group, seeds), _read(folder, task, "spaces", seeds)
    if not held:
        return []
    if group == "epochs":
        for h in held:  # the score of k epochs is a mean of the first k
            each = np.array([h["scores"][f"epoch_{e + 1}"] for e in range(variants.EPOCHS)])
            h["scores"] = {f"epochs_{k}": each[:k].mean(0).tolist() for k in (1, 3, 5, 10)}
    rows = []
    for name in held[0]["scores"]:
        own = [h["scores"][name] for h in held]
        row: dict[str, Any] = {"task": task, "group": group, "variant": name}
        if base:
            row["to_reference"] = _spread(
                [spearman(o, b["scores"]["tsa"]) for o, b in zip(own, base, strict=True)]
            )
            row["to_loss"] = _spread(
                [spearman(o, b["scores"]["loss"]) for o, b in zip(own, base, strict=True)]
            )
        if "sampled" in name:
            row["kept_of_sample_and_others"] = np.mean([_kept(o) for o in own], 0).tolist()
        row["to_position"] = _spread([spearman(o, range(len(o))) for o in own])
        if "seconds" in held[0]:
            source = {"tsa_joint": "tsa_joint", "exact_inverse_1e-3": "factors"}.get(name, name)
            if source in held[0]["seconds"]:
                row["reader_seconds"] = float(np.mean([h["seconds"][source] for h in held]))
            if name.startswith("exact_inverse"):
                row["reader_seconds"] = float(
                    np.mean([h["seconds"]["factors"] + h["seconds"][name] for h in held])
                )
        row["plain_pass_seconds"] = float(np.mean([h["plain_pass"] for h in held]))
        if held[0]["detection_auc"] and name in held[0]["detection_auc"]:
            row["detection_auc"] = float(np.mean([h["detection_auc"][name] for h in held]))
        rows.append(row)
    return rows


def _kept(scores: list[float]) -> tuple[float, float]:
    """What stays if the upper half is kept: share of the moments' sample, and of the others."""
    ids = np.array([str(i) for i in range(len(scores))])
    inside = np.isin(
        range(len(ids)), np.argsort(uniform_of(ids, 0).numpy(), kind="stable")[: variants.SAMPLE]
    )
    kept = np.array(scores) > np.median(scores)
    return float(kept[inside].mean()), float(kept[~inside].mean())


def _spread(values: list[float]) -> list[float]:
    """[mean, least, largest] over the seeds."""
    return [float(np.mean(values)), float(min(values)), float(max(values))]


def _share(folder: Path, task: str, keep: float, seeds: int) -> list[dict[str, Any]]:
    files = [variants.cell_file(folder, task, keep, seed) for seed in range(seeds)]
    if not all(f.exists() for f in files):
        return []
    found = [json.loads(f.read_text())["arms"] for f in files]
    arms = {a: [f[a] for f in found] for a in variants.TRAINED[keep] if all(a in f for f in found)}
    values = {arm: 100 * np.array([cell["accuracy"] for cell in cells]) for arm, cells in arms.items()}
    rows = []
    for arm, cells in arms.items():
        row: dict[str, Any] = {"task": task, "keep": keep, "arm": arm, "accuracy": float(values[arm].mean())}
        row["wrong_kept"] = 100 * float(np.mean([cell["wrong_kept"] for cell in cells]))
        if len(found) > 1:
            for name, control in (
                ("vs_stratified", "stratified_random"), ("vs_tsa", "tsa"), ("vs_loss", "loss"),
            ):  # fmt: skip
                if control in arms and arm != control:
                    row[name] = list(paired_over_seeds(values[arm], values[control]))
        rows.append(row)
    return rows


def show(console: Console, table: dict[str, Any]) -> None:
    """The tables, on a terminal."""
    grid = Table(
        "task", "variant", "to two_pass", "to the loss", "to the position", "sample / others kept", "AUC",
        "reader s", "pass s", title="Spearman of the scores: mean over the seeds, least, largest",
    )  # fmt: skip
    for row in table["scores"]:
        grid.add_row(
            row["task"].split("/")[1],
            row["variant"],
            *(_spread_text(row.get(name)) for name in ("to_reference", "to_loss", "to_position")),
            " / ".join(f"{share:.0%}" for share in row.get("kept_of_sample_and_others", ())),
            f"{row['detection_auc']:.2f}" if "detection_auc" in row else "",
            f"{row['reader_seconds']:.2f}" if "reader_seconds" in row else "",
            f"{row['plain_pass_seconds']:.2f}",
        )
    console.print(grid)
    for task, keep in dict.fromkeys((row["task"], row["keep"]) for row in table["rows"]):
        tuned = Table("arm", "accuracy", "to stratified", "to tsa", "to the loss", "wrong kept",
                      title=f"{task}, keep {keep:.0%}")  # fmt: skip
        for row in table["rows"]:
            if (row["task"], row["keep"]) == (task, keep):
                differences = (interval(row.get(name)) for name in ("vs_stratified", "vs_tsa", "vs_loss"))
                tuned.add_row(
                    row["arm"], f"{row['accuracy']:.1f}", *differences, f"{row['wrong_kept']:.0f} %"
                )
        console.print(tuned)


def _spread_text(spread: list[float] | None) -> str:
    return "" if spread is None else f"{spread[0]:.3f} ({spread[1]:.2f} to {spread[2]:.2f})"


def interval(difference: list[float] | None) -> str:
    """`+0.5 [-0.1, +1.1]`, points."""
    if difference is None:
        return ""
    return f"{difference[0]:+.1f} \\[{difference[1]:+.1f}, {difference[2]:+.1f}]"


MAKE_UPS = ("clean", "wrong_labels")


def write_readme(file: Path, table: dict[str, Any]) -> None:
    """Fills the README's tables."""
    scores = {(row["task"].split("/")[1], row["variant"]): row for row in table["scores"]}
    lines, kept = [], []
    for name in dict.fromkeys(row["variant"] for row in table["scores"]):
        clean, wrong = (scores.get((made, name), {}) for made in MAKE_UPS)
        spreads = (
            (clean, "to_reference"), (wrong, "to_reference"), (clean, "to_loss"), (wrong, "to_loss"),
            (clean, "to_position"),
        )  # fmt: skip
        numbers = (wrong.get("detection_auc"), (clean or wrong).get("reader_seconds"))
        lines.append(
            (
                name,
                *(
                    "{:.2f} ({:.2f} to {:.2f})".format(*row[key]) if key in row else ""
                    for row, key in spreads
                ),
                *("" if number is None else f"{number:.2f}" for number in numbers),
            )
        )
        shares = [row.get("kept_of_sample_and_others") for row in (clean, wrong)]
        if any(shares):
            kept.append((name, *(f"{s[0]:.0%}, {s[1]:.0%}" if s else "" for s in shares)))
    head = (
        "variant", "Spearman to the reference: clean", "wrong labels", "to the loss: clean", "wrong labels",
        "to the position: clean", "AUC of wrong labels", "CPU s of the reader",
    )  # fmt: skip
    parts = []
    for keep in sorted({row["keep"] for row in table["rows"]}, reverse=True):
        rows = {(r["task"].split("/")[1], r["arm"]): r for r in table["rows"] if r["keep"] == keep}
        tuned = []
        for arm in dict.fromkeys(arm for _, arm in rows):
            own = [rows.get((made, arm)) for made in MAKE_UPS]
            cells = (
                (f"{r['accuracy']:.1f}", *(readme.interval(r.get(k)) for k in ("vs_stratified", "vs_tsa")))
                if r
                else ("", "", "")
                for r in own
            )
            tuned.append((arm, *(cell for three in cells for cell in three)))
        columns = ("arm", "clean", "to stratified", "to tsa", "wrong labels", "to stratified", "to tsa")
        parts.append(f"Keep {keep:.0%}, top-k over all examples:\n\n{readme.table(columns, tuned)}")
    readme.fill(
        file,
        scores=readme.table(head, lines),
        kept=readme.table(("variant", "clean: of the sample, of the others", "wrong labels"), kept),
        tuned="\n\n".join(parts),
    )
