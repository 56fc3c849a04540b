r"""Magnitude: the length of a neuron's weights.

    eta_i = || w_i ||_2

"Memory-efficient fine-tuning via structured neural network pruning" (SPSFT) 2024, Section 3.2 and Appendix A;
Li et al. 2017, "Pruning filters for efficient ConvNets", arXiv 1608.08710, took the l1 norm.
Differs: nothing; the bias does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import NeuronStats


class Magnitude:
    """Length of each neuron's weights, without data; high = more important."""

    name = "magnitude"
    needs: frozenset[str] = frozenset()

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float32, or float64 for such weights."""
        return torch.linalg.vector_norm(stats.weight(), dim=1)
