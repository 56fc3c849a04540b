"""Whole heads and channels: their importance, how many stay, and how they leave the model in training."""

import copy

import pytest
import torch
from lora_nets import HEAD, HEADS, KV_HEADS, WIDTH, backward, batch, lora, lora_net, net, trained, tune
from torch import nn

from serpette.weights import PruneConfig, attach, find_groups, prune, sequential, shrink
from serpette.weights.layers import pruned_layers
from serpette.weights.structured import Units


def units_of(model, round_to=1, scope="layer"):
    layers = {layer.name: layer for layer in pruned_layers(model)}
    return Units(model, find_groups(model), layers, round_to, scope)


def naive_sums(importances):
    """Of unit k of each group, by a loop over all its weights."""
    share, sums = HEADS // KV_HEADS, {}
    for b in range(2):
        at = f"blocks.{b}.self_attn."
        q, k, v, o = (importances[f"{at}{n}_proj"] for n in "qkvo")
        heads = []
        for unit in range(KV_HEADS):
            total = 0.0
            for i in range(unit * share * HEAD, (unit + 1) * share * HEAD):
                total += sum(float(w) for w in q[i]) + sum(float(w) for w in o[:, i])
            for i in range(unit * HEAD, (unit + 1) * HEAD):
                total += sum(float(w) for w in k[i]) + sum(float(w) for w in v[i])
            heads.append(total)
        fc1, fc2 = (importances[f"blocks.{b}.mlp.fc{n}"] for n in (1, 2))
        channels = [float(sum(fc1[i])) + float(sum(fc2[:, i])) for i in range(2 * WIDTH)]
        sums |= {f"blocks.{b}.self_attn.heads": heads, f"blocks.{b}.mlp.channels": channels}
    return sums


def test_importance_of_a_unit_is_the_sum_over_its_weights():
    model = net()
    importances = {layer.name: torch.rand(layer.shape, dtype=torch.float64) for layer in pruned_layers(model)}
    found, wanted = units_of(model).sums(importances), naive_sums(importances)
    assert set(found) == set(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, torch.tensor(wanted[name], dtype=torch.float64))


