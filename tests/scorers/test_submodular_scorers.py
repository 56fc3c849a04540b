"""Facility location and graph cut against the plain greedy algorithm on whole matrices."""

import oracles
import oracles_greedy as slow
import pytest
import torch
from contract import make_signals

from serpette.greedy import lazy_greedy
from serpette.scorers import registry
from serpette.types import uniform_of

NAMES = ["facility_location", "graph_cut"]


def hash_order(signals):
    return uniform_of(signals.ids, signals.seed).argsort()


def values(signals, order, redundancy=0.5):
    similarity = slow.cosine_similarity(signals.embeddings[order])
    return {
        "facility_location": slow.facility_location(similarity),
        "graph_cut": slow.graph_cut(similarity, redundancy),
    }


@pytest.mark.parametrize("name", NAMES)
def test_order_is_that_of_plain_greedy(name):
    signals = make_signals(n=40)
    order = hash_order(signals)
    expected = slow.greedy(40, values(signals, order)[name])
    assert registry[name]()(signals)[order].tolist() == oracles.turns(expected)


@pytest.mark.parametrize("redundancy", [0, 1.5])
def test_graph_cut_with_another_price(redundancy):
    signals = make_signals(n=30)
    order = hash_order(signals)
    expected = slow.greedy(30, values(signals, order, redundancy)["graph_cut"])
    scores = registry["graph_cut"](redundancy=redundancy)(signals)
    assert scores[order].tolist() == oracles.turns(expected)


def test_facility_location_serves_each_cluster_first():
    signals = make_signals(n=30)
    signals.embeddings = torch.eye(3)[torch.arange(30) % 3] + 0.01 * signals.embeddings[:, :3]
    scores = registry["facility_location"]()(signals)
    assert set((scores > -3).nonzero().flatten().remainder(3).tolist()) == {0, 1, 2}


def test_graph_cut_starts_in_the_middle_and_then_avoids_it():
    signals = make_signals(n=7)
    angle = torch.tensor([0.0, 0.1, -0.1, 0.2, -0.2, 1.5, -1.6])
    signals.embeddings = torch.stack([angle.cos(), angle.sin()], 1)
    scores = registry["graph_cut"](redundancy=4.0)(signals)
    assert scores[0] == scores[:5].max() == 0
    assert int((scores == -1).nonzero()) in (5, 6)


@pytest.mark.parametrize("name", NAMES)
def test_picks_are_the_first_of_the_whole_ranking(name):
    signals = make_signals(n=50)
    whole, short = registry[name]()(signals), registry[name](picks=9)(signals)
    assert torch.equal(whole[whole > -9], short[whole > -9])
    assert sorted(short.tolist()) == [-49.0 + i for i in range(50)]


@pytest.mark.parametrize("name", NAMES)
def test_all_twins_are_ranked_by_hash(name):
    signals = make_signals(n=23)
    rank = hash_order(signals).argsort()
    for row in (torch.tensor([[0.1, 0.7, 0.3]]), torch.zeros(1, 3)):
        signals.embeddings = row.repeat(23, 1)
        assert torch.equal(registry[name]()(signals), -rank.double())


def test_blocks_change_nothing(monkeypatch):
    signals = make_signals(n=40)
    before = [registry[name]()(signals) for name in [*NAMES, "craig"]]
    monkeypatch.setattr("serpette.greedy.ELEMENTS", 100)  # two or three columns at a time
    assert all(torch.equal(registry[n]()(signals), b) for n, b in zip([*NAMES, "craig"], before, strict=True))


def test_lazy_greedy_looks_at_few_and_picks_the_same():
    g = torch.Generator().manual_seed(0)
    cover = torch.rand(300, 500, generator=g) < 0.05
    covered, looks = torch.zeros(500, dtype=torch.bool), 0

    def gains_of(rows):
        nonlocal looks
        looks += len(rows)
        return (cover[rows] & ~covered).sum(1).double()

    first = gains_of(torch.arange(300))
    order = lazy_greedy(first, gains_of, lambda i: covered.logical_or_(cover[i]), 40)
    expected = slow.greedy(300, lambda S: float(cover[S].any(0).sum()) if S else 0.0, picks=40)
    assert order[:40].tolist() == expected and sorted(order.tolist()) == list(range(300))
    assert looks < 300 * 40 / 2


@pytest.mark.parametrize(
    ("name", "options"),
    [("facility_location", {"picks": 0}), ("graph_cut", {"picks": 0}), ("graph_cut", {"redundancy": -1})],
)
def test_bad_options_are_named(name, options):
    option, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{option}={value} must be"):
        registry[name](**options)
