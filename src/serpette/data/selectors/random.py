r"""Random: k of N without replacement, each subset as likely as any other.

Within a class balanced budget it is stratified random, the control that every method has to beat.
Guo et al. 2022, "DeepCore", arXiv 2204.08499. Differs: nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Random:
    """Any k of the N examples; the scores are not looked at, whatever their direction."""

    name = "random"
    needs: frozenset[str] = frozenset()

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        return torch.randperm(n, generator=generator)[:k].sort().values
