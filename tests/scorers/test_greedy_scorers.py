import numpy as np
import oracles
import pytest
import torch
from contract import make_signals

from serpette.scorers import registry
from serpette.types import uniform_of


def first_of(signals):
    return int(uniform_of(signals.ids, signals.seed).argmin())


@pytest.mark.parametrize("picks", [None, 1, 7])
def test_k_center(picks):
    signals = make_signals(n=25)
    order = oracles.k_center(signals.embeddings, first_of(signals), oracles.distance, picks)
    assert registry["k_center"](picks=picks)(signals).tolist() == oracles.turns(order)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0])
@pytest.mark.parametrize("picks", [None, 6])
def test_contextual_diversity(picks, epsilon):
    signals = make_signals(n=25)

    def d(z, w):
        return oracles.symmetric_kl(z, w, epsilon)

    order = oracles.k_center(signals.logits, first_of(signals), d, picks)
    scores = registry["contextual_diversity"](epsilon=epsilon, picks=picks)(signals)
    assert scores.tolist() == oracles.turns(order)


def test_contextual_diversity_of_sure_predictions_is_finite():
    signals = make_signals(n=6)
    signals.logits = 1e4 * torch.eye(3).repeat(2, 1)
    scores = registry["contextual_diversity"]()(signals)
    chosen = set((scores > -3).nonzero().flatten().remainder(3).tolist())
    assert chosen == {0, 1, 2}  # one of each before any twin


def test_k_center_takes_a_twin_last():
    signals = make_signals(n=9)
    signals.embeddings = 100 + torch.tensor([[0.0], [1], [2], [3], [4], [5], [6], [7], [7]])
    scores = registry["k_center"]()(signals)
    assert scores[7:].min() == -8 and sorted(scores.tolist()) == [-8.0 + i for i in range(9)]


@pytest.mark.parametrize("name", ["k_center", "contextual_diversity", "herding"])
def test_all_twins_are_ranked_by_the_hash_of_their_id(name):
    signals = make_signals(n=12)
    signals.embeddings, signals.logits = torch.ones(12, 2), torch.ones(12, 3)
    signals.labels = torch.zeros(12, dtype=torch.long)
    rank = uniform_of(signals.ids, signals.seed).argsort().argsort()
    assert torch.equal(registry[name]()(signals), -rank.double())


@pytest.mark.parametrize("name", ["k_center", "contextual_diversity"])
def test_the_seed_changes_the_first_pick(name):
    signals = make_signals(n=50)
    firsts = set()
    for signals.seed in range(8):
        firsts.add(int(registry[name]()(signals).argmax()))
    assert len(firsts) > 3


@pytest.mark.parametrize("compat", [False, True])
def test_herding(compat):
    signals = make_signals(n=30)
    scores = registry["herding"](compat=compat)(signals)
    for c in range(3):
        rows = (signals.labels == c).nonzero().flatten()
        order = oracles.herding(signals.embeddings[rows].double(), best=max if compat else min)
        assert scores[rows].tolist() == oracles.turns(order)


def test_herding_by_hand():
    signals = make_signals("regression", n=5)
    signals.embeddings = torch.tensor([[0.0], [4.0], [5.0], [6.1], [10.0]])  # mean 5.02
    # targets: 5.02; 10.04 - 5 = 5.04; 15.06 - 9 = 6.06; 20.08 - 15.1 = 4.98
    assert registry["herding"]()(signals).tolist() == [-3, -1, 0, -2, -4]
    assert registry["herding"](compat=True)(signals).argmax() == 0  # 0 is farther from 5.02 than 10


def test_herding_follows_the_mean_and_compat_does_not():
    signals = make_signals("regression", n=200)
    x = signals.embeddings.double()
    errors = {}
    for compat in (False, True):
        chosen = registry["herding"](compat=compat)(signals) > -20
        errors[compat] = (x[chosen].mean(0) - x.mean(0)).norm()
    spread = x.std(0).norm() / 20**0.5  # a random 20
    assert errors[False] < spread / 4 and errors[True] > spread


def test_herding_stops_after_its_picks():
    signals = make_signals(n=30)
    whole, short = registry["herding"]()(signals), registry["herding"](picks=4)(signals)
    picked = whole > -4
    assert torch.equal(whole[picked], short[picked])
    assert short[~picked].max() <= -4 and len(short.unique()) == 10


@pytest.mark.parametrize("name", ["k_center", "contextual_diversity", "herding"])
def test_picks_must_be_positive(name):
    with pytest.raises(ValueError, match="picks=0 must be at least 1"):
        registry[name](picks=0)


def test_epsilon_must_be_positive():
    with pytest.raises(ValueError, match="epsilon=0"):
        registry["contextual_diversity"](epsilon=0)


def test_ids_of_any_kind():
    signals = make_signals(n=6)
    scores = registry["k_center"]()(signals)
    signals.ids = np.array(list(signals.ids), dtype=object)
    assert torch.equal(registry["k_center"]()(signals), scores)
