"""LoRA before the layer, against the parallel LoRA with B_eff = W0 B."""

import copy
import warnings

import pytest
import torch
from lora_nets import ALL, batch, lora, lora_net, net, tune
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from serpette.weights import PruneConfig, sequential, to_parallel
from serpette.weights.layers import PrunedLayer


def trained_pair():
    """A sequential model with B that is not zero, and stock peft's parallel one that should equal it."""
    model, other = sequential(lora_net()), lora_net()
    modules = dict(other.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert B.shape == (module.base_layer.in_features, 3) and not B.any()
            nn.init.normal_(B, std=0.1)
            modules[name].lora_A["default"].weight.data.copy_(A)
            modules[name].lora_B["default"].weight.data.copy_(module.base_layer.weight @ B)
    return model, other


def pairs(model, other):
    modules = dict(other.named_modules())
    return [(m, modules[name]) for name, m in model.named_modules() if hasattr(m, "lora_A")]


def test_outputs_and_gradients_equal_the_parallel_ones():
    model, other = trained_pair()
    for m in (model, other):
        m(**batch()).loss.backward()
    torch.testing.assert_close(model(**batch()).logits, other(**batch()).logits)
    for mine, peft in pairs(model, other):
        gA, gB = (getattr(mine, f)["default"].weight.grad for f in ("lora_A", "lora_B"))
        torch.testing.assert_close(gA, peft.lora_A["default"].weight.grad)
        torch.testing.assert_close(gB, mine.base_layer.weight.T @ peft.lora_B["default"].weight.grad)
        assert gB.any()


@pytest.mark.parametrize("mask_grad", ["exact", "ste"])
def test_masked_gradients_equal_the_parallel_ones(mask_grad):
    model, other = trained_pair()
    for mine, peft in pairs(model, other):
        W0 = mine.base_layer.weight.detach().clone()
        cut = torch.rand(W0.shape) < 0.4
        for module in (mine, peft):
            PrunedLayer("", module, mask_grad).remove(cut)
        assert torch.equal(mine.base_layer.weight, W0)  # W0 B needs W0 as it was
    for m in (model, other):
        m(**batch()).loss.backward()
    for mine, peft in pairs(model, other):
        torch.testing.assert_close(mine.lora_A["default"].weight.grad, peft.lora_A["default"].weight.grad)
        wanted = mine.base_layer.weight.T @ peft.lora_B["default"].weight.grad
        torch.testing.assert_close(mine.lora_B["default"].weight.grad, wanted)


def test_merge_has_the_zeros_and_the_outputs():
    model, _ = trained_pair()
    cuts = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer = PrunedLayer(name, module)
            cuts[layer.name] = torch.rand(layer.shape) < 0.5
            layer.remove(cuts[layer.name])
    wanted = model(**batch()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    for name, cut in cuts.items():
        assert torch.equal(merged.get_submodule(name).weight == 0, cut)


def test_conv1d():
    torch.manual_seed(0)
    base = Conv1D(6, 10).double()
    nn.init.normal_(base.weight)
    plain = base.weight.detach().clone()
    model = sequential(lora(nn.Sequential(base), targets=["0"], fan_in_fan_out=True).double())
    module = model.base_model.model[0]
    B = nn.init.normal_(module.lora_B["default"].weight)
    x = torch.randn(4, 10, dtype=torch.float64)
    A, s = module.lora_A["default"].weight, module.scaling["default"]
    wanted = (x + s * x @ A.T @ B.T) @ plain + base.bias
    torch.testing.assert_close(module(x), wanted)
    torch.testing.assert_close(model.merge_and_unload()[0](x), wanted)


def test_to_parallel_is_loaded_by_stock_peft(tmp_path):
    model, _ = trained_pair()
    wanted = model(**batch()).logits
    torch.testing.assert_close(to_parallel(model)(**batch()).logits, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base model has no configuration
        model.save_pretrained(tmp_path)
    from peft import PeftModel

    stock = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(stock(**batch()).logits, wanted)


def test_a_pruned_one_as_parallel_has_the_same_zeros():
    model = sequential(lora_net())
    pruner, losses = tune(model, PruneConfig("lora_prune_seq", 0.5))
    assert losses[-1] < losses[0]
    wanted = model(**batch()).logits
    parallel = to_parallel(copy.deepcopy(model))
    torch.testing.assert_close(parallel(**batch()).logits, wanted)
    for one in (model, parallel):
        merged = one.merge_and_unload()
        torch.testing.assert_close(merged(**batch()).logits, wanted)
        for name, keep in pruner.masks_.items():
            assert torch.equal(merged.get_submodule(name).weight == 0, ~keep)
    assert set(pruner.sparsity_.values()) == {0.5}


def test_a_merged_one_cannot_be_unmerged():
    model, _ = trained_pair()
    before = model(**batch()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch()).logits, before)
    with pytest.raises(ValueError, match="cannot be unmerged; merge a copy"):
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: lora_net(trained=True), "has been trained"),
        (lambda: lora_net(lora_dropout=0.1), r"lora_dropout=0.1 of .*must be 0"),
        (lambda: net(), "no LoRA layer"),
        (
            lambda: get_peft_model(nn.Sequential(nn.Conv2d(2, 2, 3)), LoraConfig(r=2, target_modules=["0"])),
            "is a convolution",
        ),
    ],
)
def test_refused(make, error):
    with pytest.raises(ValueError, match=error):
        sequential(make())


def test_a_parallel_one_has_nothing_to_turn():
    with pytest.raises(ValueError, match="no sequential LoRA"):
        to_parallel(lora_net(targets=ALL))


@pytest.mark.parametrize("importance, turned, other", [
    ("lora_prune", True, "lora_prune_seq"), ("lora_prune_seq", False, "lora_prune"),
])  # fmt: skip
def test_the_importance_of_the_other_kind_is_refused(importance, turned, other):
    model = sequential(lora_net()) if turned else lora_net()
    with pytest.raises(ValueError, match=f"use '{other}'"):
        tune(model, PruneConfig(importance, 0.5))
