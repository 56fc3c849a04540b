r"""FlexRand: half of the budget from an easy pool, half from a hard pool, at random inside each.

Of n examples in ascending order of their score the first P = round(n gamma) are the easy pool.
    gamma <= 1/2:  easy = min(P, k/2),      hard = k - easy
    gamma >  1/2:  hard = min(n - P, k/2),  easy = k - hard
Jiang et al., "Exploring learning complexity for efficient downstream dataset pruning", ICLR 2025,
section 3.2. Its probability M / (2 N gamma) exceeds 1 when gamma < M / 2N; the minimum is what it means.

Differs: P rounds half up, exactly; the total is exact (two separate roundings miss it by one); the odd
example goes to a side drawn at random, for a fixed side would make all picks hard, or all easy, at
one example a class; a pool too small for its quota passes the rest on.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


class FlexRand:
    """Scores are taken as high = hard.

    Args:
        gamma: share of the examples that count as easy, in [0, 1]. Default None: 0.05, 0.10 ... 0.95
            are `candidates()`, among which DataPruner searches. Small where data is scarce keeps
            the easiest; large keeps the hardest.

    Raises:
        ValueError: gamma outside [0, 1]; called while gamma is None.

    Example:
        >>> import torch
        >>> FlexRand(gamma=0.25)(torch.arange(8.0), 4, torch.Generator().manual_seed(0))[:2]
        tensor([0, 1])
    """

    name = "flex_rand"
    needs: frozenset[str] = frozenset()

    def __init__(self, gamma: float | None = None):
        if gamma is not None and (isinstance(gamma, (bool, str)) or not 0 <= gamma <= 1):
            raise ValueError(f"gamma={gamma!r} must be in [0, 1], or None to let DataPruner search")
        self.gamma = gamma

    def candidates(self) -> list[FlexRand]:
        """Itself when gamma is given, else the paper's grid of 19."""
        return [self] if self.gamma is not None else [FlexRand(i / 20) for i in range(1, 20)]

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        if self.gamma is None:
            raise ValueError(
                "gamma=None is open: give gamma, as in FlexRand(gamma=0.3), or let DataPruner search"
            )
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        gamma = Fraction(str(self.gamma))  # 0.35 means 7/20, not the float beside it
        P = math.floor(n * gamma + Fraction(1, 2))
        half = (k + int(torch.randint(2, (), generator=generator))) // 2  # up or down when k is odd
        easy = min(max(half, k - (n - P)), P)  # both cases above: what one pool cannot hold, the other does
        ranked = scores.argsort(stable=True)
        easy_pool, hard_pool = ranked[:P], ranked[P:]
        picks = [
            easy_pool[torch.randperm(P, generator=generator)[:easy]],
            hard_pool[torch.randperm(n - P, generator=generator)[: k - easy]],
        ]
        return torch.cat(picks).sort().values
