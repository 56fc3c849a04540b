r"""Superfiltering: instruction-following difficulty seen by a small model.

    IFD(q, a) = PPL(a | q) / PPL(a) = exp( s(a | q) - s(a) )

s is the small model's mean loss of the answer's tokens. Li et al. 2024, "Superfiltering: weak-to-strong data
filtering for fast instruction-tuning", arXiv 2402.00530, eq. 2: weak and strong models rank alike. Unlike
`ifd` this is a ratio of perplexities; both are above 1 for the same examples, which the paper drops.

Differs: those above 1 get the negative of their IFD, so that they come after all others. The answer alone
follows the model's first token, so that both losses are means over the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Signals


class Superfiltering:
    """Perplexity of the answer given its instruction over that alone: high (up to 1) = hard, picked sooner.

    An example whose IFD is above 1 scores minus its IFD, below -1: it is picked after all others, whatever
    the budget. Take the highest with `top_hard`.

    Args:
        model: the small model: a zoo name, a hub id or a folder of a causal language model, which brings its
            own tokenizer; or the model itself (with the tokenizer of the scored model, unless the model's is
            given as `processing_class`). Default: the model that is scored, for which the result says so.
        processing_class: tokenizer of a `model` that is not a name.
    """

    name = "superfiltering"
    needs = frozenset({"response_losses", "answer_losses"})
    tasks = frozenset({"causal-lm"})

    def __init__(self, model: Any = None, processing_class: Any = None):
        self.model, self.processing_class = model, processing_class

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 in (0, 1], or below -1; `signals` are those of the small model."""
        if signals.task not in self.tasks:
            raise ValueError(
                f"superfiltering has no meaning in a {signals.task}: there are no instructions and answers"
            )
        given_N = signals.require("response_losses", self.name).double()
        alone_N = signals.require("answer_losses", self.name).double()
        ifd_N = (given_N - alone_N).clamp(max=80).exp()  # finite, whatever the model says
        return torch.where(ifd_N > 1, -ifd_N, ifd_N)
