"""Scores once a seed of a task, then a tuning of each arm at each share kept."""

from __future__ import annotations

import functools
import json
import resource
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import adapters
import tasks
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from serpette.data import budget
from serpette.data.proxy import Probe
from serpette.data.selectors import FlexRand, Random, TopHard
from serpette.evaluate import accuracy_by_class, detection_auc
from serpette.files import write_json
from serpette.scorers import DLC, EL2N, TSA, Forgetting, GraNd, MoSo

TASKS = ("fashion-vit/clean", "fashion-vit/wrong_labels", "movies-minilm/clean", "movies-minilm/wrong_labels")
KEEPS = (0.3, 0.5, 0.7, 0.9)
SIZE, SEEDS, EPOCHS, BATCH, RANK = 500, 5, 3, 16, 8
SAMPLE = 1024  # examples for the moments of TSA, its default: all of them here
DAMPING = 1e-3
RATES = (2e-3, 4e-3, 8e-3)
GAMMA = 0.5
SETTINGS = {
    "examples": SIZE, "seeds": SEEDS, "epochs": EPOCHS, "batch_size": BATCH, "optimizer": "AdamW, no decay",
    "schedule": "linear to 0", "rank": RANK, "alpha": 16, "targets": list(adapters.TARGETS),
    "layers": {"fashion-vit": "the last 4 of 8", "movies-minilm": "the last 3 of 6"},
    "test": {name: base.test for name, base in adapters.BASES.items()},
    "tokens": adapters.BASES["movies-minilm"].tokens, "precision": "bfloat16 autocast",
    "flex_rand_gamma": GAMMA, "wrong_labels": tasks.WRONG,
    "tsa": {"statistics": "sampled", "sample": SAMPLE, "damping": DAMPING, "warmup_steps": 32},
    "seconds": "CPU seconds of one thread; the other scorers' pass of the whole encoder counts as two of its "
    "upper half, each further point of DLC's path as one such pass",
}  # fmt: skip
CONTROLS: dict[str, bool | str] = {"random": False, "stratified_random": True, "equal_quotas": "equal"}
CORE = (
    "random",
    "stratified_random",
    "tsa+top_hard/global",
    "loss+top_hard/global",
    "tsa+flex_rand",
    "tsa+top_hard",
)
OTHERS = (
    "equal_quotas",
    "dlc+flex_rand",
    "el2n+top_hard",
    "grand+top_hard",
    "forgetting+top_hard",
    "moso+top_hard",
)
LATER = ("unmasked_loss+flex_rand", "loss+top_hard")
SAME_STEPS = ("random/same_steps", "tsa+top_hard/global/same_steps")  # at keep 50 %
MAKE_UPS = ("clean", "wrong_labels")


_small: dict[str, int] = {}  # for `--quick`: examples, and those of the pool and of the test set


def make_small() -> None:
    """From now on, in this process, everything is a smoke run."""
    _small.update(size=150, pool=400, test=200)


def examples() -> int:
    """That a seed draws."""
    return _small.get("size", SIZE)


def cell_file(folder: Path, task: str, keep: float, seed: int) -> Path:
    """Where the arms of one share and seed lie; written anew after each arm."""
    return folder / task.replace("/", "-") / f"keep{keep:g}-seed{seed}.json"


def jobs(folder: Path) -> list[tuple]:
    """Arguments of `run`, what matters most first."""
    order: list[tuple[tuple[str, ...], float]] = [(CORE, 0.5), (("no_pruning",), 1.0), (OTHERS, 0.5)]
    order += [(CORE, 0.7), (SAME_STEPS, 0.5), (CORE, 0.3), (CORE, 0.9)]
    order += [(OTHERS, keep) for keep in (0.3, 0.7, 0.9)] + [(LATER, 0.5)]
    return [(arms, t, keep, seed, folder) for arms, keep in order for t in TASKS for seed in range(SEEDS)]


