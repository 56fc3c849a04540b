"""Learning curves: a known law is found again, and the band holds it."""

import numpy as np
import pytest

from serpette.adviser.curve import fit

SIZES = np.array([50.0, 100, 200, 400, 800])


def law(n):
    return 90 - 60 * n**-0.4


def test_a_power_law_is_extrapolated():
    curve = fit(SIZES, np.repeat(law(SIZES)[:, None], 3, 1))
    assert curve(5000) == pytest.approx(law(5000), abs=0.3)
    value, low, high = curve.band(5000)
    assert low <= value <= high and high - low < 0.01


def test_the_band_holds_the_truth_and_grows_with_distance():
    held = 0
    for seed in range(20):
        values = law(SIZES)[:, None] + np.random.default_rng(seed).normal(0, 1, (5, 10))
        curve = fit(SIZES, values, seed=seed)
        _, low, high = curve.band(3000)
        held += low <= law(3000) <= high
        near = curve.band(800)
        assert near[2] - near[1] < high - low
    assert held >= 16


def test_few_trials_are_taken_for_what_they_are():
    """The loss of three noisy short tunings: the 95 % interval holds the truth about as often as it says."""
    sizes, rng = np.array([10.0, 20, 40]), np.random.default_rng(0)
    truth = -60 * sizes**-0.4

    def held(cautious):
        found = 0
        for seed in range(100):
            curve = fit(sizes, truth[:, None] + rng.normal(0, 1, (3, 3)), ceiling=0.0, seed=seed)
            _, low, high = (curve.cautious(3, 40) if cautious else curve).loss(32, 160)
            found += low <= 60 * (32**-0.4 - 160**-0.4) <= high
        return found

    assert held(cautious=False) < 90 <= held(cautious=True)
    curve = fit(sizes, truth[:, None].repeat(3, 1), ceiling=0.0).cautious(3, 40)
    value, low, high = curve.band(4000)
    assert value - low == pytest.approx(1.96 * (value - curve(40)) / 2) == pytest.approx(high - value)
    assert curve.loss(4000, 4000) == (0, 0, 0)


def test_it_never_falls_with_more_examples_nor_rises_above_its_ceiling():
    falling = fit(SIZES, np.array([[80.0], [79], [78], [77], [76]]))
    assert falling(10_000) >= falling(50)
    steep = fit(np.array([10.0, 20, 40]), np.array([[50.0], [75], [98]]), ceiling=100.0)
    assert steep(10**6) <= 100


def test_one_size_is_no_curve():
    with pytest.raises(ValueError, match="two or more"):
        fit(np.array([10.0]), np.array([[1.0]]))
