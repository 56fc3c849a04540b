"""DLC against a slow float64 loop, its stopping rule, its variants and its regression form."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from serpette.masking import LOW_DISCREPANCY
from serpette.scorers import DLC, LearningConfidence
from serpette.types import PathFeatures, Signals


def signals_for(scorer, N=40, D=6, C=3, P=None, seed=0, regression=False):
    g = torch.Generator().manual_seed(seed)
    points = scorer.path.points[: P or len(scorer.path.points)]
    labels = torch.arange(N) % C
    centre = torch.randn(C, D, generator=g) * 2
    features = torch.stack(
        [centre[labels] + (1 + p) * torch.randn(N, D, generator=g) for p in range(len(points))]
    )
    order = torch.randperm(N, generator=g)
    chunks = [(rows, features[:, rows]) for rows in order.split(13)]
    targets = features[0] @ torch.randn(D, generator=g) if regression else labels
    return Signals(
        ids=np.array([f"x{i}" for i in range(N)]),
        labels=targets,
        num_classes=0 if regression else C,
        paths={scorer.path: PathFeatures(points, chunks)},
    ), features


def slow(features, labels, C, standardize, inverse, masked_prototypes=False, temperature=1.0):
    """(P, N), one example at a time."""
    P, N, D = features.shape
    h = features.double()
    if standardize:
        mean = [sum(float(h[0, n, d]) for n in range(N)) / N for d in range(D)]
        std = [math.sqrt(sum((float(h[0, n, d]) - mean[d]) ** 2 for n in range(N)) / N) for d in range(D)]
        h = (h - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    losses = torch.zeros(P, N, dtype=torch.float64)
    for p in range(P):
        source = h[p] if masked_prototypes else h[0]
        mu = [source[labels == c].mean(0) for c in range(C)]
        for n in range(N):
            distance = [math.sqrt(float(((h[p, n] - mu[c]) ** 2).sum())) for c in range(C)]
            z = [1 / max(d, 1e-6) if inverse else -d / temperature for d in distance]
            losses[p, n] = math.log(sum(math.exp(v) for v in z)) - z[int(labels[n])]
    return losses


@pytest.mark.parametrize(
    ("options", "slow_options"),
    [
        ({}, {"standardize": True, "inverse": False}),
        ({"temperature": 0.5}, {"standardize": True, "inverse": False, "temperature": 0.5}),
        ({"prototype": "masked"}, {"standardize": True, "inverse": False, "masked_prototypes": True}),
        ({"logits": "inverse_distance"}, {"standardize": True, "inverse": True}),
        ({"variant": "official"}, {"standardize": False, "inverse": True}),
    ],
)
def test_losses_equal_a_slow_loop(options, slow_options):
    scorer = DLC(**options)
    signals, features = signals_for(scorer, P=4)
    expected = slow(features, signals.labels, 3, **slow_options)
    torch.testing.assert_close(scorer.along_path(signals), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scorer(signals), expected.mean(0), rtol=1e-9, atol=1e-9)


def test_inverse_distance_is_nearly_flat():
    # the reason why it is not the default: distances 10, 12, 14 give 1.084 against ln 3 = 1.099
    z = 1 / torch.tensor([[10.0, 12.0, 14.0]])
    assert torch.nn.functional.cross_entropy(z, torch.tensor([0])).item() == pytest.approx(1.084, abs=1e-3)


def test_learning_confidence_equals_a_slow_loop():
    scorer = LearningConfidence()
    signals, features = signals_for(scorer, P=3)
    P, N, C = 3, len(signals), 3
    h = (features.double() - features[0].double().mean(0)) / features[0].double().std(0, correction=0)
    mu = torch.stack([h[0][signals.labels == c].mean(0) for c in range(C)])
    for p in range(P):
        for n in range(0, N, 7):
            weight = [math.exp(-float((h[p, n] - mu[c]).norm())) for c in range(C)]
            assert float(scorer.along_path(signals)[p, n]) == pytest.approx(
                1 - max(weight) / sum(weight), abs=1e-9
            )


def test_regression_is_a_ridge_probe_on_the_masked_features():
    scorer = DLC(points=[0, 0.5])
    signals, features = signals_for(scorer, N=60, D=5, regression=True)
    errors = scorer.along_path(signals)
    h = features.double()
    z = ((h - h[0].mean(0)) / h[0].std(0, correction=0)).numpy()
    y = signals.labels.double().numpy()

    def gcv(a):
        hat = z[0] @ np.linalg.solve(z[0].T @ z[0] + a * np.eye(5), z[0].T)
        residual = (y - y.mean()) - hat @ (y - y.mean())
        return (residual @ residual) / (len(y) - np.trace(hat)) ** 2

    alpha = min((len(y) * 10.0**e for e in range(-4, 4)), key=gcv)
    probe = Ridge(alpha=alpha).fit(z[0], y)
    for p in range(2):
        np.testing.assert_allclose(errors[p].numpy(), (probe.predict(z[p]) - y) ** 2, rtol=1e-6, atol=1e-9)


def test_a_class_without_examples_and_a_class_of_one():
    scorer = DLC(points=[0])
    signals, _ = signals_for(scorer)
    signals.num_classes = 5  # classes 3 and 4 have no example
    signals.labels = signals.labels.clone()
    signals.labels[0] = 4  # and now class 4 has one
    scores = scorer(signals)
    assert torch.isfinite(scores).all()
    assert scores[0] < math.log(4)  # it is its own prototype, at distance 0: better than a guess


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "offical"},
        {"points": [0.5]},
        {"points": [0, 1.0]},
        {"points": [0, 0.2, 0.2]},
        {"points": []},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DLC(**options)


def test_paths():
    assert LOW_DISCREPANCY[:5] == (0, Fraction(1, 2), Fraction(1, 4), Fraction(3, 4), Fraction(1, 8))
    official = DLC(variant="official").path
    assert len(official.points) == 50 and official.scope == "global" and not official.adaptive
    assert float(1 - official.points[25]) == pytest.approx(0.604, abs=1e-3)
    assert DLC().path == LearningConfidence().path, "equal specs share one observation"
    assert not DLC(points=[0, 0.1]).path.adaptive
