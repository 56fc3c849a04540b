r"""Wanda: weights times the size of what they multiply.

    eta_i = sum over j of | w_ij | || x_j ||_2,   || x_j ||_2 over all tokens or pixels of the data

Sun et al. 2023, "A simple and effective pruning approach for large language models", arXiv 2306.11695, Eq. 1.
Differs: the paper compares single weights within a row; here they are summed to one number a neuron.
"""

from __future__ import annotations

from torch import Tensor

from ..types import NeuronStats


class Wanda:
    """Sum of |weight| times input norm over each neuron, from forward passes alone; high = more important."""

    name = "wanda"
    needs = frozenset({"input_norms"})

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64, 0 or more."""
        norms = stats.require("input_norms", self.name)
        return (stats.weight().abs() * norms).sum(1)
