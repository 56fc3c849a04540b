"""Budgets: units, and errors that name the argument, the value and the way out."""

import pytest

from serpette.adviser.budget import Budget


@pytest.mark.parametrize(
    "text, seconds",
    [("0.3x", 60.0), ("600s", 600.0), ("10min", 600.0), ("10m", 600.0), ("2h", 7200.0), (" 1 x", 200.0)],
)
def test_time(text, seconds):
    assert Budget(time=text).seconds(200.0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text, size", [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5GB", 1_500_000_000)]
)
def test_memory(text, size):
    assert Budget(memory=text).bytes == size


def test_latency_and_defaults():
    assert Budget(latency="0.5x").speed == 2
    assert Budget().max_loss == 1.0 and Budget(time="1h").max_loss is None
    assert Budget(time="0.5x", max_loss=2).as_dict(10.0) == {
        "time": {"text": "0.5x", "seconds": 5.0},
        "max_loss": 2,
    }


@pytest.mark.parametrize(
    "given, words",
    [
        ({"time": "30"}, "time='30' must be a share of the full run such as 0.3x"),
        ({"time": "5 days"}, "the unit 'days' is not one of x, s, min, m, h"),
        ({"time": "1.3x"}, "time='1.3x' is more than the full run takes"),
        ({"time": "0x"}, "above 0"),
        ({"time": "-3s"}, "time='-3s' must be"),
        ({"memory": "8"}, "memory='8' must be bytes such as 8GiB"),
        ({"memory": "8 KiB"}, "the unit 'KiB'"),
        ({"latency": "20ms"}, "latency='20ms' must be a share"),
        ({"latency": "1.5x"}, "slower than the unpruned model"),
        ({"max_loss": -1}, r"max_loss=-1 must be in \[0, 100\)"),
    ],
)
def test_bad_budgets(given, words):
    with pytest.raises(ValueError, match=words):
        Budget(**given)
