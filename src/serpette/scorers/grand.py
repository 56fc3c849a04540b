r"""GraNd: the length of the loss gradient.

    score_n = mean over seeds of || grad_(W, b) l(W h_n + b, y_n) ||

Paul et al. 2021, arXiv 2107.07075, the GraNd score.
Differs: gradient of the last layer only. It is [delta, delta (x) h] with delta = softmax(f) - onehot(y),
so its length is ||delta|| sqrt(1 + ||h||^2), without a backward pass. Regression: delta = f - y, the
gradient of half the squared error.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from ..types import ANY_TASK, Signals


class GraNd:
    """Length of the last layer's gradient early in training: high = hard (or wrongly labelled).

    `embeddings` are taken as the input h of the last layer.
    """

    name = "grand"
    needs = frozenset({"early_logits", "embeddings", "labels"})
    tasks = ANY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, loss per unit of the weights."""
        f_SNC = signals.require("early_logits", self.name).double()
        h_ND = signals.require("embeddings", self.name)
        y_N = signals.require("labels", self.name)
        if signals.task == "regression":
            delta_SN = (f_SNC[..., 0] - y_N).abs()
        else:
            delta_SN = (f_SNC.softmax(2) - one_hot(y_N, f_SNC.shape[2])).norm(dim=2)
        return delta_SN.mean(0) * (1 + h_ND.double().square().sum(1)).sqrt()  # (N,)
