"""Pruning at once: every importance with every pattern, and what it needs."""

import pytest
import torch
from lora_nets import batch, lora_net, net, state
from torch import nn
from torch.nn.functional import mse_loss, unfold
from transformers.pytorch_utils import Conv1D

from serpette.importance import weights
from serpette.weights import find_groups, prune, sequential
from serpette.weights.patterns import count_of

NAME = "blocks.0.mlp.fc1"
FREE = ["magnitude", "random"]
PATTERNS = {"unstructured": {}, "2:4": {}, "structured": {}, "global": {"scope": "global"}}


def data(count=3):
    return [batch(6, seed=i) for i in range(count)]


@pytest.mark.parametrize("importance", sorted(set(weights) - {"obs"}))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_importance_with_every_pattern(importance, pattern):
    if importance == "lora_prune_seq":
        model = sequential(lora_net())
    else:
        model = lora_net() if importance == "lora_prune" else net()
    if importance == "soft_movement" and pattern != "structured":
        return  # its threshold finds a sparsity of its own
    kind = "unstructured" if pattern == "global" else pattern
    loader = None if importance in FREE else data()
    pruner = prune(
        model, importance, 0.5, pattern=kind, loader=loader, progress=False, round_to=1, **PATTERNS[pattern]
    )
    masks = pruner.masks_
    if pattern == "structured":
        assert all(int(masks[f"blocks.{b}.mlp.fc1"].any(1).sum()) == 16 for b in (0, 1))
    elif pattern == "2:4":
        assert all((m.view(-1, 4).sum(1) == 2).all() for m in masks.values())
    elif pattern == "global":
        assert sum(int(m.sum()) for m in masks.values()) * 2 == sum(m.numel() for m in masks.values())
    else:
        assert set(pruner.sparsity_.values()) == {0.5}
    wanted = model(**batch()).logits
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    for name, keep in masks.items():
        assert not merged.get_submodule(name).weight[~keep].any()
    assert len(masks) == 12 and len(find_groups(merged)) == 4


