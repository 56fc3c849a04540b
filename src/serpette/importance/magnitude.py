r"""Magnitude: the length of a neuron's weights; of a single weight, its size.

    eta_i = || w_i ||_2,   S_ij = | w_ij |

"Memory-efficient fine-tuning via structured neural network pruning" (SPSFT) 2024, Section 3.2 and Appendix A;
Li et al. 2017, "Pruning filters for efficient ConvNets", arXiv 1608.08710, took the l1 norm.
Single weights: LeCun et al. 1989, "Optimal brain damage", compare with it; Han et al. 2015, arXiv 1506.02626;
with LoRA it is the contender MaP-LoRA of LoRAPrune, arXiv 2305.18403, which leaves open whether
W = W0 + s B A or W0 is ranked.
Differs: nothing; the bias does not count.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import LayerStats, NeuronStats


class Magnitude:
    """Length of each neuron's weights, or size of each weight, without data; high = more important.

    Args:
        of: of single weights with a LoRA, `"merged"` ranks | W0 + s B A |, what is left after the merge;
            `"base"` ranks | W0 |, which training does not change.
    """

    name = "magnitude"
    needs: frozenset[str] = frozenset()
    weight_needs: frozenset[str] = frozenset()
    averaged = False

    def __init__(self, of: Literal["merged", "base"] = "merged"):
        if of not in ("merged", "base"):
            raise ValueError(f"of={of!r} must be 'merged' or 'base'")
        self.of = of

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float32, or float64 for such weights."""
        return torch.linalg.vector_norm(stats.weight(), dim=1)

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the weight, 0 or more."""
        weight = stats.base if self.of == "base" and stats.base is not None else stats.weight
        return weight().abs()
