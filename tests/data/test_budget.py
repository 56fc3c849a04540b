import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings

from serpette.data.budget import count, select, split
from serpette.data.mmd import mmd
from serpette.data.selectors.dq import DQ
from serpette.data.selectors.flex_rand import FlexRand
from serpette.data.selectors.random import Random
from serpette.data.selectors.top import TopHard

quiet = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- count ---


@pytest.mark.parametrize(
    ("total", "keep", "expected"),
    [
        (10, 0.25, 3),  # Python's round gives 2
        (30, 0.35, 11),  # 10.5, though 0.35 * 30 is a float just below it
        (100, 0.58, 58),
        (10, 0.04, 1),  # at least one
        (7, 1, 7),
        (7, 1.0, 7),
        (1000, np.float32(0.3), 300),
        (3, Fraction(1, 2), 2),
        (60000, 1e-4, 6),
    ],
)
def test_count(total, keep, expected):
    assert count(total, keep) == expected


@pytest.mark.parametrize(
    ("keep", "hint"),
    [(1.3, "0.13"), (30, "0.3"), (12.5, "0.125"), (5, "0.05"), (500, "0.5"), (0, "(0, 1]"), (-0.1, "(0, 1]")],
)
def test_keep_outside_its_range(keep, hint):
    with pytest.raises(ValueError) as error:
        count(1000, keep)
    assert f"keep={keep} must be in (0, 1]" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("keep", [True, False, np.True_, "0.3", None, math.nan, math.inf, [0.3], 0.3j])
def test_keep_of_a_wrong_kind(keep):
    with pytest.raises(ValueError, match="must be a number in"):
        count(1000, keep)


def test_no_examples():
    with pytest.raises(ValueError, match="total=0"):
        count(0, 0.5)


# --- split ---

class_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@quiet
@given(class_sizes, st.data())
def test_proportional_split(sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    k = data.draw(st.integers(0, len(labels)))
    quotas = split(labels, k)
    assert list(quotas) == list(range(len(sizes)))
    q = list(quotas.values())
    assert sum(q) == k and all(0 <= v <= n for v, n in zip(q, sizes, strict=True))
    if k >= len(sizes):
        assert min(q) >= 1
    exact = [Fraction(k * n, len(labels)) for n in sizes]
    if all(e >= 1 for e in exact):  # then nobody is lifted and it is Hamilton's method
        assert all(math.floor(e) <= v <= math.ceil(e) for v, e in zip(q, exact, strict=True))
    assert split(torch.from_numpy(np.random.default_rng(0).permutation(labels)), k) == quotas


@quiet
@given(class_sizes, st.data())
def test_equal_split(sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    k = data.draw(st.integers(0, len(labels)))
    q = list(split(labels, k, how="equal").values())
    assert sum(q) == k and all(0 <= v <= n for v, n in zip(q, sizes, strict=True))
    if k >= len(sizes):
        assert min(q) >= 1
    for v, n in zip(q, sizes, strict=True):  # whoever has less than another holds no more
        assert v == n or v >= max(q) - 1


def test_split_by_hand():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    assert split(labels, 10) == {0: 5, 1: 3, 2: 2}
    assert split(labels, 12) == {0: 6, 1: 4, 2: 2}  # 6.0 3.6 2.4
    assert split(labels, 70, how="equal") == {0: 25, 1: 25, 2: 20}
    assert split([0] * 98 + [1, 2], 5) == {0: 3, 1: 1, 2: 1}  # one of each before proportion
    assert split([0] * 98 + [1, 2], 2) == {0: 2, 1: 0, 2: 0}


def test_bad_split():
    with pytest.raises(ValueError, match="k=4 must be in 0..3"):
        split([0, 1, 2], 4)
    with pytest.raises(ValueError, match="did you mean 'equal'"):
        split([0, 1, 2], 2, how="equals")  # type: ignore[arg-type]


# --- select ---


@quiet
@given(class_sizes, st.data(), st.sampled_from([True, "proportional", "equal", False]), st.integers(0, 99))
def test_select_meets_the_total(sizes, data, per_class, seed):
    labels = torch.from_numpy(
        np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    )
    k = data.draw(st.integers(len(sizes), len(labels)))
    scores = torch.randn(len(labels), generator=seeded(seed))
    picks = select(FlexRand(0.3), scores, k, labels=labels, per_class=per_class, generator=seeded(seed))
    assert picks.dtype == torch.int64 and len(picks) == k and (picks.diff() > 0).all()
    if per_class is not False:
        how = "proportional" if per_class is True else per_class
        held = torch.bincount(labels[picks], minlength=len(sizes)).tolist()
        assert held == list(split(labels, k, how).values())


def test_select_is_per_class():
    scores, labels = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    of = dict(labels=labels, generator=seeded())
    assert select(TopHard(), scores, 4, **of).tolist() == [0, 1, 6, 7]
    assert select(TopHard(), scores, 4, per_class=False, **of).tolist() == [0, 1, 2, 3]


def test_select_hands_each_class_its_embeddings():
    labels, x = torch.arange(20) % 2, torch.randn(20, 3, generator=seeded())
    picks = select(DQ(2), torch.zeros(20), 6, labels=labels, generator=seeded(1), embeddings=x)
    g, expected = seeded(1), []
    for c in (0, 1):
        rows = (labels == c).nonzero().flatten()
        expected += rows[DQ(2)(torch.zeros(10), 3, g, x[rows])].tolist()
    assert picks.tolist() == sorted(expected)


def test_too_small_for_one_of_each_class_names_the_keep_that_works():
    labels = torch.arange(997) % 10
    with pytest.raises(ValueError, match="per_class=False") as error:
        select(Random(), torch.zeros(997), 9, labels=labels, generator=seeded())
    least = float(str(error.value).split("keep at least ")[1].split(",")[0])
    assert count(997, least) == 10 and count(997, least - 1e-3) == 9
    assert len(select(Random(), torch.zeros(997), 9, per_class=False, generator=seeded())) == 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k=0 must be in 1..4"),
        ({"k": 5}, "k=5 must be in 1..4"),
        ({"labels": None}, "labels, which are missing"),
        ({"labels": torch.tensor([0.5, 1.0, 2.0, 3.0])}, "needs classes"),
        ({"labels": torch.tensor([0, 1])}, "labels has 2 entries, scores 4"),
        ({"per_class": "equl"}, "did you mean 'equal'"),
    ],
)
def test_bad_select(change, match):
    given = {"k": 2, "labels": torch.tensor([0, 0, 1, 1]), "generator": seeded()} | change
    with pytest.raises(ValueError, match=match):
        select(Random(), torch.zeros(4), **given)


