r"""DQ, data set quantisation: split the features into bins by graph cut, draw uniformly from each.

A bin S takes, one after the other, from what the earlier bins left (R):
    next = argmax_x  sum_(p in S) || f(p) - f(x) ||^2  -  sum_(p in R) || f(p) - f(x) ||^2
Zhou et al. 2023, "Dataset quantization", arXiv 2308.10524, section 3. The first bins are spread
around the centre of the data, the last hold what is left.
Differs: the features are the pre-trained model's, there is no patch dropping, and the total is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DQ:
    """Scores are not looked at. Time O(N^2 D), memory O(N D).

    Args:
        bins: of (nearly) equal size; the paper's 10 on CIFAR and ImageNet.

    Raises:
        ValueError: bins below 1; called without embeddings.
    """

    name = "dq"
    needs = frozenset({"embeddings"})

    def __init__(self, bins: int = 10):
        if bins < 1:
            raise ValueError(f"bins={bins} must be at least 1; the paper has 10")
        self.bins = bins

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        if embeddings is None:
            raise ValueError(
                "selector 'dq' needs embeddings (N, D); pass them, or let DataPruner observe them"
            )
        bins = self.split(embeddings)
        quotas = [k * len(rows) // n for rows in bins]
        # largest remainders first; of equal ones, any
        shuffled = torch.randperm(len(bins), generator=generator).tolist()
        for b in sorted(shuffled, key=lambda b: -(k * len(bins[b]) % n))[: k - sum(quotas)]:
            quotas[b] += 1
        picks = [
            rows[torch.randperm(len(rows), generator=generator)[:quota]]
            for rows, quota in zip(bins, quotas, strict=True)
        ]
        return torch.cat(picks).sort().values

    def split(self, embeddings: Tensor) -> list[Tensor]:
        """Positions of the examples in each bin, in the order of picking (the last bin: of position)."""
        n = len(embeddings)
        bins = min(self.bins, n)
        f_ND = embeddings.double() - embeddings.double().mean(0)
        left_N = torch.arange(n)
        found = []
        for b in range(bins - 1):
            f_RD = f_ND[left_N]
            norm_R = f_RD.square().sum(1)
            # sum over p in A of ||p - x||^2 = const + |A| ||x||^2 - 2 x . sum(A), for A = S and A = R
            size, sum_D = -len(left_N), -f_RD.sum(0)  # of S minus those of R
            out_R = torch.zeros(len(left_N), dtype=torch.bool)
            picked = []
            for _ in range(n // bins + (b < n % bins)):
                gain_R = size * norm_R - 2 * (f_RD @ sum_D)
                i = int(gain_R.masked_fill(out_R, -torch.inf).argmax())
                out_R[i] = True
                picked.append(i)
                size, sum_D = size + 2, sum_D + 2 * f_RD[i]  # i leaves R and joins S
            found.append(left_N[picked])
            left_N = left_N[~out_R]
        return [*found, left_N]
