import oracles
import pytest
import torch
from contract import make_signals

from serpette.scorers import registry


def close(scores, expected):
    torch.testing.assert_close(scores, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_el2n():
    signals = make_signals()
    close(registry["el2n"]()(signals), oracles.el2n(signals.early_logits, signals.labels))


def test_el2n_by_hand():
    signals = make_signals(n=2)
    signals.num_classes, signals.labels = 2, torch.tensor([0, 1])
    signals.early_logits = torch.tensor([[[0.0, 0.0], [100.0, 0.0]]])
    close(registry["el2n"]()(signals), [0.5**0.5, 2**0.5])  # torn; wrong and sure


def test_el2n_and_grand_of_a_regression():
    signals = make_signals("regression", n=1)
    signals.labels = torch.tensor([3.0])
    signals.early_logits = torch.tensor([[[5.0]], [[-1.0]]])
    signals.embeddings = torch.tensor([[2.0, 2.0]])
    close(registry["el2n"]()(signals), [3.0])
    close(registry["grand"]()(signals), [9.0])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_grand_against_autograd(task):
    signals = make_signals(task, n=12)
    expected = oracles.grand(signals.early_logits, signals.embeddings, signals.labels, task == "regression")
    close(registry["grand"]()(signals), expected)


def history_of(rights):
    """(T, N, 2) logits of examples of class 1, right or wrong at each visit."""
    return torch.tensor([[[0.0, 1.0] if r == "1" else [1.0, 0.0] for r in visit] for visit in zip(*rights)])  # noqa: B905


def test_forgetting_by_hand():
    rights = ["111111", "000111", "101010", "010101", "110110", "000000", "000001"]
    signals = make_signals(n=len(rights))
    signals.num_classes, signals.labels = 2, torch.ones(len(rights), dtype=torch.long)
    signals.history = history_of(rights)
    assert registry["forgetting"]()(signals).tolist() == [0, 0, 3, 2, 2, 6, 0]


@pytest.mark.parametrize("visits", [1, 2, 3])
def test_never_learnt_is_above_any_number_of_events(visits):
    rights = ["1010"[:visits], "0" * visits]
    signals = make_signals(n=2)
    signals.num_classes, signals.labels = 2, torch.ones(2, dtype=torch.long)
    signals.history = history_of(rights)
    forgotten, never = registry["forgetting"]()(signals).tolist()
    assert forgotten < never < float("inf")


def test_forgetting_and_complexity_oracles():
    signals = make_signals(n=30)
    close(registry["forgetting"]()(signals), oracles.forgetting(signals.history, signals.labels))
    expected = oracles.optimisation_complexity(signals.history, signals.labels)
    close(registry["optimisation_complexity"]()(signals), expected)


def test_complexity_of_a_regression():
    signals = make_signals("regression", n=1)
    signals.labels, signals.history = torch.tensor([1.0]), torch.tensor([[[1.0]], [[3.0]], [[0.0]]])
    close(registry["optimisation_complexity"]()(signals), [5 / 3])