def test_only_members_with_an_importance_count():
    units = units_of(net())
    ones = {n: torch.ones(layer.shape) for n, layer in units.layers.items()}
    some = {n: v for n, v in ones.items() if n.endswith(("q_proj", "fc2"))}
    sums = units.sums(some)
    assert sums["blocks.0.self_attn.heads"].tolist() == [HEADS // KV_HEADS * HEAD * WIDTH] * KV_HEADS
    assert sums["blocks.1.mlp.channels"].tolist() == [WIDTH] * 2 * WIDTH
    with pytest.raises(ValueError, match="no layer of 'blocks.1.mlp.channels' has the gradients"):
        units.sums({n: v for n, v in ones.items() if n != "blocks.1.mlp.fc1" and n != "blocks.1.mlp.fc2"})


@pytest.mark.parametrize("sparsity, round_to, left", [
    (0.5, 8, 16), (0.4, 8, 24), (0.5, 3, 18), (0.9, 8, 8), (0.9, 1, 3), (0.99, 8, 8), (0.5, 64, 32),
    (0, 8, 32),
])  # fmt: skip
def test_widths_are_uniform_and_rounded_up(sparsity, round_to, left):
    units = units_of(net(), round_to)
    sums = {g.name: torch.rand(g.units, dtype=torch.float64) for g in units.groups}
    assert units.choose(sums, sparsity) == (left < 32 or sparsity >= 0.25)
    for group in units.groups:
        cut = units.cut[group.name]
        if group.kind == "channels":
            assert int((~cut).sum()) == left
        else:
            assert int((~cut).sum()) == (1 if sparsity >= 0.25 else 2)  # one KV head at least
        assert not cut.any() or sums[group.name][cut].max() < sums[group.name][~cut].min()


def test_of_equal_units_the_first_go_and_what_is_cut_stays_cut():
    units = units_of(net())
    name = "blocks.0.mlp.channels"
    sums = {g.name: torch.ones(g.units, dtype=torch.float64) for g in units.groups}
    assert units.choose(sums, 0.25)
    assert units.cut[name].nonzero()[:, 0].tolist() == list(range(8))
    sums[name][:8] = 100
    assert units.choose(sums, 0.5)
    assert units.cut[name].nonzero()[:, 0].tolist() == list(range(16))
    assert not units.choose(sums, 0.5) and not units.choose(sums, 0.1)


def test_global_scope_ranks_the_groups_of_a_kind_together():
    units = units_of(net(), scope="global")
    sums = {g.name: torch.arange(g.units, dtype=torch.float64) + (100 if ".1." in g.name else 0)
            for g in units.groups}  # fmt: skip
    units.choose(sums, 0.5)
    left = {name: int((~cut).sum()) for name, cut in units.cut.items()}
    assert left["blocks.0.mlp.channels"] == 1 and left["blocks.1.mlp.channels"] == 32  # one stays in each
    assert left["blocks.0.self_attn.heads"] == 1 and left["blocks.1.self_attn.heads"] == 2


@pytest.mark.parametrize("make", [net, lora_net, lambda: lora_net(targets=["q_proj", "fc2"]),
                                  lambda: sequential(lora_net())])  # fmt: skip
def test_masks_are_whole_heads_and_channels_and_the_merged_model_has_them(make):
    model = make()
    kind = "magnitude" if not hasattr(model, "peft_config") else "original_gradient"
    pruner, _ = tune(model, PruneConfig(kind, 0.5, pattern="structured"))
    wanted = model(**batch()).logits
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    for b in range(2):
        keep = {n: pruner.masks_[f"blocks.{b}.self_attn.{n}_proj"] for n in "qkvo"}
        heads = keep["k"].view(KV_HEADS, HEAD, WIDTH)[:, 0, 0]
        assert int(heads.sum()) == 1
        assert torch.equal(keep["k"], heads.repeat_interleave(HEAD)[:, None].expand(-1, WIDTH))
        assert torch.equal(keep["v"], keep["k"])
        assert torch.equal(keep["q"], heads.repeat_interleave(2 * HEAD)[:, None].expand(-1, WIDTH))
        assert torch.equal(keep["o"], keep["q"].T)
        fc1, fc2 = (pruner.masks_[f"blocks.{b}.mlp.fc{n}"] for n in (1, 2))
        assert torch.equal(fc1, fc2.T) and int(fc1[:, 0].sum()) == WIDTH and bool((fc1 == fc1[:, :1]).all())
    for name, keep in pruner.masks_.items():
        assert torch.equal(merged.get_submodule(name).weight != 0, keep)
    small = shrink(merged, pruner.masks_)
    torch.testing.assert_close(small(**batch()).logits, wanted)
    block = small.blocks[0]
    assert block.mlp.fc1.out_features == WIDTH and block.self_attn.q_proj.out_features == 2 * HEAD


def test_convolution_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 2, 5, 5)
    pruner = prune(model, "magnitude", 0.5, pattern="structured", round_to=1, example_inputs=x)
    keep = pruner.masks_
    channels = keep["0"].all(1)
    assert int(channels.sum()) == 4
    assert torch.equal(keep["2"][keep["2"].any(1)][0], channels.repeat_interleave(4))  # 2 x 2 of each channel
    assert all(torch.equal(model[int(n)].weight.flatten(1) != 0, m) for n, m in keep.items())
    small = shrink(model, keep, round_to=1, example_inputs=x)
    assert small[0].out_channels == 4 and torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "plain"])
