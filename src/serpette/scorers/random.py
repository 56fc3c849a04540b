r"""Random: the baseline that pruning methods have to beat.

    score_n = u(id_n, seed), uniform in [0, 1)

Guo et al. 2022, "DeepCore", arXiv 2204.08499, where few methods beat it.
Differs: the number is a hash of the example's id and the seed, so it does not depend on the order.
"""

from __future__ import annotations

from torch import Tensor

from ..types import EVERY_TASK, Signals, uniform_of


class Random:
    """A uniform number for each example; the highest are picked sooner, and mean nothing more."""

    name = "random"
    needs: frozenset[str] = frozenset()
    tasks = EVERY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 in [0, 1), the same for the same ids and `signals.seed`."""
        return uniform_of(signals.ids, signals.seed)
