"""LoRAPrune's Table 3 in shape: pruning while tuning, or after it, at 50 %.

`serpette bench loraprune_strategies` goes on where it stopped and shares its cells with `loraprune_table`;
`--report` only reads what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules shared by the benchmarks

import pruned
import readme
import tasks

from serpette.cost import hardware, versions
from serpette.files import write_json

STRATEGIES = {
    "lora_prune@0.5": "joint: prune while LoRA tunes",
    "map_lora@0.5": "joint, by magnitude (control)",
    "then/lora_prune@0.5": "1: tune LoRA, then prune while it tunes on",
    "then/map_lora@0.5": "1, by magnitude (control)",
    "then/all_weights@0.5": "2: tune all weights, then prune by their gradients while they tune on",
    "obs@0.5": "3: tune all weights, then prune at once by OBS",
}
# Table 3: VTAB-1k mean accuracy, epochs
PAPER = {
    "lora_prune@0.5": (72.0, 100), "then/lora_prune@0.5": (72.0, 200), "then/all_weights@0.5": (64.6, 200),
    "obs@0.5": (54.2, 100),
}  # fmt: skip
HEAD = ("strategy", "paper", "ViT", "to joint", "MiniLM", "to joint", "epochs")


def main(out: Path, args: list[str]) -> None:
    """Runs what is missing and writes `result.json` and the README's table."""
    parser = argparse.ArgumentParser("serpette bench loraprune_strategies")
    parser.add_argument("--report", action="store_true", help="the table of the cells that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    chosen = parser.parse_args(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, arms = tasks.cache() / "loraprune", tuple(STRATEGIES)
    if not chosen.report:
        rates = [(name, folder) for name in pruned.MODELS]
        tasks.in_parallel(pruned.choose_rates, rates, chosen.workers, "learning rates")
        tasks.in_parallel(pruned.run, pruned.jobs(folder, arms), chosen.workers, "seeds")
    result = {
        "benchmark": "loraprune_strategies",
        "command": "serpette bench loraprune_strategies",
        "versions": versions(),
        "hardware": hardware(),
        "settings": pruned.FACTS | {"learning_rates": pruned.chosen_rates(folder)},
        "paper": PAPER,
        "rows": pruned.table(folder, arms, {"vs_joint": lambda arm: "lora_prune@0.5"}),
    }
    write_json(out / "result.json", json.loads(json.dumps(result), parse_float=tasks.four_digits))
    text = readme.table(HEAD, [line(arm, result["rows"]) for arm in arms])
    print(text)
    readme.fill(out / "README.md", table=text)


def line(arm: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of the table."""
    cells = []
    for name in pruned.MODELS:
        row = next((r for r in rows if (r["model"], r["arm"]) == (name, arm)), None)
        accuracy = "" if row is None else "{:.1f} [{:.1f}, {:.1f}]".format(row["accuracy"], *row["interval"])
        cells += [accuracy, readme.interval(row.get("vs_joint") if row else None)]
    epochs = pruned.EPOCHS * (2 if pruned.parse(arm)[0] == "then" else 1)
    return STRATEGIES[arm], str(PAPER[arm][0]) if arm in PAPER else "", *cells, str(epochs)
