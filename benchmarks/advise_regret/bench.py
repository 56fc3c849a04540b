"""How good the adviser's picks are: on all head-only tasks, against the best in hindsight and against chance.

A seed draws the training examples of a task; the adviser sees them and nothing else, and picks a choice at
each share kept, and the cheapest share at one point lost. Then every choice is tried on all training examples
and judged on the test examples. `serpette bench advise_regret` goes on where it stopped; `--quick` is a smoke
run, `--report` only reads what is there. Cells lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tasks.py, shared by the benchmarks

import numpy as np
import readme
import tasks
from cells import BATCH, TASKS, full_seconds, run
from rich.console import Console
from rich.table import Table

from serpette.adviser import probes
from serpette.adviser.recommend import SURE
from serpette.cost import hardware, versions
from serpette.evaluate import seeds_interval
from serpette.files import write_json

SEEDS, EPOCHS = 10, 3
EQUAL = probes.EQUAL.name
MAX_LOSS = 1.0


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing; writes `result.json` and the table of the README to `out`."""
    parser = argparse.ArgumentParser("serpette bench advise_regret")
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tasks.cache() / ("advise_regret-quick" if chosen.quick else "advise_regret")
    names = ["movies clean"] if chosen.quick else list(TASKS)
    seeds = 1 if chosen.quick else SEEDS
    if not chosen.report:
        for name in names:
            tasks.features(TASKS[name][0])
        steps = folder / "steps.json"
        if not steps.exists():
            write_json(steps, {source: full_seconds(source) for source in {TASKS[n][0] for n in names}})
        jobs = [(name, seed, folder, chosen.quick) for seed in range(seeds) for name in names]
        tasks.in_parallel(run, jobs, chosen.workers, "advice")
    cells: dict[str, list[dict]] = defaultdict(list)
    for name in names:
        files = [folder / f"{name}-{seed}.json" for seed in range(seeds)]
        cells[name] = [json.loads(file.read_text()) for file in files if file.exists()]
    cells = {name: found for name, found in cells.items() if len(found) == seeds}
    if not cells:
        Console().print("No task has all its seeds yet.")
        return
    result = summary(cells, json.loads((folder / "steps.json").read_text()))
    show(result)
    if not chosen.quick:
        facts = {
            "benchmark": "advise_regret",
            "command": "serpette bench advise_regret",
            "versions": versions(),
            "hardware": hardware(),
            "seeds": SEEDS,
        }
        write_json(out / "result.json", json.loads(json.dumps(facts | result), parse_float=tasks.four_digits))
        readme.fill(out / "README.md", table=table(result))


def _picked(cell: dict, keep: float) -> dict[str, Any]:
    """The score that `recommend.best_of` would advise, else the choice by chance."""
    same = [o for o in cell["outlooks"] if o["keep"] == keep]
    chance = max((o for o in same if o["by_chance"]), key=lambda o: o["value"])
    sure = [o for o in same if o["beats_random"] >= SURE and o["value"] > chance["value"]]
    return max(sure, key=lambda o: o["value"]) if sure else chance


def summary(cells: dict[str, list[dict]], steps: dict[str, dict]) -> dict[str, Any]:
    """By task and share: regret to the best in hindsight, differences to chance; coverage; time."""
    rows, coverage, cheapest = [], defaultdict(list), []
    for name, found in cells.items():
        keeps = sorted({o["keep"] for o in found[0]["outlooks"]} - {1.0})
        at = [{(o["choice"], o["keep"]): o for o in cell["outlooks"]} for cell in found]
        for keep in keeps:
            picks = [_picked(cell, keep) for cell in found]
            got = np.array([p["actual"] for p in picks])
            by_choice = {
                choice: np.array([cell[choice, keep]["actual"] for cell in at])
                for choice, k in at[0]
                if k == keep and all((choice, keep) in cell for cell in at)
            }
            best = max(by_choice, key=lambda c: by_choice[c].mean())
            ceiling = np.max(list(by_choice.values()), axis=0)
            chance = [by_choice[c] for c in by_choice if at[0][c, keep]["by_chance"]]
            best_chance = max(chance, key=lambda v: v.mean())
            row = {
                "task": name,
                "keep": keep,
                "best": best,
                "picked": {
                    c: sum(p["choice"] == c for p in picks) for c in dict.fromkeys(p["choice"] for p in picks)
                },
                "accuracy": float(got.mean()),
                "regret": list(seeds_interval(by_choice[best] - got)),
                "regret_each_seed": list(seeds_interval(ceiling - got)),
                "to_random": list(seeds_interval(got - by_choice[probes.RANDOM.name])),
                "to_best_chance": list(seeds_interval(got - best_chance)),
            }
            if EQUAL in by_choice:
                row["to_equal"] = list(seeds_interval(got - by_choice[EQUAL]))
            rows.append(row)
            coverage["value, picks"] += [p["low"] <= p["actual"] <= p["high"] for p in picks]
        for cell, held in zip(found, at, strict=True):
            whole = held[probes.RANDOM.name, 1.0]
            for o in cell["outlooks"]:
                coverage["value, all choices"].append(o["low"] <= o["actual"] <= o["high"])
                if o["keep"] < 1:
                    lost = whole["actual"] - o["actual"]
                    coverage["loss, all choices"].append(o["loss_low"] <= lost <= o["loss_high"])
        cheapest.append(_cheapest(name, found, keeps))
    regret = np.array([row["regret"][0] for row in rows])
    return {
        "cells": rows,
        "mean_regret": float(regret.mean()),
        "mean_to_random": float(np.mean([row["to_random"][0] for row in rows])),
        "mean_to_best_chance": float(np.mean([row["to_best_chance"][0] for row in rows])),
        "cells_below_chance_beyond_0.3": [
            f"{row['task']} {row['keep']:g}" for row in rows if row["to_best_chance"][2] < -0.3
        ],
        "coverage": {k: float(np.mean(v)) for k, v in coverage.items()}
        | {"predictions": len(coverage["value, all choices"])},
        "at_one_point": cheapest,
        "time": {name: _share_of_full(name, found, steps) for name, found in cells.items()},
        "wrong_labels": {
            name: {
                "true": float(np.mean([c["wrong_labels_true"] for c in found])),
                "estimated": list(seeds_interval([c["wrong_labels"] for c in found])),
            }
            for name, found in cells.items()
        },
    }


