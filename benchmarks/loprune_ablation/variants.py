"""Groups of variants, scored once a seed, and the tunings on what some of them keep."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loprune_table"))

import adapters
import cells
import readings
import torch
from readings import ByEpoch, ExactInverse, Variant
from torch.nn.functional import cross_entropy

from serpette.data import budget
from serpette.data.selectors import Random, TopHard
from serpette.evaluate import detection_auc
from serpette.files import write_json

NAME, SIZE, TEST, SEEDS, SAMPLE = "fashion-vit", 300, 1500, cells.SEEDS, 150
TASKS = (f"{NAME}/clean", f"{NAME}/wrong_labels")
KEEPS = (0.5, 0.3)
STEPS = -(-SIZE // cells.BATCH)  # an epoch
STARTS = {"start_0": 0, "start_1/4": STEPS // 4, "start_1": STEPS, "start_2": 2 * STEPS, "start_3": 3 * STEPS}
DAMPINGS = (1e-5, 1e-4, 1e-2, 1e-1)  # beside the usual 1e-3
EPOCHS = 10
RANKS = (2, 4, 8, 16)  # with another initialisation than the reference: 8 shows what that does alone
GROUPS = ("spaces", "stream", "start", "rank", "epochs")
STREAM_BATCH = 8  # of the group `stream`: the moving statistics move 38 times, with 32 only 10 times
CONTROLS = ("random", "stratified_random")
TRAINED = {
    0.5: (
        *CONTROLS, "loss", "tsa", "tsa_joint", "full_space", "exact_inverse",
        "start_0", "start_1/4", "start_2", "start_3", "damping_1e-05", "damping_0.1",
    ),
    0.3: (*CONTROLS, "loss", "tsa", "tsa_joint", "full_space", "exact_inverse"),
}  # fmt: skip
SETTINGS = cells.SETTINGS | {
    "examples": SIZE, "test": TEST, "sample": SAMPLE, "steps_in_an_epoch": STEPS, "warmup_steps": STEPS,
    "reference": "two_pass, damping 1e-3, rank 8, scored after one epoch",
    "selection": "top-k over all examples, as the paper does",
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def tuner(rank: int) -> adapters.Tuner:
    """One a process and rank; alpha / rank stays 2."""
    torch.set_num_threads(1)
    return adapters.Tuner(NAME, rank, alpha=2 * rank, precision=torch.bfloat16)


def group_file(folder: Path, task: str, group: str, seed: int) -> Path:
    """The scores of a group, with seconds."""
    return folder / task.replace("/", "-") / f"{group}-seed{seed}.json"


def cell_file(folder: Path, task: str, keep: float, seed: int) -> Path:
    """The tunings at one share and seed; written anew after each."""
    return folder / task.replace("/", "-") / f"keep{keep:g}-seed{seed}.json"


def variants(group: str, rate: float) -> list[Any]:
    """The scorers of a group; `rank` has them one by one, see `score`."""
    usual: dict[str, Any] = {
        "statistics": "two_pass",
        "damping": cells.DAMPING,
        "tokens": 32,  # all of an image
        "warmup_steps": STEPS,
        "warmup_learning_rate": rate,
        "sample": SAMPLE,
    }
    if group == "spaces":
        factors = Variant("factors", "factors", **usual)
        found: list[Any] = [
            Variant("tsa", **usual),
            Variant("tsa_joint", joint=True, **usual),
            Variant("full_space", "full", **usual),
            ExactInverse("exact_inverse", factors, 0.1),
            ExactInverse("exact_inverse_1e-3", factors, 1e-3),
        ]
        found += [Variant(s, **usual | {"statistics": s}) for s in ("sampled", "running")]
        found.append(Variant("paper", **usual | {"statistics": "paper"}))
        found += [Variant(f"damping_{d:g}", **usual | {"damping": d}) for d in DAMPINGS]
        return found
    if group == "stream":
        names: tuple[Any, ...] = ("two_pass", "sampled", "running", "paper")
        found = [Variant(f"stream_{s}", **usual | {"statistics": s}) for s in names]
        damped = usual | {"statistics": "sampled"}
        return found + [
            Variant(f"sampled_damping_{d:g}", **damped | {"damping": d}) for d in (0.1, 1.0, 10.0)
        ]
    if group == "start":
        return [Variant(name, **usual | {"warmup_steps": steps}) for name, steps in STARTS.items()]
    if group == "epochs":
        several = Variant("epochs", "epochs", epochs=EPOCHS, **usual | {"statistics": "sampled"})
        return [ByEpoch(several, epoch) for epoch in range(EPOCHS)]
    return [Variant("rank", **usual)]


def score(task: str, group: str, seed: int, folder: Path, rate: float) -> dict[str, Any]:
    """The scores of a group's variants and the CPU seconds inside each reader; held in a file."""
    file = group_file(folder, task, group, seed)
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    drawn, examples, _, _ = cells.data(task, seed, min(SIZE, cells.examples()))
    labels = drawn.signals.labels
    assert labels is not None
    held: dict[str, Any] = {"scores": {}, "seconds": {}, "shared": {}}
    batch = STREAM_BATCH if group == "stream" else 32
    for rank in RANKS if group == "rank" else (cells.RANK,):
        model, scorers = tuner(rank), variants(group, rate)
        if group == "spaces":
            scorers.append(adapters.WarmLoss(model, scorers[0]))
        readings.SPENT.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        found = model.score(examples, labels, scorers, seed + 100 * (group == "rank"), batch)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        rename = {"rank": f"rank_{rank}"}
        held["scores"] |= {rename.get(n, n): v.tolist() for n, v in found.values.items()}
        held["seconds"] |= {rename.get(n, n): v for n, v in readings.SPENT.items()}
        held["shared"][f"rank_{rank}"] = cpu - sum(readings.SPENT.values())
        held["warmup"] = found.cost["seconds"]["warmup"] * cpu / wall
    held["plain_pass"] = plain_pass(tuner(cells.RANK), examples, labels)
    held["wrong"], held["labels"] = drawn.wrong.int().tolist(), labels.tolist()
    held["detection_auc"] = {}
    if drawn.wrong.any():
        held["detection_auc"] = {
            n: detection_auc(torch.tensor(v), drawn.wrong) for n, v in held["scores"].items()
        }
    write_json(file, held)
    return held


