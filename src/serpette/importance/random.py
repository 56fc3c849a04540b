r"""Random: the baseline that an importance has to beat.

    eta_i = u(id_i, seed), uniform in [0, 1)

Gale et al. 2019, "The state of sparsity in deep neural networks", arXiv 1902.09574, compare with it.
Differs: the number is a hash of the neuron's id and the seed, so it depends on no order.
"""

from __future__ import annotations

from torch import Tensor

from ..types import NeuronStats, uniform_of


class Random:
    """A uniform number for each neuron; high = more important, and means nothing more.

    Args:
        seed: another seed, other numbers.
    """

    name = "random"
    needs: frozenset[str] = frozenset()

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64 in [0, 1), the same for the same ids and seed."""
        return uniform_of(stats.ids, self.seed)
