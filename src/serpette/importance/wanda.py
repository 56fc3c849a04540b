r"""Wanda: weights times the size of what they multiply.

    S_ij = | w_ij | || x_j ||_2,   eta_i = sum over j of S_ij,   || x_j ||_2 over all tokens or pixels

Sun et al. 2023, "A simple and effective pruning approach for large language models", arXiv 2306.11695, Eq. 1.
The paper compares single weights within a row (`per_row`), since rows differ in scale.
Differs: of neurons, the numbers of a row are summed to one.
"""

from __future__ import annotations

from torch import Tensor

from ..types import LayerStats, NeuronStats


class Wanda:
    """|Weight| times input norm, of a neuron their sum, from forward passes alone; high = more important.

    Single weights are to be compared within their row: `per_row`.
    """

    name = "wanda"
    needs = frozenset({"input_norms"})
    weight_needs = frozenset({"input_norms"})
    averaged = False
    per_row = True

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64, 0 or more."""
        norms = stats.require("input_norms", self.name)
        return (stats.weight().abs() * norms).sum(1)

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the weight, 0 or more."""
        scores_OI = stats.weight().abs()
        return scores_OI.mul_(stats.require("input_norms", self.name).to(scores_OI))
