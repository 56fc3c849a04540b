r"""Diverse and easy: k-means of the features, then the easiest of each cluster in turn.

Jing et al. 2024, "Exploring learning complexity for downstream data pruning", arXiv 2402.05356 (the
first version of DLC) keeps "the diverse and easy samples".
Differs: only the abstract was at hand, so the clusters and the turns are ours.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


class DiverseEasy:
    """Low scores are easy. A round takes the easiest left of each cluster; a part round the easiest of those.

    Args:
        clusters: at most so many, never more than k. Default 100: a cluster for each pick would be the
            most diverse, but the time of k-means grows with N x clusters.

    Raises:
        ValueError: clusters below 1; called without embeddings.
    """

    name = "diverse_easy"
    needs = frozenset({"embeddings"})

    def __init__(self, clusters: int = 100):
        if clusters < 1:
            raise ValueError(f"clusters={clusters} must be at least 1")
        self.clusters = clusters

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor:
        """Sorted positions (k,) int64. ValueError when k is not in 0..N."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        n = len(scores)
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must be in 0..{n}, the number of examples")
        if embeddings is None:
            raise ValueError(
                "selector 'diverse_easy' needs embeddings (N, D); pass them, or let DataPruner observe them"
            )
        if k == 0:
            return torch.empty(0, dtype=torch.long)
        seed = int(torch.randint(2**31, (), generator=generator))
        kmeans = KMeans(min(k, self.clusters), n_init="auto", random_state=seed)
        # one thread: with several the sums, and so the last bits, depend on who comes first
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
            cluster_N = kmeans.fit_predict(embeddings.numpy())
        s_N = scores.numpy()
        turn_N = np.empty(n, dtype=np.int64)
        for c in np.unique(cluster_N):
            rows = np.flatnonzero(cluster_N == c)
            turn_N[rows[s_N[rows].argsort(kind="stable")]] = np.arange(len(rows))
        picks = np.lexsort((s_N, turn_N))[:k]  # by turn, then by score
        return torch.from_numpy(np.sort(picks))
