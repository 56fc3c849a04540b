import math
import re

import numpy as np
import pytest
import torch

from serpette.importance import LoraPrune, QMTaylor, Random, Taylor, Wanda, neurons, registry, weights
from serpette.types import Importance, NeuronStats

FIELDS = ("contribution", "elementwise", "input_norms")


def make_stats(n=6, f=4, classes=3, labelled=True, seed=0) -> NeuronStats:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, f, generator=g)
    return NeuronStats(
        weight=lambda: weight,
        ids=np.array([f"layer.{i}" for i in range(n)]),
        contribution=torch.randn(classes if labelled else 1, n, generator=g, dtype=torch.float64),
        counts=torch.arange(1, classes + 1) if labelled else torch.tensor([classes]),
        labelled=labelled,
        elementwise=torch.rand(n, generator=g, dtype=torch.float64),
        input_norms=torch.rand(f, generator=g, dtype=torch.float64),
    )


def test_every_importance_is_found():
    both = {"magnitude", "taylor", "random", "wanda"}
    assert set(neurons) >= both | {"taylor_elementwise", "qm_taylor"}
    of_weights = both | {"lora_prune", "lora_prune_seq", "original_gradient", "movement", "soft_movement"}
    assert set(weights) >= of_weights | {"pst", "obs"}
    assert set(registry) == {*neurons, *weights} and both <= {*neurons} & {*weights}


@pytest.mark.parametrize("name", sorted(neurons))
def test_contract(name):
    """One finite number a neuron, from what it declares alone, whatever the neuron's place."""
    method, stats = registry[name](), make_stats()
    assert isinstance(method, Importance) and method.name == name
    assert isinstance(method.needs, frozenset) and method.needs <= {*FIELDS, "labels"}
    before = (
        [getattr(stats, field).clone() for field in FIELDS],
        stats.weight().clone(),
        torch.get_rng_state(),
    )
    scores = method(stats)
    assert scores.shape == (len(stats),) and scores.is_floating_point() and bool(scores.isfinite().all())
    assert all(torch.equal(a, getattr(stats, field)) for a, field in zip(before[0], FIELDS, strict=True))
    assert torch.equal(before[1], stats.weight()) and torch.equal(before[2], torch.get_rng_state())
    assert torch.equal(scores, method(stats))

    rows = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = make_stats()
    moved.weight, moved.ids = lambda: stats.weight()[rows], stats.ids[rows.numpy()]
    moved.contribution, moved.elementwise = stats.contribution[:, rows], stats.elementwise[rows]
    torch.testing.assert_close(method(moved), scores[rows])

    bare = make_stats()
    for field in set(FIELDS) - method.needs:
        setattr(bare, field, None)
    assert torch.equal(method(bare), scores)
    for need in method.needs - {"labels"}:
        setattr(bare, need, None)
        with pytest.raises(ValueError, match=rf"importance '{name}' needs '{need}'.*rank_rows"):
            method(bare)
    if "labels" in method.needs:
        with pytest.raises(ValueError, match=rf"importance '{name}' needs class labels"):
            method(make_stats(labelled=False))


@pytest.mark.parametrize("name", sorted(registry))
def test_documentation(name):
    cls = registry[name]
    text = f"{__import__('sys').modules[cls.__module__].__doc__}\n{cls.__doc__}"
    assert "high = more important" in text and "Differs" in text
    assert re.search(r"\b(19|20)\d\d\b", text), "name the paper and its year"


def test_magnitude_and_random():
    stats = make_stats()
    expected = [math.sqrt(sum(float(w) ** 2 for w in row)) for row in stats.weight()]
    torch.testing.assert_close(registry["magnitude"]()(stats), torch.tensor(expected))
    assert not torch.equal(Random(seed=1)(stats), Random()(stats))
    assert float(Random()(make_stats(n=4000)).mean()) == pytest.approx(0.5, abs=0.02)


def test_taylor_by_class_and_over_all():
    stats = make_stats()
    c = stats.contribution.tolist()
    by_class = [sum(abs(c[t][i]) for t in range(3)) / 3 for i in range(6)]
    over_all = [abs(1 * c[0][i] + 2 * c[1][i] + 3 * c[2][i]) / 6 for i in range(6)]
    double = {"dtype": torch.float64}
    torch.testing.assert_close(Taylor()(stats), torch.tensor(by_class, **double))
    torch.testing.assert_close(Taylor(per_class=True)(stats), torch.tensor(by_class, **double))
    torch.testing.assert_close(Taylor(per_class=False)(stats), torch.tensor(over_all, **double))
    plain = make_stats(labelled=False)
    assert torch.equal(Taylor()(plain), plain.contribution[0].abs())
    with pytest.raises(ValueError, match="'taylor' needs class labels"):
        Taylor(per_class=True)(plain)
    assert "labels" in Taylor(per_class=True).needs and "labels" not in Taylor().needs


def test_classes_without_examples():
    stats, fewer = make_stats(), make_stats()
    stats.counts = torch.tensor([4, 0, 0])
    stats.contribution[1:] = 0
    fewer.contribution, fewer.counts = stats.contribution[:1], stats.counts[:1]
    assert torch.equal(Taylor()(stats), Taylor()(fewer))
    with pytest.raises(ValueError, match=r"2 of 3 have none: 1, 2;.*missing='ignore'"):
        QMTaylor()(stats)
    assert torch.equal(QMTaylor(missing="ignore")(stats), QMTaylor()(fewer))
    with pytest.raises(ValueError, match="missing='skip'"):
        QMTaylor(missing="skip")


def test_qm_taylor_against_numpy_and_in_pieces(monkeypatch):
    stats = make_stats(n=50, classes=7)
    eta = stats.contribution.abs().numpy()
    expected = np.mean([np.quantile(eta, k / 10, axis=0) for k in range(11)], axis=0)
    torch.testing.assert_close(QMTaylor()(stats), torch.from_numpy(expected))
    monkeypatch.setattr("serpette.importance.qm_taylor.AT_ONCE", 30)
    torch.testing.assert_close(QMTaylor()(stats), torch.from_numpy(expected))


@pytest.mark.parametrize("classes, same", [(2, True), (3, False), (9, False), (10, True), (11, True)])
def test_qm_taylor_is_the_mean_over_two_ten_or_eleven_classes(classes, same):
    stats = make_stats(n=8, classes=classes)
    assert torch.allclose(QMTaylor()(stats), Taylor()(stats), rtol=1e-13, atol=0) == same


def test_wanda_with_norms_for_all_or_for_each_neuron():
    stats = make_stats()
    expected = [
        sum(abs(float(w)) * float(x) for w, x in zip(row, stats.input_norms, strict=True))
        for row in stats.weight()
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(Wanda()(stats), expected)
    stats.input_norms = stats.input_norms.expand(6, 4)
    torch.testing.assert_close(Wanda()(stats), expected)


def test_unknown_name():
    for methods in (registry, neurons, weights):
        with pytest.raises(ValueError, match="unknown importance 'tailor'; did you mean 'taylor'"):
            methods["tailor"]


def test_an_importance_of_the_other_kind_is_refused():
    for method in ("lora_prune", LoraPrune()):
        with pytest.raises(ValueError, match="'lora_prune' does not rank neurons; those that do: magn"):
            neurons.make(method)
    for method in ("qm_taylor", QMTaylor()):
        with pytest.raises(
            ValueError, match="'qm_taylor' does not rank single weights; those that do: lora_prune, "
        ):
            weights.make(method)
    assert isinstance(neurons.make(Taylor()), Taylor) and isinstance(weights.make("taylor"), Taylor)
