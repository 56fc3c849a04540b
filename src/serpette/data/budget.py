"""How many stay, of which class: counts are exact, and any selector becomes class-balanced here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..registry import near
from ..types import Selector

Labels = Tensor | np.ndarray | Sequence


def count(total: int, keep: float) -> int:
    """Number of examples that `keep`, a share, means: round half up of the decimal, at least 1.

    Args:
        total: number of examples, at least 1.
        keep: share kept in (0, 1]; 0.35 means 7/20 exactly, not the nearest float.

    Raises:
        ValueError: keep is not a number in (0, 1], total below 1.

    Example:
        >>> count(1000, 0.3), count(10, 0.25), count(10, 0.001)
        (300, 3, 1)
    """
    if total < 1:
        raise ValueError(f"total={total} examples: there must be at least 1")
    if isinstance(keep, (bool, np.bool_)) or not isinstance(keep, numbers.Real) or not math.isfinite(keep):
        raise ValueError(f"keep={keep!r} must be a number in (0, 1], the share of the examples that stays")
    share = Fraction(str(keep))
    if not 0 < share <= 1:
        raise ValueError(f"keep={keep} must be in (0, 1]{_meant(share, total)}")
    return max(1, math.floor(total * share + Fraction(1, 2)))


def _meant(share: Fraction, total: int) -> str:
    if share <= 0:
        return "; to keep nothing, do not tune"
    if share > 100:  # a number of examples
        return f"; did you mean {float(share / total):.6g}?" if share <= total else ""
    percent = share.denominator == 1 or share > 10
    return f"; did you mean {float(share / (100 if percent else 10)):.6g}?"


def split(labels: Labels, k: int, how: Literal["proportional", "equal"] = "proportional") -> dict:
    """The budget k shared out among the classes: {class: number}, exact in total, whatever the order.

    Args:
        labels: (N,) classes.
        k: total, in 0..N.
        how: `"proportional"` to the size of the class, by largest remainders; `"equal"` quotas, where
            what a small class cannot hold goes to the others. Both leave at least one example of
            each class when k allows; ties go to the smaller class label.

    Raises:
        ValueError: k not in 0..N, unknown `how`.

    Example:
        >>> split(["a"] * 6 + ["b"] * 3 + ["c"], 5)
        {'a': 3, 'b': 1, 'c': 1}
        >>> split(["a"] * 6 + ["b"] * 3 + ["c"], 7, how="equal")
        {'a': 3, 'b': 3, 'c': 1}
    """
    values, counts = np.unique(np.asarray(labels), return_counts=True)
    classes, sizes = values.tolist(), counts.tolist()
    total = sum(sizes)
    if not 0 <= k <= total:
        raise ValueError(f"k={k} must be in 0..{total}, the number of examples")
    if how == "equal":
        quotas, left = [0] * len(classes), k
        by_size = sorted(range(len(classes)), key=lambda c: (sizes[c], -c))
        for done, c in enumerate(by_size):
            quotas[c] = min(sizes[c], left // (len(classes) - done))
            left -= quotas[c]
    elif how == "proportional":
        quotas = [k * size // total for size in sizes]
        by_remainder = sorted(range(len(classes)), key=lambda c: (-(k * sizes[c] % total), c))
        for c in by_remainder[: k - sum(quotas)]:
            quotas[c] += 1
        if k >= len(classes):
            quotas = [max(1, quota) for quota in quotas]
            while sum(quotas) > k:  # take back from whoever is most above its share
                over = [
                    q * total - k * size if q > 1 else -math.inf
                    for q, size in zip(quotas, sizes, strict=True)
                ]
                quotas[len(over) - 1 - over[::-1].index(max(over))] -= 1
    else:
        raise ValueError(f"how={how!r} is unknown{near(how, ('proportional', 'equal'))}")
    return dict(zip(classes, quotas, strict=True))


def select(
    selector: Selector,
    scores: Tensor,
    k: int,
    *,
    labels: Labels | None = None,
    per_class: bool | Literal["proportional", "equal"] = True,
    generator: torch.Generator,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Exactly k positions, sorted (int64), with the selector run on each class by itself or on all.

    Args:
        selector: see `serpette.types.Selector`.
        scores: (N,), higher = harder, or picked sooner.
        k: how many stay, in 1..N; `count` makes it from a share.
        labels: (N,) classes; needed unless `per_class=False`.
        per_class: True is `"proportional"`: the subset has the class shares of the whole, since that
            changes nothing but the examples; `"equal"` balances the classes; False ignores them.
        generator: of the random selectors; used class after class, in the order of the labels.
        embeddings: (N, D), for selectors that need them.

    Raises:
        ValueError: k not in 1..N; labels missing, not classes or of another length; fewer picks than classes.

    Example:
        >>> from serpette.data.selectors.top import TopHard
        >>> scores, labels = torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> select(TopHard(), scores, 2, labels=labels, generator=torch.Generator())
        tensor([0, 2])
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be in 1..{n}, the number of examples")
    if per_class is False:
        return selector(scores, k, generator, embeddings)
    if labels is None:
        raise ValueError(
            f"per_class={per_class!r} needs labels, which are missing; give them or per_class=False"
        )
    y_N = np.asarray(labels)
    if y_N.dtype.kind == "f":
        raise ValueError(
            f"per_class={per_class!r} needs classes, but labels are {y_N.dtype}; per_class=False"
        )
    if len(y_N) != n:
        raise ValueError(f"labels has {len(y_N)} entries, scores {n}; they must be of the same examples")
    classes = len(np.unique(y_N))
    if k < classes:
        digits = len(str(n)) + 1
        least = math.ceil(Fraction(2 * classes - 1, 2 * n) * 10**digits) / 10**digits
        raise ValueError(
            f"k={k} is too small to leave one example of each of the {classes} classes; "
            f"keep at least {least:g}, or give per_class=False"
        )
    quotas = split(y_N, k, "proportional" if per_class is True else per_class)
    picks = []
    for c, quota in quotas.items():
        rows = torch.from_numpy(np.flatnonzero(y_N == c))
        mine = None if embeddings is None else embeddings[rows]
        picks.append(rows[selector(scores[rows], quota, generator, mine)])
    return torch.cat(picks).sort().values
