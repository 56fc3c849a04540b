r"""AUM: area under the margin.

    score_n = - mean over visits t of ( z_t,y - max over c != y of z_t,c ),   z the logits

Pleiss et al. 2020, "Identifying mislabeled data using the area under the margin ranking", NeurIPS,
arXiv 2001.10528, eq. 1. Differs: the negative, since the paper's AUM is low for what is hard or mislabelled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CLASSIFICATION, Signals


class AUM:
    """Minus the mean margin of the label over training: high = hard (above 0: mostly wrong)."""

    name = "aum"
    needs = frozenset({"history", "labels"})
    tasks = CLASSIFICATION

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, in units of the logits. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'optimisation_complexity' has"
            )
        history_TNC = signals.require("history", self.name)
        y_N1 = signals.require("labels", self.name)[:, None]
        margin_N = torch.zeros(len(y_N1), dtype=torch.float64)
        for z_NC in history_TNC:
            z_NC = z_NC.double()
            other_N = z_NC.scatter(1, y_N1, -torch.inf).amax(1)
            margin_N += z_NC.gather(1, y_N1)[:, 0] - other_N
        return -margin_N / len(history_TNC)