@pytest.mark.parametrize("optimizer", ["AdamW", "momentum"])
def test_shrinking_in_training_follows_masking(kind, optimizer):
    """The same losses and the same model, though units leave the layers, the optimizer and the averages."""
    found = []
    for away in (False, True):
        model = net() if kind == "plain" else lora_net()
        importance = {"lora": "lora_prune", "plain": "taylor"}[kind]
        config = PruneConfig(importance, 0.5, pattern="structured", shrink=away, round_to=4)
        made = (
            torch.optim.AdamW(trained(model), lr=1e-2)
            if optimizer == "AdamW"
            else torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)
        )
        pruner, losses = tune(model, config, optimizer=made)
        assert all(p.shape == v.shape for p, s in made.state.items() for v in s.values()
                   if torch.is_tensor(v) and v.numel() > 1)  # fmt: skip
        held = {id(p) for group in made.param_groups for p in group["params"]}
        assert held == {id(p) for p in trained(model)}
        found.append((pruner, losses, model))
    (masked, slow, one), (shrunk, fast, two) = found
    assert slow[-1] < slow[0]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(slow), rtol=0, atol=1e-5)
    assert masked.history_ == shrunk.history_ and masked.sparsity_ == shrunk.sparsity_
    assert all(torch.equal(m, shrunk.masks_[n]) for n, m in masked.masks_.items())
    torch.testing.assert_close(two(**batch()).logits, one(**batch()).logits, rtol=1e-5, atol=1e-5)
    small = two.merge_and_unload() if kind != "plain" else two
    assert small.blocks[1].mlp.fc2.weight.shape == (WIDTH, WIDTH)
    assert small.blocks[1].self_attn.k_proj.weight.shape == (HEAD, WIDTH)
    torch.testing.assert_close(small(**batch()).logits, one(**batch()).logits, rtol=1e-5, atol=1e-5)


def test_shrinking_while_the_last_loss_is_held():
    """Whoever logs the loss holds its graph, whose ends know the shape that a parameter had."""
    model = lora_net()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    config = PruneConfig("lora_prune", 0.5, pattern="structured", shrink=True)
    pruner, held = attach(model, config, 20, optimizer), []
    for _ in range(20):
        held.append(model(**batch()).loss)
        held[-1].backward()
        pruner.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    assert held[-1] < held[0] and pruner.masks_["blocks.0.mlp.fc1"].float().mean() == 0.5


def test_a_step_that_the_optimizer_leaves_out_shrinks_at_the_next():
    model = lora_net()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    config = PruneConfig("lora_prune", 0.5, pattern="structured", shrink=True, round_to=1)
    pruner = attach(model, config, 20, optimizer)
    for step in range(1, 21):
        backward(model, batch())
        pruner.step(optimizer)
        if step not in (3, 4, 5, 9):
            optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    assert model.base_model.model.blocks[0].mlp.fc1.base_layer.out_features == WIDTH
    assert not optimizer._optimizer_step_post_hooks
    backward(model, batch())


def test_shrinking_refused():
    config = PruneConfig("original_gradient", 0.5, pattern="structured", shrink=True)
    with pytest.raises(ValueError, match="shrink=True needs the optimizer"):
        attach(lora_net(), config, 20)
    model = sequential(lora_net())
    with pytest.raises(ValueError, match="shrink=True needs a parallel LoRA"):
        attach(model, config, 20, torch.optim.SGD(trained(model)))


def test_the_pruned_units_of_a_lora_have_no_gradient():
    model = lora_net(trained=True)
    pruner = prune(model, "original_gradient", 0.5, pattern="structured", loader=[batch()], progress=False)
    model(**batch()).loss.backward()
    layer = model.base_model.model.blocks[0].mlp
    gone = ~pruner.masks_["blocks.0.mlp.fc1"][:, 0]
    assert not layer.fc1.lora_B["default"].weight.grad[gone].any()
    assert not layer.fc2.lora_A["default"].weight.grad[:, gone].any()
    assert layer.fc1.lora_B["default"].weight.grad[~gone].any()


def test_a_copy_made_in_training_stands_alone():
    model = lora_net()
    tune(model, PruneConfig("lora_prune", 0.5, pattern="structured"))
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)
    assert isinstance(lora(model.merge_and_unload()), nn.Module)
