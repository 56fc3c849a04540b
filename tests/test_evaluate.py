"""Metrics and intervals against scipy, scikit-learn, exact enumeration and values worked by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from serpette import evaluate
from serpette.evaluate import paired_difference, paired_over_seeds, seeds_interval


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_metrics_agree_with_scikit_learn(rng):
    labels, logits = rng.integers(0, 4, 200), rng.normal(size=(200, 4))
    assert evaluate.accuracy(logits, labels) == accuracy_score(labels, logits.argmax(1))
    assert evaluate.accuracy(torch.tensor(logits).bfloat16(), torch.tensor(labels)) > 0
    by_class = evaluate.accuracy_by_class(logits, labels, 5)
    for c in range(4):
        assert by_class[c] == pytest.approx((logits.argmax(1) == c)[labels == c].mean())
    assert math.isnan(by_class[4])
    targets, guesses = rng.normal(size=50), rng.normal(size=(50, 1))
    assert evaluate.r2(guesses, targets) == pytest.approx(r2_score(targets, guesses))
    assert evaluate.r2(torch.tensor(guesses, requires_grad=True), targets) < 0
    wrong, scores = rng.random(200) < 0.2, rng.integers(0, 9, 200)  # ties
    assert evaluate.detection_auc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))


def test_spearman_agrees_with_scipy_on_ties(rng):
    a, b = rng.integers(0, 6, 80), rng.integers(0, 6, 80)
    labels = rng.integers(0, 3, 80)
    assert evaluate.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    each = [stats.spearmanr(a[labels == c], b[labels == c]).statistic for c in range(3)]
    assert evaluate.class_averaged_spearman(a, b, labels) == pytest.approx(np.mean(each))
    a, b, labels = [1, 2, 3, 5, 5, 7], [3, 2, 1, 4, 6, 0], [0, 0, 0, 1, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(evaluate.spearman([1, 1], [1, 2]))
        assert evaluate.class_averaged_spearman(a, b, labels) == -1  # classes 1 and 2 say nothing
        assert math.isnan(evaluate.class_averaged_spearman([1, 2], [1, 2], [0, 1]))


def test_calibration_error_against_a_loop(rng):
    labels, logits = rng.integers(0, 3, 300), rng.normal(size=(300, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slow = 0.0
    for i in range(15):
        inside = (p.max(1) > i / 15) & (p.max(1) <= (i + 1) / 15)
        if inside.any():
            gap = (p.argmax(1) == labels)[inside].mean() - p.max(1)[inside].mean()
            slow += inside.mean() * abs(gap)
    assert evaluate.calibration_error(logits, labels) == pytest.approx(slow, abs=1e-12)
    assert evaluate.calibration_error([[9e9, 0.0]], [1]) == pytest.approx(1)


def test_seeds_interval_is_the_t_interval(rng):
    values = rng.normal(size=7)
    mean, low, high = seeds_interval(values, 0.9)
    expected = stats.t.interval(0.9, 6, values.mean(), stats.sem(values))
    assert (mean, low, high) == pytest.approx((values.mean(), *expected))
    assert seeds_interval([0.5]) == (0.5, -math.inf, math.inf)
    other = rng.normal(size=7)
    assert paired_over_seeds(values, other) == seeds_interval(values - other)


def test_paired_difference_is_the_t_interval_of_the_differences(rng):
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.75
    d = a.astype(float) - b
    expected = stats.t.interval(0.95, 499, d.mean(), stats.sem(d))
    assert paired_difference(a, b) == pytest.approx((d.mean(), *expected))
    back = paired_difference(torch.tensor(b), torch.tensor(a))
    assert back == pytest.approx((-d.mean(), -expected[1], -expected[0]))
    errors = rng.random(12)  # not right-or-wrong: always the t-interval
    assert paired_difference(errors, errors * 0) == seeds_interval(errors)


def test_few_disagreements_still_have_a_width():
    difference, low, high = paired_difference([1] * 1000, [1] * 1000)
    assert difference == 0 and low == pytest.approx(-high) and 0.002 < high < 0.004  # about 3 / N
    # sure of a difference exactly when the exact sign test on the disagreements is
    for count in range(1, 10):
        _, low, _ = paired_difference([1] * 1000, [0] * count + [1] * (1000 - count))
        assert (low > 0) == (stats.binomtest(count, count).pvalue < 0.05)
    difference, low, high = paired_difference([1], [0])
    assert difference == 1 and -1 <= low < 0 and high == 1


def test_coverage_by_enumeration():
    """All outcomes of n = 20 pairs, for several truths: the interval holds the truth often enough."""
    n = 20
    outcomes = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
    intervals = {}
    for i, j in outcomes:
        a, b = [1] * i + [0] * j + [1] * (n - i - j), [0] * i + [1] * j + [1] * (n - i - j)
        intervals[i, j] = paired_difference(a, b)[1:]
    for p, q in [(0.05, 0.05), (0.3, 0.1), (0.2, 0.2), (0.1, 0.0), (0.5, 0.3)]:
        covered = sum(
            stats.multinomial.pmf([i, j, n - i - j], n, [p, q, 1 - p - q])
            for (i, j), (low, high) in intervals.items()
            if low <= p - q <= high
        )
        assert covered > 0.93, (p, q, covered)


def test_proportion_interval_is_wilsons():
    for k, n in [(0, 10), (7, 10), (812, 1000), (10, 10)]:
        expected = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert evaluate.proportion_interval(k / n, n) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paired_difference([1], [1, 0]), "correct_a has 1 values and correct_b has 2"),
        (lambda: paired_difference([], []), r"correct_a has shape \(0,\)"),
        (lambda: paired_difference([1], [1], level=95), r"level=95 must be in \(0, 1\); did you mean 0.95\?"),
        (lambda: evaluate.r2([1, 2], [3, 3]), "targets are all 3"),
        (lambda: evaluate.detection_auc([1, 2], [0, 0]), "0 of 2 labels are wrong"),
        (lambda: evaluate.accuracy(np.zeros((1, 1, 1)), [0]), "predictions have shape"),
        (lambda: evaluate.accuracy_by_class([0], [3], 2), "must be in 0..1"),
        (lambda: evaluate.calibration_error([0.5], [0]), r"must be \(N, C\)"),
        (lambda: evaluate.class_averaged_spearman([1, 2], [1, 2], [0]), "labels have shape"),
        (lambda: evaluate.proportion_interval(1.2, 10), "share must be in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
