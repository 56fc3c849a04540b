r"""IFD: instruction-following difficulty.   IFD(q, a) = s(a | q) / s(a)

s is the mean loss of the answer's tokens, with the instruction q before them and alone. Near 1 the
instruction does not help: a hard example. Above 1 it hinders: answer and instruction do not belong together.
Li et al. 2023, "From quantity to quality: boosting LLM performance with self-guided data selection for
instruction tuning" (Cherry), arXiv 2308.12032, eq. 3; they drop those above 1 and keep the highest.

Differs: those above 1 get the negative of their IFD, so that they come after all others. The model is used
as it is; the paper tunes it briefly on a hundred examples of each of some clusters first (score with a model
so tuned for that). The answer alone follows the model's first token, so that both losses are means over the
same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Signals


class IFD:
    """Loss of the answer given its instruction over its loss alone: high (up to 1) = hard, picked sooner.

    An example whose IFD is above 1 scores minus its IFD, below -1: it is picked after all others, whatever
    the budget. Take the highest with `top_hard`.
    """

    name = "ifd"
    needs = frozenset({"response_losses", "answer_losses"})
    tasks = frozenset({"causal-lm"})

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 in (0, 1], or below -1."""
        if signals.task not in self.tasks:
            raise ValueError(f"ifd has no meaning in a {signals.task}: there are no instructions and answers")
        given_N = signals.require("response_losses", self.name).double()
        alone_N = signals.require("answer_losses", self.name).double()
        ifd_N = given_N / alone_N.clamp(min=1e-12)
        return torch.where(ifd_N > 1, -ifd_N, ifd_N)
