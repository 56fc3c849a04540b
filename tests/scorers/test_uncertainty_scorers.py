import oracles
import pytest
import torch
from contract import make_signals

from serpette.scorers import registry

NAMES = ["entropy", "margin", "least_confidence"]


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
    signals = make_signals(n=40)
    expected = torch.tensor(getattr(oracles, name)(signals.logits), dtype=torch.float64)
    torch.testing.assert_close(registry[name]()(signals), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_sure_is_low_and_torn_is_high(name):
    signals = make_signals(n=3)
    signals.logits = torch.tensor([[9.0, 0, 0], [3.0, 1, 0], [1.0, 1, 1]])
    sure, between, torn = registry[name]()(signals).tolist()
    assert sure < between < torn


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name):
    signals = make_signals(n=4)
    signals.logits = torch.tensor([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [3e38, 0, 0], [80, -80, 0.0]])
    scores = registry[name]()(signals)
    assert torch.isfinite(scores).all()
    assert scores[1] == scores.max()


def test_least_confidence_keeps_its_digits_where_the_probability_rounds_to_one():
    signals = make_signals(n=2)
    signals.logits = torch.tensor([[50.0, 0, 0], [60.0, 0, 0]])
    a, b = registry["least_confidence"]()(signals).tolist()
    assert a == pytest.approx(2 * torch.tensor(-50.0).double().exp().item()) and 0 < b < a


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_on_two_classes_they_rank_alike(scale):
    signals = make_signals(n=300)
    signals.num_classes = 2
    signals.logits = scale * torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    by_name = {name: registry[name]()(signals) for name in NAMES}
    for first in NAMES:
        order = by_name[first].argsort()
        for second in NAMES:  # never down by more than a rounding error
            assert by_name[second][order].diff().min() >= -1e-13, (first, second)
