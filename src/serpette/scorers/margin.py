r"""Margin between the two likeliest classes.

    score_n = -( p_n(1) - p_n(2) ),   p = softmax(logits)

Scheffer et al. 2001; Coleman et al. 2020, "Selection via proxy", arXiv 1906.11829.
Differs: nothing. On probabilities, not on logits.
"""

from __future__ import annotations

from torch import Tensor

from ..types import CLASSIFICATION, Signals


class Margin:
    """Minus the margin, -1 (sure) to 0 (torn between two classes): high = hard. No labels."""

    name = "margin"
    needs = frozenset({"logits"})
    tasks = CLASSIFICATION

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'el2n' or 'k_center' has"
            )
        p_NC = signals.require("logits", self.name).double().softmax(1)
        p_N2 = p_NC.topk(2, dim=1).values
        return p_N2[:, 1] - p_N2[:, 0]  # (N,)
