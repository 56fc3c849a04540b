"""What each choice of examples would reach, by heads on frozen features that are cross-fitted.

The observed examples are dealt into K folds, several times. Of all folds but one a choice keeps its share, a
head is fitted on what it keeps, and the fold that was left out judges it: nothing is scored, chosen or fitted
on the examples that judge, nor on duplicates of them. Two things are the same in all trials: the axes of the
features, which know no labels, and the penalties of the heads, which the first pool chooses. Every choice
sees the same folds, so that differences are paired.

Letters: N examples, D features, C classes, K folds, J = K x repeats trials.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from ..data import budget
from ..data.proxy import TRAINING_SIGNALS, Probe
from ..data.selectors import registry as selectors
from ..files import write_json
from ..scorers import registry as scorers
from ..types import Signals
from .head import choose_penalty, fit_head, folds_of, whitened

KEEPS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
IMBALANCE = 1.5  # largest class over the smallest, from which on equal quotas are another choice


@dataclass(frozen=True)
class Choice:
    """A way to choose examples: a scorer, a selector, and how the budget is split over the classes."""

    name: str
    scorer: str | None = None
    select: str = "random"
    per_class: bool | Literal["equal"] = True
    select_options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def by_chance(self) -> bool:
        return self.scorer is None


RANDOM, EQUAL = Choice("random"), Choice("random, equal quotas", per_class="equal")
# The best of our tables, not all there is: DLC's and the other training signals rank much like these, and
# k-center, contextual diversity and the hardest by EL2N or GraNd were below chance.
SCORED = (
    Choice("herding", "herding", "top_hard"),
    Choice("forgetting + flex_rand", "forgetting", "flex_rand", True, {"gamma": 0.5}),
    Choice("loss + flex_rand", "loss", "flex_rand", True, {"gamma": 0.5}),
    Choice("smallest margin", "margin", "top_hard"),
    Choice("least optimisation complexity", "optimisation_complexity", "top_easy"),
)


def choices_for(task: str, labels: Tensor | None, wanted: Sequence[Choice] = SCORED) -> list[Choice]:
    """The controls and those of `wanted` that mean something to the task.

    Each is there with equal quotas, too, where the largest class is `IMBALANCE` times the smallest.
    """
    able = [c for c in wanted if c.scorer is None or task in scorers[c.scorer].tasks]
    if task != "classification":
        return [Choice(c.name, c.scorer, c.select, False, c.select_options) for c in (RANDOM, *able)]
    assert labels is not None
    sizes = torch.bincount(labels)
    if sizes.max() < IMBALANCE * sizes[sizes > 0].min():
        return [RANDOM, *able]
    equal = [Choice(f"{c.name}, equal quotas", c.scorer, c.select, "equal", c.select_options) for c in able]
    return [RANDOM, EQUAL, *able, *equal]


@dataclass
class Measured:
    """What the probes found.

    Args:
        values: {(choice, keep): (J,) metric of each trial}, keep 1.0 under the name of `RANDOM` for all.
        trained: examples in a pool, i.e. of which a share is kept.
        held: examples that judge a trial.
        folds: K.
        seconds: {choice: of scoring a pool, once}, a mean over the trials.
    """

    choices: list[Choice]
    keeps: tuple[float, ...]
    values: dict[tuple[str, float], np.ndarray]
    trained: int
    held: int
    folds: int
    seconds: dict[str, float]

    @property
    def whole(self) -> np.ndarray:
        """(J,) where everything is kept."""
        return self.values[RANDOM.name, 1.0]

    def interval(self, values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
        """Mean and interval of (J,) trials, see `standard_error`."""
        half = float(student.ppf(0.5 + level / 2, max(1, len(values) - 1))) * self.standard_error(values)
        return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half

    def standard_error(self, values: np.ndarray) -> float:
        """Of the mean of (J,) trials whose training examples overlap.

        s sqrt(1 / J + 1 / (K - 1)): Nadeau and Bengio 2003, "Inference for the generalization error", eq. 9;
        a plain s / sqrt(J) would be far too sure.
        """
        if len(values) < 2:
            return float("inf")
        return float(values.std(ddof=1) * np.sqrt(1 / len(values) + 1 / (self.folds - 1)))


def measure(
    signals: Signals,
    choices: Sequence[Choice],
    keeps: Sequence[float] = KEEPS,
    *,
    features: Tensor | None = None,
    groups: Tensor | None = None,
    metric: str = "accuracy",
    folds: int = 5,
    repeats: int = 2,
    seed: int = 0,
    folder: Path | None = None,
    go_on: Callable[[], bool] = lambda: True,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Each choice at each share kept, in `folds` x `repeats` trials.

    Args:
        signals: of the observed examples, with embeddings and labels.
        keeps: shares in (0, 1); those that leave a class without an example are left out.
        features: (N, D) what the heads see; default: the embeddings, standardised, 192 components.
        groups: (N,) int64 of duplicates, which share a fold, see `folds_of`.
        metric: `"accuracy"`, `"balanced_accuracy"` (mean over the classes) or `"r2"`.
        folder: where finished trials are kept, so that a killed measurement goes on.
        go_on: asked before each trial after the first `folds`; False ends with those that are there.
        advance: called after each trial.

    Raises:
        ValueError: fewer than two examples of a class or a fold.
    """
    labels, C = signals.require("labels", "advise"), signals.num_classes
    x_ND = whitened(signals.require("embeddings", "advise")) if features is None else features
    classes = labels if C else None
    if len(signals) < 2 * folds:
        raise ValueError(f"{len(signals)} examples are too few to advise on; give at least {2 * folds}")
    pool_size = len(signals) - -(-len(signals) // folds)
    present = len(labels.unique()) if C else 1
    keeps = tuple(k for k in sorted({*keeps} - {1.0}) if budget.count(pool_size, k) >= max(2 * present, 4))
    penalties: dict[float, float] = {}
    trials: list[dict[str, float]] = []
    for trial in range(folds * repeats):
        repeat, number = divmod(trial, folds)
        file = folder / f"{trial:03d}.json" if folder else None
        if file is not None and file.exists():
            trials.append(json.loads(file.read_text(encoding="utf-8")))
            advance()
            continue
        if repeat and not go_on():
            break
        fold_N = folds_of(signals.ids, classes, folds, 1000 * seed + repeat, groups)
        pool, held = (fold_N != number).nonzero()[:, 0], (fold_N == number).nonzero()[:, 0]
        if not penalties:  # of the first pool, also where its trial was done before
            first = (folds_of(signals.ids, classes, folds, 1000 * seed, groups) != 0).nonzero()[:, 0]
            penalties = _penalties(
                x_ND[first],
                labels[first],
                C,
                signals.ids[first.numpy()],
                keeps,
                seed,
                None if groups is None else groups[first],
            )
        judged = (x_ND[held], labels[held], C, metric)
        found = {_key(RANDOM.name, 1.0): head_quality(x_ND[pool], labels[pool], penalties[1.0], *judged)}
        sub = signals.subset(pool)
        scores, spent = scores_of(sub, choices)
        for choice in choices:
            found[_seconds(choice)] = spent.get(choice.scorer or "", 0.0)
            for keep in keeps:
                picks = picks_of(sub, choice, scores, budget.count(len(pool), keep), 1000 * seed + trial)
                found[_key(choice.name, keep)] = head_quality(
                    x_ND[pool[picks]], labels[pool[picks]], penalties[keep], *judged
                )
        trials.append(found)
        if file is not None:
            write_json(file, found)
        advance()
    values = {
        (choice.name, keep): np.array([t[_key(choice.name, keep)] for t in trials])
        for choice in choices
        for keep in keeps
    }
    values[RANDOM.name, 1.0] = np.array([t[_key(RANDOM.name, 1.0)] for t in trials])
    seconds = {c.name: float(np.mean([t[_seconds(c)] for t in trials])) for c in choices}
    return Measured(list(choices), keeps, values, pool_size, len(signals) - pool_size, folds, seconds)


def _key(name: str, keep: float) -> str:
    return f"{name} @ {keep:g}"


def _seconds(choice: Choice) -> str:
    return f"seconds of {choice.name}"


def scores_of(signals: Signals, choices: Sequence[Choice]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """{scorer: (N,)}, and {scorer: seconds}, with those of the training signals that it needs."""
    start, training = time.perf_counter(), 0.0
    if any(scorers[c.scorer].needs & TRAINING_SIGNALS for c in choices if c.scorer):
        signals = Probe().train(signals)
        training = time.perf_counter() - start
    found, seconds = {}, {}
    for name in dict.fromkeys(c.scorer for c in choices if c.scorer):
        start = time.perf_counter()
        method = scorers.make(name)
        found[name] = method(signals)
        seconds[name] = time.perf_counter() - start + (training if method.needs & TRAINING_SIGNALS else 0.0)
    return found, seconds


def _penalties(
    x_ND: Tensor,
    y_N: Tensor,
    C: int,
    ids: np.ndarray,
    keeps: Sequence[float],
    seed: int,
    groups: Tensor | None,
) -> dict[float, float]:
    """{keep: penalty}, each from one stratified random subset of that size, so that it favours no choice."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for keep in (*keeps, 1.0):
        k = budget.count(len(x_ND), keep)
        picks = budget.select(
            selectors.make("random"), torch.zeros(len(x_ND)), k,
            labels=y_N if C else None, per_class=bool(C), generator=generator,
        )  # fmt: skip
        kept = None if groups is None else groups[picks]
        found[keep] = choose_penalty(x_ND[picks], y_N[picks], C, ids[picks.numpy()], seed, kept)
    return found


def picks_of(signals: Signals, choice: Choice, scores: dict[str, Tensor], k: int, seed: int) -> Tensor:
    """(k,) rows of `signals` that a choice keeps, by the scores of `scores_of`."""
    return budget.select(
        selectors.make(choice.select, **choice.select_options),
        scores[choice.scorer] if choice.scorer else torch.zeros(len(signals)),
        k,
        labels=signals.labels if signals.num_classes else None,
        per_class=choice.per_class if signals.num_classes else False,
        generator=torch.Generator().manual_seed(seed),
        embeddings=signals.embeddings,
    )


def head_quality(
    x_kD: Tensor, y_k: Tensor, penalty: float, x_MD: Tensor, y_M: Tensor, C: int, metric: str
) -> float:
    """The metric, see `quality_of`, of a head that is fitted on k examples and judged by M others."""
    W, b = fit_head(x_kD, y_k, C, penalty)
    return quality_of(x_MD @ W + b, y_M, metric)


def each_of(output_MC: Tensor, y_M: Tensor, metric: str) -> Tensor:
    """(M,) each example's part of the metric: whose mean it is, as a share."""
    if metric == "r2":
        return 1 - (output_MC[:, 0] - y_M).square() / y_M.var(correction=0).clamp(min=1e-12)
    right = (output_MC.argmax(1) == y_M).double()
    if metric == "accuracy":
        return right
    sizes = torch.bincount(y_M).double()
    return right * len(y_M) / (len(y_M.unique()) * sizes[y_M])


def quality_of(output_MC: Tensor, y_M: Tensor, metric: str) -> float:
    """The metric of M examples, in points: percent correct, also as a mean over the classes, or 100 R^2."""
    return 100 * float(each_of(output_MC, y_M, metric).mean())
