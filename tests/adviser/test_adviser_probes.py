"""What is advised on data with a known answer: easy, noisy labels, a long tail, duplicates, pure noise."""

import dataclasses

import numpy as np
import pytest
import torch

from serpette.adviser.head import cross_fitted
from serpette.adviser.health import examine
from serpette.adviser.probes import EQUAL, RANDOM, SCORED, Choice, choices_for, measure
from serpette.adviser.recommend import Noise, best_of, outlooks
from serpette.types import Signals

KEEPS = (0.1, 0.3, 0.6)


def made(sizes, apart, seed=0, D=8):
    """Gaussian classes around points `apart` from one another; `sizes` of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    centres = apart * torch.eye(D)[: len(sizes)]
    x = centres[labels] + torch.randn(len(labels), D, generator=generator)
    ids = np.array([f"n{i}" for i in range(len(labels))])
    return Signals(ids, labels, len(sizes), embeddings=x, seed=seed)


def advised(signals, *, metric="accuracy", choices=SCORED, noise=None, repeats=2, total=None):
    tried = choices_for(signals.task, signals.labels, choices)
    measured = measure(signals, tried, KEEPS, metric=metric, repeats=repeats)
    found = outlooks(measured, total or len(signals), noise=noise)
    return (
        measured,
        {keep: best_of([o for o in found if o.keep == keep])[-1] for keep in (*KEEPS, 1.0)},
        found,
    )


def test_all_easy_a_small_random_share_is_as_good():
    _, best, _ = advised(made([100, 100, 100], apart=12))
    assert abs(best[0.1].loss) < 0.5 and best[0.1].loss_high < 1
    assert best[0.1].choice.by_chance and best[1.0].value > 99


def test_pure_noise_no_score_is_advised_and_nothing_is_lost():
    signals = made([150, 150], apart=0, seed=3)
    _, best, found = advised(signals)
    assert best[0.3].loss_low < 0.5 < 10 and 35 < best[1.0].value < 65
    sure = [o for o in found if o.beats_random > 0.99]
    assert not sure


def test_long_tail_equal_quotas_are_advised_where_classes_count_alike():
    signals = made([300, 60, 40], apart=2.2)
    _, best, _ = advised(signals, metric="balanced_accuracy", choices=())
    assert best[0.1].choice == EQUAL and best[0.1].value > 60
    _, plain, _ = advised(signals, choices=())
    assert plain[0.3].choice == RANDOM


def test_heavy_label_noise_is_found_and_its_share_estimated():
    signals = made([200, 200, 200], apart=6)
    wrong = torch.zeros(600, dtype=torch.bool)
    wrong[torch.randperm(600, generator=torch.Generator().manual_seed(1))[:180]] = True
    noisy = torch.where(wrong, (signals.labels + 1 + torch.arange(600) % 2) % 3, signals.labels)
    signals = dataclasses.replace(signals, labels=noisy)
    outputs = cross_fitted(signals.embeddings, noisy, 3, ids=signals.ids)
    found = examine(signals, outputs, ["a", "b", "c"], lambda a, b: False)["wrong_labels"]
    assert found["low"] <= 0.3 <= found["high"] and found["high"] - found["low"] < 0.1
    ids = {s["id"] for s in found["suspects"]}
    assert len(ids & set(signals.ids[wrong.numpy()])) >= 0.9 * len(ids) > 0
    noise = Noise(found["share"], (found["high"] - found["low"]) / 3.92, 3)
    _, as_given, _ = advised(signals, choices=())
    _, on_right, _ = advised(signals, choices=(), noise=noise)
    assert as_given[1.0].value == pytest.approx(70, abs=4)
    assert on_right[1.0].low <= 99 <= on_right[1.0].high + 2 and on_right[1.0].value > 93


def test_clean_classes_that_overlap_are_not_taken_for_wrong_labels():
    signals = made([300, 300], apart=1.5)
    outputs = cross_fitted(signals.embeddings, signals.labels, 2, ids=signals.ids)
    assert (outputs.argmax(1) == signals.labels).float().mean() < 0.9
    assert examine(signals, outputs, ["a", "b"], lambda a, b: False)["wrong_labels"]["low"] < 0.02


def test_half_duplicates_are_counted_exact_and_near():
    signals = made([40, 40], apart=3)
    x = signals.embeddings
    twice = torch.cat([x, x[:60], x[60:] + 1e-3 * torch.randn(20, 8)])
    ids = np.array([f"n{i}" for i in range(160)])
    labels = torch.cat([signals.labels, signals.labels])
    found = examine(
        Signals(ids, labels, 2, embeddings=twice),
        None,
        ["a", "b"],
        lambda a, b: torch.equal(twice[a], twice[b]),
    )
    assert found["exact_duplicates"]["examples"] == 60
    assert ["n0", "n80"] in found["exact_duplicates"]["groups"]
    assert found["near_duplicates"]["examples"] == 20
    assert found["classes"] == {"a": 80, "b": 80}


def test_outliers_are_those_far_from_all_others():
    signals = made([100], apart=0)
    signals.embeddings[7] += 40
    found = examine(signals, None, ["a"], lambda a, b: False)["outliers"]
    assert [o["id"] for o in found] == ["n7"]


def test_a_score_that_pays_is_found():
    signals = made([300, 300], apart=2.5, seed=5)
    flipped = torch.arange(600) % 3 == 0  # herding picks what is near the mean
    x = signals.embeddings.clone()
    x[flipped] += 12 * torch.randn(int(flipped.sum()), 8, generator=torch.Generator().manual_seed(0))
    signals = dataclasses.replace(signals, embeddings=x)
    _, best, _ = advised(signals, choices=[Choice("herding", "herding", "top_hard")])
    assert best[0.1].choice.name == "herding" and best[0.1].to_random[0] > 0


def test_values_are_those_of_a_loop_by_hand():
    from serpette.adviser.head import choose_penalty, fit_head, folds_of, whitened

    signals = made([60, 60], apart=1.5)
    measured = measure(signals, [RANDOM], (0.5,), repeats=1)
    z, y = whitened(signals.embeddings), signals.labels
    fold = folds_of(signals.ids, y, 5, 0)
    pool = (fold != 0).nonzero()[:, 0]
    penalty = choose_penalty(z[pool], y[pool], 2, signals.ids[pool.numpy()])
    by_hand = []
    for number in range(5):
        W, b = fit_head(z[fold != number], y[fold != number], 2, penalty)
        by_hand.append(100 * ((z[fold == number] @ W + b).argmax(1) == y[fold == number]).double().mean())
    assert measured.whole.tolist() == pytest.approx([float(v) for v in by_hand])
    mean, low, high = measured.interval(measured.whole)
    error = np.std(by_hand, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert (mean - low, high - mean) == pytest.approx((2.776 * error, 2.776 * error), rel=1e-3)


def test_order_of_the_examples_changes_nothing():
    signals = made([50, 50], apart=1.5)
    mixed = signals.subset(torch.randperm(100))
    values = [measure(s, [RANDOM], (0.5,), repeats=1).whole for s in (signals, mixed)]
    assert np.allclose(*values, atol=1e-4)


def test_a_regression_is_judged_by_r2():
    x = torch.randn(200, 6)
    y = x[:, 0] * 2 + 0.5 * torch.randn(200)
    signals = Signals(np.arange(200).astype(str), y, 0, embeddings=x, task="regression")
    choices = choices_for("regression", y)
    assert {c.per_class for c in choices} == {False} and "forgetting" not in {c.scorer for c in choices}
    measured = measure(signals, choices, (0.5,), metric="r2", repeats=1)
    assert 85 < measured.whole.mean() < 97


def test_finished_trials_are_kept(tmp_path):
    signals = made([40, 40], apart=2)

    def stop_after(n):
        left = iter(range(n))

        def advance():
            if next(left, None) is None:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        measure(signals, [RANDOM], (0.5,), folder=tmp_path, advance=stop_after(3))
    times = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert len(times) == 4
    resumed = measure(signals, [RANDOM], (0.5,), folder=tmp_path)
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())
    assert np.array_equal(resumed.whole, measure(signals, [RANDOM], (0.5,)).whole)


def test_more_examples_than_observed_move_along_the_curve():
    signals = made([200, 200], apart=1.2)
    _, here, _ = advised(signals, choices=())
    _, there, _ = advised(signals, choices=(), total=40_000)
    assert there[0.1].value >= here[0.1].value and there[0.1].examples == 4000
    assert there[0.1].loss <= here[0.1].loss + 0.1


def test_too_few_examples():
    with pytest.raises(ValueError, match="too few to advise on; give at least 10"):
        measure(made([4, 4], apart=1), [RANDOM], (0.5,))
