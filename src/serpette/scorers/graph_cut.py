r"""Graph cut: like the whole, unlike each other.

    F(S) = sum over i in all, j in S of s_ij - lambda sum over i, j in S of s_ij
    next = argmax_x F(S + x) - F(S) = argmax_x  sum_i s_ix - 2 lambda sum over j in S of s_xj - lambda s_xx
    s_ij = (1 + cos(h_i, h_j)) / 2

Iyer et al. 2021, "Submodular combinatorial information measures with applications in machine learning",
arXiv 2006.15412, section 2. Differs: over all examples, whatever their class. The cosine is linear in either
side, so a sum of similarities is one product with a sum of features: no graph. Not lazy, which does not pay
here: every pick lowers every gain by about as much, so old gains say little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..greedy import on_grid
from ..types import EVERY_TASK, Signals, uniform_of


class GraphCut:
    """Minus the turn at which an example was picked: high (0) = picked sooner. No labels.

    Args:
        redundancy: lambda, the price of picks that are like each other. Default 0.5, the largest with
            which no pick ever lowers F.
        picks: stop after so many, for large data (a turn costs O(N D)); the others follow in the order in
            which they suit the next turn. Default: every example is picked.

    Raises:
        ValueError: `redundancy` below 0, `picks` below 1.
    """

    name = "graph_cut"
    needs = frozenset({"embeddings"})
    tasks = EVERY_TASK

    def __init__(self, redundancy: float = 0.5, picks: int | None = None):
        if not redundancy >= 0:
            raise ValueError(f"redundancy={redundancy} must be at least 0; 0.5 is usual")
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.redundancy, self.picks = redundancy, picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, a permutation of 0, -1 ... -(N - 1). Memory O(N D)."""
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        x_ND = signals.require("embeddings", self.name)[order].double()
        x_ND /= x_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
        n = len(x_ND)
        own_N = (1 + x_ND.square().sum(1)) / 2  # s_xx: 1, or 1/2 of an example without features
        gain_N = (n + x_ND @ x_ND.sum(0)) / 2 - self.redundancy * own_N
        turn_N = torch.empty(n, dtype=torch.float64)
        picks = min(self.picks or n, n)
        for turn in range(picks):
            i = int(on_grid(gain_N, 2.0**24).argmax())  # a rounding error must not part twins
            turn_N[i], gain_N[i] = turn, -torch.inf
            gain_N -= self.redundancy * (1 + x_ND @ x_ND[i])
        rest = on_grid(gain_N, 2.0**24).argsort(descending=True, stable=True)[: n - picks]
        turn_N[rest] = torch.arange(picks, n, dtype=torch.float64)
        scores_N = torch.empty_like(turn_N)
        scores_N[order] = -turn_N
        return scores_N
