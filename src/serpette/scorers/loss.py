r"""Loss: what the model gets wrong now, the control beside every dearer score.

    score_n = l( f(x_n), y_n )

l is the cross-entropy of the tuned model's or the proxy's logits, the squared error in a regression, the
mean loss of the response tokens in a causal language model. Loshchilov and Hutter 2015, "Online batch
selection for faster training of neural networks", arXiv 1511.06343, rank by it.
Differs: ranked once, not while training.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..types import EVERY_TASK, Signals


class Loss:
    """Loss of each example: high = hard (or wrongly labelled).

    In nats; in a regression in squared units of the target. Whose: see `proxy=` of `serpette.score`; in a
    causal language model always that of the model that is scored.
    """

    name = "loss"
    needs = frozenset({"logits", "labels", "response_losses"})  # whichever the task has
    tasks = EVERY_TASK

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64."""
        if signals.task == "causal-lm":
            return signals.require("response_losses", self.name).double()
        f_NC = signals.require("logits", self.name).double()
        y_N = signals.require("labels", self.name)
        if signals.task == "regression":
            return (f_NC[:, 0] - y_N).square()
        return cross_entropy(f_NC, y_N, reduction="none")
