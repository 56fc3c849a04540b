r"""EL2N: the length of the error vector.

    score_n = mean over seeds of || softmax(f_s(x_n)) - onehot(y_n) ||_2

Paul et al. 2021, arXiv 2107.07075, the EL2N score.
Differs: as many proxies as `early_logits` holds (the paper: ten). Regression: | f_s(x_n) - y_n |.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from ..types import ANY_TASK, Signals


class EL2N:
    """Length of the error early in training, 0 to sqrt(2): high = hard (or wrongly labelled)."""

    name = "el2n"
    needs = frozenset({"early_logits", "labels"})
    tasks = ANY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64; in a regression in units of the target."""
        f_SNC = signals.require("early_logits", self.name).double()
        y_N = signals.require("labels", self.name)
        if signals.task == "regression":
            return (f_SNC[..., 0] - y_N).abs().mean(0)  # (N,)
        delta_SNC = f_SNC.softmax(2) - one_hot(y_N, f_SNC.shape[2])
        return delta_SNC.norm(dim=2).mean(0)  # (N,)
