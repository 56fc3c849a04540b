r"""Movement: a weight is important if training moves it away from zero.

    S = - sum over the steps of G * W,   G = dL/dW of the unmasked product

Sanh et al. 2020, "Movement pruning", arXiv 2005.07683, Section 4: scores S that start at 0 and follow the
straight-through gradient dL/dS = G * W of the mask M = top(S).
Differs: no learning rate, which scales all S alike and ranks nothing; plain descent, where the authors'
programs trained S by Adam. A weight that is cut never comes back.
"""

from __future__ import annotations

from torch import Tensor

from ..types import LayerStats


class Movement:
    """How far training has moved each weight away from zero, negative towards it; high = more important.

    It keeps 4 bytes a weight, `stats.state["movement"]`.

    Raises:
        ValueError: the scores are asked for before the first gradient.
    """

    name = "movement"
    weight_needs = frozenset({"gradient"})
    averaged = False

    def update(self, stats: LayerStats) -> None:
        """Takes a step's gradient into the scores."""
        step_OI = stats.require("gradient", self.name) * stats.weight()
        if self.name in stats.state:
            stats.state[self.name] -= step_OI
        else:
            stats.state[self.name] = step_OI.neg_()

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the gradient, of both signs."""
        if self.name not in stats.state:
            raise ValueError(
                f"importance 'movement' has seen no gradient of layer {stats.name!r}; train a step before "
                "weights are cut, or use 'original_gradient', which needs no history"
            )
        return stats.state[self.name].clone()
