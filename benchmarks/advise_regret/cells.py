"""One seed of a task: the advice on its training examples, then what every choice reaches on the test."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import tasks
import torch

from serpette import zoo
from serpette.adviser import probes
from serpette.adviser.head import choose_penalty, cross_fitted
from serpette.adviser.health import near_groups, wrong_labels
from serpette.adviser.recommend import Noise, Outlook, outlooks
from serpette.data import budget
from serpette.data.examples import Examples
from serpette.data.features import find_head
from serpette.files import write_json
from serpette.tuning import trainable

BATCH = 16
FASHION, MOVIES = (0.05, 0.1, 0.3, 0.5, 0.7), (0.1, 0.3, 0.5, 0.7)
TASKS = {  # name: (features, make-up, examples, shares, metric)
    "fashion clean": ("fashion-vit", "clean", 4000, FASHION, "accuracy"),
    "fashion wrong labels": ("fashion-vit", "wrong_labels", 4000, FASHION, "accuracy"),
    "fashion long tail": ("fashion-vit", "long_tail", 4000, FASHION, "balanced_accuracy"),
    "movies clean": ("movies-minilm", "clean", 4000, MOVIES, "accuracy"),
    "movies wrong labels": ("movies-minilm", "wrong_labels", 4000, MOVIES, "accuracy"),
    "movie ratings": ("movies-rating", "clean", 4000, MOVIES, "r2"),
}


def full_seconds(source: str) -> dict[str, float]:
    """Processor seconds of a LoRA step (median of 7), and of reading an example once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset, _, _, model_name, options, _ = tasks.SETS[source]
    regression = source == "movies-rating"
    kind = {"task": "regression"} if regression else {"num_labels": 2}
    model = zoo.load_model(model_name, **(kind | options))
    size = options.get("image_size")
    processor = zoo.load_processor(model_name, **({"image_size": size} if size else {}))
    examples = Examples(zoo.load_dataset(dataset, "train", limit=256), processing_class=processor)
    start = time.process_time()
    with torch.inference_mode():
        for first in range(0, 256, 64):
            model(**examples.read(range(first, first + 64))[1])
    reading = (time.process_time() - start) / 256
    model = trainable(model, find_head(model), "lora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    seconds = []
    for step in range(9):
        start = time.process_time()
        _, inputs, labels, _ = examples.read(range(BATCH * step, BATCH * (step + 1)))
        wanted = torch.tensor(labels, dtype=torch.float32 if regression else torch.long)
        model(**inputs, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return {"step": statistics.median(seconds[2:]), "reading": reading}


def run(name: str, seed: int, folder: Path, quick: bool = False) -> None:
    """One task and seed: the advice, then what every choice reaches on the test examples."""
    file = folder / f"{name}-{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    source, make_up, size, keeps, metric = TASKS[name]
    pool = tasks.features(source)
    task = tasks.draw(pool, make_up, seed, size=600 if quick else size)
    signals, C = task.signals, task.signals.num_classes
    start = time.process_time()
    choices = probes.choices_for(signals.task, signals.labels)
    raw = pool.path[0, task.rows]
    groups = near_groups(raw)
    measured = probes.measure(
        signals, choices, keeps, features=signals.embeddings, groups=groups, metric=metric, seed=seed
    )  # the space of the heads is that of the benchmarks
    noise = None
    if C:
        logits = cross_fitted(raw, signals.labels, C, seed=seed, ids=signals.ids, groups=groups)
        found = wrong_labels(logits, signals.labels, signals.ids, [str(c) for c in range(C)])
        if found["share"] > 0:
            noise = Noise(found["share"], (found["high"] - found["low"]) / 3.92, C)
            noise = noise if noise.identified else None
    predicted = outlooks(measured, len(signals), noise=noise, test_examples=len(task.test))
    seconds = time.process_time() - start
    actual = _actual(task, measured, metric, seed)
    write_json(
        file,
        {
            "task": name,
            "seed": seed,
            "examples": len(signals),
            "seconds": seconds,
            "wrong_labels": noise.share if noise else 0.0,
            "wrong_labels_true": float(task.wrong.double().mean()),
            "outlooks": [_entry(o, actual) for o in predicted],
        },
    )


def _actual(task: tasks.Task, measured: probes.Measured, metric: str, seed: int) -> dict[tuple, float]:
    """{(choice, keep): points on the test examples}, of a head on what is kept of all training examples."""
    signals, C = task.signals, task.signals.num_classes
    scores, _ = probes.scores_of(signals, measured.choices)
    found = {}
    for keep in (*measured.keeps, 1.0):
        k = budget.count(len(signals), keep)
        if C:
            penalty = tasks.choose_penalty(task, k, seed)
        else:
            some = torch.randperm(len(signals), generator=torch.Generator().manual_seed(seed))[:k]
            penalty = choose_penalty(
                signals.embeddings[some], signals.labels[some], 0, signals.ids[some.numpy()], seed
            )
        judged = (task.test, task.test_labels, C, metric)
        if keep == 1:
            found[probes.RANDOM.name, keep] = probes.head_quality(
                signals.embeddings, signals.labels, penalty, *judged
            )
            continue
        for choice in measured.choices:
            picks = probes.picks_of(signals, choice, scores, k, seed)
            kept = signals.embeddings[picks], signals.labels[picks]
            found[choice.name, keep] = probes.head_quality(*kept, penalty, *judged)
    return found


def _entry(o: Outlook, actual: dict[tuple, float]) -> dict[str, Any]:
    return {
        "choice": o.choice.name,
        "by_chance": o.choice.by_chance,
        "keep": o.keep,
        "value": o.value,
        "low": o.low,
        "high": o.high,
        "loss": o.loss,
        "loss_low": o.loss_low,
        "loss_high": o.loss_high,
        "beats_random": o.beats_random,
        "actual": actual[o.choice.name, o.keep],
    }
