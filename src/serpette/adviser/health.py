r"""What is wrong with the data: duplicates, imbalance, wrong labels, outliers.

Wrong labels: the share e that moved to another class by chance, by maximum likelihood over e and a
temperature t, from cross-fitted logits z of a linear head,

    p(y | x) = (1 - e) softmax(t z)_y + e / (C - 1) (1 - softmax(t z)_y)

A head that learned noisy labels is less sure of all examples, which t takes back; what remains is that even
the surest are wrong in a share e. Classes that merely overlap do not look like this. The interval is where
the profile likelihood is within 1.92 of its maximum (95 %); it takes the model for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..types import Signals

SIMILARITY = 0.98  # cosine of centred features, from which on two examples are near duplicates
SAME = 0.9999  # from which on it is looked whether their inputs are equal
PAIRS = 2**22  # that are looked at at once
SHOWN = 20  # suspects, outliers and groups that are listed
NEIGHBOURS = 5
FAR = 6.0  # median absolute deviations above the median distance
TEMPERATURES = np.geomspace(0.3, 60, 60)
SHARES = np.linspace(0, 0.6, 121)


def examine(
    signals: Signals,
    outputs: Tensor | None,
    class_names: list[str],
    digest: Callable[[int], bytes],
) -> dict[str, Any]:
    """The health of N observed examples, as in `result.json`.

    Args:
        signals: ids, embeddings, and labels where the task has them.
        outputs: (N, C) cross-fitted logits, see `cross_fitted`; None without classes.
        digest: of the inputs at a position; equal where these are equal bit for bit.
    """
    z_ND = signals.require("embeddings", "advise").float()
    z_ND = z_ND - z_ND.mean(0)
    exact, near = duplicates(z_ND, digest)
    found: dict[str, Any] = {
        "exact_duplicates": listed(exact, signals.ids),
        "near_duplicates": listed(near, signals.ids) | {"similarity": SIMILARITY},
        "outliers": outliers(z_ND, signals.ids),
    }
    if signals.task == "classification" and signals.labels is not None:
        sizes = torch.bincount(signals.labels, minlength=len(class_names)).tolist()
        found["classes"] = dict(zip(class_names, sizes, strict=True))
        if outputs is not None:
            found["wrong_labels"] = wrong_labels(outputs, signals.labels, signals.ids, class_names)
    return found


def wrong_labels(logits_NC: Tensor, y_N: Tensor, ids: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """Share of wrong labels with its interval, and whose label is more likely wrong than right.

    Example:
        >>> y = torch.arange(400) % 2
        >>> logits = 4.0 * torch.eye(2)[y]
        >>> y[:40] = 1 - y[:40]                     # a tenth of the labels are made wrong
        >>> ids, names = np.arange(400).astype(str), ["a", "b"]
        >>> found = wrong_labels(logits, y, ids, names)
        >>> 0.05 < found["share"] < 0.12, len(found["suspects"])
        (True, 20)
    """
    C = logits_NC.shape[1]
    if C < 2:
        return {"share": 0.0, "low": 0.0, "high": 0.0, "suspects": []}
    shares = SHARES[SHARES < (C - 1) / C]  # with more the labels would tell what an example is not
    likelihood = np.empty((len(TEMPERATURES), len(shares)))
    for i, t in enumerate(TEMPERATURES):
        p_N = torch.softmax(logits_NC.double() * t, 1).gather(1, y_N[:, None])[:, 0].numpy()
        for j, e in enumerate(shares):
            likelihood[i, j] = np.log(np.maximum((1 - e) * p_N + e / (C - 1) * (1 - p_N), 1e-12)).sum()
    i, j = np.unravel_index(likelihood.argmax(), likelihood.shape)
    profile = likelihood.max(0)
    within = shares[profile > profile.max() - 1.92]
    e = float(shares[j])
    p_NC = torch.softmax(logits_NC.double() * TEMPERATURES[i], 1)
    p_N = p_NC.gather(1, y_N[:, None])[:, 0]
    wrong_N = e / (C - 1) * (1 - p_N)
    wrong_N = wrong_N / (wrong_N + (1 - e) * p_N).clamp(min=1e-300)
    order = wrong_N.argsort(descending=True, stable=True)
    suspects = [n for n in order.tolist() if wrong_N[n] > 0.5 and int(p_NC[n].argmax()) != int(y_N[n])]
    return {
        "share": e,
        "low": float(within.min()),
        "high": float(within.max()),
        "suspected": len(suspects),
        "suspects": [
            {
                "id": str(ids[n]),
                "label": class_names[int(y_N[n])],
                "likely": class_names[int(p_NC[n].argmax())],
                "confidence": float(wrong_N[n]),
            }
            for n in suspects[:SHOWN]
        ],
    }


def near_groups(z_ND: Tensor) -> Tensor:
    """(N,) int64, the group of near duplicates of each example; numbered as their first examples come.

    Two examples are in one group if a chain of examples joins them, each of which has a cosine of SIMILARITY
    or more to the next; an example without near duplicates is a group of its own.

    Args:
        z_ND: features as they are; their cosine is taken around their mean.

    Example:
        >>> near_groups(torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.1, 0.0], [-9.0, -9.0]])).tolist()
        [0, 1, 0, 2]
    """
    return _near(z_ND)[0]


def duplicates(z_ND: Tensor, digest: Callable[[int], bytes]) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of positions whose inputs are equal, and groups that are nearly equal but not all so.

    Args:
        z_ND: features as they are.
        digest: see `examine`; taken once at most of each position, where the features are those of another.
    """
    group_N, has_twin_N = _near(z_ND)
    by_digest: dict[bytes, list[int]] = {}
    for n in has_twin_N.nonzero()[:, 0].tolist():
        by_digest.setdefault(digest(n), []).append(n)
    exact = as_groups(by_digest.values())
    first = {n: group[0] for group in exact for n in group}
    near: dict[int, list[int]] = {}
    for n, number in enumerate(group_N.tolist()):
        near.setdefault(number, []).append(n)
    alike = [group for group in as_groups(near.values()) if len({first.get(n, n) for n in group}) > 1]
    return exact, alike


