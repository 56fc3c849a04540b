r"""GradMatch: a weighted subset whose gradients sum to the gradient of all.

    E(S, w) = || sum over j in S of w_j g_j - G ||^2 + lambda ||w||^2,   G = mean of all g
    next = argmax_x < g_x, G - sum over j in S of w_j g_j >,   then w = argmin E(S, w)

Killamsetty et al. 2021, "GRAD-MATCH: gradient matching based data subset selection for efficient deep
model training", ICML, arXiv 2103.00123, algorithm 2: orthogonal matching pursuit, within each class.
g = delta (x) [1, h] is the gradient of the last layer, delta = softmax(f) - onehot(y).
Regression: delta = f - y, one group.
Differs: chosen once, on the tuned model or probe, not every few epochs; lambda is in units of the mean
||g||^2 of the class; weights may turn negative; after `support` picks the pursuit starts again from G,
among those left (else late picks match rounding errors, and the memory grows as n_c^2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..greedy import on_grid
from ..types import ANY_TASK, Signals, uniform_of


class GradMatch:
    """Minus the turn at which an example was picked within its class: high (0) = picked sooner.

    Args:
        penalty: lambda; 0.5 keeps single weights from growing.
        picks: stop after so many in each class, for large data (a turn costs O(n_c C D)); the others
            follow in the order in which they suit the next turn. Default: every example is picked.
        support: picks whose weights are solved for together; 1,000 need 8 MB.

    Raises:
        ValueError: `penalty` not above 0, `picks` or `support` below 1.
    """

    name = "grad_match"
    needs = frozenset({"logits", "embeddings", "labels"})
    tasks = ANY_TASK
    turns_within_class = True

    def __init__(self, penalty: float = 0.5, picks: int | None = None, support: int = 1000):
        if not penalty > 0:
            raise ValueError(f"penalty={penalty} must be above 0, else twins have no solution; 0.5 is usual")
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        if support < 1:
            raise ValueError(f"support={support} must be at least 1; 1000 is usual")
        self.penalty, self.picks, self.support = penalty, picks, support

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, 0, -1, -2 ... in each class. Memory O(n_c D + support^2)."""
        f_NC, h_ND = signals.require("logits", self.name), signals.require("embeddings", self.name)
        y_N = signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        classes = signals.task == "classification"
        group_N = y_N[order] if classes else torch.zeros(len(order))
        scores_N = torch.empty(len(order), dtype=torch.float64)
        for c in group_N.unique():
            rows = order[group_N == c]
            f_nC = f_NC[rows].double()
            if classes:
                delta_nC = f_nC.softmax(1) - one_hot(y_N[rows], f_nC.shape[1])
            else:
                delta_nC = f_nC[:, :1] - y_N[rows, None]
            h_nD = torch.cat([h_ND[rows].double(), torch.ones(len(rows), 1, dtype=torch.float64)], 1)
            scores_N[rows] = -self._turns(delta_nC, h_nD)
        return scores_N

    def _turns(self, delta_nC: Tensor, h_nD: Tensor) -> Tensor:
        n = len(h_nD)
        picks = min(self.picks or n, n)
        size = min(self.support, picks)
        norm_n = delta_nC.square().sum(1) * h_nD.square().sum(1)
        top = float(norm_n.max()) or 1.0
        penalty = self.penalty * (float(norm_n.mean()) or 1.0)
        target_CD = delta_nC.T @ h_nD / n
        to_target_n = (delta_nC * (h_nD @ target_CD.T)).sum(1)
        h_SD, delta_SC = h_nD.new_empty(size, h_nD.shape[1]), h_nD.new_empty(size, delta_nC.shape[1])
        inverse_SS, w_S = h_nD.new_empty(size, size), h_nD.new_empty(size)  # of K + penalty; the weights
        turns_n, out_n = torch.empty_like(norm_n), torch.zeros_like(norm_n)
        residual_CD, s = target_CD, 0

        def fit_n() -> Tensor:  # < g_n, residual >; a rounding error must not part twins
            return on_grid((delta_nC * (h_nD @ residual_CD.T)).sum(1) / top) + out_n

        for turn in range(picks):
            if s == size:
                s, residual_CD = 0, target_CD
            i = int(fit_n().argmax())
            turns_n[i], out_n[i] = turn, -torch.inf
            # K + penalty grows by a row and a column: the inverse and the weights by bordering
            k_s = (delta_SC[:s] @ delta_nC[i]) * (h_SD[:s] @ h_nD[i])
            v_s = inverse_SS[:s, :s] @ k_s
            pivot = norm_n[i] + penalty - k_s @ v_s
            w = (to_target_n[i] - k_s @ w_S[:s]) / pivot
            w_S[:s] -= w * v_s
            inverse_SS[:s, :s] += torch.outer(v_s / pivot, v_s)
            inverse_SS[s, :s] = inverse_SS[:s, s] = -v_s / pivot
            inverse_SS[s, s], w_S[s], h_SD[s], delta_SC[s] = 1 / pivot, w, h_nD[i], delta_nC[i]
            s += 1
            residual_CD = target_CD - (w_S[:s, None] * delta_SC[:s]).T @ h_SD[:s]
        rest = fit_n().argsort(descending=True, stable=True)[: n - picks]
        turns_n[rest] = torch.arange(picks, n, dtype=torch.float64)
        return turns_n
