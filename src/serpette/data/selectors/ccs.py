r"""CCS, coverage-centric selection: drop the hardest, then the same budget for each stratum of scores.

Zheng et al. 2023, "Coverage-centric coreset selection for high pruning rates", arXiv 2210.15809,
algorithm 1: 50 strata of equal width, the smallest first; what it cannot use goes to the others.
Differs: never drops so many that fewer than k are left.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


class CCS:
    """Scores are taken as high = hard (the paper uses AUM, low = hard, the other way round).

    Args:
        beta: share of the hardest examples that is dropped first. Default 0: the paper tunes it for each
            data set and budget (0 to 0.9), and without such a search dropping nothing is the neutral choice.
        strata: the paper's 50.

    Raises:
        ValueError: beta outside [0, 1), strata below 1.
    """

    name = "ccs"
    needs: frozenset[str] = frozenset()

    def __init__(self, beta: float = 0.0, strata: int = 50):
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be in [0, 1), the share of the hardest to drop")
        if strata < 1:
            raise ValueError(f"strata={strata} must be at least 1; the paper has 50")
        self.beta, self.strata = beta, strata

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        dropped = min(math.floor(n * Fraction(str(self.beta))), n - k)
        if n == dropped:
            return torch.empty(0, dtype=torch.long)
        rows = scores.argsort(stable=True)[: n - dropped]
        s = scores[rows].double()
        width = (s[-1] - s[0]).item() / self.strata or 1.0  # all alike: one stratum
        stratum = ((s - s[0]) / width).long().clamp(max=self.strata - 1)
        groups = [rows[stratum == i] for i in stratum.unique()]
        picks, left = [], k
        for i, group in enumerate(sorted(groups, key=len)):
            take = min(len(group), left // (len(groups) - i))
            picks.append(group[torch.randperm(len(group), generator=generator)[:take]])
            left -= take
        return torch.cat(picks).sort().values
