r"""k-center greedy: cover the feature space.

    next = argmax_x min over selected s of || h(x) - h(s) ||_2

Sener and Savarese 2018, "Active learning for CNNs: a core-set approach", arXiv 1708.00489, algorithm 1.
Differs: the first pick is the example with the smallest hash of its id; O(N) memory beside the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import EVERY_TASK, Signals, uniform_of


class KCenter:
    """Minus the turn at which an example was picked: high (0) = picked sooner.

    Args:
        picks: stop after so many, for large data (a turn costs O(N D)); the others follow, those far
            from the selected first. Default: every example is picked, O(N^2 D).

    Raises:
        ValueError: `picks` below 1.
    """

    name = "k_center"
    needs = frozenset({"embeddings"})
    tasks = EVERY_TASK

    def __init__(self, picks: int | None = None):
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.picks = picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, a permutation of 0, -1 ... -(N - 1)."""
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        h_ND = signals.require("embeddings", self.name)[order]
        n = len(h_ND)
        picks = min(self.picks or n, n)
        radius_N = torch.full((n,), torch.inf, dtype=h_ND.dtype)
        turn_N = torch.empty(n, dtype=torch.float64)
        i = 0
        for turn in range(picks):
            turn_N[i] = turn
            # without the matrix-product form, whose cancellation puts twins at a distance above 0
            d_N = torch.cdist(h_ND, h_ND[i : i + 1], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
            torch.minimum(radius_N, d_N, out=radius_N)
            radius_N[i] = -torch.inf  # out of the race, even against twins at distance 0
            i = int(radius_N.argmax())
        rest = radius_N.argsort(descending=True, stable=True)[: n - picks]
        turn_N[rest] = torch.arange(picks, n, dtype=torch.float64)
        scores_N = torch.empty_like(turn_N)
        scores_N[order] = -turn_N
        return scores_N
