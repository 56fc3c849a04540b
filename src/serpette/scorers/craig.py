r"""CRAIG: a weighted subset whose gradients stand in for all gradients.

    F(S) = sum over i of max over j in S of ( d0 - || g_i - g_j || ),   next = argmax_x F(S + x) - F(S)

Mirzasoleiman, Bilmes and Leskovec 2020, "Coresets for data-efficient training of machine learning
models", ICML, arXiv 1906.01827, algorithm 1: facility location within each class; a pick's weight is the
number of examples nearest to it. g is the gradient of the last layer, delta (x) [1, h] with
delta = softmax(f) - onehot(y), so < g_i, g_j > = < delta_i, delta_j > (1 + < h_i, h_j >), without any
gradient at hand. Regression: delta = f - y, one group.
Differs: chosen once, on the tuned model or probe, not every few epochs; the paper's experiments on deep
networks take delta alone; distances are rounded to 2^-30 of d0 = 2 max ||g||, which makes the sums exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..greedy import blocks, lazy_greedy, on_grid
from ..types import ANY_TASK, Signals, uniform_of


class CRAIG:
    """Minus the turn at which an example was picked within its class: high (0) = picked sooner.

    Args:
        picks: stop after so many in each class, for large data; the others follow by the last gain known
            of them. Default: every example is picked. The first gains of a class cost O(n_c^2 D).

    Attributes:
        weights_: (N,) float64 of the last call: how many examples of its class each pick stands for, 0
            where not picked; all 1 without `picks`.

    Raises:
        ValueError: `picks` below 1.
    """

    name = "craig"
    needs = frozenset({"logits", "embeddings", "labels"})
    tasks = ANY_TASK
    turns_within_class = True

    def __init__(self, picks: int | None = None):
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.picks = picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, 0, -1, -2 ... in each class. Memory O(n_c D), never n_c x n_c."""
        f_NC, h_ND = signals.require("logits", self.name), signals.require("embeddings", self.name)
        y_N = signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        classes = signals.task == "classification"
        group_N = y_N[order] if classes else torch.zeros(len(order))
        scores_N, self.weights_ = torch.empty(2, len(order), dtype=torch.float64)
        for c in group_N.unique():
            rows = order[group_N == c]
            f_nC = f_NC[rows].double()
            if classes:
                delta_nC = f_nC.softmax(1) - one_hot(y_N[rows], f_nC.shape[1])
            else:
                delta_nC = f_nC[:, :1] - y_N[rows, None]
            picked, weights_n = self._pick(delta_nC, h_ND[rows].double())
            scores_N[rows[picked]] = -torch.arange(len(rows), dtype=torch.float64)
            self.weights_[rows] = weights_n
        return scores_N

    def _pick(self, delta_nC: Tensor, h_nD: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the order of picking, weights (n,)."""
        n = len(h_nD)
        norm_n = delta_nC.square().sum(1) * (1 + h_nD.square().sum(1))
        scale = 2 * norm_n.max().sqrt() or torch.tensor(1.0)  # no two gradients are farther apart
        near_n = torch.zeros(n, dtype=torch.float64)  # 1 - distance to the nearest pick / scale
        nearest_n = torch.full((n,), -1)

        def similar(rows: Tensor) -> Tensor:  # (n, rows)
            inner = (delta_nC @ delta_nC[rows].T) * (1 + h_nD @ h_nD[rows].T)
            squared = (norm_n[:, None] + norm_n[rows] - 2 * inner).div_(scale**2)
            return on_grid(1 - on_grid(squared, 2.0**40).clamp_(min=0).sqrt_())

        def gains_of(rows: Tensor) -> Tensor:
            return (similar(rows) - near_n[:, None]).clamp_(min=0).sum(0)

        def take(i: int) -> None:
            similar_n = similar(torch.tensor([i]))[:, 0]
            closer_n = (similar_n > near_n) | (nearest_n < 0)
            closer_n[i] = True  # a pick stands for itself, also beside a twin
            near_n[closer_n], nearest_n[closer_n] = similar_n[closer_n], i

        first_n = torch.empty_like(near_n)
        for rows in blocks(n, n):
            first_n[rows] = gains_of(rows)
        picked = lazy_greedy(first_n, gains_of, take, self.picks or n)
        return picked, torch.bincount(nearest_n, minlength=n).double()