@functools.lru_cache(maxsize=4)
def tuner(name: str) -> adapters.Tuner:
    """One a process."""
    torch.set_num_threads(1)
    return adapters.Tuner(name, RANK, precision=torch.bfloat16)


@functools.lru_cache(maxsize=4)
def pool(name: str) -> tasks.Pool:
    """The features of the frozen encoder, once a process."""
    return tasks.features(name, _small.get("pool"), _small.get("test"))


def activations(name: str) -> tuple[dict[int, int], adapters.Activations, adapters.Activations, Tensor]:
    """As `adapters.activations`; one seed more than the tables have, for the learning rate."""
    return adapters.activations(name, MAKE_UPS, SEEDS + 1, examples(), _small.get("pool"), _small.get("test"))


def data(
    task: str, seed: int, size: int | None = None
) -> tuple[tasks.Task, adapters.Activations, adapters.Activations, Tensor]:
    """(what the seed drew, its activations, those of the test set, the test labels); at most `SIZE`."""
    name, make_up = task.split("/")
    size = size or examples()
    scorer = DLC(points=tasks.POINTS)
    drawn = tasks.draw(pool(name), make_up, seed, [scorer.path, DLC(points=[0]).path], size)
    place, train, test, labels = activations(name)
    return drawn, train[torch.tensor([place[int(row)] for row in drawn.rows])], test, labels


def choose_rate(name: str, folder: Path) -> float:
    """The learning rate of least validation loss: half of an extra seed trains, the other half validates."""
    file = folder / f"rate-{name}.json"
    if not file.exists():
        losses = {rate: 0.0 for rate in RATES}
        for make_up in MAKE_UPS:
            drawn, hidden, _, _ = data(f"{name}/{make_up}", SEEDS)
            labels = drawn.signals.labels
            assert labels is not None
            mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEEDS))
            train, held = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
            for rate in RATES:
                tuner(name).tune(hidden[train], labels[train], SEEDS, epochs=EPOCHS, learning_rate=rate)
                loss = cross_entropy(tuner(name).test(hidden[held]), labels[held])
                losses[rate] += float(loss) / len(MAKE_UPS)
        best = min(losses, key=lambda rate: losses[rate])
        write_json(file, {"learning_rate": best, "validation_loss": {f"{k:g}": v for k, v in losses.items()}})
    return json.loads(file.read_text())["learning_rate"]


def score(task: str, seed: int, folder: Path) -> dict[str, Any]:
    """Every score of the seed's training examples, with its CPU seconds; from the file if it is there."""
    file = folder / task.replace("/", "-") / f"scores-seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    name = task.split("/")[0]
    drawn, hidden, _, _ = data(task, seed)
    labels = drawn.signals.labels
    assert labels is not None
    rate = choose_rate(name, folder)
    tsa = TSA(sample=SAMPLE, damping=DAMPING, tokens=32, warmup_learning_rate=rate)
    cpu, wall = time.process_time(), time.perf_counter()
    found = tuner(name).score(hidden, labels, [tsa, adapters.WarmLoss(tuner(name), tsa)], seed)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    values, parts = dict(found.values), found.cost["seconds"]
    warm = parts["warmup"] * cpu / wall
    cpu_forward = time.process_time()
    with torch.no_grad(), tuner(name).autocast():
        for rows in torch.arange(len(labels)).split(32):
            tuner(name).model(**hidden[rows].inputs())
    forward = time.process_time() - cpu_forward
    seconds = {"tsa": cpu, "warmup": warm, "loss": warm + forward}
    seconds["moments"] = parts["moments"] * cpu / wall
    unmasked = 2 * forward  # half of the encoder lies below the activations
    path = (len(tasks.POINTS) - 1) * unmasked
    cpu = time.process_time()
    signals = Probe().train(drawn.signals)
    probe = time.process_time() - cpu
    others = (DLC(points=tasks.POINTS), Unmasked(), EL2N(), GraNd(), Forgetting(), MoSo())
    for scorer in others:
        cpu = time.process_time()
        values[scorer.name] = scorer(signals)
        seconds[scorer.name] = time.process_time() - cpu + unmasked
        seconds[scorer.name] += path if scorer.name == "dlc" else 0.0
        seconds[scorer.name] += probe if scorer.needs & {"logits", "early_logits", "history"} else 0.0
    held = {
        "scores": {n: v.tolist() for n, v in values.items()},
        "seconds": seconds,
        "wrong": drawn.wrong.int().tolist(),
        "labels": labels.tolist(),
        "peak_bytes": found.cost["peak_bytes"],
        "detection_auc": (
            {n: detection_auc(v, drawn.wrong) for n, v in values.items()} if drawn.wrong.any() else {}
        ),
    }
    write_json(file, held)
    return held


