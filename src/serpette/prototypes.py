r"""A classifier without training, along a learning path: class means as prototypes.

    mu_c = mean of h_0(x) over class c
    z_c(x, t) = -||h_t(x) - mu_c|| / temperature   or   1 / ||h_t(x) - mu_c||

h_t is the encoder with point t's mask in place. Two passes over the chunks of features, in float64,
so that memory stays flat and the order of the examples does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .types import PathFeatures


def prototype_logits(
    path: PathFeatures,
    labels: Tensor,
    num_classes: int,
    *,
    prototype: Literal["unmasked", "masked"] = "unmasked",
    logits: Literal["neg_distance", "inverse_distance"] = "neg_distance",
    standardize: bool = True,
    temperature: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (rows (n,), logits (P, n, C) float64). A class without examples has logits of -inf."""
    mean_D, scale_D = moments(path) if standardize else (0.0, 1.0)
    count_C = torch.bincount(labels, minlength=num_classes).double()
    mu_PCD = None
    for rows, features in path.chunks():
        z_PnD = (features.double() - mean_D) / scale_D
        if prototype == "unmasked":
            z_PnD = z_PnD[:1]
        if mu_PCD is None:
            mu_PCD = z_PnD.new_zeros(z_PnD.shape[0], num_classes, z_PnD.shape[2])
        mu_PCD.index_add_(1, labels[rows], z_PnD)
    assert mu_PCD is not None, "a path has at least one chunk"
    mu_PCD /= count_C.clamp(min=1)[:, None]

    for rows, features in path.chunks():
        z_PnD = (features.double() - mean_D) / scale_D
        distance_PnC = torch.cdist(z_PnD, mu_PCD.expand(len(z_PnD), -1, -1))
        if logits == "inverse_distance":
            logits_PnC = 1 / distance_PnC.clamp(min=1e-6)
        else:
            logits_PnC = -distance_PnC / temperature
        yield rows, logits_PnC.masked_fill(count_C == 0, -torch.inf)


def moments(path: PathFeatures) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of the unmasked features, float64; a constant feature has scale 1."""
    total, square, n = torch.zeros(()), torch.zeros(()), 0
    for _, features in path.chunks():
        h_nD = features[0].double()
        total, square, n = total + h_nD.sum(0), square + (h_nD**2).sum(0), n + len(h_nD)
    mean_D = total / n
    std_D = (square / n - mean_D**2).clamp(min=0).sqrt()
    return mean_D, torch.where(std_D > 1e-6 * mean_D.abs() + 1e-12, std_D, torch.ones_like(std_D))
