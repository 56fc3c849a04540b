r"""Contextual diversity: k-center greedy on what the model predicts.

next = argmax_x min over selected s of d(x, s),   d(x, s) = KL(p_x || p_s) + KL(p_s || p_x)
                                                          = sum_c (p_xc - p_sc)(log p_xc - log p_sc)
Agarwal et al. 2020, "Contextual diversity for active learning", arXiv 2008.05723.
Differs: one distribution an image, not one an image region; p = (softmax + eps) / (1 + C eps), without
which two sure predictions of different classes are infinitely far apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CLASSIFICATION, Signals, uniform_of


class ContextualDiversity:
    """Minus the turn at which an example was picked: high (0) = picked sooner. No labels.

    Args:
        epsilon: added to each probability; 1e-6 bounds the distance at about 28 nats.
        picks: stop after so many, for large data (a turn costs O(N C)); the others follow, those far
            from the selected first. Default: every example is picked, O(N^2 C).

    Raises:
        ValueError: `epsilon` not above 0, `picks` below 1.
    """

    name = "contextual_diversity"
    needs = frozenset({"logits"})
    tasks = CLASSIFICATION

    def __init__(self, epsilon: float = 1e-6, picks: int | None = None):
        if not epsilon > 0:
            raise ValueError(
                f"epsilon={epsilon} must be above 0, else the distance can be infinite; try 1e-6"
            )
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.epsilon, self.picks = epsilon, picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, a permutation of 0, -1 ... -(N - 1). ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(f"scorer {self.name!r} has no meaning in a {signals.task}; 'k_center' has")
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        p_NC = signals.require("logits", self.name)[order].double().softmax(1) + self.epsilon
        p_NC = p_NC / (1 + p_NC.shape[1] * self.epsilon)
        log_p_NC = p_NC.log()
        n = len(p_NC)
        picks = min(self.picks or n, n)
        radius_N = torch.full((n,), torch.inf, dtype=torch.float64)
        turn_N = torch.empty(n, dtype=torch.float64)
        i = 0
        for turn in range(picks):
            turn_N[i] = turn
            d_N = ((p_NC - p_NC[i]) * (log_p_NC - log_p_NC[i])).sum(1)
            torch.minimum(radius_N, d_N, out=radius_N)
            radius_N[i] = -torch.inf  # out of the race, even against twins at distance 0
            i = int(radius_N.argmax())
        rest = radius_N.argsort(descending=True, stable=True)[: n - picks]
        turn_N[rest] = torch.arange(picks, n, dtype=torch.float64)
        scores_N = torch.empty_like(turn_N)
        scores_N[order] = -turn_N
        return scores_N
