r"""PST: magnitude plus a learnt part of low rank, in place of a learnt score for each weight.

    S = |W| + a1 A_s B_s + a2 (R_i + C_j),   dL/dS = G * W straight through the mask

Li et al. 2022, "Parameter-efficient sparsity for large language models fine-tuning" (PST), arXiv 2205.11005,
Eq. 4 to 8. A_s (O, r) starts normal, B_s (r, I), R (O,) and C (I,) at zero; Adam trains them by
dL/dA_s = a1 (G * W) B_s^T, dL/dB_s = a1 A_s^T (G * W), and a2 times the sums over columns and rows, without
weight decay, which would pull the score back to the magnitude.

Differs: the paper finds the mask anew in each forward pass; here weights are cut on a schedule and a weight
that is cut never comes back. The paper's low-rank update of the weights is the model's LoRA. The factors have
a learning rate of their own: Adam moves R and C by one, and an element of A_s B_s by about sqrt(r) learning
rates an update; at 3e-4 a hundred updates that agree move a score by 0.1, a few times a weight of a
transformer, and a hundred that do not by about 0.01.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..types import LayerStats, uniform_of

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults
FACTORS = ("A", "B", "R", "C")


class PST:
    """Magnitude plus learnt scores of low rank, for rows and for columns; high = more important.

    Args:
        alpha1, alpha2: weights of the low-rank part and of those by row and column; 1 in the paper.
        rank: of the low-rank part, 1 or more; 8 in the paper.
        learning_rate: of the factors, above 0.
        seed: of the first A_s, with the layer's name.

    Raises:
        ValueError: a rank or learning rate out of its range.
    """

    name = "pst"
    weight_needs = frozenset({"gradient"})
    averaged = False

    def __init__(
        self,
        alpha1: float = 1.0,
        alpha2: float = 1.0,
        rank: int = 8,
        learning_rate: float = 3e-4,
        seed: int = 0,
    ):
        if rank < 1:
            raise ValueError(f"rank={rank!r} must be a whole number, at least 1; the paper takes 8")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate={learning_rate!r} must be above 0")
        self.alpha1, self.alpha2, self.rank = alpha1, alpha2, rank
        self.learning_rate, self.seed = learning_rate, seed

    def update(self, stats: LayerStats) -> None:
        """One step of Adam on the factors of a layer."""
        dS_OI = stats.require("gradient", self.name) * stats.weight()
        state = stats.state
        if "A" not in state:
            self._begin(stats, dS_OI)
        gradients = (
            self.alpha1 * (dS_OI @ state["B"].T),
            self.alpha1 * (state["A"].T @ dS_OI),
            self.alpha2 * dS_OI.sum(1),
            self.alpha2 * dS_OI.sum(0),
        )
        state["updates"] += 1
        t = int(state["updates"])
        for factor, gradient in zip(FACTORS, gradients, strict=True):
            mean, square = state[f"{factor}.mean"], state[f"{factor}.square"]
            mean.lerp_(gradient, 1 - BETA1)
            square.lerp_(gradient.square(), 1 - BETA2)
            size = (square / (1 - BETA2**t)).sqrt_().add_(EPSILON)
            state[factor].addcdiv_(mean, size, value=-self.learning_rate / (1 - BETA1**t))

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the weight; the magnitude before the first update."""
        scores_OI = stats.weight().abs()
        if "A" in stats.state:
            A, B, R, C = (stats.state[factor].to(scores_OI) for factor in FACTORS)
            scores_OI.addmm_(A, B, alpha=self.alpha1).add_(R[:, None] + C, alpha=self.alpha2)
        return scores_OI

    def _begin(self, stats: LayerStats, like_OI: Tensor) -> None:
        rows, columns = like_OI.shape
        seed = int(uniform_of(np.array([stats.name]), self.seed) * 2**53)
        generator = torch.Generator().manual_seed(seed)
        stats.state["A"] = torch.randn(rows, self.rank, generator=generator).to(like_OI)
        stats.state["B"] = like_OI.new_zeros(self.rank, columns)
        stats.state["R"], stats.state["C"] = like_OI.new_zeros(rows), like_OI.new_zeros(columns)
        for factor in FACTORS:
            for moment in ("mean", "square"):
                stats.state[f"{factor}.{moment}"] = torch.zeros_like(stats.state[factor])
        stats.state["updates"] = torch.zeros((), dtype=torch.long)
