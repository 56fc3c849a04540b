r"""Moderate coreset.

    score_n = - | d_n - median of the class's d |,   d_n = || h_n - mean of the class ||_2

Xia et al. 2023, "Moderate coreset: a universal method of data selection for real-world data-efficient
deep learning", ICLR. Differs: nothing; without classes there is one group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..types import EVERY_TASK, Signals, uniform_of


class Moderate:
    """Minus how far an example's distance is from its class's median: high (0) = picked sooner."""

    name = "moderate"
    needs = frozenset({"embeddings", "labels"})
    tasks = EVERY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 up to 0, in units of the features."""
        h_ND, y_N = signals.require("embeddings", self.name), torch.zeros(len(signals))
        if signals.task != "causal-lm":
            y_N = signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # the last bits of the mean, in any order
        group_N = y_N[order] if signals.task == "classification" else torch.zeros(len(order))
        scores_N = torch.empty(len(order), dtype=torch.float64)
        for c in group_N.unique():
            rows = order[group_N == c]
            h_nD = h_ND[rows].double()
            d_n = (h_nD - h_nD.mean(0)).norm(dim=1)
            scores_N[rows] = -(d_n - float(np.median(d_n))).abs()
        return scores_N
