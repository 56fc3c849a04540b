r"""Top-k: the k hardest (T-H), the k easiest (T-E), or whichever a probe prefers (T-F).

Jiang et al., "Exploring learning complexity for efficient downstream dataset pruning", ICLR 2025,
section 3.2 and figure 6c, where they shift the distribution and lose to random.
Differs: the paper does not say how T-F picks its side; here a probe on a validation split does.
Ties go to the earlier position, so the generator is never used.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def _top(scores: Tensor, k: int, hard: bool) -> Tensor:
    if not 0 <= k <= len(scores):
        raise ValueError(f"k={k} must be in 0..{len(scores)}, the number of examples")
    return scores.argsort(descending=hard, stable=True)[:k].sort().values


class TopHard:
    """The k highest scores: hardest, or picked soonest by a greedy scorer."""

    name = "top_hard"
    needs: frozenset[str] = frozenset()

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        return _top(scores, k, hard=True)


class TopEasy:
    """The k lowest scores: easiest."""

    name = "top_easy"
    needs: frozenset[str] = frozenset()

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        return _top(scores, k, hard=False)


class TopFlexible:
    """The k lowest (`side="easy"`) or highest (`side="hard"`) scores.

    Args:
        side: default None: both are `candidates()`, among which DataPruner searches.

    Raises:
        ValueError: unknown side; called while side is None.
    """

    name = "top_flexible"
    needs: frozenset[str] = frozenset()

    def __init__(self, side: Literal["easy", "hard"] | None = None):
        if side not in ("easy", "hard", None):
            raise ValueError(f"side={side!r} must be 'easy', 'hard' or None (searched by DataPruner)")
        self.side = side

    def candidates(self) -> list[TopFlexible]:
        """Itself when the side is given, else one of each side."""
        return [self] if self.side else [TopFlexible("easy"), TopFlexible("hard")]

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        if self.side is None:
            raise ValueError("side=None is open: give side='easy' or 'hard', or let DataPruner search")
        return _top(scores, k, hard=self.side == "hard")
