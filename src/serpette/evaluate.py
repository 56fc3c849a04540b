"""How good, how sure: metrics of predictions, and intervals for their differences.

Everything takes numpy arrays, lists or torch tensors, computes in float64 and returns Python floats.
Letters: N examples, C classes, S seeds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import softmax

FEW_DISCORDANT = 10  # below so many examples on which two models disagree, the t-interval is too narrow


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a torch tensor, perhaps bfloat16 or on a GPU
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _vector(values: Any, name: str) -> np.ndarray:
    array = _array(values).astype(np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}; it must be (N,) with N >= 1")
    return array


def _pair(a: Any, b: Any, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    a_N, b_N = _vector(a, names[0]), _vector(b, names[1])
    if len(a_N) != len(b_N):
        raise ValueError(
            f"{names[0]} has {len(a_N)} values and {names[1]} has {len(b_N)}; "
            "they must describe the same examples in the same order"
        )
    return a_N, b_N


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        hint = f"; did you mean {level / 100:g}?" if 1 < level < 100 else ""
        raise ValueError(f"level={level!r} must be in (0, 1){hint}")


def _predicted(predictions: Any) -> np.ndarray:
    array = _array(predictions)
    if array.ndim == 2:
        return array.argmax(1)
    if array.ndim != 1:
        raise ValueError(f"predictions have shape {array.shape}; they must be (N,) classes or (N, C) logits")
    return array


def accuracy(predictions: Any, labels: Any) -> float:
    """Share of examples whose class is found, in [0, 1].

    Args:
        predictions: (N,) classes or (N, C) logits.
        labels: (N,) classes.

    Raises:
        ValueError: on empty input or different lengths.

    >>> accuracy([[2.0, 1.0], [0.0, 3.0]], [0, 0])
    0.5
    """
    predicted, true = _pair(_predicted(predictions), labels, ("predictions", "labels"))
    return float((predicted == true).mean())


def accuracy_by_class(predictions: Any, labels: Any, num_classes: int) -> np.ndarray:
    """(C,) accuracy among the examples of each class; NaN for a class without examples.

    >>> accuracy_by_class([0, 1, 1], [0, 0, 1], 2).tolist()
    [0.5, 1.0]
    """
    predicted, true = _pair(_predicted(predictions), labels, ("predictions", "labels"))
    if true.min() < 0 or true.max() >= num_classes:
        raise ValueError(
            f"labels reach from {true.min():g} to {true.max():g}; with num_classes={num_classes} "
            f"they must be in 0..{num_classes - 1}"
        )
    total = np.bincount(true.astype(int), minlength=num_classes)
    right = np.bincount(true.astype(int), weights=predicted == true, minlength=num_classes)
    return np.where(total > 0, right / np.maximum(total, 1), np.nan)


def r2(predictions: Any, targets: Any) -> float:
    """1 - residual / total sum of squares: 1 is perfect, 0 is as good as the mean of the targets.

    Args:
        predictions: (N,) or (N, 1).
        targets: (N,), not all equal.

    Raises:
        ValueError: when all targets are equal, where R2 has no meaning.

    >>> r2([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    0.7857142857142857
    """
    predictions = _array(predictions)
    predictions = predictions[:, 0] if predictions.ndim == 2 and predictions.shape[1] == 1 else predictions
    predicted, true = _pair(predictions, targets, ("predictions", "targets"))
    spread = ((true - true.mean()) ** 2).sum()
    if spread == 0:
        raise ValueError(f"targets are all {true[0]:g}; R2 needs targets that differ")
    return float(1 - ((true - predicted) ** 2).sum() / spread)


def spearman(a: Any, b: Any) -> float:
    """Rank correlation, in [-1, 1]; ties share their average rank. NaN when a or b is constant.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    a_N, b_N = _pair(a, b, ("a", "b"))
    a_N, b_N = stats.rankdata(a_N), stats.rankdata(b_N)
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    scale = math.sqrt(float(a_N @ a_N) * float(b_N @ b_N))
    return float(a_N @ b_N) / scale if scale else math.nan


def class_averaged_spearman(a: Any, b: Any, labels: Any) -> float:
    """Mean over the classes of the rank correlation within the class.

    Classes where it is undefined (one example, or constant scores) are left out; NaN if all are.

    >>> class_averaged_spearman([1, 2, 3, 4], [1, 2, 4, 3], [0, 0, 1, 1])
    0.0
    """
    a_N, b_N = _pair(a, b, ("a", "b"))
    labels_N = _array(labels)
    if labels_N.shape != a_N.shape:
        raise ValueError(f"labels have shape {labels_N.shape}; they must be {a_N.shape}, as the scores")
    each = [spearman(a_N[labels_N == c], b_N[labels_N == c]) for c in np.unique(labels_N)]
    each = [value for value in each if not math.isnan(value)]
    return float(np.mean(each)) if each else math.nan


def detection_auc(scores: Any, wrong: Any) -> float:
    """Chance that a wrongly labelled example scores higher than a rightly labelled one; ties count half.

    Args:
        scores: (N,) higher = harder.
        wrong: (N,) booleans, True where the label is known to be wrong.

    Raises:
        ValueError: when no label, or every label, is wrong.

    >>> detection_auc([0.1, 0.9, 0.5], [False, True, False])
    1.0
    """
    scores_N, wrong_N = _pair(scores, wrong, ("scores", "wrong"))
    bad = wrong_N.astype(bool)
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    if not n_bad or not n_good:
        raise ValueError(f"{n_bad} of {len(bad)} labels are wrong; the AUC needs wrong and right ones")
    rank_sum = stats.rankdata(scores_N)[bad].sum()
    return float((rank_sum - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def calibration_error(logits: Any, labels: Any, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equal-width bins.

    Guo et al. 2017, arXiv 1706.04599, eq. 3, with their 15 bins as default.

    Args:
        logits: (N, C).
        labels: (N,) classes.
        bins: number of bins of the confidence (0, 1].

    >>> round(calibration_error([[0.0, 0.0], [0.0, 0.0]], [0, 1]), 3)
    0.0
    """
    logits_NC = _array(logits).astype(np.float64)
    if logits_NC.ndim != 2:
        raise ValueError(f"logits have shape {logits_NC.shape}; they must be (N, C)")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1; 15 is usual")
    p_NC = softmax(logits_NC, axis=1)
    predicted, true = _pair(p_NC.argmax(1), labels, ("logits", "labels"))
    confidence = p_NC.max(1)
    # bins are (low, high]; the tiny step keeps 2/3 in the bin that ends at 2/3 despite rounding
    which = np.clip(np.ceil(confidence * bins - 1e-9).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=(predicted == true) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(true))


def proportion_interval(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval (1927) of a share seen in n trials, such as an accuracy over n test examples.

    >>> [round(x, 3) for x in proportion_interval(0.8, 100)]
    [0.711, 0.867]
    """
    _check_level(level)
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"share={share!r} of n={n!r}: share must be in [0, 1] and n at least 1")
    z2 = float(stats.norm.ppf(0.5 + level / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(correct_a: Any, correct_b: Any, level: float = 0.95) -> tuple[float, float, float]:
    """`(difference, low, high)` of mean(a) - mean(b), both measured on the same N test examples.

    The t-interval of the per-example difference. Where both are right-or-wrong values and disagree on
    fewer than 10 examples, or N < 30, that interval is too narrow (of no width when they agree
    everywhere), and the adjusted Wald interval of Bonett & Price 2012 (J. Educ. Behav. Stat. 37, 479) is
    given instead. The interval holds for these two trained models; it knows nothing of other seeds.

    Args:
        correct_a: (N,) booleans, or any per-example value whose mean is the metric.
        correct_b: (N,) of the same examples in the same order.
        level: of confidence.

    Raises:
        ValueError: on empty input, different lengths, or a level outside (0, 1).

    >>> difference, low, high = paired_difference([1] * 80 + [0] * 20, [1] * 60 + [0] * 40)
    >>> print(f"{difference:.2f} {low:.2f} {high:.2f}")
    0.20 0.12 0.28
    """
    _check_level(level)
    a_N, b_N = _pair(correct_a, correct_b, ("correct_a", "correct_b"))
    d_N, n = a_N - b_N, len(a_N)
    difference = float(d_N.mean())
    binary = bool(np.isin(a_N, (0, 1)).all() and np.isin(b_N, (0, 1)).all())
    if binary and (n < 30 or np.count_nonzero(d_N) < FEW_DISCORDANT):
        p_a, p_b = (((d_N == 1).sum() + 1) / (n + 2), ((d_N == -1).sum() + 1) / (n + 2))
        z = float(stats.norm.ppf(0.5 + level / 2))
        half = z * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
        return difference, float(max(-1.0, p_a - p_b - half)), float(min(1.0, p_a - p_b + half))
    return seeds_interval(d_N, level)


def seeds_interval(values: Any, level: float = 0.95) -> tuple[float, float, float]:
    """`(mean, low, high)`: mean and t-interval of independent values, such as one result a seed.

    With one value nothing is known of the spread, and the interval is infinite.

    >>> mean, low, high = seeds_interval([0.80, 0.82, 0.84])
    >>> print(f"{mean:.2f} {low:.2f} {high:.2f}")
    0.82 0.77 0.87
    """
    _check_level(level)
    x_S = _vector(values, "values")
    mean = float(x_S.mean())
    if len(x_S) == 1:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.5 + level / 2, len(x_S) - 1) * x_S.std(ddof=1) / math.sqrt(len(x_S))
    return mean, float(mean - half), float(mean + half)


def paired_over_seeds(a: Any, b: Any, level: float = 0.95) -> tuple[float, float, float]:
    """`(difference, low, high)` of a - b, paired seed by seed: mean and t-interval over the seeds.

    >>> difference, low, high = paired_over_seeds([0.82, 0.85, 0.88], [0.80, 0.82, 0.84])
    >>> print(f"{difference:.2f} {low:.3f} {high:.3f}")
    0.03 0.005 0.055
    """
    a_S, b_S = _pair(a, b, ("a", "b"))
    return seeds_interval(a_S - b_S, level)
