r"""D2 pruning: difficulty spreads over a graph of neighbours, and each pick takes it back from its own.

    forward:  s_i <- s_i + sum over the k nearest j of e_ij s_j,          e_ij = exp(- gamma d_ij)
    turns:    pick i = argmax s;  s_j <- s_j - exp(- gamma_back d_ij) s_i  for the k nearest j of i

Maharana, Yadav and Bansal 2024, "D2 pruning: message passing for balancing diversity and difficulty in
data pruning", ICLR, arXiv 2310.07931, section 3. A dense region of hard examples scores high and is
thinned out as it is picked from.
Differs: scores are shifted and scaled to 0 .. 1 first, since some are negative here; distances are in units
of the median distance to a neighbour, since raw features of 700 numbers are so far apart that exp(-d) = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...greedy import blocks


class D2:
    """Scores are taken as high = hard.

    Args:
        neighbours: k of the graph; 10 is a usual size.
        gamma: how fast a message fades with distance, forward; 1 = by e at the median distance.
        gamma_back: the same for what a pick takes back; 1 as for the way forward.

    Raises:
        ValueError: `neighbours` below 1, a gamma below 0; called without embeddings.
    """

    name = "d2"
    needs = frozenset({"embeddings"})

    def __init__(self, neighbours: int = 10, gamma: float = 1.0, gamma_back: float = 1.0):
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} must be at least 1; 10 is usual")
        for option, value in (("gamma", gamma), ("gamma_back", gamma_back)):
            if not value >= 0:
                raise ValueError(f"{option}={value} must be at least 0; 1 is usual")
        self.neighbours, self.gamma, self.gamma_back = neighbours, gamma, gamma_back

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64; ties go to the earlier. ValueError when k is not in 0..N."""
        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        if embeddings is None:
            raise ValueError(
                "selector 'd2' needs embeddings (N, D); pass them, or let DataPruner observe them"
            )
        s_N = scores.double() - scores.double().min() if n else scores.double()
        s_N = s_N / (s_N.max() or 1.0) if n else s_N
        if n > 1:
            near_NK, d_NK = self.graph(embeddings)
            s_N = s_N + ((-self.gamma * d_NK).exp() * s_N[near_NK]).sum(1)
            back_NK = (-self.gamma_back * d_NK).exp()
        picks = torch.empty(k, dtype=torch.long)
        out_N = torch.zeros(n, dtype=torch.float64)
        for turn in range(k):
            i = int((s_N + out_N).argmax())
            picks[turn], out_N[i] = i, -torch.inf
            if n > 1:
                s_N[near_NK[i]] -= back_NK[i] * s_N[i]
        return picks.sort().values

    def graph(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(N, k) positions of the nearest others and their distances over the median. O(N k) memory."""
        n = len(embeddings)
        k = min(self.neighbours, n - 1)
        x_ND = embeddings.double()
        near_NK, d_NK = torch.empty(n, k, dtype=torch.long), torch.empty(n, k, dtype=torch.float64)
        for rows in blocks(n, n):
            d_nN = torch.cdist(x_ND[rows], x_ND)
            d_nN[torch.arange(len(rows)), rows] = torch.inf
            d_NK[rows], near_NK[rows] = d_nN.topk(k, dim=1, largest=False)
        return near_NK, d_NK / (float(d_NK.median()) or 1.0)
