r"""Original gradient: the squared first-order change of the loss without a weight.

    J = (G * W)^2,   G = dL/dW

LoRAPrune 2023, arXiv 2305.18403, Eq. 4, and its contender in Figure 3; Molchanov et al. 2019, "Importance
estimation for neural network pruning", arXiv 1906.10771, Eq. 8. What `lora_prune` approximates, at the price
of a whole weight gradient a layer.
Differs: nothing; the mean over a batch comes before the square, that over the steps after it.
"""

from __future__ import annotations

from torch import Tensor

from ..types import LayerStats


class OriginalGradient:
    """Squared gradient times weight; high = more important."""

    name = "original_gradient"
    weight_needs = frozenset({"gradient"})
    averaged = True

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the gradient, 0 or more."""
        return stats.require("gradient", self.name).mul(stats.weight()).square_()
