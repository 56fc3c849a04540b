r"""DUAL: difficulty times uncertainty of the prediction, early in training.

    score_n = mean over windows w of J visits in a row of  std_w(p_y) (1 - mean_w(p_y))

p_y is the probability of the label, std has J - 1 below. Cho et al. 2025, "Lightweight dataset pruning
without full training via example difficulty and prediction uncertainty", ICML, arXiv 2502.06905: T = 30
visits, J = 10. With `keep` the examples are drawn as in the paper's pruning-ratio adaptive sampling:
    weight_n = score_n Beta(m_n; 16 - b, b),   b = 15 (1 - mu) (1 - r^c),   r = 1 - keep
m_n is the mean of p_y over all visits and mu that of the ten highest scores: little pruning keeps
examples like these, heavy pruning easier ones. Parameters as in the authors' scripts.
Differs: fewer visits than J make one window of all of them (the default probe has 10 visits); m_n within
1e-6 of 0 or 1 counts as that far away, where the density can be infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CLASSIFICATION, Signals, uniform_of


class DUAL:
    """High = hard and undecided. Low for the easy and for what is never learnt alike.

    Args:
        window: J; of T visits there are T - J + 1 windows, or one of T where T < J.
        keep: the share that will be kept, in (0, 1]: then the score is a random key (of id and seed) and
            the k highest are a sample without replacement by the weights above, high = picked sooner.
            Default None: the plain score. Selector `beta` does the like for any score.
        c: how late the Beta moves to the easy; the paper tunes it for each data set, 4 on CIFAR-100.

    Raises:
        ValueError: `window` below 2, `keep` outside (0, 1], `c` not above 0.
    """

    name = "dual"
    needs = frozenset({"history", "labels"})
    tasks = CLASSIFICATION

    def __init__(self, window: int = 10, keep: float | None = None, c: float = 4.0):
        if window < 2:
            raise ValueError(f"window={window} must be at least 2 visits; the paper has 10")
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep={keep} must be in (0, 1], or None for the plain score")
        if not c > 0:
            raise ValueError(f"c={c} must be above 0; the paper has 4 on CIFAR-100")
        self.window, self.keep, self.c = window, keep, c

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, 0 to about 0.5 without `keep`. ValueError in a regression."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"scorer {self.name!r} has no meaning in a {signals.task}; 'optimisation_complexity' has"
            )
        history_TNC = signals.require("history", self.name)
        y_N1 = signals.require("labels", self.name)[:, None]
        p_TN = torch.stack([z_NC.double().softmax(1).gather(1, y_N1)[:, 0] for z_NC in history_TNC])
        T, J = len(p_TN), min(self.window, len(p_TN))
        score_N = torch.zeros_like(p_TN[0])
        if T > 1:  # a single visit tells no spread
            for t in range(T - J + 1):
                p_JN = p_TN[t : t + J]
                score_N += p_JN.std(0) * (1 - p_JN.mean(0)) / (T - J + 1)
        return score_N if self.keep is None else self._keys(score_N, p_TN.mean(0), signals)

    def _keys(self, score_N: Tensor, m_N: Tensor, signals: Signals) -> Tensor:
        assert self.keep is not None
        tie_N = uniform_of(signals.ids, signals.seed)
        top = tie_N.argsort()  # of equal scores, the smallest hash first
        top = top[score_N[top].argsort(descending=True, stable=True)][:10]
        b = 15 * (1 - float(m_N[top].mean())) * (1 - (1 - self.keep) ** self.c)
        m_N = m_N.clamp(1e-6, 1 - 1e-6)
        weight_N = (15 - b) * m_N.log() + (b - 1) * (1 - m_N).log() + score_N.clamp(min=1e-300).log()
        return weight_N - (-tie_N.clamp(min=1e-17).log()).log()  # Gumbel: the k highest are such a sample
