r"""Forgetting events.

    score_n = #{ t : right at visit t, wrong at visit t + 1 };   T if never right

Toneva et al. 2019, arXiv 1812.05159, definition of a forgetting event and algorithm 1.
Differs: an example that was never learnt is infinite in the paper. Here it scores T, the number of
visits: finite, and above all others, which can be forgotten at most T / 2 times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CLASSIFICATION, Signals


class Forgetting:
    """How often an example was forgotten in T visits: high = hard; T = never learnt."""

    name = "forgetting"
    needs = frozenset({"history", "labels"})
    tasks = CLASSIFICATION

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 of whole numbers. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'optimisation_complexity' has"
            )
        history_TNC = signals.require("history", self.name)
        right_TN = history_TNC.argmax(2) == signals.require("labels", self.name)
        events_N = (right_TN[:-1] & ~right_TN[1:]).sum(0).double()
        never_N = ~right_TN.any(0)
        return torch.where(never_N, float(len(history_TNC)), events_N)