def _cheapest(name: str, found: list[dict], keeps: list[float]) -> dict[str, Any]:
    """The smallest share whose pick is likely within MAX_LOSS, and what it lost."""
    from scipy.stats import norm

    lost, shares = [], []
    for cell in found:
        whole = next(o for o in cell["outlooks"] if o["keep"] == 1)
        keep = 1.0
        pick = whole
        for share in keeps:
            option = _picked(cell, share)
            error = (option["loss_high"] - option["loss"]) / 1.96
            if option["loss"] + norm.ppf(SURE) * error <= MAX_LOSS:
                keep, pick = share, option
                break
        shares.append(keep)
        lost.append(whole["actual"] - pick["actual"])
    return {
        "task": name,
        "keep": float(np.mean(shares)),
        "keeps": shares,
        "lost": list(seeds_interval(lost)),
        "within": float(np.mean([x <= MAX_LOSS for x in lost])),
    }


def _share_of_full(name: str, found: list[dict], steps: dict[str, dict]) -> dict[str, float]:
    """Advising (reading each example, probes, health) over LoRA of 3 epochs, processor seconds."""
    cost = steps[TASKS[name][0]]
    N = found[0]["examples"]
    full = EPOCHS * -(-N // BATCH) * cost["step"]
    probing = float(np.mean([c["seconds"] for c in found]))
    return {
        "full": full,
        "observing": N * cost["reading"],
        "probes": probing,
        "share": (N * cost["reading"] + probing) / full,
    }


HEAD = (
    "task",
    "keep",
    "picked",
    "accuracy",
    "regret to the best in hindsight",
    "to stratified random",
    "to the better of both random",
)


def _lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    def words(interval: list[float]) -> str:
        return f"{interval[0]:+.1f} ({interval[1]:+.1f} to {interval[2]:+.1f})"

    return [
        (
            row["task"],
            f"{row['keep']:.0%}",
            ", ".join(f"{c} {n}" if n < SEEDS else c for c, n in row["picked"].items()),
            f"{row['accuracy']:.1f}",
            words(row["regret"]),
            words(row["to_random"]),
            words(row["to_best_chance"]),
        )
        for row in result["cells"]
    ]


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(line) + " |" for line in _lines(result)]
    c = result["coverage"]
    lines += [
        "",
        f"Mean regret {result['mean_regret']:.2f} points; to stratified random "
        f"{result['mean_to_random']:+.2f}, to the better of both random choices "
        f"{result['mean_to_best_chance']:+.2f}. Intervals of 95 % held the actual value in "
        f"{c['value, all choices']:.0%} of {c['predictions']:,} predictions ({c['value, picks']:.0%} of the "
        f"picks), the loss in {c['loss, all choices']:.0%}.",
        "",
        "| task | share kept at one point | lost | within one point | advising over the LoRA run "
        "| wrong labels, estimated | true |",
        "|---|---|---|---|---|---|---|",
    ]
    for at in result["at_one_point"]:
        name, lost = at["task"], at["lost"]
        wrong = result["wrong_labels"][name]
        lines.append(
            f"| {name} | {at['keep']:.0%} | {lost[0]:+.1f} ({lost[1]:+.1f} to {lost[2]:+.1f}) "
            f"| {at['within']:.0%} | {result['time'][name]['share']:.0%} | {wrong['estimated'][0]:.0%} "
            f"| {wrong['true']:.0%} |"
        )
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """The table on a terminal."""
    grid = Table(*HEAD)
    for line in _lines(result):
        grid.add_row(*line)
    Console().print(grid)
    Console().print(table(result).split("\n\n", 1)[1])
