r"""LoraPrune: the squared first-order change of the loss without a weight, from the gradients of its LoRA.

    J = (G * W)^2,   G = s (gB A + B gA - gB gA) = s [gB | B] [A - gA ; gA],   W = W0 + s B A

LoRAPrune 2023, arXiv 2305.18403 (v1), Eq. 6 and 8: gA and gB are dL/dA and dL/dB, and G is how much a step
of gradient descent with learning rate 1 changes W. One product of rank 2r a layer; no gradient of W.

The last term, gB gA, is of second order: unlike the others it grows with the square of the loss, so
gradients that still have a loss scale, or a loss that is a sum in place of a mean, change the ranking. The
paper drops the learning rate in front of it. `LoraPrune(cross=False)` leaves the term out.

Differs: s, which cancels inside a layer, is kept for the ranking over layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LayerStats


class LoraPrune:
    """Squared first-order change of the loss without each weight, by LoRA's gradients; high = more important.

    Args:
        cross: with the term gB gA, as the paper prints it.

    Raises:
        ValueError: no LoRA in the layer, or one that stands before it (`"lora_prune_seq"`).
    """

    name = "lora_prune"
    weight_needs = frozenset({"lora"})
    averaged = True

    def __init__(self, cross: bool = True):
        self.cross = cross

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the gradients, 0 or more."""
        if stats.sequential:
            raise ValueError(
                f"importance 'lora_prune' is of a LoRA beside its layer, and that of {stats.name!r} stands "
                "before it; use 'lora_prune_seq'"
            )
        A, gA = stats.require("A", self.name), stats.require("grad_A", self.name)
        B, gB = stats.require("B", self.name), stats.require("grad_B", self.name)
        left_O2r = torch.cat([gB, B], 1).mul_(stats.scale)
        right_2rI = torch.cat([A - gA if self.cross else A, gA])
        return (left_O2r @ right_2rI).mul_(stats.weight()).square_()
