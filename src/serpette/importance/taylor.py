r"""Taylor: how much the loss would change without the neuron, to first order.

    eta_i^t = | w_i . dL(D^t)/dw_i |,   eta_i = mean over t of eta_i^t

SPSFT 2024, "Memory-efficient fine-tuning via structured neural network pruning", Eq. 6; the first-order term
of LeCun et al. 1989, "Optimal brain damage". D^t: the examples of class t; the absolute value comes after the
mean over them. What the paper calls the standard Taylor importance is the mean over the classes; over all
examples at once, eta_i = | w_i . dL(D)/dw_i |, signs cancel between classes, too.

Differs: no weight gradient is needed. A layer is linear in w_i, so w_i . dL/dw_i is the sum over tokens or
pixels of dL/dout_i (out_i - b_i). The bias does not count: Eq. 6 has the weights alone.
"""

from __future__ import annotations

from torch import Tensor

from ..types import NeuronStats


class Taylor:
    """First-order change of the loss without each neuron; high = more important.

    Args:
        per_class: True takes the mean, over the classes that have examples, of |mean over their examples|;
            False |mean over all examples|. Default: by class where there are class labels.

    Raises:
        ValueError: `per_class=True` without class labels.
    """

    name = "taylor"

    def __init__(self, per_class: bool | None = None):
        self.per_class = per_class
        self.needs = frozenset({"contribution", "labels"} if per_class else {"contribution"})

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64, 0 or more."""
        c_Tn, counts_T = stats.require("contribution", self.name), stats.require("counts", self.name)
        if self.per_class:
            stats.require("labels", self.name)
        if self.per_class is not False and stats.labelled:
            return c_Tn[counts_T > 0].abs().mean(0)
        share_T = counts_T.to(c_Tn) / counts_T.sum()
        return (share_T @ c_Tn).abs()
