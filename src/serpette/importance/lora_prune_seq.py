r"""LoraPruneSeq: LoRAPrune's criterion where the LoRA stands before the layer.

    J = (G * W)^2,   G = s [(W0 gB)(A - gA) + (W0 B) gA],   W = W0 + s (W0 B) A

LoRAPrune 2023, arXiv 2305.18403 (v1), Eq. 2, 9 and 10: y = (x + s x A^T B^T) W0^T, A (r, I), B (I, r). It is
a LoRA beside the layer with the factor W0 B (O, r), which a step on B changes by W0 gB. As in `lora_prune`, G
is how much a step of gradient descent with learning rate 1 changes W, and the term of second order, gB gA,
needs gradients without loss scale.

Differs: Eq. 10 as printed is G = s (gB A + B gA - gB gA) * W0, element by element, of an (I, I) and an (O, I)
matrix: it exists for square layers alone, and there is not the gradient of W (`literal=True`). Eq. 9 prints
the square inside its bracket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LayerStats


class LoraPruneSeq:
    """Squared first-order change of the loss without each weight, by a LoRA before it; high = more important.

    Args:
        cross: with the term of both gradients, as the paper prints it.
        literal: Eq. 10 as printed, for square layers; off, since the elements it multiplies do not belong
            together.

    Raises:
        ValueError: no LoRA in the layer, or one that stands beside it (`"lora_prune"`); `literal=True` for a
            layer that is not square.
    """

    name = "lora_prune_seq"
    weight_needs = frozenset({"lora"})
    averaged = True

    def __init__(self, cross: bool = True, literal: bool = False):
        self.cross, self.literal = cross, literal

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the gradients, 0 or more."""
        A, gA = stats.require("A", self.name), stats.require("grad_A", self.name)
        B, gB = stats.require("B", self.name), stats.require("grad_B", self.name)
        W0 = stats.require("base", self.name)()
        if not stats.sequential:
            raise ValueError(
                f"importance 'lora_prune_seq' is of a LoRA before its layer, and that of {stats.name!r} "
                "stands beside it; use 'lora_prune'"
            )
        left_I2r = torch.cat([gB, B], 1).mul_(stats.scale)
        right_2rI = torch.cat([A - gA if self.cross else A, gA])
        if not self.literal:
            return ((W0 @ left_I2r) @ right_2rI).mul_(stats.weight()).square_()
        if W0.shape[0] != W0.shape[1]:
            raise ValueError(
                f"literal=True, Eq. 10 as printed, is for square layers, and {stats.name!r} is "
                f"{tuple(W0.shape)}; leave it at False"
            )
        return (left_I2r @ right_2rI).mul_(W0).mul_(stats.weight()).square_()
