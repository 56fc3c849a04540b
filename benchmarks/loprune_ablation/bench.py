"""What TSA's parts are for: space, inverse, statistics, damping, start, scoring epochs, rank.

`serpette bench loprune_ablation` goes on where it stopped; `--quick` is a smoke run, `--report` only
reads what is there. The learning rate is the one that `loprune_table` chose.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import summary
import tasks
import variants
from rich.console import Console

from serpette.cost import hardware, versions
from serpette.files import write_json


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing, prints the tables and writes `result.json` to `out`."""
    parser = argparse.ArgumentParser("serpette bench loprune_ablation")
    parser.add_argument("--quick", action="store_true", help="one group of one seed, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of what is there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tasks.cache() / ("loprune_ablation-quick" if chosen.quick else "loprune_ablation")
    if not chosen.report:
        if chosen.quick:
            variants.cells.make_small()
            variants.run(variants.TASKS[1], "spaces", 0, folder, 2e-3)
        else:
            variants.cells.activations(variants.NAME)
            rate = variants.cells.choose_rate(variants.NAME, tasks.cache() / "loprune_table")
            tasks.in_parallel(variants.run, variants.jobs(folder, rate), chosen.workers, "groups and runs")
    console = Console()
    table = summary.collect(folder, 1 if chosen.quick else variants.SEEDS)
    summary.show(console, table)
    if not chosen.quick:
        facts = {
            "benchmark": "loprune_ablation",
            "command": "serpette bench loprune_ablation",
            "versions": versions(),
            "hardware": hardware(),
        }
        text = json.dumps(facts | table)
        write_json(out / "result.json", json.loads(text, parse_float=tasks.four_digits))
        summary.write_readme(out / "README.md", table)
