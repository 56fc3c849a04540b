"""Table 1 of the DLC paper in shape: every scorer with its selectors, against the right controls.

`serpette bench dlc_table1` goes on where it stopped; `--quick` is a smoke run, `--report` only reads what
is there. Features and cells lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tasks.py, shared by the benchmarks

import cells
import lora
import report
import tasks
from rich.console import Console

from serpette.cost import hardware, versions
from serpette.files import write_json

SEEDS, LORA_SEEDS = 10, 5


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing, prints the tables and writes `result.json` and `rows.csv` to `out`."""
    parser = argparse.ArgumentParser("serpette bench dlc_table1")
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there")
    parser.add_argument("--only", default="", help="tasks whose name begins so; 'lora' for that part")
    parser.add_argument("--no-lora", action="store_true", help="the head-only part alone")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: with more, two of them stand in each other's way
    console = Console()
    plans = cells.QUICK if chosen.quick else cells.PLANS
    seeds = 2 if chosen.quick else SEEDS
    folder = tasks.cache() / ("dlc_table1-quick" if chosen.quick else "dlc_table1")

    if not chosen.report:
        wanted = [plan for plan in plans if plan.name.startswith(chosen.only)]
        for plan in wanted:
            tasks.features(plan.source, plan.pool, plan.test)
        jobs = [(plan, seed, folder) for plan in wanted for seed in range(seeds)]
        tasks.in_parallel(cells.run, jobs, chosen.workers, "head-only seeds")
    table = report.heads(folder, plans, seeds)
    if not table["rows"]:
        console.print("No task has all its seeds yet.")
        return
    if not chosen.quick and not chosen.no_lora:
        arms = lora.choose_arms(table)
        if arms and not chosen.report and "lora".startswith(chosen.only):
            lora.prepare(LORA_SEEDS)
            tasks.in_parallel(lora.run, lora.jobs(arms, LORA_SEEDS, folder), chosen.workers, "LoRA runs")
        table["lora"] = report.lora(folder, LORA_SEEDS)
    report.show(console, table)
    if not chosen.quick:
        facts = {
            "benchmark": "dlc_table1",
            "command": "serpette bench dlc_table1",
            "versions": versions(),
            "hardware": hardware(),
        }
        report.write_rows(out / "rows.csv", table.pop("rows"))
        write_json(out / "result.json", json.loads(json.dumps(facts | table), parse_float=tasks.four_digits))
