"""What is recommended out of options made by hand."""

import math

import numpy as np
import pytest

from serpette.adviser.budget import Budget
from serpette.adviser.probes import RANDOM, Choice, Measured
from serpette.adviser.recommend import (
    Behind,
    Noise,
    Option,
    Outlook,
    best_of,
    outlooks,
    recommend,
    sentence,
)
from serpette.adviser.tuning import Tuning

HERDING = Choice("herding", "herding", "top_hard")


def outlook(keep, loss, error=0.5, choice=RANDOM, beats=0.0, value=None):
    value = 90 - loss if value is None else value
    half = 1.96 * error
    ends = (value, value - half, value + half, loss, loss - half, loss + half)
    to_random = None if choice.by_chance else (1.0, 0.2, 1.8)
    return Outlook(choice, keep, round(1000 * keep), *ends, to_random, beats)


def tuning(name="LoRA", peak=2**30, seconds=1.0):
    return Tuning(name, "lora", None, False, "checkpointing" in name, 1000, peak, seconds, True)


def option(keep, loss, seconds, *, error=0.5, way=None, cut=None, choice=RANDOM):
    return Option(outlook(keep, loss, error, choice), way or tuning(), cut, seconds)


EVERYTHING = option(1.0, 0.0, 100.0, error=0.0)
HALF, THIRD = option(0.5, 0.4, 50.0), option(0.3, 2.0, 30.0)


def test_without_a_time_limit_the_least_time_that_is_likely_within_the_loss():
    assert recommend([EVERYTHING, HALF, THIRD], Budget(), 100.0) == [HALF, EVERYTHING]
    assert recommend([EVERYTHING, HALF, THIRD], Budget(max_loss=3.0), 100.0)[0] is THIRD
    unsure = option(0.5, 0.4, 50.0, error=1.3)  # 0.4 + 0.52 * 1.3 is above 1
    assert recommend([EVERYTHING, unsure], Budget(), 100.0) == [EVERYTHING]


def test_with_a_time_limit_the_least_loss():
    assert recommend([EVERYTHING, HALF, THIRD], Budget(time="0.6x"), 100.0) == [HALF, THIRD]
    assert recommend([EVERYTHING, HALF, THIRD], Budget(time="35s"), 100.0) == [THIRD]
    unsure = option(0.05, -0.5, 5.0, error=8.0)
    assert recommend([HALF, unsure], Budget(time="0.6x"), 100.0)[0] is HALF


def test_memory_and_latency():
    small = option(1.0, 0.0, 140.0, error=0.0, way=tuning("LoRA, checkpointing", 2**29))
    assert recommend([EVERYTHING, small], Budget(memory="0.6GiB"), 100.0) == [small]
    cut = {
        "sparsity": 0.5,
        "loss": 3.0,
        "low": 2.0,
        "high": 4.0,
        "timings": [{"batch_size": 8, "speedup": 1.8}],
    }
    pruned = option(1.0, 0.0, 100.0, error=0.0, cut=cut)
    assert recommend([EVERYTHING, pruned], Budget(latency="0.6x"), 100.0) == [pruned]
    assert pruned.loss == 3.0 and pruned.interval == pytest.approx((2.0, 4.0))
    quick = option(0.1, 9.0, 10.0, cut=cut)
    assert recommend([quick, pruned], Budget(latency="0.6x"), 100.0)[0] is pruned  # not the least time
    both = option(0.5, 0.4, 50.0, cut=cut)
    assert both.loss == pytest.approx(3.4)
    assert both.interval[1] - both.loss == pytest.approx(math.hypot(0.98, 1.0))


@pytest.mark.parametrize(
    "budget, words",
    [
        (
            {"time": "0.4x", "max_loss": 0.5},
            r"max_loss=0.5 cannot be promised with time=0.4x: .* 2.0 points \(1.0 to 3.0\)",
        ),
        (
            {"time": "0.2x"},
            "time='0.2x' is too little: the cheapest option takes 30 s, 0.30x of the full run",
        ),
        ({"memory": "1MB"}, r"the least is 1.00GiB \(LoRA\)"),
        ({"latency": "0.5x"}, "latency='0.5x' is not reached: the fastest model measured is 1.00x"),
    ],
)
def test_impossible_budgets_name_the_limit_and_the_nearest(budget, words):
    with pytest.raises(ValueError, match=words):
        recommend([EVERYTHING, HALF, THIRD], Budget(**budget), 100.0)


