r"""Taylor: how much the loss would change without the neuron or the weight, to first order.

    eta_i^t = | w_i . dL(D^t)/dw_i |,   eta_i = mean over t of eta_i^t;   S_ij = | w_ij dL/dw_ij |

SPSFT 2024, "Memory-efficient fine-tuning via structured neural network pruning", Eq. 6; the first-order term
of LeCun et al. 1989, "Optimal brain damage". Single weights: Ma et al. 2023, "LLM-Pruner", arXiv 2305.11627,
Section 3.2, first order. D^t: the examples of class t; the absolute value comes after the
mean over them. What the paper calls the standard Taylor importance is the mean over the classes; over all
examples at once, eta_i = | w_i . dL(D)/dw_i |, signs cancel between classes, too.

Differs: no weight gradient is needed. A layer is linear in w_i, so w_i . dL/dw_i is the sum over tokens or
pixels of dL/dout_i (out_i - b_i). The bias does not count: Eq. 6 has the weights alone.
Of single weights, LLM-Pruner takes the absolute value after the mean over its ten calibration samples; so it
is here over what one gradient covers, a batch, or all the data where a model is pruned at once. Over the
steps of a training the absolute values are averaged: the mean gradient goes to zero where LoRA has learnt,
and the weights are no longer the same.
"""

from __future__ import annotations

from torch import Tensor

from ..types import LayerStats, NeuronStats


class Taylor:
    """First-order change of the loss without each neuron or weight; high = more important.

    Args:
        per_class: of neurons. True takes the mean, over the classes that have examples, of |mean over their
            examples|; False |mean over all examples|. Default: by class where there are class labels.

    Raises:
        ValueError: `per_class=True` without class labels.
    """

    name = "taylor"
    weight_needs = frozenset({"gradient"})
    averaged = True

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

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the gradient, 0 or more."""
        return stats.require("gradient", self.name).mul(stats.weight()).abs_()
