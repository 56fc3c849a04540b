r"""Beta sampling: random, weighted towards an easiness that grows with how much is pruned.

    weight_n = (1 - x_n) Beta(x_n; 16 - b, b),   b = 15 (1 - mu) (1 - r^c),   r = 1 - k / N

Cho et al. 2025, "Lightweight dataset pruning without full training via example difficulty and prediction
uncertainty", ICML, arXiv 2502.06905 (DUAL), with the parameters of the authors' scripts. Little pruning draws
from the hardest examples, heavy pruning from easier ones.
Differs: a selector sees scores of any kind, not the mean probability of the label that the paper takes for
x_n and multiplies by the score. Here x_n is the share of the examples that are harder (ties share theirs),
1 - x_n the score, and mu the mean of x over the ten hardest. `DUAL(keep=...)` with `top_hard` is the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Beta:
    """Scores are taken as high = hard; only their order counts. Draws without replacement.

    Args:
        c: how late the weight moves to the easy as more is pruned; the paper tunes it for each data set, 4 on
            CIFAR-100. Larger stays with the hard ones longer.

    Raises:
        ValueError: c not above 0.

    Example:
        >>> import torch
        >>> pick = lambda k: Beta()(torch.arange(1000.0), k, torch.Generator().manual_seed(0))
        >>> bool(pick(20).double().mean() < 300), bool(pick(500).double().mean() > 600)
        (True, True)
    """

    name = "beta"
    needs: frozenset[str] = frozenset()

    def __init__(self, c: float = 4.0):
        if not c > 0:
            raise ValueError(f"c={c} must be above 0; the paper has 4 on CIFAR-100")
        self.c = c

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        if k == 0:
            return torch.empty(0, dtype=torch.long)
        weight_N = self.log_weights(scores, k)
        u_N = torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=1e-17)
        return (weight_N - (-u_N.log()).log()).topk(k).indices.sort().values  # Gumbel top-k

    def log_weights(self, scores: Tensor, k: int) -> Tensor:
        """(N,) float64, up to a constant."""
        n = len(scores)
        _, value_N, count_V = torch.unique(-scores, return_inverse=True, return_counts=True)
        x_V = (count_V.cumsum(0) - count_V.double() / 2) / n  # the hardest first; never 0 or 1
        x_N = x_V[value_N]
        b = 15 * (1 - float(x_N.sort().values[:10].mean())) * (1 - (1 - k / n) ** self.c)
        return (15 - b) * x_N.log() + b * (1 - x_N).log()  # (b - 1) of the density, 1 of the score
