r"""M-F: top-k of one side for a part of the budget, random for the rest.

Jiang et al., "Exploring learning complexity for efficient downstream dataset pruning", ICLR 2025,
section 3.2: FlexRand with an extreme gamma. Differs: the paper does not say how the side is chosen;
here a probe on a validation split does.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


class MixedFlexible:
    """The easiest (lowest scores) or hardest examples, mixed with random ones.

    Args:
        side: `"easy"` or `"hard"`; default None: both are `candidates()`, among which DataPruner searches.
        share: of the budget that is top-k, rounded half up; default one half, as in FlexRand.

    Raises:
        ValueError: unknown side, share outside [0, 1]; called while side is None.
    """

    name = "mixed_flexible"
    needs: frozenset[str] = frozenset()

    def __init__(self, side: Literal["easy", "hard"] | None = None, share: float = 0.5):
        if side not in ("easy", "hard", None):
            raise ValueError(f"side={side!r} must be 'easy', 'hard' or None (searched by DataPruner)")
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} must be in [0, 1]; 0.5 mixes half and half")
        self.side, self.share = side, share

    def candidates(self) -> list[MixedFlexible]:
        """Itself when the side is given, else one of each side."""
        return [self] if self.side else [MixedFlexible(side, self.share) for side in ("easy", "hard")]

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        if self.side is None:
            raise ValueError("side=None is open: give side='easy' or 'hard', or let DataPruner search")
        if not 0 <= k <= len(scores):
            raise ValueError(f"k={k} must be in 0..{len(scores)}, the number of examples")
        top = int(k * Fraction(str(self.share)) + Fraction(1, 2))
        ranked = scores.argsort(descending=self.side == "hard", stable=True)
        rest = ranked[top:]
        drawn = rest[torch.randperm(len(rest), generator=generator)[: k - top]]
        return torch.cat([ranked[:top], drawn]).sort().values
