r"""Learning confidence, the first version of DLC.   S(x) = mean over t of ( 1 - max_c p_t(c | x) )

Average predicted confidence of subnets of different capacity; the first version of the paper keeps
the diverse and easy samples (selector `diverse_easy`). Jing et al. 2024, arXiv 2402.05356.

Differs: only the abstract's definition was at hand; the subnets are the masked models of
`serpette.masking`, classified by class prototypes as in `dlc`, whose path it shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import LOW_DISCREPANCY
from ..prototypes import prototype_logits
from ..types import CLASSIFICATION, PathSpec, Signals


class LearningConfidence:
    """One minus the confidence, averaged over a path of masked models: high = hard (unsure)."""

    name = "learning_confidence"
    needs = frozenset({"labels"})
    tasks = CLASSIFICATION

    def __init__(self):
        self.path = PathSpec(points=LOW_DISCREPANCY, adaptive=True)

    def along_path(self, signals: Signals) -> Tensor:
        """1 - confidence of each model on each example, (P, N) float64."""
        if signals.task not in self.tasks:
            raise ValueError(
                "learning_confidence has no meaning in a regression: there is no class to be sure of"
            )
        path, labels = signals.path(self.path, self.name), signals.require("labels", self.name)
        doubt_PN = torch.empty(len(path.points), len(labels), dtype=torch.float64)
        for rows, logits_PnC in prototype_logits(path, labels, signals.num_classes):
            doubt_PN[:, rows] = 1 - logits_PnC.softmax(-1).amax(-1)
        return doubt_PN

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, the mean of `along_path` over the points."""
        return self.along_path(signals).mean(0)
