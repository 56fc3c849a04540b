"""Selectors D2 and Beta: slow oracles, which way they read a score, what pruning more does."""

import oracles_greedy as slow
import pytest
import torch

from serpette.data.selectors.beta import Beta
from serpette.data.selectors.d2 import D2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("options", [(3, 1.0, 1.0), (3, 0.3, 2.0), (5, 2.0, 0.0), (1, 0.0, 1.0)])
@pytest.mark.parametrize("shift", [0.0, -7.0])
def test_d2(options, shift):
    points, scores = torch.randn(30, 4, generator=seeded(1)), torch.randn(30, generator=seeded(2)) + shift
    for k in (1, 5, 12, 29):
        picks = D2(*options)(scores, k, seeded(), points)
        assert picks.tolist() == slow.d2(scores.double().tolist(), points.double(), k, *options)


def test_d2_in_blocks(monkeypatch):
    points, scores = torch.randn(50, 4, generator=seeded(1)), torch.randn(50, generator=seeded(2))
    before = D2()(scores, 20, seeded(), points)
    monkeypatch.setattr("serpette.greedy.ELEMENTS", 170)
    assert torch.equal(D2()(scores, 20, seeded(), points), before)


def test_d2_takes_one_hard_example_of_a_crowd():
    points = torch.tensor([[0.0], [0.1], [0.2], [50.0], [50.1], [50.2]])
    scores = torch.tensor([3.0, 3.0, 3.0, 2.5, 2.5, 0.0])
    assert D2(neighbours=2)(scores, 2, seeded(), points).tolist() in ([0, 3], [1, 3], [0, 4], [1, 4])
    assert max(D2(neighbours=2, gamma_back=1e9)(scores, 2, seeded(), points)) < 3  # nothing is taken back


def test_d2_without_a_way_back_is_top_hard_of_the_spread_scores():
    points, scores = torch.randn(20, 3, generator=seeded()), torch.arange(20.0)
    picks = D2(gamma=1e9, gamma_back=1e9)(scores, 4, seeded(), points)  # no message arrives
    assert picks.tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("k", [1, 6, 12, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_beta_weights(k, ties):
    scores = torch.randn(24, generator=seeded(3))
    if ties:
        scores = scores.round()
    expected = torch.tensor(slow.beta_weights(scores.tolist(), k, 4.0)).double()
    weights = Beta().log_weights(scores, k).exp()
    torch.testing.assert_close(weights / weights.sum(), expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_beta_draws_by_its_weights():
    scores, hits, draws = torch.randn(12, generator=seeded(3)), torch.zeros(12), 4000
    for seed in range(draws):
        hits[Beta()(scores, 1, seeded(seed))] += 1
    weights = Beta().log_weights(scores, 1).exp()
    torch.testing.assert_close(hits.double() / draws, weights / weights.sum(), rtol=0, atol=0.03)


def test_beta_turns_to_the_easy_as_more_is_pruned():
    scores = torch.arange(2000.0)  # high = hard
    means = [float(Beta()(scores, k, seeded()).double().mean()) for k in (1000, 400, 100, 20)]
    assert means == sorted(means, reverse=True) and means[0] > 1200 and means[-1] < 500


def test_beta_of_equal_scores_is_random():
    hits = torch.zeros(10)
    for seed in range(2000):
        hits[Beta()(torch.zeros(10), 3, seeded(seed))] += 1
    assert (hits / 2000 - 0.3).abs().max() < 0.05


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: D2(neighbours=0), "neighbours=0"),
        (lambda: D2(gamma=-1), "gamma=-1"),
        (lambda: D2(gamma_back=-1), "gamma_back=-1"),
        (lambda: Beta(c=0), "c=0"),
    ],
)
def test_bad_options_are_named(make, option):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        make()
