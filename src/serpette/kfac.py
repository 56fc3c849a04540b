r"""Second moments of a layer's inputs or output gradients, damped and inverted: one factor of K-FAC.

    H ~ Sx (x) Sd,    Sx = E[x x'],  Sd = E[delta delta'],    damped: S + lambda tr(S)/D I

Martens and Grosse 2015, arXiv 1503.05671, section 3; the damping is relative to the mean eigenvalue, since
those of Sd are many orders smaller than those of Sx. Letters: D size of the layer's side, t tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """E[v v'] over tokens, as sums or as moving averages, and the root of its damped inverse."""

    def __init__(self, size: int, like: Tensor):
        self.sum = like.new_zeros(size, size)
        self.weight = 0.0
        # L with L L' = damped; W with W W' = its pseudo-inverse if it is singular (damping 0) and then not
        # `triangular`; None while nothing but zeros was seen
        self.factor: Tensor | None = None
        self.triangular = True

    def add(self, v_tD: Tensor, beta: float | None = None) -> None:
        """Counts the tokens v (t, D); with `beta` as a moving average of the batches' means."""
        if beta is None:
            self.sum.addmm_(v_tD.mT, v_tD)
            self.weight += len(v_tD)
        else:
            self.sum.mul_(1 - beta).addmm_(v_tD.mT, v_tD, alpha=beta / max(1, len(v_tD)))
            self.weight = (1 - beta) * self.weight + beta

    def start_at_identity(self) -> None:
        """As the paper does; a moving average forgets it slowly."""
        self.sum, self.weight = torch.eye(len(self.sum)).to(self.sum), 1.0

    def factorise(self, damping: float, relative: bool = True) -> None:
        """Makes `factor`. Its inverse is not made: solving for the few rows of a batch is as fast."""
        mean = self.sum / max(self.weight, 1e-30)
        average = mean.diagonal().mean()
        if not bool(average > 0):
            self.factor = None
            return
        mean.diagonal().add_(damping * average if relative else damping)
        L, fault = torch.linalg.cholesky_ex(mean)
        self.triangular = not int(fault)
        # contiguous, as it comes back from disk: another layout would give other bits
        self.factor = (L if self.triangular else pseudo_root(mean)).contiguous()

    def projected(self, P_rD: Tensor) -> Tensor:
        """P damped P' (r, r)."""
        assert self.factor is not None
        Y_rD = P_rD @ (self.factor if self.triangular else torch.linalg.pinv(self.factor).mT)
        return Y_rD @ Y_rD.mT


def pseudo_root(matrix: Tensor) -> Tensor:
    """W (D, D) with W W' the pseudo-inverse of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix.double())
    held = values > len(values) * torch.finfo(matrix.dtype).eps * values[-1].clamp(min=0)
    roots = torch.where(held, values.clamp(min=1e-300).rsqrt(), torch.zeros_like(values))
    return (vectors * roots).to(matrix.dtype)


def squared_lengths(rows_nrD: Tensor, moments: Moments) -> Tensor:
    """(n,) sum over the r rows of row' damped^-1 row; one triangular solve for the whole batch."""
    rows, factor = rows_nrD.flatten(0, 1), moments.factor
    assert factor is not None
    if moments.triangular:
        whitened = torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
    else:
        whitened = rows @ factor
    return whitened.square().sum(1).reshape(len(rows_nrD), -1).sum(1)
