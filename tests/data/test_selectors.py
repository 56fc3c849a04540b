import hypothesis.strategies as st
import oracles
import pytest
import torch
from contract import check_selector, check_selector_documentation
from hypothesis import given, settings

from serpette.data.selectors import registry
from serpette.data.selectors.ccs import CCS
from serpette.data.selectors.diverse_easy import DiverseEasy
from serpette.data.selectors.dq import DQ
from serpette.data.selectors.flex_rand import FlexRand
from serpette.data.selectors.mixed_flexible import MixedFlexible
from serpette.data.selectors.random import Random
from serpette.data.selectors.top import TopEasy, TopFlexible, TopHard

NAMES = "beta ccs d2 diverse_easy dq flex_rand mixed_flexible random top_easy top_flexible top_hard".split()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def closed(name):
    """Instances without an open hyperparameter."""
    selector = registry[name]()
    return selector.candidates() if hasattr(selector, "candidates") else [selector]


def test_every_selector_is_found():
    assert set(NAMES) <= set(registry)


@pytest.mark.parametrize("name", sorted(registry))
def test_selector(name):
    found = closed(name)
    for selector in found[:: max(1, len(found) // 3)]:
        assert selector.name == name
        check_selector(selector)


@pytest.mark.parametrize("name", sorted(registry))
def test_documentation(name):
    check_selector_documentation(registry[name])


@pytest.mark.parametrize("name", ["flex_rand", "top_flexible", "mixed_flexible"])
def test_an_open_hyperparameter_is_searched_not_guessed(name):
    with pytest.raises(ValueError, match="DataPruner"):
        registry[name]()(torch.zeros(4), 2, seeded())
    for selector in closed(name):
        assert [s.__dict__ for s in selector.candidates()] == [selector.__dict__]


def test_the_grid_of_gamma_is_the_papers():
    gammas = [s.gamma for s in FlexRand().candidates()]
    assert gammas == [float(f"{5 * i / 100:.2f}") for i in range(1, 20)]
    assert [s.side for s in TopFlexible().candidates()] == ["easy", "hard"]
    assert [(s.side, s.share) for s in MixedFlexible(share=0.2).candidates()] == [
        ("easy", 0.2),
        ("hard", 0.2),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlexRand(gamma=1.2),
        lambda: FlexRand(gamma=float("nan")),
        lambda: FlexRand(gamma=True),
        lambda: FlexRand(gamma="0.3"),
        lambda: TopFlexible("middle"),
        lambda: MixedFlexible("up"),
        lambda: MixedFlexible(share=2),
        lambda: CCS(beta=1),
        lambda: CCS(strata=0),
        lambda: DQ(bins=0),
        lambda: DiverseEasy(clusters=0),
    ],
)
def test_bad_options(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# --- FlexRand ---


@settings(deadline=None, derandomize=True, database=None, max_examples=400)
@given(st.integers(1, 80), st.data(), st.integers(0, 100), st.integers(0, 2**31))
def test_flex_rand_counts(n, data, percent, seed):
    k = data.draw(st.integers(0, n))
    scores = torch.randperm(n, generator=seeded(seed)).double()  # the score of an example is its rank
    picks = FlexRand(gamma=percent / 100)(scores, k, seeded(seed))
    pool, quotas = oracles.flex_rand(n, k, percent)
    assert len(picks.unique()) == k
    easy = int((scores[picks] < pool).sum())
    assert easy in quotas
    assert k - easy <= n - pool and easy <= pool


@pytest.mark.parametrize("percent", [5, 35, 50, 65, 95])
def test_flex_rand_on_every_small_case(percent):
    for n in range(1, 21):
        for k in range(n + 1):
            pool, quotas = oracles.flex_rand(n, k, percent)
            seen = {
                int((FlexRand(percent / 100)(torch.arange(n), k, seeded(s)) < pool).sum()) for s in range(12)
            }
            assert seen == quotas, (n, k)  # the odd example goes to either side


@pytest.mark.parametrize(
    ("n", "k", "gamma", "pool", "easy"),
    [
        (10, 4, 0.5, 5, {2}),
        (10, 8, 0.25, 3, {3}),  # 2.5 rounds up to 3, where Python's round gives 2; the cap holds
        (10, 8, 0.75, 8, {6}),  # mirrored: 7.5 rounds up, 2 hard ones are left
        (100, 10, 0.05, 5, {5}),  # the whole easy pool
        (100, 40, 0.05, 5, {5}),  # M / (2 N gamma) = 4, a "probability"
        (3, 3, 0.5, 2, {2}),  # 1 easy and 2 hard do not exist
        (50, 1, 0.3, 15, {0, 1}),
        (50, 5, 0.7, 35, {2, 3}),
    ],
)
def test_flex_rand_by_hand(n, k, gamma, pool, easy):
    seen = {int((FlexRand(gamma)(torch.arange(n), k, seeded(s)) < pool).sum()) for s in range(20)}
    assert seen == easy
    assert (pool, easy) == oracles.flex_rand(n, k, round(gamma * 100))


def test_flex_rand_is_uniform_inside_a_pool():
    hits = torch.zeros(20)
    for seed in range(2000):
        hits[FlexRand(0.25)(torch.arange(20), 8, seeded(seed))] += 1
    easy, hard = hits[:5] / 2000, hits[5:] / 2000
    assert (easy - 4 / 5).abs().max() < 0.05 and (hard - 4 / 15).abs().max() < 0.05


def test_flex_rand_reads_low_scores_as_easy():
    scores = torch.tensor([9.0, 8.0, 1.0, 7.0, 2.0, 6.0, 5.0, 4.0])
    picks = FlexRand(0.25)(scores, 6, seeded()).tolist()
    assert {2, 4} <= set(picks)


# --- the others ---


def test_top():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 3.0])
    assert TopHard()(scores, 2, seeded()).tolist() == [0, 4]
    assert TopHard()(scores, 1, seeded()).tolist() == [0]  # a tie goes to the earlier one
    assert TopEasy()(scores, 1, seeded()).tolist() == [1]
    assert TopEasy()(scores, 3, seeded()).tolist() == [1, 2, 3]
    assert TopFlexible("hard")(scores, 2, seeded()).tolist() == [0, 4]
    assert TopFlexible("easy")(scores, 2, seeded()).tolist() == [1, 3]


