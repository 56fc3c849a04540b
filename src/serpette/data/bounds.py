"""Greedy scorers stop after as many picks as will be kept, where that changes no selected subset."""

from __future__ import annotations

import inspect
from typing import Any

from ..scorers import registry
from ..types import PerClass, Signals
from . import budget


def bounded(scorer: Any, select: Any, k: int, per_class: PerClass | None) -> Any:
    """`scorer`, or for the name of a greedy one an object that stops in time.

    Only selector `top_hard` reads nothing but who is picked first. Turns within a class stop at the largest
    quota; turns over all examples stop at k, and only if the budget is not split over the classes.

    Args:
        scorer: a name; an object is returned as it is, for its options were given.
        select: name or object of the selector.
        k: examples that will be kept.
        per_class: as in `serpette.select`; None is True where there are classes.
    """
    name = select if isinstance(select, str) else getattr(select, "name", None)
    if not isinstance(scorer, str) or name != "top_hard":
        return scorer
    cls = registry[scorer]
    if "picks" not in inspect.signature(cls).parameters:
        return scorer

    class Bounded(cls):
        def __call__(self, signals: Signals):
            self.picks = _picks(signals, k, per_class, getattr(cls, "turns_within_class", False))
            return super().__call__(signals)

    return Bounded()


def _picks(signals: Signals, k: int, per_class: PerClass | None, within_class: bool) -> int | None:
    if not signals.num_classes or per_class is False:
        return k
    if not within_class or signals.labels is None or not 1 <= k <= len(signals):
        return None
    how = "equal" if per_class == "equal" else "proportional"
    return max(1, *budget.split(signals.labels.numpy(), k, how).values())
