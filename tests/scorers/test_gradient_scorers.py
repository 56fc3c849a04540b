"""AUM, DUAL, MoSo, CRAIG, GradMatch and GLISTER: slow oracles, hand cases, which way they point."""

import math

import oracles
import oracles_greedy as slow
import pytest
import torch
from contract import make_signals

from serpette.scorers import registry
from serpette.types import uniform_of

TASKS = ["classification", "regression"]


def close(scores, expected):
    torch.testing.assert_close(scores, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)


def hash_order(signals):
    return uniform_of(signals.ids, signals.seed).argsort()


def groups(signals, task):
    """Rows of each class in the order of their hash."""
    order = hash_order(signals)
    if task == "regression":
        return [order]
    return [order[signals.labels[order] == c] for c in range(3)]


def test_aum():
    signals = make_signals(n=30)
    close(registry["aum"]()(signals), slow.aum(signals.history, signals.labels))


def test_aum_by_hand():
    signals = make_signals(n=3)
    signals.num_classes, signals.labels = 3, torch.tensor([0, 0, 1])
    learnt, wrong, torn = [5.0, 1, 0], [-1.0, 3, 2], [2.0, 2, 2]
    signals.history = torch.tensor([[learnt, wrong, torn], [learnt, [1.0, 3, 7], torn]])
    assert registry["aum"]()(signals).tolist() == [-4, 5, 0]  # a wrong label is the hardest


@pytest.mark.parametrize("window", [2, 4, 6, 10])  # of 6 visits
def test_dual(window):
    signals = make_signals(n=30)
    close(registry["dual"](window=window)(signals), slow.dual(signals.history, signals.labels, window))


def test_dual_is_high_for_the_undecided_that_are_hard():
    signals = make_signals(n=4)
    signals.num_classes, signals.labels = 2, torch.zeros(4, dtype=torch.long)
    p = torch.tensor([[0.99] * 4, [0.01] * 4, [0.1, 0.5, 0.1, 0.5], [0.5, 0.9, 0.5, 0.9]]).T  # (T, N)
    signals.history = torch.stack([p.log(), (1 - p).log()], 2)
    easy, never, hard, learning = registry["dual"]()(signals).tolist()
    assert easy == pytest.approx(0, abs=1e-6) and never == pytest.approx(0, abs=1e-6)
    std = 0.2 * math.sqrt(4 / 3)
    assert hard == pytest.approx(std * 0.7) and learning == pytest.approx(std * 0.3)


