r"""GLISTER: what lowers the loss on a validation part the most.

    next = argmax_x  < g_x, grad L_V(theta_S) >,   theta_S = theta - eta (gradients of what was picked)

Killamsetty et al. 2021, "GLISTER: generalization based data subset selection for efficient and robust
learning", AAAI, arXiv 2012.10630: greedy on the validation loss after one step, to the first order (Taylor);
as in its algorithm the model steps after each of many rounds of picks. g = delta (x) [1, h] is the gradient
of the last layer, delta = softmax(f) - onehot(y), whose steps change the logits of V in closed form:
    f_v <- f_v - eta mean over the round's picks j of delta_j (1 + < h_j, h_v >)
Regression: delta = f - y.
Differs: chosen once, on the tuned model or probe, not every few epochs; without a validation set at hand V is
drawn from the examples themselves by the hash of their id, and no example of V is judged on itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..greedy import on_grid
from ..types import ANY_TASK, Signals, uniform_of


class GLISTER:
    """Minus the turn at which an example was picked: high (0) = picked sooner.

    Args:
        validation: share of the examples that are V, in (0, 1); 0.1 leaves nine tenths to choose from.
        step: eta in units of 1 / mean(1 + ||h||^2), so that 1 moves a logit by about one error.
        rounds: the model steps after every N / rounds picks. Each costs O(N C D).
        picks: stop after so many; the others follow in the order in which they suit the next turn.
            Default: every example is picked.

    Raises:
        ValueError: `validation` outside (0, 1), `step` not above 0, `rounds` or `picks` below 1.
    """

    name = "glister"
    needs = frozenset({"logits", "embeddings", "labels"})
    tasks = ANY_TASK

    def __init__(
        self, validation: float = 0.1, step: float = 1.0, rounds: int = 100, picks: int | None = None
    ):
        if not 0 < validation < 1:
            raise ValueError(f"validation={validation} must be in (0, 1), a share of the examples; try 0.1")
        if not step > 0:
            raise ValueError(f"step={step} must be above 0; 1 is usual")
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1; 100 is usual")
        if picks is not None and picks < 1:
            raise ValueError(f"picks={picks} must be at least 1, or None for every example")
        self.validation, self.step, self.rounds, self.picks = validation, step, rounds, picks

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, a permutation of 0, -1 ... -(N - 1). Memory O(N (C + D))."""
        f_NC, h_ND = signals.require("logits", self.name), signals.require("embeddings", self.name)
        y_N = signals.require("labels", self.name)
        order = uniform_of(signals.ids, signals.seed).argsort()  # of ties, the smallest hash is picked
        classes, n = signals.task == "classification", len(order)
        h_ND = torch.cat([h_ND[order].double(), torch.ones(n, 1, dtype=torch.float64)], 1)
        f_NC = f_NC[order].double()
        if classes:
            y_NC = one_hot(y_N[order], f_NC.shape[1]).double()
        else:
            f_NC, y_NC = f_NC[:, :1], y_N[order, None].double()

        def error(f: Tensor, y: Tensor) -> Tensor:
            return (f.softmax(1) if classes else f) - y

        delta_NC, V = error(f_NC, y_NC), math.ceil(n * self.validation)
        h_VD, f_VC = h_ND[:V], f_NC[:V].clone()  # the smallest hashes
        norm_N = h_ND.square().sum(1)
        eta = self.step / float(norm_N.mean())
        top = float((delta_NC.square().sum(1) * norm_N).max()) or 1.0
        turn_N, left = torch.empty(n, dtype=torch.float64), torch.arange(n)
        picks, every = min(self.picks or n, n), math.ceil(n / self.rounds)
        for turn in range(0, picks, every):
            delta_VC = error(f_VC, y_NC[:V])
            gain_N = (delta_NC * (h_ND @ (delta_VC.T @ h_VD).T)).sum(1)  # < g_x, sum over V >
            own_V = (delta_NC[:V] * delta_VC).sum(1) * norm_N[:V]
            gain_N[:V] = (gain_N[:V] - own_V) / max(1, V - 1)
            gain_N[V:] /= V
            left = left[on_grid(gain_N[left] / top).argsort(descending=True, stable=True)]
            turn_N[left] = torch.arange(turn, n, dtype=torch.float64)
            took, left = left[:every], left[every:].sort().values
            step_CD = delta_NC[took].T @ h_ND[took] / len(took)
            f_VC -= eta * (h_VD @ step_CD.T)
        scores_N = torch.empty_like(turn_N)
        scores_N[order] = -turn_N
        return scores_N
