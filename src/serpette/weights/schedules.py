r"""How the sparsity grows during training, from a warm-up at which nothing is cut to a rest that only tunes.

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (T - t0 - t1))^3

T steps in all, t0 of them before the first cut, t1 after the last. Zhu and Gupta 2017, "To prune, or not to
prune", arXiv 1710.01878; used by LoRAPrune 2023, arXiv 2305.18403, Section 3.3.
Differs: before t0 the sparsity is 0, also with s_i > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from ..registry import near

Schedule = Callable[[float], float]  # progress in [0, 1] -> share of the final sparsity in [0, 1]


def cubic(progress: float) -> float:
    """Much early, while the network is redundant, little late.

    >>> cubic(0.5)
    0.875
    """
    return 1 - (1 - progress) ** 3


def linear(progress: float) -> float:
    """The same number of weights at each step.

    >>> linear(0.5)
    0.5
    """
    return progress


def one_shot(progress: float) -> float:
    """Everything at the first cut.

    >>> one_shot(0.0)
    1.0
    """
    return 1.0


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear, "one_shot": one_shot}


def schedule_of(name: str) -> Schedule:
    """The schedule with that name; ValueError with near names for an unknown one."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}{near(name, SCHEDULES)}")
    return SCHEDULES[name]


def sparsity_at(
    step: int,
    steps: int,
    final: float,
    start: float = 0.1,
    end: float = 0.3,
    schedule: str = "cubic",
    initial: float = 0.0,
) -> float:
    """Sparsity (share of the weights cut) that is due after `step` of `steps` training steps.

    0 before `start * steps`, exactly `final` from `(1 - end) * steps` on.

    Args:
        step: finished steps, 0 or more.
        steps: of the whole training, 1 or more.
        final: sparsity at the end, in [0, 1).
        start, end: shares of the steps before the first and after the last cut. The first scores of a LoRA
            say little, because B starts at zero, and the weights that stay need steps to make up for the
            last cut; 0.1 and 0.3 are LoRAPrune's.
        schedule: `"cubic"`, `"linear"` or `"one_shot"`.
        initial: sparsity of the first cut, in [0, final].

    Raises:
        ValueError: when an argument is outside its limits, or `start + end` leaves no step to prune in.

    >>> [round(sparsity_at(step, 100, final=0.5), 4) for step in (9, 10, 40, 70, 100)]
    [0.0, 0.0, 0.4375, 0.5, 0.5]
    """
    share_of_final = schedule_of(schedule)
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more: give the number of optimiser steps")
    if not 0 <= final < 1:
        raise ValueError(f"final={final} must be in [0, 1): it is the share of the weights that is cut")
    if not 0 <= initial <= final:
        raise ValueError(f"initial={initial} must be in [0, final={final}]")
    if min(start, end) < 0 or _exact(start) + _exact(end) >= 1:
        raise ValueError(
            f"start={start} and end={end} must be 0 or more and together less than 1; "
            "no step would be left in which to prune: lower one of them"
        )
    first, last = _exact(start) * steps, (1 - _exact(end)) * steps
    if step < first:
        return 0.0
    if step >= last:
        return float(final)
    return initial + (final - initial) * share_of_final(float((step - first) / (last - first)))


def _exact(share: float) -> Fraction:
    return Fraction(str(float(share)))  # the decimal that was typed: 0.1 + 0.3 leaves exactly 0.6
