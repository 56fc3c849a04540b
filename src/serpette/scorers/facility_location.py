r"""Facility location: every example should have a pick that is like it.

    F(S) = sum over i of max over j in S of s_ij,   s_ij = (1 + cos(h_i, h_j)) / 2
    next = argmax_x F(S + x) - F(S)

Wei, Iyer and Bilmes 2015, "Submodularity in data subset selection and active learning", ICML.
Differs: over all examples, whatever their class; similarities are rounded to 2^-30, so that sums are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..greedy import blocks, lazy_greedy
from ..types import EVERY_TASK, Signals, uniform_of


class FacilityLocation:
    """Minus the turn at which an example was picked: high (0) = picked sooner. No labels.

    Args:
        picks: stop after so many, for large data; the others follow by the last gain known of them.
            Default: every example is picked. The first gains cost O(N^2 D), a look at a gain O(N D).

    Raises:
        ValueError: `picks` below 1.
    """

    name = "facility_location"
    needs = frozenset({"embeddings"})
    tasks = EVERY_TASK

    def __init__(self, picks: int | None = None):
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.picks = picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, a permutation of 0, -1 ... -(N - 1). Memory O(N D), never N x N."""
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        x_ND = signals.require("embeddings", self.name)[order].double()
        x_ND *= 2**14.5 / x_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)  # x . x = 2^29
        n = len(x_ND)
        best_N = torch.zeros(n, dtype=torch.float64)  # similarity of i to the pick most like it

        def similar(rows: Tensor) -> Tensor:
            return (x_ND @ x_ND[rows].T).add_(2**29).round_()  # (N, n), in units of 2^-30

        def gains_of(rows: Tensor) -> Tensor:
            return similar(rows).sub_(best_N[:, None]).clamp_(min=0).sum(0)

        def take(i: int) -> None:
            torch.maximum(best_N, similar(torch.tensor([i]))[:, 0], out=best_N)

        # filled in place: small results kept between big blocks scatter the heap, to 14 GB at N = 60,000
        first_N = torch.empty_like(best_N)
        for rows in blocks(n, n):
            first_N[rows] = gains_of(rows)
        scores_N = torch.empty(n, dtype=torch.float64)
        picked = lazy_greedy(first_N, gains_of, take, self.picks or n)
        scores_N[order[picked]] = -torch.arange(n, dtype=torch.float64)
        return scores_N
