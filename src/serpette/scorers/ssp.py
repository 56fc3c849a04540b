r"""SSP: self-supervised prototypes.

    score_n = || h_n - m_(a(n)) ||_2,   m, a = k-means of the features

Sorscher et al. 2022, "Beyond neural scaling laws", arXiv 2206.14486, the self-supervised prototype metric.
Differs: features of whatever pre-trained model is at hand; Euclidean distance.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..types import EVERY_TASK, Signals, uniform_of


class SSP:
    """Distance to the own centroid: high = far = hard. No labels.

    The paper keeps the far ones where data is plenty, the near ones where it is scarce: selectors
    `top_hard` and `top_easy`.

    Args:
        clusters: of k-means; default: the number of classes (the paper finds anything within an order of
            magnitude of it alike), 10 where there are none. Never more than examples.

    Raises:
        ValueError: `clusters` below 1.
    """

    name = "ssp"
    needs = frozenset({"embeddings"})
    tasks = EVERY_TASK

    def __init__(self, clusters: int | None = None):
        if clusters is not None and clusters < 1:
            raise ValueError(f"clusters={clusters} must be at least 1, or None for the number of classes")
        self.clusters = clusters

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, in units of the features."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        order = uniform_of(signals.ids, signals.seed).argsort()
        h_ND = signals.require("embeddings", self.name)[order]
        k = min(self.clusters or signals.num_classes or 10, len(h_ND))
        kmeans = KMeans(k, n_init="auto", random_state=signals.seed % 2**32)
        # one thread: with several the sums, and so the last bits, depend on who comes first
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
            cluster_N = torch.as_tensor(kmeans.fit_predict(h_ND.numpy())).long()
        centroid_KD = torch.as_tensor(kmeans.cluster_centers_)
        scores_N = torch.empty(len(h_ND), dtype=torch.float64)
        scores_N[order] = (h_ND - centroid_KD[cluster_N]).double().norm(dim=1)
        return scores_N
