r"""OBS: the least growth of a layer's squared error when a weight goes and the others make up for it.

    score = w_ij^2 / d_j^2,   d = diagonal of the upper Cholesky factor U of H^-1,   H = 2 X^T X + damping

Frantar and Alistarh 2023, "SparseGPT", arXiv 2301.00774, Algorithm 1, after Hassibi and Stork 1992, "Second
order derivatives for network pruning: optimal brain surgeon". d_j^2 is the j-th diagonal element of the
inverse of H[j:, j:]: the weights to the left of j are settled, those to its right make up for it by
- w_ij / d_j times the row U[j, j:]. X (N, I) are the inputs of all calibration tokens.

`of_weights` gives the scores of the weights as they stand. `reconstruct` is the whole method: 128 columns at
a time, it cuts the lowest of a block by the weights as they are by then and moves the columns to the right.

Differs: the count of a block is its share of the layer's, which is exact (rounded half up). Inputs that are
always zero do not count in the mean that scales the damping; their weights score 0, and those that are not
cut are left as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import LayerStats


class OBS:
    """Growth of the layer's squared error without each weight, made up for by others; high = more important.

    Args:
        damping: added to the diagonal of the Hessian, as a share of its mean; above 0. 0.01 in the paper.
        block: columns that are cut by the same scores; 128 in the paper.

    Raises:
        ValueError: an argument out of its range; a Hessian that is not finite or, damped, not positive.
    """

    name = "obs"
    weight_needs = frozenset({"hessian"})
    averaged = False

    def __init__(self, damping: float = 0.01, block: int = 128):
        if not 0 < damping < math.inf:
            raise ValueError(f"damping={damping!r} must be above 0, such as 0.01")
        if block < 1:
            raise ValueError(f"block={block!r} must be at least 1 column; the paper takes 128")
        self.damping, self.block = damping, block

    def of_weights(self, stats: LayerStats) -> Tensor:
        """(O, I) of the dtype of the Hessian, 0 or more."""
        U_II, dead_I = self._factor(stats.require("hessian", self.name), f"layer {stats.name!r}")
        w_OI = stats.weight().to(U_II, copy=True)
        return w_OI.div_(U_II.diagonal()).square_().masked_fill_(dead_I, 0)

    def reconstruct(
        self, weight: Tensor, hessian: Tensor, sparsity: float, nm: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cuts the weights of a layer and moves the others so that its outputs change least.

        Args:
            weight: (O, I); left as it is.
            hessian: (I, I) 2 X^T X, float64 or float32, in which it computes; left as it is.
            sparsity: share to cut, in [0, 1): round(sparsity O I) weights, half up, in each block of columns
                its share; of equal scores the lower position goes.
            nm: (n, m), n of every m neighbours in a row stay, such as (2, 4); sparsity is then 1 - n / m.

        Returns:
            The new weight (O, I) of the dtype of `weight`, and the cut (O, I) bool, True where it is zero.

        Raises:
            ValueError: sparsity, n:m or the shapes do not fit.

        Example:
            >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9]])
            >>> w, cut = OBS().reconstruct(torch.tensor([[1.0, 2.0]]), 2 * x.T @ x, sparsity=0.5)
            >>> cut.tolist(), [round(v, 1) for v in w[0].tolist()]
            ([[True, False]], [0.0, 3.0])
        """
        rows, columns = weight.shape
        if hessian.shape != (columns, columns):
            raise ValueError(
                f"hessian of shape {tuple(hessian.shape)} must be ({columns}, {columns}), as the weight is "
                f"{tuple(weight.shape)}"
            )
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r} must be in [0, 1)")
        block, (n, m) = self.block, nm or (1, 1)
        if nm is not None:
            if not 0 < n <= m or columns % m:
                raise ValueError(f"nm={nm!r} needs 0 < n <= m and m that divides the {columns} inputs")
            if not math.isclose(sparsity, 1 - n / m, abs_tol=1e-6):
                raise ValueError(f"sparsity={sparsity!r} must be {1 - n / m:g} where {n} of every {m} stay")
            block = max(1, block // m) * m
        U_II, dead_I = self._factor(hessian, "the layer")
        w_IO = weight.T.clone(memory_format=torch.contiguous_format).to(U_II.dtype)
        cut_IO = torch.zeros_like(w_IO, dtype=torch.bool)
        total = math.floor(sparsity * rows * columns + 0.5)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            w_bO, cut_bO, U_bb = w_IO[start:stop], cut_IO[start:stop], U_II[start:stop, start:stop]
            d_b1, dead_b1 = U_bb.diagonal()[:, None], dead_I[start:stop, None]
            if nm is None:
                scores_bO = (w_bO / d_b1).square_().masked_fill_(dead_b1, 0)
                count = total * stop // columns - total * start // columns
                lowest = scores_bO.T.flatten().argsort(stable=True)[:count]
                cut_bO[lowest % (stop - start), lowest // (stop - start)] = True
            errors_bO = torch.empty_like(w_bO)
            for j in range(stop - start):
                if nm is not None and j % m == 0:
                    group = slice(j, j + m)
                    scores_mO = (w_bO[group] / d_b1[group]).square_().masked_fill_(dead_b1[group], 0)
                    lowest = scores_mO.argsort(dim=0, stable=True)[: m - n]
                    cut_bO[group].scatter_(0, lowest, True)
                errors_bO[j] = torch.where(cut_bO[j], w_bO[j] / d_b1[j], 0)
                w_bO[j:].addr_(U_bb[j, j:], errors_bO[j], alpha=-1)
                w_bO[j].masked_fill_(cut_bO[j], 0)
            w_IO[stop:].addmm_(U_II[start:stop, stop:].T, errors_bO, alpha=-1)
        return w_IO.T.to(weight.dtype).contiguous(), cut_IO.T.contiguous()

    def _factor(self, hessian: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """U, upper, U^T U = H^-1 of the damped Hessian, and (I,) bool, the inputs that are always zero."""
        H_II = hessian.clone()
        diagonal_I = H_II.diagonal()
        dead_I = diagonal_I == 0
        diagonal_I += self.damping * diagonal_I.sum() / max(1, int((~dead_I).sum()))
        diagonal_I[dead_I] = 1
        L_II, failed = torch.linalg.cholesky_ex(H_II)
        U_II, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(L_II), upper=True)
        if int(failed) or int(failed_too) or not bool(U_II.isfinite().all()):
            raise ValueError(
                f"the Hessian of {where} is not finite, or not positive with damping={self.damping}; look "
                "for NaN in the inputs, accumulate it in float64, or raise the damping"
            )
        return U_II, dead_I
