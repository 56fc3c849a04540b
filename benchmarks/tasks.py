"""Data of the head-only benchmarks: features cached once, and tasks that a seed makes from them.

A set of features belongs to one encoder and one data set: a pool of training examples, seen by the
unmasked model and by the masked ones of DLC's path, and a test set. A seed then draws the training
examples from the pool, spoils their labels or thins their classes.

Letters: N examples, C classes, D features, P path points.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from serpette import zoo
from serpette.data.examples import Examples
from serpette.data.observe import observe
from serpette.scorers import DLC
from serpette.types import PathFeatures, PathSpec, Signals

POINTS = (0, 0.5, 0.25, 0.75, 0.125)  # the paper's scores stop changing at five models

# name: (data set, pool, test, model, its options, batch size)
SETS = {
    "fashion-vit": ("fashion-mnist", 8000, 5000, "vit-s", {"layers": 8, "image_size": 56, "num_labels": 10}, 64),
    "fashion-effnet": ("fashion-mnist", 8000, 5000, "efficientnet-lite0", {"image_size": 64, "num_labels": 10}, 64),
    "movies-minilm": ("movie-snippets", 6000, 2000, "minilm-l6", {}, 32),
}


def cache() -> Path:
    """The benchmarks' folder in the cache of the zoo; it is made."""
    folder = zoo.cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Pool:
    """Features of one encoder on one data set.

    Args:
        path: (P, N, D) features of the pool under each model of DLC's path; point 0 is unmasked.
        test: (M, D) unmasked features of the test set.
        seconds: of decoding, of the unmasked pass and of the other points, for the whole pool.
    """

    ids: np.ndarray
    path: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    seconds: dict[str, float]


def features(name: str, pool_size: int | None = None, test_size: int | None = None) -> Pool:
    """The set `name` of `SETS`: from the cache, else computed, in pieces that outlive a kill."""
    source, pool_limit, test_limit, model_name, options, batch_size = SETS[name]
    pool_limit, test_limit = pool_size or pool_limit, test_size or test_limit
    file = cache() / f"{name}-{pool_limit}-{test_limit}.safetensors"
    if not file.exists():
        model = zoo.load_model(model_name, **options)
        image = {k: v for k, v in options.items() if k == "image_size"}
        processor = zoo.load_processor(model_name, **image)
        train = zoo.load_dataset(source, "train", limit=pool_limit)
        test = zoo.load_dataset(source, "test", limit=test_limit)
        if source == "movie-snippets":  # texts of a length side by side: batches with less padding
            train, test = (d.select(np.argsort([len(t) for t in d["text"]], kind="stable")) for d in (train, test))
        seen = []
        for part, data, scorers in (("train", train, [DLC(points=POINTS)]), ("test", test, [])):
            examples = Examples(data, processing_class=processor)
            folder = cache() / "observed" / f"{file.stem}-{part}"
            seen.append(observe(model, examples, scorers, batch_size=batch_size, folder=folder))
        pool, held_out = seen[0].signals, seen[1].signals
        (path,) = pool.paths.values()
        stacked = torch.empty(len(path.points), *pool.embeddings.shape)
        for rows, part in path.chunks():
            stacked[:, rows] = part
        tensors = {"path": stacked, "labels": pool.labels, "test": held_out.embeddings, "test_labels": held_out.labels}
        facts = {"ids": "\n".join(pool.ids.tolist()), "num_classes": str(pool.num_classes)}
        facts |= {f"seconds:{k}": str(v) for k, v in seen[0].seconds.items()}
        part_file = file.with_suffix(".part")
        save_file(tensors, part_file, metadata=facts)
        part_file.replace(file)
    with safe_open(file, "pt") as held:
        tensors, facts = {k: held.get_tensor(k) for k in held.keys()}, held.metadata()  # noqa: SIM118
    return Pool(
        ids=np.array(facts["ids"].split("\n")),
        num_classes=int(facts["num_classes"]),
        seconds={k.partition(":")[2]: float(v) for k, v in facts.items() if k.startswith("seconds:")},
        **tensors,
    )


if __name__ == "__main__":  # python benchmarks/tasks.py [set ...] fills the cache
    for wanted in sys.argv[1:] or SETS:
        made = features(wanted)
        print(wanted, tuple(made.path.shape), tuple(made.test.shape), made.seconds, flush=True)