def plain_pass(model: adapters.Tuner, examples: adapters.Activations, labels: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass without a reader, in the scorer's batches."""
    start = time.process_time()
    for rows in torch.arange(len(labels)).split(32):
        with model.autocast():
            logits = model.model(**examples[rows].inputs())
        cross_entropy(logits.float(), labels[rows], reduction="sum").backward()
    return time.process_time() - start


def jobs(folder: Path, rate: float) -> list[tuple]:
    """Arguments of `run`, what matters most first: (task, group or share kept, seed, folder, rate)."""
    order: list[Any] = ["spaces", "start", 0.5, "stream", "rank", "epochs", 0.3]
    return [(task, what, seed, folder, rate) for what in order for task in TASKS for seed in range(SEEDS)]


def run(task: str, what: str | float, seed: int, folder: Path, rate: float) -> None:
    """Scores a group, or tunes on what the variants of `TRAINED` keep at a share."""
    torch.set_num_threads(1)
    if isinstance(what, str):
        score(task, what, seed, folder, rate)
        return
    file = cell_file(folder, task, what, seed)
    done = json.loads(file.read_text())["arms"] if file.exists() else {}
    if all(arm in done for arm in TRAINED[what]):
        return
    scores = dict(score(task, "spaces", seed, folder, rate)["scores"])
    if any(arm in STARTS for arm in TRAINED[what]):
        scores |= score(task, "start", seed, folder, rate)["scores"]
    drawn, examples, test, test_labels = cells.data(task, seed, SIZE)
    test, test_labels = test[torch.arange(TEST)], test_labels[:TEST]
    labels = drawn.signals.labels
    assert labels is not None
    k = budget.count(SIZE, what)
    for number, arm in enumerate(TRAINED[what]):
        if arm in done:
            continue
        generator = torch.Generator().manual_seed(1000 * seed + number)
        if arm in CONTROLS:
            selector, values, per_class = Random(), torch.zeros(SIZE), arm != "random"
        else:
            selector, values, per_class = TopHard(), torch.tensor(scores[arm]), False
        picks = budget.select(selector, values, k, labels=labels, per_class=per_class, generator=generator)
        cpu = time.process_time()
        model = tuner(cells.RANK)
        model.tune(examples[picks], labels[picks], seed, epochs=cells.EPOCHS, learning_rate=rate)
        seconds = time.process_time() - cpu
        right = model.test(test).argmax(1) == test_labels
        done[arm] = {
            "accuracy": float(right.double().mean()),
            "seconds": seconds,
            "wrong_kept": float(drawn.wrong[picks].double().mean()),
        }
        write_json(file, {"task": task, "keep": what, "seed": seed, "kept": k, "arms": done})
