r"""Entropy of the predicted distribution.

    score_n = - sum_c p_nc log p_nc,   p = softmax(logits)

Coleman et al. 2020, "Selection via proxy", arXiv 1906.11829.
Differs: nothing; log p comes from log_softmax, so that p = 0 adds 0.
"""

from __future__ import annotations

from torch import Tensor

from ..types import CLASSIFICATION, Signals


class Entropy:
    """Entropy in nats, 0 to log C: high = hard (unsure). Labels are not looked at."""

    name = "entropy"
    needs = frozenset({"logits"})
    tasks = CLASSIFICATION

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'el2n' or 'k_center' has"
            )
        log_p_NC = signals.require("logits", self.name).double().log_softmax(1)
        return -(log_p_NC.exp() * log_p_NC).sum(1)  # (N,)