def _near(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What `near_groups` returns, and (N,) whether another example has a cosine of SAME or more."""
    z_ND = z_ND.float() - z_ND.float().mean(0)
    unit_ND = z_ND / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    N = len(unit_ND)
    group_N, has_twin_N = torch.arange(N), torch.zeros(N, dtype=torch.bool)
    for here in torch.arange(N).split(max(1, PAIRS // max(N, 1))):
        cosine = unit_ND[here] @ unit_ND.T
        cosine[torch.arange(len(here)), here] = -1  # not to itself
        has_twin_N[here] = (cosine >= SAME).any(1)
        new = (cosine >= SIMILARITY) & (group_N[here, None] != group_N)
        rows, columns = new.nonzero(as_tuple=True)
        if len(rows):
            ends = group_N[here[rows]].numpy(), group_N[columns].numpy()
            graph = coo_array((np.ones(len(rows)), ends), shape=(N, N))
            group_N = torch.from_numpy(connected_components(graph, directed=False)[1]).long()[group_N]
    _, first, number_N = np.unique(group_N.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[number_N]), has_twin_N


def as_groups(groups: Iterable[list[int]]) -> list[list[int]]:
    """Those of two and more positions, the largest first."""
    return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g))


def listed(groups: list[list[int]], ids: np.ndarray) -> dict[str, Any]:
    """As in `result.json`: how many examples are one too many, their share of all `ids`, the first groups."""
    extra = sum(len(group) - 1 for group in groups)  # those that could go
    return {
        "examples": extra,
        "share": extra / len(ids),
        "groups": [[str(ids[n]) for n in group[:SHOWN]] for group in groups[:SHOWN]],
    }


def outliers(z_ND: Tensor, ids: np.ndarray) -> list[dict[str, Any]]:
    """Examples far from their nearest neighbours: `FAR` deviations above the median distance."""
    k = min(NEIGHBOURS, len(z_ND) - 1)
    if k < 1:
        return []
    distance_N = torch.cat(
        [
            torch.cdist(part, z_ND).topk(k + 1, largest=False).values[:, 1:].mean(1)
            for part in z_ND.split(1024)
        ]
    )
    middle = distance_N.median()
    spread = (distance_N - middle).abs().median().clamp(min=1e-12)
    far_N = (distance_N - middle) / (1.4826 * spread)
    order = far_N.argsort(descending=True, stable=True)
    return [
        {"id": str(ids[n]), "distance": float(far_N[n])} for n in order[:SHOWN].tolist() if far_N[n] > FAR
    ]
