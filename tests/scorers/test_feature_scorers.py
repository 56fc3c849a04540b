import oracles
import pytest
import torch
from contract import make_signals

from serpette.scorers import registry


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_moderate(task):
    signals = make_signals(task, n=31)
    groups = signals.labels.tolist() if task == "classification" else [0] * 31
    expected = torch.tensor(oracles.moderate(signals.embeddings, groups), dtype=torch.float64)
    torch.testing.assert_close(registry["moderate"]()(signals), expected, rtol=1e-10, atol=1e-10)


def test_moderate_by_hand():
    signals = make_signals("regression", n=5)
    signals.embeddings = torch.tensor([[0.0], [1.0], [-1.0], [3.0], [-3.0]])  # distances 0 1 1 3 3, median 1
    assert registry["moderate"]()(signals).tolist() == [-1, 0, 0, -2, -2]


def test_ssp_is_the_distance_to_the_nearest_of_clear_clusters():
    signals = make_signals(n=12)
    blob = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [-2.0, -4.0]])  # mean 0
    signals.embeddings = torch.cat([blob, blob + 1000, blob - 1000])
    expected = blob.double().norm(dim=1).repeat(3)
    torch.testing.assert_close(registry["ssp"]()(signals), expected, rtol=1e-6, atol=1e-6)


def test_ssp_against_scikit_learn():
    from sklearn.cluster import KMeans

    from serpette.types import uniform_of

    signals = make_signals(n=60)
    order = uniform_of(signals.ids, signals.seed).argsort()
    x = signals.embeddings[order].numpy()
    expected = KMeans(4, n_init="auto", random_state=0).fit(x).transform(x).min(1)
    scores = registry["ssp"](clusters=4)(signals)[order]
    torch.testing.assert_close(scores, torch.from_numpy(expected).double(), rtol=1e-4, atol=1e-4)


def test_ssp_with_fewer_points_than_clusters():
    signals = make_signals(n=4)
    signals.embeddings = torch.ones(4, 2)
    assert registry["ssp"](clusters=9)(signals).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="clusters=0"):
        registry["ssp"](clusters=0)


def test_random_is_uniform_and_follows_the_seed():
    signals = make_signals(n=2000)
    scores = registry["random"]()(signals)
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert counts.min() > 140 and counts.max() < 260
    signals.seed = 1
    other = registry["random"]()(signals)
    assert abs(torch.corrcoef(torch.stack([scores, other]))[0, 1]) < 0.1
