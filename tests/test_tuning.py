"""What each method trains: counts by hand, nothing inside attention where that is frozen, refusals."""

import copy

import pytest
import torch
from torch import nn

from serpette.data.features import find_head
from serpette.tuning import rank, trainable
from serpette.zoo import tiny


@pytest.fixture(scope="module")
def vit():
    return tiny("vit")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model):
    return sum(p.numel() for p in trained(model).values())


def tuned(vit, method, **options):
    model = copy.deepcopy(vit)
    return trainable(model, find_head(model), method, **options)


def shapes(vit, attention=True):
    """(outputs, inputs) of each Linear beside the head."""
    head = find_head(vit)
    return [
        (m.out_features, m.in_features)
        for name, m in vit.named_modules()
        if isinstance(m, nn.Linear) and m is not head and (attention or "attention" not in name)
    ]


def head_size(vit):
    return sum(p.numel() for p in find_head(vit).parameters())


def test_each_method_trains_what_it_says(vit):
    linears, head = shapes(vit), head_size(vit)
    low_rank = sum(2 * (o + i) for o, i in linears)
    assert count(tuned(vit, "full")) == sum(p.numel() for p in vit.parameters())
    assert count(tuned(vit, "head")) == head
    assert count(tuned(vit, "lora", rank=2)) == head + low_rank
    assert count(tuned(vit, "dora", rank=2)) == head + low_rank + sum(o for o, _ in linears)
    assert count(tuned(vit, "shira", rank=2)) == head + low_rank
    assert count(tuned(vit, "rows", rank=3)) == head + sum(3 * i for _, i in linears)
    share = tuned(vit, "rows", rank=3, fraction=0.25)
    assert count(share) == head + sum(max(1, round(0.25 * o)) * i for o, i in linears)
    columns = tuned(vit, "rows", rank=3, modes="columns")
    assert count(columns) == head + sum(3 * o for o, _ in linears)


@pytest.mark.parametrize("method", ["lora", "dora", "shira", "rows"])
def test_attention_can_stay_frozen(vit, method):
    model = tuned(vit, method, rank=2, freeze_attention=True)
    assert not [name for name in trained(model) if "attention" in name]
    others = shapes(vit, attention=False)
    assert 0 < len(others) < len(shapes(vit))
    size = {"rows": sum(2 * i for _, i in others), "dora": sum(3 * o + 2 * i for o, i in others)}
    assert count(model) == head_size(vit) + size.get(method, sum(2 * (o + i) for o, i in others))


def test_an_adapter_changes_nothing_before_it_is_trained(vit):
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = vit.eval()(pixel_values=x).logits
        for method in ("lora", "dora", "rows"):
            after = tuned(vit, method, rank=2).eval()(pixel_values=x).logits
            assert torch.allclose(before, after, atol=1e-5), method


def test_rows_are_ranked_by_the_examples(vit):
    labels = torch.arange(12) % 3
    pixels = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def collate(picks):
        return {"pixel_values": pixels[picks], "labels": labels[picks]}

    def indices(model):
        return {n: b.tolist() for n, b in model.named_buffers() if "rows_index" in n}

    model = tuned(vit, "rows", rank=3)
    by_magnitude = indices(model)
    rank(model, 12, collate, "taylor", batch_size=5, progress=False)
    by_taylor = indices(model)
    assert by_taylor.keys() == by_magnitude.keys() and by_taylor != by_magnitude
    assert all(len(rows) == 3 for rows in by_taylor.values())
    other = tuned(vit, "rows", rank=3)
    rank(other, 12, collate, "taylor", batch_size=12, progress=False)
    assert indices(other) == by_taylor, "the size of a batch changes no rank"
    spread = tuned(vit, "rows", rank=3)
    rank(spread, 12, collate, "taylor", "global", progress=False)
    assert len({len(rows) for rows in indices(spread).values()}) > 1


def test_refusals(vit):
    with pytest.raises(ValueError, match="method='head' needs a model with a head"):
        trainable(nn.ReLU(), None, "head")
    with pytest.raises(ValueError, match="finds no Linear layer .* 'rows' with target_modules='all-layers'"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        trainable(net, net[2], "lora")
    for method in ("lora", "rows"):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with pytest.raises(ValueError, match="has attention in its name"):
            trainable(net, net[1], method, rank=1, freeze_attention=True)
    with pytest.raises(ValueError, match="r=1000 is more than"):
        tuned(vit, "rows", rank=1000)
