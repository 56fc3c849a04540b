r"""Herding: follow the class mean.

    next = argmin_x || (t + 1) mu - sum of the t selected - x ||

Welling 2009, "Herding dynamical weights to learn"; used for exemplars by Rebuffi et al. 2017 (iCaRL),
arXiv 1611.07725, algorithm 4. Each class has its own mean; without classes there is one group.
Differs: `compat=True` takes the argmax. A widespread library of baselines does, and the figures that
papers print for "herding" come from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import EVERY_TASK, Signals, uniform_of


class Herding:
    """Minus the turn at which an example was picked within its class: high (0) = picked sooner.

    A turn says nothing across classes: the k highest of all are about k / C of each class.

    Args:
        compat: argmax in place of argmin, see above.
        picks: stop after so many in each class, for large data (a turn costs O(n_c D)); the others
            follow in the order in which they suit the next turn. Default: every example is picked.

    Raises:
        ValueError: `picks` below 1.
    """

    name = "herding"
    needs = frozenset({"embeddings", "labels"})
    tasks = EVERY_TASK
    turns_within_class = True

    def __init__(self, compat: bool = False, picks: int | None = None):
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.compat, self.picks = compat, picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, 0, -1, -2 ... in each class. Memory O(n_c D)."""
        x_ND, y_N = signals.require("embeddings", self.name), torch.zeros(len(signals))
        if signals.task != "causal-lm":
            y_N = signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        group_N = y_N[order] if signals.task == "classification" else torch.zeros(len(order))
        scores_N = torch.empty(len(order), dtype=torch.float64)
        for c in group_N.unique():
            rows = order[group_N == c]
            scores_N[rows] = -self._turns(x_ND[rows].double())
        return scores_N

    def _turns(self, x_nD: Tensor) -> Tensor:
        x_nD = x_nD - x_nD.mean(0)  # mu = 0: the target is then minus the sum of the selected
        sign = -1 if self.compat else 1
        half_n = x_nD.square().sum(1) / 2
        target_D = torch.zeros_like(x_nD[0])
        out_n = torch.zeros_like(half_n)
        turns_n = torch.empty_like(half_n)
        n, picks = len(x_nD), min(self.picks or len(x_nD), len(x_nD))
        for turn in range(picks):
            gap_n = sign * (half_n - x_nD @ target_D) + out_n  # ||target - x||^2 / 2 but for a constant
            i = int(gap_n.argmin())
            turns_n[i], out_n[i] = turn, torch.inf
            target_D -= x_nD[i]
        rest = (sign * (half_n - x_nD @ target_D) + out_n).argsort(stable=True)[: n - picks]
        turns_n[rest] = torch.arange(picks, n, dtype=turns_n.dtype)
        return turns_n
