r"""Least confidence.

    score_n = 1 - max_c p_nc,   p = softmax(logits)

Lewis and Gale 1994; Coleman et al. 2020, "Selection via proxy", arXiv 1906.11829.
Differs: computed as the sum of the other probabilities, which keeps its digits where p_max rounds to 1.
"""

from __future__ import annotations

from torch import Tensor

from ..types import CLASSIFICATION, Signals


class LeastConfidence:
    """What the likeliest class leaves to the others, 0 to 1 - 1/C: high = hard. No labels."""

    name = "least_confidence"
    needs = frozenset({"logits"})
    tasks = CLASSIFICATION

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'el2n' or 'k_center' has"
            )
        p_NC = signals.require("logits", self.name).double().softmax(1)
        return p_NC.sort(dim=1).values[:, :-1].sum(1)  # (N,)
