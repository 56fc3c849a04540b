r"""MoSo, moving one sample out: does an example pull the way the others do?

    score_n = mean over visits t of eta_t < grad L_t(D without n), grad l_t(n) >

Tan et al. 2023, "Data pruning via moving-one-sample-out", NeurIPS, arXiv 2310.14664: to the first order, by
how much the training loss of the others rises when n is left out. It is low, and below 0, for what pulls
against the rest (outliers, wrong labels); the paper keeps the high.
Differs: gradients of the last layer only, delta (x) [1, h] with delta = softmax(f_t) - onehot(y), of the
same h at every visit; logits are those of the visit, not of a checkpoint; eta is one constant, 1, and
the paper's factor T / N is left out, neither of which changes a rank. Regression: delta = f - y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..greedy import blocks
from ..types import ANY_TASK, Signals, uniform_of


class MoSo:
    """Agreement with the gradient of all others: high = picked sooner (so not: harder)."""

    name = "moso"
    needs = frozenset({"history", "embeddings", "labels"})
    tasks = ANY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64. Memory O(N C) and one gradient of the last layer, time O(T N C D)."""
        f_TNC = signals.require("history", self.name)
        h_ND, y_N = signals.require("embeddings", self.name), signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # the last bits of the sum, in any order
        n = len(order)
        score_N = torch.zeros(n, dtype=torch.float64)
        for f_NC in f_TNC:
            f_NC = f_NC.double()
            if signals.task == "regression":
                delta_NC = f_NC[:, :1] - y_N[:, None]
            else:
                delta_NC = f_NC.softmax(1) - one_hot(y_N, f_NC.shape[1])
            total_CD, total_C = torch.tensor(0.0), delta_NC[order].sum(0)
            for rows in blocks(n, h_ND.shape[1]):
                total_CD = total_CD + delta_NC[order[rows]].T @ h_ND[order[rows]].double()
            for rows in blocks(n, h_ND.shape[1]):
                h_nD, delta_nC = h_ND[rows].double(), delta_NC[rows]
                all_n = (delta_nC * (h_nD @ total_CD.T + total_C)).sum(1)  # < sum of all, g_n >
                own_n = delta_nC.square().sum(1) * (1 + h_nD.square().sum(1))  # < g_n, g_n >
                score_N[rows] += (all_n - own_n) / max(1, n - 1)
        return score_N / len(f_TNC)
