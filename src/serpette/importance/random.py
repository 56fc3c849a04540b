r"""Random: the baseline that an importance has to beat.

    eta_i = u(id_i, seed),   S_ij = u_ij(name of the layer, seed),   uniform in [0, 1)

Gale et al. 2019, "The state of sparsity in deep neural networks", arXiv 1902.09574, compare with it.
Differs: a neuron's number is a hash of its id and the seed, those of a layer's weights are drawn by a
generator that starts from the hash of its name and the seed; they depend on no order, and not on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..types import LayerStats, NeuronStats, uniform_of


class Random:
    """A uniform number for each neuron or weight; high = more important, and means nothing more.

    Args:
        seed: another seed, other numbers.
    """

    name = "random"
    needs: frozenset[str] = frozenset()
    weight_needs: frozenset[str] = frozenset()
    averaged = False

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64 in [0, 1), the same for the same ids and seed."""
        return uniform_of(stats.ids, self.seed)

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) float32 in [0, 1), the same for the same name, shape and seed."""
        weight = stats.weight()
        seed = int(uniform_of(np.array([stats.name]), self.seed) * 2**53)
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
