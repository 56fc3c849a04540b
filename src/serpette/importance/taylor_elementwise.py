r"""Elementwise Taylor: the first-order change of the loss without each single weight, summed over a neuron.

    eta_i = sum over j of | mean over x of w_ij dL(x)/dw_ij |

SPSFT 2024, "Memory-efficient fine-tuning via structured neural network pruning", Appendix A, last form;
Molchanov et al. 2019, "Importance estimation for neural network pruning", arXiv 1906.10771, square instead.
It is another number than Eq. 6 (`taylor`): there the weights of a neuron may cancel.

Differs: it needs the weight gradients, reduced and freed layer by layer, so the mean over x is exact
within one batch only; over several it is the mean of the batches' values. Larger batches are closer to the
formula.
"""

from __future__ import annotations

from torch import Tensor

from ..types import NeuronStats


class TaylorElementwise:
    """Sum of |weight times gradient| over each neuron; high = more important."""

    name = "taylor_elementwise"
    needs = frozenset({"elementwise"})

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64, 0 or more."""
        return stats.require("elementwise", self.name)
