"""Data of the head-only benchmarks: features cached once, and tasks that a seed makes from them.

A set of features belongs to one encoder and one data set: a pool of training examples, seen by the
unmasked model and by the masked ones of DLC's path, and a test set. A seed then draws the training
examples from the pool, spoils their labels or thins their classes.

Letters: N examples, C classes, D features, P path points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from serpette import zoo
from serpette.adviser.head import fit_head
from serpette.data import budget
from serpette.data.examples import Examples
from serpette.data.observe import observe
from serpette.data.selectors import Random
from serpette.scorers import DLC
from serpette.types import PathFeatures, PathSpec, Signals

POINTS = (0, 0.5, 0.25, 0.75, 0.125)  # the paper's scores stop changing at five models

VIT = {"layers": 8, "image_size": 56, "num_labels": 10}
LITE = {"image_size": 64, "num_labels": 10}
# name: (data set, pool, test, model, its options, batch size)
SETS: dict[str, tuple[str, int, int, str, dict[str, int], int]] = {
    "fashion-vit": ("fashion-mnist", 8000, 5000, "vit-s", VIT, 64),
    "fashion-effnet": ("fashion-mnist", 3000, 2000, "efficientnet-lite0", LITE, 64),
    "movies-minilm": ("movie-snippets", 6000, 2000, "minilm-l6", {}, 32),
    "movies-rating": ("movie-snippets:rating", 6000, 2000, "minilm-l6", {}, 32),  # a regression: no path
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
        regression = source.endswith(":rating")
        model = zoo.load_model(model_name, task="regression" if regression else None, **options)
        image = {k: v for k, v in options.items() if k == "image_size"}
        processor = zoo.load_processor(model_name, **image)
        train = zoo.load_dataset(source, "train", limit=pool_limit)
        test = zoo.load_dataset(source, "test", limit=test_limit)
        if source.startswith("movie-snippets"):  # texts of a length side by side: batches with less padding
            train, test = (
                d.select(np.argsort([len(t) for t in d["text"]], kind="stable")) for d in (train, test)
            )
        seen = []
        path = [] if regression else [DLC(points=POINTS)]
        for part, data, scorers in (("train", train, path), ("test", test, [])):
            examples = Examples(data, processing_class=processor)
            folder = cache() / "observed" / f"{file.stem}-{part}"
            seen.append(observe(model, examples, scorers, batch_size=batch_size, folder=folder))
        pool, held_out = seen[0].signals, seen[1].signals
        stacked = pool.embeddings[None].clone()
        for path in pool.paths.values():
            stacked = torch.empty(len(path.points), *pool.embeddings.shape)
            for rows, part in path.chunks():
                stacked[:, rows] = part
        tensors = {
            "path": stacked,
            "labels": pool.labels,
            "test": held_out.embeddings,
            "test_labels": held_out.labels,
        }
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


MAKE_UPS = ("clean", "wrong_labels", "long_tail")
WRONG, TAIL = 0.2, 50  # share of labels that are wrong; the largest class over the smallest


@dataclass
class Task:
    """What one seed makes of a pool: training signals, and a test set in the same space.

    Args:
        signals: of the N training examples; `labels` as a user would have them, wrong ones included,
            `embeddings` standardised and projected on the first principal components of this training
            set, `paths` raw.
        wrong: (N,) True where the label was made wrong.
        test: (M, D) in the space of `signals.embeddings`.
        rows: (N,) of the pool.
    """

    signals: Signals
    wrong: Tensor
    test: Tensor
    test_labels: Tensor
    rows: Tensor


def draw(
    pool: Pool,
    make_up: str,
    seed: int,
    paths: Sequence[PathSpec] = (),
    size: int = 4000,
    components: int = 192,
) -> Task:
    """`size` examples drawn class by class from the pool, then spoilt or thinned; all of it by `seed`.

    Args:
        make_up: `"clean"`; `"wrong_labels"`, where a fifth of the labels moves to another class;
            `"long_tail"`, where class sizes fall geometrically to a fiftieth, in an order of the classes
            that the seed permutes. The test set is never touched.
        paths: which the scorers will look up; each gets the pool's models, as many as it has points.
    """
    assert make_up in MAKE_UPS and (pool.num_classes or make_up == "clean")
    rng = np.random.default_rng([seed, 2026])
    group = pool.labels if pool.num_classes else torch.zeros(len(pool.labels), dtype=torch.long)
    quotas = budget.split(group, size)
    rows = [rng.permutation(np.flatnonzero(group.numpy() == c))[:quota] for c, quota in quotas.items()]
    if make_up == "long_tail":
        shares = TAIL ** (-rng.permutation(len(rows)) / (len(rows) - 1))
        rows = [r[: max(1, round(len(r) * share))] for r, share in zip(rows, shares, strict=True)]
    rows = torch.from_numpy(np.sort(np.concatenate(rows)))
    labels = pool.labels[rows].clone()
    wrong = torch.zeros(len(rows), dtype=torch.bool)
    if make_up == "wrong_labels":
        wrong[rng.permutation(len(rows))[: round(WRONG * len(rows))]] = True
        shift = torch.from_numpy(rng.integers(1, pool.num_classes, len(rows)))
        labels[wrong] = (labels[wrong] + shift[wrong]) % pool.num_classes

    x_ND, x_MD = pool.path[0, rows], pool.test
    mean_D, std_D = x_ND.mean(0), x_ND.std(0).clamp(min=1e-6)
    x_ND, x_MD = (
        (x_ND - mean_D) / std_D / x_ND.shape[1] ** 0.5,
        (x_MD - mean_D) / std_D / x_ND.shape[1] ** 0.5,
    )
    _, axes_DD = torch.linalg.eigh(x_ND.T.double() @ x_ND.double())
    axes_DK = axes_DD[:, -components:].flip(1).float()  # mean square norm of an example: about 1

    def chunks(points: int):
        for part in torch.arange(len(rows)).split(500):
            yield part, pool.path[:points, rows[part]]

    def along(spec: PathSpec) -> PathFeatures:
        points = min(len(spec.points), len(pool.path))
        return PathFeatures(tuple(Fraction(str(p)) for p in POINTS[:points]), lambda: chunks(points))

    signals = Signals(
        ids=pool.ids[rows.numpy()],
        labels=labels,
        num_classes=pool.num_classes,
        embeddings=x_ND @ axes_DK,
        paths={spec: along(spec) for spec in paths},
        seed=seed,
    )
    return Task(signals, wrong, x_MD @ axes_DK, pool.test_labels, rows)


PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def choose_penalty(task: Task, k: int, seed: int) -> float:
    """The penalty that suits a stratified random subset of k training examples, by splits of that subset.

    One choice for every method, from training data with its noise and imbalance alone. Small subsets are
    split several times, until about 400 validation examples have been seen.
    """
    signals = task.signals
    generator = torch.Generator().manual_seed(seed)
    picks = budget.select(
        Random(), torch.zeros(len(signals)), k, labels=signals.labels, per_class=True, generator=generator
    )
    held = max(1, round(0.2 * k))
    right = dict.fromkeys(PENALTIES, 0.0)
    for _ in range(min(5, -(-300 // held))):
        mixed = picks[torch.randperm(k, generator=generator)]
        val, train = mixed[:held], mixed[held:]
        for penalty in PENALTIES:
            W, b = fit_head(signals.embeddings[train], signals.labels[train], signals.num_classes, penalty)
            right[penalty] += float(
                ((signals.embeddings[val] @ W + b).argmax(1) == signals.labels[val]).sum()
            )
    return max(PENALTIES, key=lambda p: (right[p], p))


def in_parallel(job: Callable, arguments: list[tuple], workers: int, what: str) -> None:
    """Calls `job(*a)` for each a in processes of their own, with a bar."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, bar:
        line = bar.add_task(what, total=len(arguments))
        for done in as_completed([pool.submit(job, *a) for a in arguments]):
            done.result()
            bar.advance(line)


def four_digits(text: str) -> float:
    """For `json.loads(parse_float=...)`: numbers as they are committed."""
    return float(f"{float(text):.4g}")


if __name__ == "__main__":  # python benchmarks/tasks.py [set ...] fills the cache
    for wanted in sys.argv[1:] or SETS:
        made = features(wanted)
        print(wanted, tuple(made.path.shape), tuple(made.test.shape), made.seconds, flush=True)
