"""A greedy scorer given by name stops in time, and the subset stays the same."""

import inspect

import pytest
import torch
from contract import make_signals
from torch import nn
from torch.utils.data import TensorDataset

from serpette import DataPruner, Probe
from serpette.data.bounds import bounded
from serpette.scorers import registry

GREEDY = sorted(n for n, cls in registry.items() if "picks" in inspect.signature(cls).parameters)


def blobs(n=150):
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(n) % 5 - 2).clamp(min=0)  # 3 classes of 90, 30 and 30
    return TensorDataset(3 * torch.eye(4)[y] + torch.randn(n, 4, generator=g), y)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {c: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, c)) for c in (1, 3)}


def test_the_greedy_ones_are_known():
    assert {"herding", "k_center", "contextual_diversity", "craig", "glister", "graph_cut"} <= set(GREEDY)
    assert [n for n in GREEDY if getattr(registry[n], "turns_within_class", False)] == [
        "craig",
        "grad_match",
        "herding",
    ]


@pytest.mark.parametrize("per_class", [None, True, "equal", False])
@pytest.mark.parametrize("name", GREEDY)
def test_the_same_ids_with_and_without(models, name, per_class):
    options = {"select": "top_hard", "keep": 0.2, "per_class": per_class, "progress": False}
    options["proxy"] = Probe(epochs=2, seeds=1)
    by_name = DataPruner(name, **options).fit(models[3], blobs())
    by_object = DataPruner(registry[name](), **options).fit(models[3], blobs())  # never bounded
    assert by_name.ids_.tolist() == by_object.ids_.tolist()


@pytest.mark.parametrize("name", ["herding", "k_center"])
def test_a_regression(models, name):
    x, y = blobs().tensors
    data = TensorDataset(x, x[:, 0] + y)
    options = {"select": "top_hard", "keep": 0.2, "progress": False}
    by_name = DataPruner(name, **options).fit(models[1], data)
    by_object = DataPruner(registry[name](), **options).fit(models[1], data)
    assert by_name.ids_.tolist() == by_object.ids_.tolist()
    assert by_name.result_.methods[name].picks == 30


@pytest.mark.parametrize(
    ("name", "per_class", "picks"),
    [
        ("herding", None, 5),
        ("herding", "equal", 5),
        ("craig", True, 5),
        ("herding", False, 13),
        ("k_center", False, 13),
        ("k_center", True, None),  # the first of a class may come at any turn
        ("graph_cut", None, None),
    ],
)
def test_how_many_picks(name, per_class, picks):
    scorer = bounded(name, "top_hard", 13, per_class)  # 13 over 3 classes: 5, 4, 4
    assert isinstance(scorer, registry[name]) and scorer.name == name
    scorer(make_signals(n=24))
    assert scorer.picks == picks


def test_what_is_not_bounded():
    herding = registry["herding"]()
    assert bounded(herding, "top_hard", 5, True) is herding
    assert bounded("herding", "flex_rand", 5, True) == "herding"  # it reads every score
    assert bounded("el2n", "top_hard", 5, True) == "el2n"
