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
from torch import Tensor

from ..types import Signals

SIMILARITY = 0.98  # cosine of centred features, from which on two examples are near duplicates
SAME = 0.9999  # from which on it is looked whether their inputs are equal
SHOWN = 20  # suspects, outliers and groups that are listed
NEIGHBOURS = 5
FAR = 6.0  # median absolute deviations above the median distance
TEMPERATURES = np.geomspace(0.3, 60, 60)
SHARES = np.linspace(0, 0.6, 121)


def examine(
    signals: Signals,
    outputs: Tensor | None,
    class_names: list[str],
    equal: Callable[[int, int], bool],
) -> dict[str, Any]:
    """The health of N observed examples, as in `result.json`.

    Args:
        signals: ids, embeddings, and labels where the task has them.
        outputs: (N, C) cross-fitted logits, see `cross_fitted`; None without classes.
        equal: whether the inputs of two positions are equal, bit for bit.
    """
    z_ND = signals.require("embeddings", "advise").float()
    z_ND = z_ND - z_ND.mean(0)
    unit_ND = z_ND / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    exact, near = duplicates(unit_ND, equal)
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
    likelihood = np.empty((len(TEMPERATURES), len(SHARES)))
    for i, t in enumerate(TEMPERATURES):
        p_N = torch.softmax(logits_NC.double() * t, 1).gather(1, y_N[:, None])[:, 0].numpy()
        for j, e in enumerate(SHARES):
            likelihood[i, j] = np.log(np.maximum((1 - e) * p_N + e / (C - 1) * (1 - p_N), 1e-12)).sum()
    i, j = np.unravel_index(likelihood.argmax(), likelihood.shape)
    profile = likelihood.max(0)
    within = SHARES[profile > profile.max() - 1.92]
    e = float(SHARES[j])
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


def duplicates(unit_ND: Tensor, equal: Callable[[int, int], bool]) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of positions whose inputs are equal, and groups that are nearly equal but not all so.

    Args:
        unit_ND: centred features of length 1.
    """
    N = len(unit_ND)
    same, near = list(range(N)), list(range(N))
    for start in range(0, N, 1024):
        cosine = unit_ND[start : start + 1024] @ unit_ND.T
        rows, columns = (cosine > SIMILARITY).nonzero(as_tuple=True)
        for row, column in zip((rows + start).tolist(), columns.tolist(), strict=True):
            if row < column:
                _join(near, row, column)
                if cosine[row - start, column] > SAME and _root(same, row) != _root(same, column):
                    if equal(row, column):
                        _join(same, row, column)
    exact = _by_root(same)
    alike = [group for group in _by_root(near) if len({_root(same, n) for n in group}) > 1]
    return exact, alike


def _root(parents: list[int], n: int) -> int:
    while parents[n] != n:
        parents[n] = n = parents[parents[n]]
    return n


def _join(parents: list[int], a: int, b: int) -> None:
    parents[max(_root(parents, a), _root(parents, b))] = min(_root(parents, a), _root(parents, b))


def _by_root(parents: list[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for n in range(len(parents)):
        groups.setdefault(_root(parents, n), []).append(n)
    return as_groups(groups.values())


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
