"""SPSFT's accuracy tables in shape: full, head, LoRA and rows by importance, with and without dependencies.

`serpette bench spsft_table2` goes on where it stopped; `--quick` is a smoke run, `--report` only reads what
is there. Activations and cells lie in the cache of the zoo, under `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import cells
import report
import tasks
from rich.console import Console

from serpette.cost import hardware, versions
from serpette.files import write_json


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing, prints the tables and writes `result.json`, a picture and the README's tables."""
    parser = argparse.ArgumentParser("serpette bench spsft_table2")
    parser.add_argument("--quick", action="store_true", help="two arms of one small seed, nothing committed")
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: with more, two of them stand in each other's way
    folder = tasks.cache() / ("spsft_table2-quick" if chosen.quick else "spsft_table2")
    console = Console()
    if chosen.quick:
        cells.make_small()
        cells.run("fashion-vit", 0, folder, ("head", "rows/taylor"))
        report.show(console, report.collect(folder, seeds=1))
        return
    if not chosen.report:
        tasks.in_parallel(
            cells.choose_rates, [(name, folder) for name in cells.SETTINGS], chosen.workers, "rates"
        )
        tasks.in_parallel(cells.run, cells.jobs(folder), chosen.workers, "seeds")
    table = report.collect(folder, cells.SEEDS)
    report.show(console, table)
    facts = {"benchmark": "spsft_table2", "command": "serpette bench spsft_table2"}
    facts |= {"versions": versions(), "hardware": hardware()}
    write_json(out / "result.json", json.loads(json.dumps(facts | table), parse_float=tasks.four_digits))
    report.picture(out, table)
    report.write_readme(out / "README.md", table)
