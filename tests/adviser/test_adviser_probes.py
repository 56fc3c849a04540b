"""What is advised on data with a known answer: easy, noisy labels, a long tail, duplicates, pure noise."""

import dataclasses

import numpy as np
import pytest
import torch

from serpette.adviser.head import cross_fitted
from serpette.adviser.health import SAME, SIMILARITY, duplicates, examine, near_groups
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


def never_equal(n):
    return str(n).encode()


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
    found = examine(signals, outputs, ["a", "b", "c"], never_equal)["wrong_labels"]
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
    assert examine(signals, outputs, ["a", "b"], never_equal)["wrong_labels"]["low"] < 0.02


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
        lambda n: twice[n].numpy().tobytes(),
    )
    assert found["exact_duplicates"]["examples"] == 60
    assert ["n0", "n80"] in found["exact_duplicates"]["groups"]
    assert found["near_duplicates"]["examples"] == 20
    assert found["classes"] == {"a": 80, "b": 80}


def slow_duplicates(x, kinds):
    """Every pair by itself; `kinds` says whose inputs are equal."""
    unit = (x - x.mean(0)).double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    N, same, near = len(x), list(range(len(x))), list(range(len(x)))
    for a in range(N):
        for b in range(a + 1, N):
            cosine = float(unit[a] @ unit[b])
            for number, joins in (
                (near, cosine >= SIMILARITY),
                (same, cosine >= SAME and kinds[a] == kinds[b]),
            ):
                if joins and number[a] != number[b]:
                    old, new = number[b], number[a]
                    number[:] = [new if n == old else n for n in number]
    groups = [[[n for n in range(N) if number[n] == g] for g in set(number)] for number in (same, near)]
    exact, alike = ([g for g in found if len(g) > 1] for found in groups)
    alike = [g for g in alike if len({same[n] for n in g}) > 1]
    return *(sorted(found, key=lambda g: (-len(g), g)) for found in (exact, alike)), near


def alike_and_equal(seed):
    """Features with chains of neighbours, near and equal ones; and of which kind the inputs are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator)
    angle = 0.15 * torch.arange(20.0)  # a chain: neighbours are alike, its ends are not
    chain = torch.stack([angle.cos(), angle.sin(), *torch.zeros(3, 20)], 1) * 4
    near = x[:30] + 0.1 * torch.randn(30, 5, generator=generator)
    equal = x[torch.randint(0, 20, (40,), generator=generator)]
    found = torch.cat([x, chain, near, equal, x[40:45]])
    found = found[torch.randperm(len(found), generator=generator)]
    kinds = [row.numpy().tobytes() for row in found]
    kinds[3] = b"of the same features, but another input"
    return found, kinds


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_are_those_of_a_loop_over_all_pairs(seed, monkeypatch):
    x, kinds = alike_and_equal(seed)
    exact, alike, number = slow_duplicates(x, kinds)
    assert len(exact) > 5 and len(alike) > 2
    for pairs in (2**22, 1000):  # all at once, and in blocks of a few rows
        monkeypatch.setattr("serpette.adviser.health.PAIRS", pairs)
        assert duplicates(x, lambda n: kinds[n]) == (exact, alike)
        places = {g: i for i, g in enumerate(dict.fromkeys(number))}
        assert near_groups(x).tolist() == [places[g] for g in number]


def test_each_of_hundreds_of_equal_examples_is_read_once():
    x = torch.cat([torch.randn(1, 8).expand(600, 8), torch.randn(600, 8)])
    read = []

    def digest(n):
        read.append(n)
        return b"equal" if n < 400 else str(n).encode()

    exact, near = duplicates(x, digest)
    assert exact == [list(range(400))] and list(range(600)) == near[0]
    assert len(read) == len(set(read)) < 620


def test_outliers_are_those_far_from_all_others():
    signals = made([100], apart=0)
    signals.embeddings[7] += 40
    found = examine(signals, None, ["a"], never_equal)["outliers"]
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


def test_a_later_call_has_all_trials_that_are_there(tmp_path):
    signals = made([40, 40], apart=2)
    whole = measure(signals, [RANDOM], (0.5,), folder=tmp_path).whole
    assert np.array_equal(
        measure(signals, [RANDOM], (0.5,), folder=tmp_path, go_on=lambda: False).whole, whole
    )
    assert len(measure(signals, [RANDOM], (0.5,), go_on=lambda: False).whole) == 5


def test_no_head_judges_what_it_has_seen_as_a_duplicate():
    """Labels by chance, each example twice: nothing can be learned, and nothing is lost by fewer."""
    once = made([150, 150], apart=0, D=64)
    labels = torch.cat([once.labels, once.labels])
    ids = np.array([f"n{i}" for i in range(600)])
    signals = Signals(ids, labels, 2, embeddings=torch.cat([once.embeddings] * 2), seed=0)
    groups = near_groups(signals.embeddings)
    assert len(groups.unique()) == 300
    leaky = measure(signals, [RANDOM], (0.3,), repeats=1)
    honest = measure(signals, [RANDOM], (0.3,), groups=groups, repeats=1)
    assert leaky.whole.mean() > 58 > 55 > honest.whole.mean()
    assert abs(honest.whole.mean() - honest.values[RANDOM.name, 0.3].mean()) < 7
    outputs = cross_fitted(signals.embeddings, labels, 2, groups=groups, penalty=1e-3)
    assert 0.4 < (outputs.argmax(1) == labels).double().mean() < 0.6


def test_more_examples_than_observed_move_along_the_curve():
    signals = made([200, 200], apart=1.2)
    _, here, _ = advised(signals, choices=())
    _, there, _ = advised(signals, choices=(), total=40_000)
    assert there[0.1].value >= here[0.1].value and there[0.1].examples == 4000
    assert there[0.1].loss <= here[0.1].loss + 0.1


def test_too_few_examples():
    with pytest.raises(ValueError, match="too few to advise on; give at least 10"):
        measure(made([4, 4], apart=1), [RANDOM], (0.5,))
