"""An open hyperparameter of a selector (FlexRand's gamma), chosen by a probe on a validation split.

20 % of the examples, stratified, are held out: they are in no prototype and in no pool. For each
candidate and a few draws, a ridge classifier is fitted in closed form on the frozen features of the
picked examples. Jiang et al. 2025, appendix C.1. It never sees a test set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..types import PerClass, Selector, Signals, uniform_of
from . import budget


def search(
    selector: Any,
    signals: Signals,
    scorer: Callable[[Signals], Tensor],
    keep: float,
    per_class: PerClass,
    *,
    seed: int = 0,
    repeats: int = 5,
    limit: int = 5000,
) -> tuple[Selector, list[tuple[str, float]]]:
    """The best of `selector.candidates()`, and [(candidate, validation accuracy or R^2)].

    Args:
        scorer: signals -> (N,); called once, on the examples that are not held out.
        repeats: draws a candidate; the validation accuracies are averaged.
        limit: examples looked at, so that the search stays a small share of the scoring time.

    Raises:
        ValueError: no labels, or too few to hold some out.
    """
    if signals.labels is None:
        raise ValueError(
            f"the best of {selector.name!r} is searched by a probe on labels, and a {signals.task} has none; "
            "give its option, e.g. FlexRand(gamma=0.5), or another selector, e.g. select='top_hard'"
        )
    labels, embeddings = signals.require("labels", "search"), signals.require("embeddings", "search")
    order = uniform_of(signals.ids, seed + 1).argsort()[:limit]
    held_out = _validation(labels[order], signals.num_classes)
    val, pool = order[held_out], order[~held_out]
    pool_signals = signals.subset(pool)
    scores = scorer(pool_signals)
    pool_labels = labels[pool]
    least = len(pool_labels.unique()) if per_class and signals.num_classes else 1
    k = max(budget.count(len(pool), keep), least)

    mean_D, std_D = embeddings[pool].mean(0), embeddings[pool].std(0).clamp(min=1e-6)
    z_pool, z_val = (embeddings[pool] - mean_D) / std_D, (embeddings[val] - mean_D) / std_D
    targets = _targets(pool_labels, signals.num_classes)

    def validation(picks: Tensor, penalty: float) -> float:
        prediction = _ridge(z_pool[picks], targets[picks], z_val, penalty)
        if signals.num_classes:
            return float((prediction.argmax(1) == labels[val]).double().mean())
        residual = (prediction[:, 0] - labels[val]) ** 2
        return float(1 - residual.mean() / labels[val].var(correction=0).clamp(min=1e-12))

    # the penalty comes from one random subset, so that it favours no candidate
    some = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:k]
    penalty = max((0.01, 0.1, 1.0, 10.0), key=lambda p: validation(some, p))

    needed = embeddings[pool] if "embeddings" in selector.needs else None
    candidates, table = selector.candidates(), []
    for candidate in candidates:
        values = []
        for draw in range(repeats):
            generator = torch.Generator().manual_seed(seed * 1000 + draw)
            picks = budget.select(
                candidate,
                scores,
                k,
                labels=pool_labels if signals.num_classes else None,
                per_class=per_class,
                generator=generator,
                embeddings=needed,
            )
            values.append(validation(picks, penalty))
        table.append((describe(candidate), sum(values) / repeats))
    middle = (len(candidates) - 1) / 2  # a tie goes to the middle of the range, the mildest choice
    best = max(range(len(candidates)), key=lambda i: (table[i][1], -abs(i - middle)))
    return candidates[best], table


def describe(selector: Any) -> str:
    """The selector's name and the options it was made with, e.g. `flex_rand(gamma=0.3)`."""
    options = {k: v for k, v in vars(selector).items() if not k.startswith("_") and v is not None}
    return f"{selector.name}({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})"


def _validation(labels: Tensor, num_classes: int, share: float = 0.2) -> Tensor:
    """(N,) bool: every fifth example of each class; a class always keeps one example in the pool."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique() if num_classes else [None]:
        rows = torch.arange(len(labels)) if c is None else (labels == c).nonzero()[:, 0]
        held_out[rows[: min(round(len(rows) * share), len(rows) - 1)]] = True
    if not held_out.any():
        raise ValueError(
            f"{len(labels)} examples are too few to hold out a validation split of {share:.0%}; "
            "give the hyperparameter, e.g. FlexRand(gamma=0.5)"
        )
    return held_out


def _targets(labels: Tensor, num_classes: int) -> Tensor:
    return one_hot(labels, num_classes).float() if num_classes else labels[:, None].float()


def _ridge(z_kD: Tensor, y_kC: Tensor, z_vD: Tensor, penalty: float) -> Tensor:
    """Predictions (v, C) of a ridge regression with intercept; solved in the smaller of k and D."""
    k, D = z_kD.shape
    y_C, h_D = y_kC.mean(0), z_kD.mean(0)
    z_kD, z_vD, y_kC = z_kD - h_D, z_vD - h_D, y_kC - y_C
    strength = penalty * max(k, D) * torch.eye(min(k, D))
    if k <= D:
        return z_vD @ (z_kD.T @ torch.linalg.solve(z_kD @ z_kD.T + strength, y_kC)) + y_C
    return z_vD @ torch.linalg.solve(z_kD.T @ z_kD + strength, z_kD.T @ y_kC) + y_C