def test_dual_of_one_visit_is_nothing():
    signals = make_signals(n=5)
    signals.history = signals.history[:1]
    assert registry["dual"]()(signals).tolist() == [0] * 5


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_dual_draws_by_the_weights_of_the_paper(keep):
    signals = make_signals(n=15)
    weights = torch.tensor(slow.dual_weights(signals.history, signals.labels, 4, keep, 4.0))
    hits, draws = torch.zeros(15), 3000
    scorer = registry["dual"](window=4, keep=keep)
    for signals.seed in range(draws):
        hits[scorer(signals).argmax()] += 1
    torch.testing.assert_close(hits.double() / draws, weights / weights.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize("task", TASKS)
def test_moso_against_autograd(task):
    signals = make_signals(task, n=14)
    expected = slow.moso(signals.history, signals.embeddings, signals.labels, task == "regression")
    close(registry["moso"]()(signals), expected)


def test_moso_in_pieces(monkeypatch):
    signals = make_signals(n=20)
    whole = registry["moso"]()(signals)
    monkeypatch.setattr("serpette.greedy.ELEMENTS", 15)
    close(registry["moso"]()(signals), whole)


def test_moso_is_low_for_what_pulls_against_the_rest():
    signals = make_signals(n=10)
    signals.num_classes, signals.labels = 2, torch.tensor([0] * 9 + [1])
    signals.embeddings, signals.history = torch.ones(10, 2), torch.zeros(3, 10, 2)
    scores = registry["moso"]()(signals)
    assert scores[9] < 0 < scores[:9].min()  # the one with another label in the same place


def gradients(signals, rows, task):
    return slow.last_layer_gradients(
        signals.logits[rows], signals.embeddings[rows], signals.labels[rows], task == "regression"
    )


@pytest.mark.parametrize("task", TASKS)
def test_craig(task):
    signals = make_signals(task, n=36)
    scores = registry["craig"]()(signals)
    for rows in groups(signals, task):
        order = slow.greedy(len(rows), slow.craig(gradients(signals, rows, task)))
        assert scores[rows].tolist() == oracles.turns(order)


def test_craig_weights_count_whom_a_pick_stands_for():
    signals = make_signals(n=36)
    scorer = registry["craig"](picks=3)
    scores = scorer(signals)
    for rows in groups(signals, "classification"):
        g = gradients(signals, rows, "classification")
        picked = (scores[rows] > -3).nonzero().flatten()
        nearest = torch.cdist(g, g[picked]).argmin(1)
        expected = torch.bincount(nearest, minlength=3).double()
        assert torch.equal(scorer.weights_[rows][picked], expected)
    assert scorer.weights_.sum() == 36 and (scorer.weights_ > 0).sum() == 9
    whole = registry["craig"]()
    whole(signals)
    assert whole.weights_.tolist() == [1] * 36


def test_craig_takes_the_middle_then_the_other_cluster():
    signals = make_signals("regression", n=6)
    signals.labels, signals.embeddings = torch.zeros(6), torch.zeros(6, 1)
    signals.logits = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0], [101.0]])  # these are the gradients
    scores = registry["craig"]()(signals)
    assert int((scores == 0).nonzero()) in (2, 3)
    assert int((scores == -1).nonzero()) in (4, 5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("support", [1000, 5])
def test_grad_match(task, support):
    signals = make_signals(task, n=36)
    scores = registry["grad_match"](support=support)(signals)
    for rows in groups(signals, task):
        order = slow.grad_match(gradients(signals, rows, task), 0.5, support)
        assert scores[rows].tolist() == oracles.turns(order)


def test_grad_match_by_hand():
    signals = make_signals("regression", n=3)
    signals.labels, signals.embeddings = torch.zeros(3), torch.zeros(3, 1)
    signals.logits = torch.tensor([[3.0], [2.0], [-1.0]])  # mean 4/3: what points the other way comes last
    assert registry["grad_match"]()(signals).tolist() == [0, -1, -2]


def test_grad_match_matches_the_mean_better_than_chance():
    signals = make_signals("regression", n=200)
    signals.embeddings = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    g = gradients(signals, torch.arange(200), "regression")
    chosen = (registry["grad_match"](penalty=1e-6)(signals) > -8).nonzero().flatten()

    def error(rows):
        A = g[rows].T
        return float((A @ torch.linalg.lstsq(A, g.mean(0)[:, None]).solution - g.mean(0)[:, None]).norm())

    others = [error(torch.randperm(200)[:8]) for _ in range(20)]
    assert error(chosen) < min(others)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rounds", [1, 6, 100])
def test_glister(task, rounds):
    signals = make_signals(task, n=24)
    order = hash_order(signals)
    picked = slow.glister(
        signals.logits[order],
        signals.embeddings[order],
        signals.labels[order],
        validation=range(5),
        step=0.7,
        every=math.ceil(24 / rounds),
        regression=task == "regression",
    )
    scores = registry["glister"](validation=0.2, step=0.7, rounds=rounds)(signals)
    assert scores[order].tolist() == oracles.turns(picked)


def test_glister_likes_what_agrees_with_the_validation_part():
    signals = make_signals(n=40)
    signals.num_classes = 2
    signals.embeddings = torch.ones(40, 1)
    signals.logits = torch.zeros(40, 2)
    order = hash_order(signals)
    signals.labels = torch.zeros(40, dtype=torch.long)
    signals.labels[order[[20, 30]]] = 1  # two wrong labels outside of V
    scores = registry["glister"](rounds=2)(signals)
    assert sorted(scores[order[[20, 30]]].tolist()) == [-39, -38]


@pytest.mark.parametrize("name", ["craig", "grad_match", "glister"])
def test_picks_are_the_first_of_the_whole_ranking(name):
    signals = make_signals(n=45)
    whole, short = registry[name]()(signals), registry[name](picks=4)(signals)
    assert torch.equal(whole > -4, short > -4) and torch.equal(whole[whole > -4], short[short > -4])
    assert len(short.unique()) == len(whole.unique())


@pytest.mark.parametrize("name", ["craig", "grad_match", "glister"])
def test_twins_and_examples_without_a_gradient_are_ranked_by_hash(name):
    signals = make_signals(n=13)
    signals.labels = torch.zeros(13, dtype=torch.long)
    signals.embeddings = torch.full((13, 3), 0.1)
    rank = hash_order(signals).argsort()
    for logits in (torch.full((13, 3), 0.3), torch.tensor([[1e4, 0, 0]]).repeat(13, 1)):
        signals.logits = logits
        scorer = registry[name]()
        assert torch.equal(scorer(signals), -rank.double())
        if name == "craig":
            assert scorer.weights_.tolist() == [1] * 13  # each stands for itself, also beside twins


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dual", {"window": 1}),
        ("dual", {"keep": 0}),
        ("dual", {"keep": 30}),
        ("dual", {"c": 0}),
        ("craig", {"picks": 0}),
        ("grad_match", {"picks": 0}),
        ("grad_match", {"penalty": 0}),
        ("grad_match", {"support": 0}),
        ("glister", {"validation": 1}),
        ("glister", {"step": 0}),
        ("glister", {"rounds": 0}),
        ("glister", {"picks": 0}),
    ],
)
def test_bad_options_are_named(name, options):
    option, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{option}={value} must be"):
        registry[name](**options)
