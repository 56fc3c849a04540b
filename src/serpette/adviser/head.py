"""A linear head on frozen features, fitted to the end: what stands for the fine-tuned model while advising.

Letters: N examples, D features, C classes (1 output in a regression), K folds.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ..types import uniform_of

PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def fit_head(x_ND: Tensor, y_N: Tensor, num_classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) of least mean loss + penalty / 2 ||W||^2, the bias free.

    Logistic regression on labels; ridge regression on numbers (`num_classes` = 0, half the squared error).
    The logistic one by L-BFGS in the coordinates V = R W with R'R = X'X / 2N + penalty: a bound of the
    Hessian (Boehning 1992), which makes the problem round and saves most of the iterations.

    Args:
        x_ND: features; a mean square norm about 1 suits `PENALTIES`.
        y_N: int64 classes, or float32 targets.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1])
        >>> W, b = fit_head(x, y, 2, 1e-3)
        >>> (x @ W + b).argmax(1).tolist()
        [0, 1, 1]
    """
    N, D, C = len(x_ND), x_ND.shape[1], num_classes
    mean_D = x_ND.mean(0)
    z_ND = x_ND - mean_D
    if not C:
        y_N1 = y_N[:, None].to(x_ND.dtype)
        gram_DD, moment_D1 = z_ND.T @ z_ND / N, z_ND.T @ (y_N1 - y_N1.mean()) / N
        W_D1 = torch.linalg.solve(gram_DD + penalty * torch.eye(D), moment_D1)
        return W_D1, y_N1.mean(0) - mean_D @ W_D1
    R_DD = torch.linalg.cholesky(z_ND.T @ z_ND / (2 * N) + penalty * torch.eye(D), upper=True)
    inverse_DD = torch.linalg.solve_triangular(R_DD, torch.eye(D), upper=True)
    z_ND = torch.cat([z_ND @ inverse_DD, torch.ones(N, 1)], 1).numpy()  # the last column is the bias
    metric_DD = penalty * (inverse_DD.T @ inverse_DD).numpy()  # penalty ||W||^2 = V' metric V
    z_DN, truth = np.ascontiguousarray(z_ND.T), (np.arange(N), y_N.numpy())

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        V_DC = flat.reshape(D + 1, C).astype(np.float32)
        logits_NC = z_ND @ V_DC
        logits_NC -= logits_NC.max(1, keepdims=True)
        right_N = logits_NC[truth]
        p_NC = np.exp(logits_NC, out=logits_NC)
        sum_N1 = p_NC.sum(1, keepdims=True)
        p_NC /= sum_N1
        p_NC[truth] -= 1
        gradient = z_DN @ p_NC / N
        pull_DC = metric_DD @ V_DC[:-1]
        gradient[:-1] += pull_DC
        loss = (np.log(sum_N1[:, 0], dtype=np.float64) - right_N).mean() + (V_DC[:-1] * pull_DC).sum() / 2
        return float(loss), gradient.ravel().astype(np.float64)

    found = minimize(
        loss_and_gradient,
        np.zeros((D + 1) * C),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 200, "gtol": 2e-5, "ftol": 1e-8},
    )
    V_DC = torch.from_numpy(found.x.reshape(D + 1, C)).float()
    W_DC = inverse_DD @ V_DC[:-1]
    return W_DC, V_DC[-1] - mean_D @ W_DC


def whitened(x_ND: Tensor, components: int = 192) -> Tensor:
    """(N, K) features standardised and on their first K principal components; mean square norm about 1."""
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0).clamp(min=1e-6) / x_ND.shape[1] ** 0.5
    if z_ND.shape[1] <= components:
        return z_ND
    _, axes_DD = torch.linalg.eigh(z_ND.T.double() @ z_ND.double())
    return z_ND @ axes_DD[:, -components:].flip(1).float()


def folds_of(
    ids: np.ndarray, labels: Tensor | None, folds: int, seed: int, groups: Tensor | None = None
) -> Tensor:
    """(N,) int64, the fold of each example: of each class about the same number in each fold.

    Follows from ids and seed, not from the order of the examples.

    Args:
        labels: None without classes.
        groups: (N,) int64, see `health.near_groups`: those of a group share a fold, so that no head judges a
            duplicate of what it was fitted on; a group larger than a fold is dealt like other examples.
    """
    order = uniform_of(ids, seed).argsort()
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    fold_N = torch.empty(len(order), dtype=torch.long)
    if groups is None or len(groups.unique()) == len(groups):
        fold_N[order] = torch.arange(len(order)) % folds
        return fold_N
    members: dict[int, list[int]] = {}
    for n, group in zip(order.tolist(), groups[order].tolist(), strict=True):
        members.setdefault(group, []).append(n)
    filled = np.zeros((1 if labels is None else int(labels.max()) + 1, folds))
    units = [part for group in members.values() for part in _parts(group, len(order) // folds)]
    for group in sorted(units, key=len, reverse=True):  # the largest first, to the emptiest fold
        own = filled[0 if labels is None else labels[group[0]]]
        fold = int(np.lexsort((filled.sum(0), own))[0])
        own[fold] += len(group)
        fold_N[group] = fold
    return fold_N


def _parts(group: list[int], most: int) -> list[list[int]]:
    """The group; one that is larger than a fold, example by example."""
    return [group] if len(group) <= most else [[n] for n in group]


def choose_penalty(
    x_ND: Tensor,
    y_N: Tensor,
    num_classes: int,
    ids: np.ndarray,
    seed: int = 0,
    groups: Tensor | None = None,
) -> float:
    """The one of `PENALTIES` that serves held-out fifths best; a tie goes to the stronger.

    Small sets are split several times, until about 300 examples have been held out: one small split says
    little.
    """
    splits = min(5, -(-300 // max(1, len(x_ND) // 5)))
    fold_N = folds_of(ids, y_N if num_classes else None, 5, seed, groups)
    found = dict.fromkeys(PENALTIES, 0.0)
    for held in [fold_N == fold for fold in range(splits)]:
        for penalty in PENALTIES:
            W, b = fit_head(x_ND[~held], y_N[~held], num_classes, penalty)
            output = x_ND[held] @ W + b
            if num_classes:
                found[penalty] += float((output.argmax(1) == y_N[held]).sum())
            else:
                found[penalty] -= float((output[:, 0] - y_N[held]).square().sum())
    return max(PENALTIES, key=lambda p: (found[p], p))


def cross_fitted(
    x_ND: Tensor,
    y_N: Tensor,
    num_classes: int,
    folds: int = 5,
    seed: int = 0,
    ids: np.ndarray | None = None,
    penalty: float | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """(N, C) float32 outputs of each example by a head that has not seen it.

    Args:
        x_ND: raw features; they are standardised.
        folds: 5: a head sees four fifths, near enough to all, for five fits.
        penalty: None: chosen on held-out examples.
        groups: duplicates, as for `folds_of`.
    """
    ids = np.array([str(i) for i in range(len(x_ND))]) if ids is None else ids
    x_ND = whitened(x_ND)
    penalty = choose_penalty(x_ND, y_N, num_classes, ids, seed, groups) if penalty is None else penalty
    fold_N = folds_of(ids, y_N if num_classes else None, folds, seed, groups)
    outputs = torch.empty(len(x_ND), max(1, num_classes))
    for fold in range(folds):
        held = fold_N == fold
        W, b = fit_head(x_ND[~held], y_N[~held], num_classes, penalty)
        outputs[held] = x_ND[held] @ W + b
    return outputs
