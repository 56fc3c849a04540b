r"""S_Opt: learning complexity by optimisation.

    score_n = mean over t of l( f(x_n; theta_t), y_n )

theta_t are the weights along a fine-tuning run. Jiang et al., "Exploring learning complexity for
efficient downstream dataset pruning", ICLR 2025, section 3.1: the integral that DLC estimates
without training. Differs: the integral is the plain mean over the visits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..types import ANY_TASK, Signals


class OptimisationComplexity:
    """Mean loss over a training run: high = hard (learnt late or never).

    Cross-entropy in nats; in a regression the squared error.
    """

    name = "optimisation_complexity"
    needs = frozenset({"history", "labels"})
    tasks = ANY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64."""
        history_TNC = signals.require("history", self.name)
        y_N = signals.require("labels", self.name)
        loss_N = torch.zeros(len(y_N), dtype=torch.float64)
        for f_NC in history_TNC:  # a visit at a time: T visits in float64 at once would be large
            if signals.task == "regression":
                loss_N += (f_NC[:, 0].double() - y_N).square()
            else:
                loss_N += cross_entropy(f_NC.double(), y_N, reduction="none")
        return loss_N / len(history_TNC)
