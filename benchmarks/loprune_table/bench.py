"""LoPrune's main table in shape: TSA against random, the plain loss and other scores, by LoRA tuning.

`serpette bench loprune_table` goes on where it stopped; `--quick` is a smoke run, `--report` only reads what
is there. Activations and cells lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import adapters
import cells
import report
import tasks
from rich.console import Console

from serpette.cost import hardware, versions
from serpette.files import write_json


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing, prints the tables and writes `result.json` and two pictures to `out`."""
    parser = argparse.ArgumentParser("serpette bench loprune_table")
    parser.add_argument("--quick", action="store_true", help="two arms of one small seed, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: with more, two of them stand in each other's way
    folder = tasks.cache() / ("loprune_table-quick" if chosen.quick else "loprune_table")
    jobs = cells.jobs(folder)
    if chosen.quick:
        cells.make_small()
        jobs = [(("random", "tsa+top_hard/global"), "fashion-vit/wrong_labels", 0.5, 0, folder)]
    if not chosen.report:
        for name in {job[1].split("/")[0] for job in jobs}:
            cells.activations(name)
        if chosen.quick:
            cells.run(*jobs[0])
        else:
            names = [(name, folder) for name in adapters.BASES]
            tasks.in_parallel(cells.choose_rate, names, chosen.workers, "learning rates")
            tasks.in_parallel(cells.run, jobs, chosen.workers, "LoRA runs")
    console = Console()
    table = report.collect(folder, 1 if chosen.quick else cells.SEEDS)
    if not table["rows"]:
        console.print("No task has all its seeds yet.")
        return
    report.show(console, table)
    if not chosen.quick:
        facts = {
            "benchmark": "loprune_table",
            "command": "serpette bench loprune_table",
            "versions": versions(),
            "hardware": hardware(),
        }
        text = json.dumps(facts | table)
        write_json(out / "result.json", json.loads(text, parse_float=tasks.four_digits))
        report.pictures(out, table)
        report.write_readme(out / "README.md", table)