# --- mmd ---


def test_mmd_against_loops():
    x, y = torch.randn(30, 3, generator=seeded()), torch.randn(11, 3, generator=seeded(1)) + 0.5
    assert mmd(x, y, bandwidth=1.7, chunk=7) == pytest.approx(oracles.mmd(x, y, 1.7), abs=1e-10)
    pairs = [oracles.distance(x[i], x[j]) for i in range(30) for j in range(i)]
    sigma = sorted(pairs)[(len(pairs) - 1) // 2]
    assert mmd(x, y) == pytest.approx(oracles.mmd(x, y, sigma), abs=1e-9)


def test_mmd_against_scikit_learn():
    from sklearn.metrics.pairwise import rbf_kernel

    x, y = torch.randn(600, 4, generator=seeded()), torch.randn(500, 4, generator=seeded(1)) * 1.2
    k = [rbf_kernel(a, b, gamma=1 / (2 * 2.0**2)).mean() for a, b in ((x, x), (y, y), (x, y))]
    assert mmd(x, y, bandwidth=2.0) == pytest.approx(math.sqrt(k[0] + k[1] - 2 * k[2]), abs=1e-5)


def test_mmd_sees_a_shift_and_not_a_random_subset():
    x = torch.randn(400, 3, generator=seeded())
    order = x[:, 0].argsort()
    chance = mmd(x, x[torch.randperm(400, generator=seeded(1))[:100]])
    assert chance < 0.1 < 0.3 < mmd(x, x[order[:100]])
    assert mmd(x, x.flip(0)) < 1e-6
    assert mmd(x, x[:100]) == pytest.approx(mmd(x + 1000, x[:100] + 1000), abs=1e-4)  # translation


def test_mmd_of_odd_sets():
    assert mmd(torch.ones(5, 2), torch.ones(3, 2)) == 0
    assert mmd(torch.ones(1, 2), torch.zeros(1, 2)) > 0
    mostly_twins = torch.tensor([[0.0]] * 9 + [[1.0]])
    assert 0 < mmd(mostly_twins, mostly_twins[:9]) < 1
    for x, y in ((torch.ones(0, 2), torch.ones(1, 2)), (torch.ones(3, 2), torch.ones(3, 1))):
        with pytest.raises(ValueError, match="not empty"):
            mmd(x, y)
    with pytest.raises(ValueError, match="bandwidth=0"):
        mmd(torch.ones(3, 2), torch.ones(3, 2), bandwidth=0)