def test_a_score_is_advised_only_where_it_is_likely_above_chance():
    random, score = outlook(0.3, 2.0), outlook(0.3, 1.0, choice=HERDING, beats=0.6)
    assert best_of([random, score]) == [random]
    score = outlook(0.3, 1.0, choice=HERDING, beats=0.8)
    assert best_of([random, score]) == [random, score]


def test_what_is_said():
    assert "Keep everything and tune LoRA on all 1,000 examples (100 s" in sentence(EVERYTHING, 100.0, False)
    said = sentence(HALF, 100.0, False)
    assert (
        "a balanced random 50%, 500 examples" in said
        and "lose 0.4 points (-0.6 to 1.4) in 50 s, 0.50" in said
    )
    assert "500 examples: predicted to lose 0.004 nats (-0.006 to 0.014) in 50 s" in sentence(
        HALF, 100.0, True
    )
    said = sentence(option(0.3, 1.0, 30.0, choice=HERDING), 100.0, False)
    assert "300 examples, that herding chooses (+1.0 points to a balanced random choice)" in said


def test_accuracy_on_right_labels_is_that_of_the_noise_model():
    noise = Noise(0.2, 0.01, 5)
    for right in (0.3, 0.7, 0.95):
        as_given = 100 * (right * 0.8 + (1 - right) * 0.2 / 4)
        assert noise.right(as_given) == pytest.approx(100 * right)
    assert noise.uncertainty(70.0) > 0.5 and noise.identified
    assert not Noise(0.45, 0.03, 2).identified or Noise(0.45, 0.03, 2).scale > 0
    assert not Noise(0.45, 0.06, 2).identified and not Noise(0.1, 0.1, 10).identified


def test_of_a_language_model_figures_are_in_nats_of_which_less_is_better():
    plain, nats = HALF.as_dict(), HALF.as_dict(causal=True)
    assert [nats[k] for k in ("loss", "low", "high")] == pytest.approx(
        [plain[k] / 100 for k in ("loss", "low", "high")]
    )
    whole, half = (o.as_dict(causal=True)["choice"] for o in (EVERYTHING, HALF))
    assert half["value"] - whole["value"] == pytest.approx(half["loss"])
    assert half["low"] <= half["value"] <= half["high"]


def test_a_share_is_one_of_all_examples_also_where_some_cannot_be_read():
    """As `select` counts it: 30 % of 100 are 30 of the 60 that can be read; 70 % cannot be kept."""
    values = {(RANDOM.name, keep): np.full(5, 80.0) for keep in (0.3, 0.7, 1.0)}
    held = Measured([RANDOM], (0.3, 0.7), values, 60, 15, 5, {})
    assert [(o.keep, o.examples) for o in outlooks(held, 60, listed=100)] == [(0.3, 30), (1.0, 60)]


def test_a_tuning_of_few_steps_is_behind_the_head():
    held = Measured(
        [RANDOM],
        (0.1, 0.5),
        {(RANDOM.name, keep): np.full(5, value) for keep, value in ((0.1, 70.0), (0.5, 80.0), (1.0, 82.0))},
        100, 25, 5, {},
    )  # fmt: skip
    plain = {o.keep: o for o in outlooks(held, 100)}
    late = {o.keep: o for o in outlooks(held, 100, behind=Behind(30.0, 2.0, 5))}
    assert [plain[k].value for k in (0.1, 0.5, 1.0)] == pytest.approx([70, 80, 82])
    assert [late[k].value for k in (0.1, 0.5, 1.0)] == pytest.approx(
        [70 - 15, 80 - 3, 82 - 1.5]
    )  # 30 x 5 / n
    assert late[0.1].loss == pytest.approx(12 + 15 - 1.5) and late[1.0].loss == 0
    half = late[0.1].loss_high - late[0.1].loss
    assert half == pytest.approx(2.776 * math.hypot(7.5, 2.0 * 5 / 10), rel=1e-3)
    assert Behind(-4.0, 1.0, 5).at(50, 80.0) == 0
    assert Behind(40.0, 5.0, 32, trivial=10.0).at(10, 60.0) == 50  # never below what knows nothing
    unknown = Behind(3.0, 2.0, 5, trivial=50.0, learned=False)  # half of the other 50 points, as 95 %
    lost = outlooks(held, 100, behind=unknown)[0]
    assert lost.loss_high - lost.loss == pytest.approx(2.776 * 25 / 1.96, rel=1e-3)
