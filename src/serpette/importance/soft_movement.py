r"""SoftMovement: movement scores against a threshold, which finds its own sparsity.

    M = [sigmoid(S) > tau],   dL/dS = G * W + lambda d/dS mean(sigmoid(S)),   G = dL/dW

Sanh et al. 2020, "Movement pruning", arXiv 2005.07683, Section 4.2, soft version. S starts at 0 and is
trained by Adam, as the authors' programs do; lambda pushes S down, so that a weight stays only if training
keeps moving it away from zero. G is that of the unmasked product. The larger lambda and tau, the more is
cut, of each layer another share; no target is met.

tau = 0.1 and lambda = 400 over the mean of 72 matrices, as the authors' programs had it, which is 5.6 for the
mean of a single one. Adam moves S by at most about its learning rate an update, and S must come down to
log(tau / (1 - tau)) = -2.2: their 0.01 is for ten thousand updates; 0.05 gets there in 44.

Differs: lambda does not rise in the course of the training. A weight that is cut never comes back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import LayerStats

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults


class SoftMovement:
    """Movement scores with a threshold of their own (`keeps`); high = more important.

    It keeps 12 bytes a weight in `stats.state`: the scores and Adam's two moments.

    Args:
        threshold: tau in (0, 1); a weight stays while sigmoid(S) is above it.
        regularization: lambda, 0 or more, that of a layer's mean sigmoid(S).
        learning_rate: of S, above 0.

    Raises:
        ValueError: an argument out of its range.
    """

    name = "soft_movement"
    weight_needs = frozenset({"gradient"})
    averaged = False

    def __init__(self, threshold: float = 0.1, regularization: float = 5.6, learning_rate: float = 0.05):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold!r} must be in (0, 1), such as 0.1")
        if not 0 <= regularization < math.inf:
            raise ValueError(f"regularization={regularization!r} must be 0 or more")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate={learning_rate!r} must be above 0")
        self.threshold, self.regularization = threshold, regularization
        self.learning_rate = learning_rate

    def update(self, stats: LayerStats) -> None:
        """One step of Adam on the scores of a layer."""
        gradient_OI = stats.require("gradient", self.name) * stats.weight()
        state = stats.state
        if "scores" not in state:
            state.update({key: torch.zeros_like(gradient_OI) for key in ("scores", "mean", "square")})
            state["updates"] = torch.zeros((), dtype=torch.long)
        p_OI = state["scores"].sigmoid()
        gradient_OI += p_OI.mul_(1 - p_OI).mul_(self.regularization / p_OI.numel())
        state["updates"] += 1
        t = int(state["updates"])
        state["mean"].lerp_(gradient_OI, 1 - BETA1)
        state["square"].lerp_(gradient_OI.square_(), 1 - BETA2)
        size_OI = (state["square"] / (1 - BETA2**t)).sqrt_().add_(EPSILON)
        state["scores"].addcdiv_(state["mean"], size_OI, value=-self.learning_rate / (1 - BETA1**t))

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) S, of both signs; 0 before the first update."""
        return stats.state["scores"].clone() if "scores" in stats.state else torch.zeros_like(stats.weight())

    def keeps(self, stats: LayerStats) -> Tensor:
        """(O, I) bool, True where a weight stays; in place of a count of the lowest."""
        return self.of_weights(stats) > math.log(self.threshold / (1 - self.threshold))
