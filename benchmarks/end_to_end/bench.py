"""Full LoRA on all examples against what the adviser advises: time, memory, latency, size, and what was lost.

Each seed draws its training examples, asks the adviser three times (at most one point lost; a quarter of the
time; 0.6 of the latency) and runs the recipe of its answers beside the full run. `serpette bench end_to_end`
goes on where it stopped; `--quick` is a smoke run, `--report` only reads what is there, `--only TASK` runs
one. Runs lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tasks.py, shared by the benchmarks

import numpy as np
import readme
import tasks
from cells import BUDGETS, TASKS, cell_file, run
from rich.console import Console

from serpette.cost import hardware, versions
from serpette.evaluate import seeds_interval
from serpette.files import write_json

SEEDS = 5


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing; writes `result.json` and the table of the README to `out`."""
    parser = argparse.ArgumentParser("serpette bench end_to_end")
    parser.add_argument("--quick", action="store_true", help="one seed of few examples, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of the runs that are there")
    parser.add_argument("--only", default="", help="tasks whose name begins so")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tasks.cache() / ("end_to_end-quick" if chosen.quick else "end_to_end")
    names = [name for name in TASKS if name.startswith(chosen.only)]
    seeds = 1 if chosen.quick else SEEDS
    if chosen.quick:
        TASKS.update({name: replace(task, train=200, test=60) for name, task in TASKS.items()})
    if not chosen.report:
        jobs = [(TASKS[name], seed, folder) for name in names for seed in range(seeds)]
        tasks.in_parallel(run, jobs, chosen.workers, "tasks and seeds")
    found = {}
    for name in TASKS:
        files = [cell_file(folder, name, seed) for seed in range(seeds)]
        if all(file.exists() for file in files):
            found[name] = [json.loads(file.read_text()) for file in files]
    if not found:
        Console().print("No task has all its seeds yet.")
        return
    result = {"tasks": {name: summary(cells) for name, cells in found.items()}}
    Console().print(table(result))
    if not chosen.quick:
        facts = {
            "benchmark": "end_to_end",
            "command": "serpette bench end_to_end",
            "versions": versions(),
            "hardware": hardware(),
            "seeds": SEEDS,
        }
        write_json(out / "result.json", json.loads(json.dumps(facts | result), parse_float=tasks.four_digits))
        readme.fill(out / "README.md", table=table(result))


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; differences and ratios seed by seed to the full run.

    A budget that the adviser refused in some seeds has those of the others.
    """
    arms: dict[str, Any] = {"everything": _facts([cell["arms"]["everything"] for cell in cells])}
    for name in BUDGETS:
        held = [cell for cell in cells if name in cell["arms"]]
        if len(held) > 1:
            arms[name] = _against_full(held, name)
    full = [cell["arms"]["everything"]["seconds"] for cell in cells]
    advising = [cell["advising_seconds"] for cell in cells]
    return {
        "metric": cells[0]["metric"],
        "examples": cells[0]["examples"],
        "test_examples": cells[0]["test_examples"],
        "full_seconds": float(np.mean(full)),
        "advising_seconds": float(np.mean(advising)),
        "advising_over_full": list(seeds_interval(np.array(advising) / np.array(full))),
        "refused": [cell["refused"] for cell in cells],
        "arms": arms,
    }


def _against_full(cells: list[dict[str, Any]], name: str) -> dict[str, Any]:
    full, own = ([cell["arms"][arm] for cell in cells] for arm in ("everything", name))
    lost = np.array([f["quality"] - a["quality"] for f, a in zip(full, own, strict=True)])
    told = [arm["predicted"] for arm in own]
    spent, mine = (np.array([arm["seconds"] for arm in arms]) for arms in (full, own))
    advising = np.array([cell["advising_seconds"] for cell in cells])
    held = [  # "keep everything" loses nothing, which is no prediction
        p["loss_low"] <= x <= p["loss_high"]
        for p, x, arm in zip(told, lost, own, strict=True)
        if arm["keep"] < 1 or arm["parameters"] < 1
    ]
    return _facts(own) | {
        "seeds": len(cells),
        "keeps": [arm["keep"] for arm in own],
        "choices": [arm["choice"] for arm in own],
        "lost": list(seeds_interval(lost)),
        "predicted": [float(np.mean([p[k] for p in told])) for k in ("loss", "loss_low", "loss_high")],
        "came_true": [int(sum(held)), len(held)],
        "times_as_fast": _ratio(spent, mine),
        "times_as_fast_with_advising": _ratio(spent, mine + advising),
    }


def _facts(arms: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("quality", "seconds", "peak_bytes", "speedup", "file", "parameters")
    return {key: float(np.mean([arm[key] for arm in arms])) for key in keys}


def _ratio(whole: np.ndarray, part: np.ndarray) -> list[float]:
    """Geometric mean and t-interval of the ratios."""
    return [float(np.exp(v)) for v in seeds_interval(np.log(whole / part))]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    head = (
        "task", "budget", "seeds", "advised", "quality", "lost, points", "predicted", "within its interval",
        "times as fast", "with advising", "latency", "file",
    )  # fmt: skip
    rows = []
    for name, task in result["tasks"].items():
        for arm, f in task["arms"].items():
            if arm == "everything":
                row = [name, arm, SEEDS, "", f"{f['quality']:.1f}", *[""] * 5, "1.00", "1.00"]
            else:
                picks = zip(f["keeps"], f["choices"], strict=True)
                kept = sorted({choice if keep == 1 else f"{keep:.0%} {choice}" for keep, choice in picks})
                row = [
                    "",
                    arm,
                    f["seeds"],
                    "; ".join(kept),
                    f"{f['quality']:.1f}",
                    readme.interval(f["lost"]),
                ]
                true, of = f["came_true"]
                row += [readme.interval(f["predicted"]), f"{true} of {of}" if of else ""]
                row += [_words(f["times_as_fast"])]
                row += [
                    f"{f['times_as_fast_with_advising'][0]:.1f}",
                    f"{1 / f['speedup']:.2f}",
                    f"{f['file']:.2f}",
                ]
            rows.append(row)
    shares = [
        f"{name} {task['advising_seconds']:.0f} of {task['full_seconds']:.0f} s"
        for name, task in result["tasks"].items()
    ]
    return readme.table(head, rows) + f"\n\nAdvising, once for all budgets: {', '.join(shares)}."


def _words(ratio: list[float]) -> str:
    return f"{ratio[0]:.1f} [{ratio[1]:.1f}, {ratio[2]:.1f}]"
