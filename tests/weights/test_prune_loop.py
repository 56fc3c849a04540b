"""A plain loop: what is scored, averaged and cut, and the traps of mixed precision."""

import pytest
import torch
from lora_nets import backward, batch, lora_net, net, trained, tune
from torch import nn

from serpette.importance import OriginalGradient
from serpette.weights import PruneConfig, Pruner, attach, sequential
from serpette.weights.patterns import lowest
from serpette.weights.schedules import sparsity_at

NAME = "blocks.0.mlp.fc1"


def test_the_documented_loop_and_merge():
    model = lora_net()
    pruner, losses = tune(model, PruneConfig("lora_prune", 0.5))
    assert losses[-1] < losses[0] and set(pruner.sparsity_.values()) == {0.5}
    wanted = model(**batch()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    for name, keep in pruner.masks_.items():
        assert torch.equal(merged.get_submodule(name).weight != 0, keep)


def test_the_disabled_adapter_leaves_the_pruned_base():
    model, plain = lora_net(), net()
    pruner, _ = tune(model, PruneConfig("lora_prune", 0.5))
    with torch.no_grad():
        for name, keep in pruner.masks_.items():
            plain.get_submodule(name).weight.masked_fill_(~keep, 0)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits)
    assert not torch.allclose(model(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize("importance", ["lora_prune", "original_gradient", "taylor"])
def test_the_average_is_the_one_that_is_written(importance):
    """J_bar = 0.9 J_bar + 0.1 J with each step's own gradients, before the optimizer moves the weights."""
    model, wanted = lora_net(trained=True), 0
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    pruner = attach(model, PruneConfig(importance, 0.5, mask_grad="exact", start=0.5), 20, optimizer)
    layer = pruner._layers[NAME]
    for _ in range(9):
        backward(model, batch())
        W = layer.weight()
        if importance == "lora_prune":
            A, B = layer.masked.factors()
            gA, gB = (getattr(layer.module, f)["default"].weight.grad for f in ("lora_A", "lora_B"))
            J = (layer.masked.scale * (gB @ A + B @ gA - gB @ gA) * W) ** 2
        else:
            J = layer.masked.gradient.double() * W
            J = J.abs() if importance == "taylor" else J**2
        wanted = 0.9 * wanted + 0.1 * J.detach()
        pruner.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(pruner._averages[NAME].double(), wanted, rtol=1e-4, atol=1e-12)
    pruner.step_ = 14
    pruner.finish()
    backward(model, batch())


def test_the_lowest_of_the_average_go():
    seen = {}

    def look(step, pruner):
        seen[step] = {n: v.clone() for n, v in pruner._averages.items()}

    pruner, _ = tune(lora_net(), PruneConfig("lora_prune", 0.5, end=0.5), each=look)
    first = {n: seen[3][n] for n in pruner.masks_}  # the average at the first cut, and what that cut
    for name, value in first.items():
        k = int(sparsity_at(3, 20, 0.5, end=0.5) * value.numel() + 0.5)
        assert not pruner.masks_[name][lowest([value], k)[0]].any() and k > 0


def test_original_gradient_is_that_of_the_dense_merged_weight():
    """By autograd through the merged weight, and by finite differences of the loss."""
    model, plain = lora_net(trained=True), net()
    pruner = attach(model, PruneConfig(OriginalGradient(), 0.5), 20)
    backward(model, batch())
    layer = pruner._layers[NAME]
    G = layer.stats({"gradient"}).gradient.double()
    with torch.no_grad():
        for name, other in pruner._layers.items():
            plain.get_submodule(name).weight.copy_(other.weight())
    weight = plain.get_submodule(NAME).weight
    plain(**batch()).loss.backward()
    torch.testing.assert_close(G, weight.grad, rtol=1e-5, atol=1e-9)
    for i, j in ((0, 0), (5, 7), (31, 15)):
        with torch.no_grad():
            losses = []
            for change in (1e-5, -2e-5):
                weight[i, j] += change
                losses.append(plain(**batch()).loss)
            weight[i, j] += 1e-5
        assert float(losses[0] - losses[1]) / 2e-5 == pytest.approx(float(G[i, j]), rel=1e-4, abs=1e-8)
    pruner.step_ = 14
    pruner.finish()


@pytest.mark.parametrize("pattern", ["unstructured", "structured"])
def test_the_averages_go_with_the_last_cut(pattern):
    held = {}

    def look(step, pruner):
        held[step] = len(pruner._averages)

    model = lora_net()
    pruner, _ = tune(model, PruneConfig("original_gradient", 0.5, pattern=pattern), each=look)
    assert held[13] > 0 and held[14] == held[20] == 0
    assert all(m.gradient is None and not m.collect for m in model.modules() if hasattr(m, "lora_A"))
    assert all(not layer._hooks and not layer.state for layer in pruner.layers)


def test_gradients_are_kept_only_in_steps_that_score():
    seen = {}

    def look(step, pruner):
        seen[step] = pruner._layers[NAME].collecting

    tune(lora_net(), PruneConfig("original_gradient", 0.5, every_k=5), each=look)
    assert {step for step, next_one in seen.items() if next_one} == {4, 9, 13}


@pytest.mark.parametrize("importance", ["movement", "soft_movement", "pst"])
@pytest.mark.parametrize("pattern", ["unstructured", "structured"])
def test_importances_that_learn(importance, pattern):
    model = lora_net()
    pruner, losses = tune(model, PruneConfig(importance, 0.5, pattern=pattern, schedule="linear"))
    assert losses[-1] < losses[0]
    if importance != "soft_movement" or pattern == "structured":
        assert all(v == 0.5 or pattern == "structured" for v in pruner.sparsity_.values())
        assert max(pruner.sparsity_.values()) >= 0.5


def test_movement_adds_up_the_gradients():
    """-sum of G * W over the steps, here without a cut."""
    model = lora_net(trained=True)
    sums, pruner = 0, attach(model, PruneConfig("movement", 0.0, end=0.0), 5)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(5):
        backward(model, batch())
        layer = pruner._layers[NAME]
        sums = sums - layer.masked.gradient * layer.weight()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(pruner._layers[NAME].state["movement"], sums.detach())
    pruner.finish()


def run_scaled(scaled, importance, clip=False, spoil=(), pass_optimizer=True, cut=True):
    """Averages after six steps in float32, with a loss scale of 2^12 or without one."""
    model = lora_net(torch.float32, trained=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    pruner = attach(model, PruneConfig(importance, 0.5 if cut else 0.0), 20, optimizer)
    for step in range(1, 7):
        optimizer.zero_grad()
        scaler.scale(model(**batch(dtype=torch.float32)).loss).backward()
        if step in spoil:
            trained(model)[0].grad[0] = torch.inf
            pruner._layers[NAME].masked.gradient = torch.full((32, 16), torch.nan)
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained(model), 1.0)
        pruner.step(optimizer if pass_optimizer else None, scaler)
        scaler.step(optimizer)
        scaler.update()
    pruner.step_ = 14
    return pruner, {n: v.clone() for n, v in pruner._averages.items()}, pruner.masks_


@pytest.mark.parametrize("importance", ["lora_prune", "original_gradient"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("pass_optimizer", [True, False])
def test_a_loss_scale_changes_no_score(importance, clip, pass_optimizer):
    """Unscaled, the term gB gA would be 4096 times too large in G."""
    _, plain, masks = run_scaled(False, importance, clip)
    _, scaled, others = run_scaled(True, importance, clip, pass_optimizer=pass_optimizer)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-3, atol=1e-12)
        assert torch.equal(masks[name], others[name])


@pytest.mark.parametrize("importance", ["lora_prune", "original_gradient"])
def test_a_step_that_is_not_finite_is_left_out(importance):
    pruner, averages, masks = run_scaled(True, importance, spoil=(2, 4))
    assert pruner.skipped_ == 2
    assert all(v.isfinite().all() for v in averages.values())
    assert all(0 < float((~m).double().mean()) < 0.5 for m in masks.values())


def test_no_finite_step_at_all():
    model = lora_net()
    pruner = attach(model, PruneConfig("lora_prune", 0.5), 20)
    with pytest.raises(ValueError, match="no step had finite gradients.*lower the learning rate"):
        for _ in range(14):
            for p in trained(model):
                p.grad = torch.full_like(p, torch.nan)
            pruner.step()


@pytest.mark.parametrize("optimizer", ["AdamW", "momentum"])
def test_a_plain_model_keeps_its_zeros_under_any_optimizer(optimizer):
    model = net()
    made = (
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        if optimizer == "AdamW"
        else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    before, outputs = [], []

    def look(step, pruner):
        before.append(pruner.masks_)
        if step == 15:
            made.step()  # momentum of what is cut
            outputs.append(model(**batch()).logits)
            with torch.no_grad():
                for name, keep in pruner.masks_.items():
                    assert torch.equal(model.get_submodule(name).weight != 0, keep)

    pruner, losses = tune(model, PruneConfig("magnitude", 0.5), optimizer=made, each=look)
    assert losses[-1] < losses[0]
    for name, keep in pruner.masks_.items():
        assert torch.equal(model.get_submodule(name).weight != 0, keep)
        masks = [earlier[name] for earlier in before]
        assert all(bool((b <= a).all()) for a, b in zip(masks, masks[1:], strict=False))  # none comes back
    backward(model, batch())
    made.step()  # the hooks are gone
    assert any((model.get_submodule(n).weight[~keep] != 0).any() for n, keep in pruner.masks_.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_magnitude_with_lora_ranks_the_sum():
    model = lora_net(trained=True)
    pruner = attach(model, PruneConfig("magnitude", 0.5, schedule="one_shot"), 20)
    weight = pruner._layers[NAME].weight()
    for _ in range(14):
        pruner.step()
    pruner.finish()
    assert torch.equal(~pruner.masks_[NAME], lowest([weight.abs()], weight.numel() // 2)[0])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_go_by_the_lower_index(scope):
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    pruner = attach(model, PruneConfig("magnitude", 0.3, schedule="one_shot", scope=scope), 20)
    for _ in range(14):
        pruner.step()
    cut = [~m.flatten() for m in pruner.finish().masks_.values()]
    for flat in [torch.cat(cut)] if scope == "global" else cut:
        k = int(flat.sum())
        assert k == int(0.3 * len(flat) + 0.5) and bool(flat[:k].all())


def test_two_four_leaves_two_of_each_four():
    pruner, _ = tune(lora_net(), PruneConfig("lora_prune", 0.5, pattern="2:4"))
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in pruner.masks_.values())


def test_random_is_the_same_again():
    masks = [tune(lora_net(), PruneConfig("random", 0.5, seed=s))[0].masks_[NAME] for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_sequential_structured_and_global_scope_end_to_end():
    model = sequential(lora_net())
    pruner, losses = tune(model, PruneConfig("lora_prune_seq", 0.5, pattern="structured", scope="global"))
    wanted = model(**batch()).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, wanted)
    assert losses[-1] < losses[0] and len(pruner.history_) == 12


def test_a_pruner_serves_a_second_training():
    pruner = Pruner("lora_prune", 0.5)
    found = []
    for _ in range(2):
        model = lora_net()
        found.append((tune(model, pruner)[1], pruner.masks_, pruner.history_, pruner.skipped_))
    assert found[0][0] == found[1][0] and found[0][2:] == found[1][2:]
    assert all(torch.equal(m, found[1][1][n]) for n, m in found[0][1].items())