def test_the_mean_over_the_batches_is_ranked():
    model = net()
    G, weight = [], model.get_submodule(NAME).weight
    for one in data():
        model.zero_grad()
        model(**one).loss.backward()
        G.append((weight.grad * weight.detach()).abs())
    model.zero_grad()
    value = torch.stack(G).mean(0)
    keep = prune(model, "taylor", 0.3, loader=data(), progress=False).masks_[NAME]
    assert value[~keep].max() < value[keep].min() and int((~keep).sum()) == count_of(0.3, value.numel())
    assert weight.grad is None


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_asked_of_the_pruned_layers_alone(frozen):
    model = net()
    model.requires_grad_(not frozen)
    prune(model, "original_gradient", 0.5, loader=data(), exclude=["fc2"], progress=False)
    assert all(p.requires_grad != frozen and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_wanda_takes_as_many_of_each_row():
    model, seen = net(), []
    handle = model.get_submodule(NAME).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    weight = model.get_submodule(NAME).weight.detach().clone()
    for one in data():
        model(**one)
    handle.remove()
    pruner = prune(model, "wanda", 0.45, loader=data(), progress=False)
    value = weight.abs() * torch.cat(seen).norm(dim=0)
    cut = ~pruner.masks_[NAME]
    total = count_of(0.45, 512)
    each, more = divmod(total, 32)
    assert cut.sum(1).tolist() == [each + 1] * more + [each] * (32 - more)
    for row, gone in zip(value, cut, strict=True):
        assert row[gone].max() < row[~gone].min()


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, (2, 3), dilation=(2, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("importance", ["obs", "wanda", "magnitude"])
def test_a_convolution(importance, pattern):
    torch.manual_seed(0)
    model = ConvNet()
    images = torch.randn(16, 2, 12, 12)
    wanted = model(images).detach()
    exclude = ["one"] if pattern == "2:4" else []  # 18 inputs
    loader = [(images[:8],), (images[8:],)]
    pruner = prune(model, importance, 0.5, pattern=pattern, loader=loader, exclude=exclude, progress=False)
    assert pruner.sparsity_ == {"one": 0.5, "two": 0.5} if not exclude else {"two": 0.5}
    for name, keep in pruner.masks_.items():
        flat = model.get_submodule(name).weight.flatten(1)
        assert torch.equal(flat != 0, keep)
        if pattern == "2:4":
            assert (keep.view(-1, 4).sum(1) == 2).all()
    assert mse_loss(model(images), wanted) < wanted.var()


def test_obs_errs_less_than_magnitude_and_moves_what_stays():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    mix = torch.randn(3, 3)
    images = torch.einsum("ij,njhw->nihw", mix, torch.randn(8, 3, 10, 10))
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(800, 2))
    X = unfold(images, 3, padding=1).mT.reshape(-1, 27)
    dense = conv.weight.detach().clone().flatten(1)
    errors = {}
    for name in ("magnitude", "obs"):
        with torch.no_grad():
            conv.weight.copy_(dense.view_as(conv.weight))
        keep = prune(model, name, 0.5, loader=[(images,)], progress=False).masks_["0"]
        errors[name] = mse_loss(X @ conv.weight.flatten(1).T, X @ dense.T).item()
        moved = (conv.weight.flatten(1) != dense)[keep].any()
        assert bool(moved) == (name == "obs")
    assert errors["obs"] < 0.9 * errors["magnitude"]


def test_lora_is_pruned_as_it_will_be_merged():
    model = lora_net(trained=True)
    before = {n: m for n, m in state(model).items() if "lora" in n}
    pruner = prune(model, "original_gradient", 0.5, loader=data(), progress=False)
    assert all(torch.equal(v, state(model)[n]) for n, v in before.items())
    wanted = model(**batch()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    assert all(torch.equal(merged.get_submodule(n).weight != 0, k) for n, k in pruner.masks_.items())


def test_a_loss_of_ones_own():
    calls = []

    def loss(model, one):
        calls.append(one)
        return model(one).logits.square().sum()

    prune(net(), "taylor", 0.5, loader=[one["x"] for one in data(2)], loss=loss, progress=False)
    assert len(calls) == 2


class NoLoss(nn.Sequential):
    pass


def no_loss():
    return NoLoss(nn.Linear(16, 4), nn.Linear(4, 4))


ALONE = "'obs' prunes single weights layer by layer"


@pytest.mark.parametrize(
    "make, importance, settings, error",
    [
        (net, "taylor", {}, "importance 'taylor' needs data; give loader="),
        (net, "obs", {}, "importance 'obs' needs data; give loader="),
        (net, "wanda", {"loader": []}, "loader has no batch"),
        (net, "obs", {"loader": []}, "loader has no batch"),
        (no_loss, "taylor", {"loader": [(torch.ones(2, 16),)]}, r"NoLoss gives no .loss"),
        (net, "obs", {"loader": "data", "pattern": "structured"}, ALONE),
        (net, "obs", {"loader": "data", "scope": "global"}, ALONE),
        (lora_net, "obs", {"loader": "data"}, "'obs' moves the weights that stay; merge the LoRA first"),
        (net, "lora_prune", {"loader": "data"}, "'lora_prune' needs LoRA"),
        (net, "magnitude", {"sparsity": 1.5}, "sparsity=1.5 must be"),
        (net, "qm_taylor", {}, "does not rank single weights"),
    ],
)
def test_refused(make, importance, settings, error):
    if settings.get("loader") == "data":
        settings = settings | {"loader": data()}
    with pytest.raises(ValueError, match=error):
        prune(make(), importance, progress=False, **settings)


def test_a_failed_pruning_leaves_the_model_as_it_was():
    model = net()
    before = state(model)

    def broken(model, one):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        prune(model, "taylor", 0.5, loader=data(), loss=broken, progress=False)
    assert all(torch.equal(v, before[n]) for n, v in state(model).items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "taylor", "obs"])
def test_conv1d_has_its_inputs_first(importance):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 12), nn.ReLU(), nn.Linear(8, 2))
    nn.init.normal_(model[0].weight)
    loader = [(torch.randn(40, 12),)]
    norms = loader[0][0].norm(dim=0)
    dense = model[0].weight.detach().clone().t()
    pruner = prune(
        model, importance, 0.5, loader=loader, loss=lambda m, one: m(*one).square().sum(), progress=False
    )
    keep = pruner.masks_["0"]
    assert keep.shape == (8, 12) and torch.equal(model[0].weight.t() != 0, keep)
    if importance == "wanda":
        value = dense.abs() * norms
        assert all(v[k].min() > v[~k].max() for v, k in zip(value, keep, strict=True))