class Unmasked(DLC):
    """The plain loss of the prototypes: DLC without its masked path."""

    name = "unmasked_loss"

    def __init__(self) -> None:
        super().__init__(points=[0])


def picks_of(arm: str, scores: dict[str, Any], task: str, keep: float, seed: int) -> Tensor:
    """(k,) positions that the arm keeps."""
    labels = torch.tensor(scores["labels"])
    k = budget.count(len(labels), keep)
    if arm == "no_pruning":
        return torch.arange(len(labels))
    arm = arm.removesuffix("/same_steps")
    key = blake2b(f"{seed}/{k}/{arm}/{task}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    if arm in CONTROLS:
        selector, values, per_class = Random(), torch.zeros(len(labels)), CONTROLS[arm]
    else:
        scorer, _, rest = arm.partition("+")
        how, _, scope = rest.partition("/")
        selector = FlexRand(GAMMA) if how == "flex_rand" else TopHard()
        values, per_class = torch.tensor(scores["scores"][scorer], dtype=torch.float64), scope != "global"
    return budget.select(selector, values, k, labels=labels, per_class=per_class, generator=generator)


def run(arms: tuple[str, ...], task: str, keep: float, seed: int, folder: Path) -> int:
    """The arms that are missing at one share and seed; how many were trained now."""
    torch.set_num_threads(1)
    file = cell_file(folder, task, keep, seed)
    done = json.loads(file.read_text())["arms"] if file.exists() else {}
    missing = [arm for arm in arms if arm not in done]
    if not missing:
        return 0
    name = task.split("/")[0]
    rate, scores = choose_rate(name, folder), score(task, seed, folder)
    drawn, hidden, test, test_labels = data(task, seed)
    labels = drawn.signals.labels
    assert labels is not None
    for arm in missing:
        picks = picks_of(arm, scores, task, keep, seed)
        steps = EPOCHS * -(-len(labels) // BATCH) if arm.endswith("same_steps") else None
        cpu = time.process_time()
        tuner(name).tune(
            hidden[picks],
            labels[picks],
            seed,
            epochs=EPOCHS,
            learning_rate=rate,
            batch_size=BATCH,
            steps=steps,
        )
        seconds = time.process_time() - cpu
        logits = tuner(name).test(test)
        classes = drawn.signals.num_classes
        kept, size = (torch.bincount(y, minlength=classes) for y in (labels[picks], labels))
        scorer = arm.split("+")[0]
        done[arm] = {
            "accuracy": float((logits.argmax(1) == test_labels).double().mean()),
            "worst_class": float(accuracy_by_class(logits, test_labels, classes).min()),
            "seconds": seconds,
            "scoring": scores["seconds"].get(scorer, 0.0),
            "wrong_kept": float(drawn.wrong[picks].double().mean()),
            "least_kept_class": float((kept / size).min()),
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(
            file,
            {"task": task, "keep": keep, "seed": seed, "kept": len(picks), "peak_bytes": peak, "arms": done},
        )
    return len(missing)
