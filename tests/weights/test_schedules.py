import pytest

from serpette.weights.schedules import SCHEDULES, schedule_of, sparsity_at


def test_cubic_is_the_papers_formula():
    for step in range(100, 701):
        expected = 0.9 + (0.2 - 0.9) * (1 - (step - 100) / (1000 - 100 - 300)) ** 3
        assert sparsity_at(step, 1000, 0.9, initial=0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_before_the_first_cut_and_all_after_the_last(schedule):
    for steps in (1, 3, 7, 10, 30, 100, 977):
        for step in range(steps + 1):
            sparsity = sparsity_at(step, steps, 0.3, schedule=schedule)
            assert sparsity == 0 or step * 10 >= steps
            assert sparsity == 0.3 or step * 10 < steps * 7
    assert sparsity_at(70, 100, 0.3, schedule=schedule) == 0.3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sparsity_never_shrinks(schedule):
    curve = [sparsity_at(step, 50, 0.5, 0.0, 0.0, schedule, 0.1) for step in range(51)]
    assert curve == sorted(curve) and curve[0] == (0.5 if schedule == "one_shot" else 0.1)
    assert curve[-1] == 0.5


def test_one_shot_cuts_all_at_the_first_cut():
    curve = [sparsity_at(step, 10, 0.5, schedule="one_shot") for step in range(11)]
    assert curve == [0.0] + [0.5] * 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shares_end_at_one(schedule):
    assert schedule_of(schedule)(1.0) == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.5, "end": 0.5}, "start=0.5 and end=0.5"),
        ({"start": 0.7, "end": 0.3}, "lower one of them"),
        ({"start": -0.1}, "start=-0.1"),
        ({"final": 1.0}, r"final=1.0 must be in \[0, 1\)"),
        ({"final": -0.1}, "final=-0.1"),
        ({"initial": 0.6}, "initial=0.6"),
        ({"steps": 0}, "steps=0"),
        ({"schedule": "cubicc"}, "did you mean 'cubic'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sparsity_at(**{"step": 1, "steps": 10, "final": 0.5, **options})
