"""Scores of instruction examples, and the plain loss: hand cases and directions."""

import math

import numpy as np
import pytest
import torch
from contract import make_signals

from serpette.data.selectors import registry as selectors
from serpette.scorers import DLC, IFD, Loss, Superfiltering
from serpette.types import PathFeatures, Signals


def signals(given, alone):
    return Signals(
        ids=np.array([str(i) for i in range(len(given))]),
        response_losses=torch.tensor(given),
        answer_losses=torch.tensor(alone),
        task="causal-lm",
    )


#        helped much, a little, not at all, hindered, hindered much
GIVEN, ALONE = [1.0, 3.0, 2.0, 2.2, 6.0], [4.0, 4.0, 2.0, 2.0, 2.0]


def test_ifd_is_the_ratio_of_the_losses_and_misaligned_examples_come_last():
    scores = IFD()(signals(GIVEN, ALONE))
    np.testing.assert_allclose(scores, [0.25, 0.75, 1.0, -1.1, -3.0], rtol=1e-6)
    assert scores.argsort(descending=True).tolist() == [2, 1, 0, 3, 4]
    assert selectors.make("top_hard")(scores, 2, torch.Generator()).tolist() == [1, 2]


def test_superfiltering_is_the_ratio_of_the_perplexities():
    scores = Superfiltering()(signals(GIVEN, ALONE))
    expected = [math.exp(-3), math.exp(-1), 1.0, -math.exp(0.2), -math.exp(4)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.argsort(descending=True).tolist() == [2, 1, 0, 3, 4]


def test_both_are_finite_whatever_the_model_says():
    extreme = signals([0.0, 5.0, 500.0, 0.0], [0.0, 0.0, 1.0, 500.0])
    for scorer in (IFD(), Superfiltering()):
        assert torch.isfinite(scorer(extreme)).all()


def test_they_differ_where_long_and_short_losses_shrink_alike():
    part = signals([1.0, 0.1], [2.0, 0.2])  # equal ratios of losses, not of perplexities
    ifd, small = IFD()(part), Superfiltering()(part)
    assert ifd[0] == pytest.approx(float(ifd[1])) and small[0] < small[1] - 0.3


def test_loss_is_that_of_each_task():
    part = make_signals("classification", n=9)
    scores = Loss()(part)
    for n in range(9):
        z = part.logits[n].tolist()
        expected = math.log(sum(math.exp(v) for v in z)) - z[int(part.labels[n])]
        assert float(scores[n]) == pytest.approx(expected, abs=1e-6)
    part = make_signals("regression", n=9)
    np.testing.assert_allclose(Loss()(part), (part.logits[:, 0] - part.labels).square(), rtol=1e-5)
    part = make_signals("causal-lm", n=9)
    assert torch.equal(Loss()(part), part.response_losses.double())


def test_dlc_of_a_language_model_is_the_mean_loss_along_its_path():
    scorer = DLC(points=[0, 0.5])
    part = make_signals("causal-lm", n=4, path=scorer.path)
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 3.0, 3.0, 5.0]])[..., None]
    part.paths = {
        scorer.path: PathFeatures(
            scorer.path.points,
            [(torch.tensor([2, 0]), losses[:, [2, 0]]), (torch.tensor([1, 3]), losses[:, [1, 3]])],
        )
    }
    assert scorer(part).tolist() == [2.0, 2.5, 3.0, 4.5]
    assert scorer.along_path(part).shape == (2, 4)


@pytest.mark.parametrize("scorer", [IFD(), Superfiltering()])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_no_instructions_no_score(scorer, task):
    with pytest.raises(ValueError, match=f"no meaning in a {task}"):
        scorer(make_signals(task))