@pytest.mark.parametrize(("side", "top"), [("easy", {0, 1, 2}), ("hard", {97, 98, 99})])
def test_mixed_flexible(side, top):
    rest = set()
    for seed in range(100):
        picks = set(MixedFlexible(side)(torch.arange(100), 5, seeded(seed)).tolist())
        assert top <= picks  # 2.5 rounds up
        rest |= picks - top
    assert len(rest) > 70
    assert MixedFlexible(side, share=0)(torch.arange(100), 5, seeded()).shape == (5,)


def test_random_is_uniform():
    hits = torch.zeros(10)
    for seed in range(2000):
        hits[Random()(torch.arange(10), 3, seeded(seed))] += 1
    assert (hits / 2000 - 0.3).abs().max() < 0.05


def test_ccs_by_hand():
    # width 1: four strata of 1, 2, 6 and 11 examples; budget 10: 1, 2, then 3 and 4
    scores = torch.tensor([0.0] + [1.5] * 2 + [2.5] * 6 + [3.5] * 10 + [4.0])
    picks = CCS(strata=4)(scores, 10, seeded())
    assert torch.bincount(scores[picks].long().clamp(max=3)).tolist() == [1, 2, 3, 4]


def test_ccs_drops_the_hardest_but_never_too_many():
    scores = torch.arange(100.0)
    picks = CCS(beta=0.3)(scores, 50, seeded())
    assert picks.max() < 70
    assert CCS(beta=0.3)(scores, 80, seeded()).tolist() == list(range(80))


def test_ccs_is_random_inside_a_stratum():
    seen = {tuple(CCS(strata=1)(torch.arange(6), 3, seeded(s)).tolist()) for s in range(200)}
    assert len(seen) == 20


@pytest.mark.parametrize(("n", "bins"), [(12, 3), (17, 4), (5, 5), (9, 1)])
def test_dq_bins(n, bins):
    points = torch.randn(n, 3, generator=seeded(n))
    found = [rows.tolist() for rows in DQ(bins).split(points)]
    assert found == oracles.dq_bins(points, bins)


def test_dq_draws_uniformly_from_each_bin():
    points = torch.randn(40, 3, generator=seeded())
    bins = DQ(4).split(points)
    seen = set()
    for seed in range(60):
        picks = set(DQ(4)(torch.zeros(40), 10, seeded(seed), points).tolist())
        held = [len(picks & set(rows.tolist())) for rows in bins]
        assert sorted(held) == [2, 2, 3, 3]
        seen |= picks
    assert len(seen) == 40


def test_diverse_easy_takes_the_easiest_of_each_cluster_in_turn():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    points = centres.repeat_interleave(4, 0) + torch.randn(12, 2, generator=seeded())
    scores = torch.tensor([3.0, 1, 2, 4, 30, 10, 20, 40, 300, 100, 200, 400])
    select = DiverseEasy(clusters=3)
    assert select(scores, 3, seeded(), points).tolist() == [1, 5, 9]
    assert select(scores, 4, seeded(), points).tolist() == [1, 2, 5, 9]
    assert select(scores, 6, seeded(), points).tolist() == [1, 2, 5, 6, 9, 10]
    assert len(DiverseEasy()(scores, 5, seeded(), torch.zeros(12, 2))) == 5  # one distinct point
