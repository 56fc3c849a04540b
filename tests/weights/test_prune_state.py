"""What a Pruner writes, and what is read from it again."""

import warnings

import pytest
import torch
from lora_nets import batch, lora_net, net, state, trained, tune
from peft import PeftModel
from safetensors import safe_open

from serpette.weights import PruneConfig, attach, prune, restore, sequential
from serpette.weights.state import NAME, read


def half_way(config, make=lora_net):
    """A Pruner, its model and optimizer after 9 of 20 steps."""
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    pruner = attach(model, config, 20, optimizer)
    return pruner, model, optimizer


def go_on(pruner, model, optimizer, steps):
    for _ in range(steps):
        model(**batch()).loss.backward()
        pruner.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()


CASES = {
    "lora_prune": {},
    "lora_prune structured": {"pattern": "structured"},
    "lora_prune 2:4, cv": {"pattern": "2:4", "mask_grad": "cv"},
    "original_gradient global": {"scope": "global", "mask_grad": "exact"},
    "movement": {},
    "soft_movement": {},
    "pst": {},
    "pst structured": {"pattern": "structured"},
    "wanda": {},
    "magnitude": {},
    "random": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [1, 9])
def test_goes_on_with_the_same_bits(case, at, tmp_path):
    config = PruneConfig(case.split()[0], 0.5, **CASES[case])
    one, model, optimizer = half_way(config)
    go_on(one, model, optimizer, at)
    path = one.save(tmp_path)
    held, moments = state(model), optimizer.state_dict()
    other, again, fresh = half_way(config)
    adapter = {n: v for n, v in held.items() if "lora_" in n}  # as an adapter's file: W0 comes from elsewhere
    again.load_state_dict(adapter, strict=False)
    fresh.load_state_dict(torch.load(save(moments, tmp_path), weights_only=True))
    other.load(tmp_path)
    assert path.name == NAME and other.step_ == at
    assert all(torch.equal(v, held[n]) for n, v in state(again).items())
    assert all(torch.equal(m, one.masks_[n]) for n, m in other.masks_.items())
    assert set(one._averages) == set(other._averages)
    assert all(torch.equal(v, other._averages[n]) for n, v in one._averages.items())
    for a, b, c in ((one, model, optimizer), (other, again, fresh)):
        go_on(a, b, c, 20 - at)
        a.finish()
    assert one.history_ == other.history_ and len(one.history_) > 5
    assert all(torch.equal(m, one.masks_[n]) for n, m in other.masks_.items())
    found = state(again)
    assert all(torch.equal(v, found[n]) for n, v in state(model).items())


def save(moments, folder):
    torch.save(moments, folder / "optimizer.pt")
    return folder / "optimizer.pt"


@pytest.mark.parametrize(
    "change, error",
    [
        ({"sparsity": 0.6}, r"sparsity: 0.5 -> 0.6\); resume with the same"),
        ({"scope": "global"}, "scope: 'layer' -> 'global'"),
        ({"importance": "original_gradient"}, "importance: 'lora_prune' -> 'original_gradient'"),
        ({"exclude": ["fc1"]}, r"exclude: \[\] -> \['fc1'\]"),
        ({"average": 0.8, "seed": 3}, "average: 0.9 -> 0.8, seed: 0 -> 3"),
    ],
)
def test_another_configuration_is_refused(change, error, tmp_path):
    pruner, model, optimizer = half_way(PruneConfig("lora_prune", 0.5))
    go_on(pruner, model, optimizer, 3)
    pruner.save(tmp_path)
    other, *_ = half_way(PruneConfig(**{"importance": "lora_prune", "sparsity": 0.5} | change))
    with pytest.raises(ValueError, match=error):
        other.load(tmp_path)


def test_options_of_the_importance_count(tmp_path):
    from serpette.importance import LoraPrune

    half_way(PruneConfig(LoraPrune(), 0.5))[0].save(tmp_path)
    with pytest.raises(ValueError, match="cross"):
        half_way(PruneConfig(LoraPrune(cross=False), 0.5))[0].load(tmp_path)


def test_another_model_a_missing_and_a_damaged_file(tmp_path):
    pruner, *_ = half_way(PruneConfig("lora_prune", 0.5))
    with pytest.raises(ValueError, match="holds no pruning_state.safetensors.*name the folder"):
        pruner.load(tmp_path)
    path = pruner.save(tmp_path)
    with pytest.raises(ValueError, match="masks of other layers than the model"):
        half_way(PruneConfig("lora_prune", 0.5), lambda: lora_net(targets=["fc1"]))[0].load(tmp_path)
    with pytest.raises(ValueError, match="has a mask of 'blocks.0.self_attn.q_proj', which Linear does not"):
        restore(torch.nn.Linear(2, 2), tmp_path)
    wide = net()
    wide.blocks[1].mlp.fc2 = torch.nn.Linear(8, 16)
    with pytest.raises(ValueError, match=r"'blocks.1.mlp.fc2' has shape \(16, 32\), its weight \(16, 8\)"):
        restore(wide, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged .*resume from an earlier checkpoint"):
        pruner.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]  # no part of a file is left


def test_masks_take_a_bit_each(tmp_path):
    pruner, _ = tune(lora_net(), PruneConfig("lora_prune", 0.5))
    with safe_open(pruner.save(tmp_path), "pt") as file:
        size = sum(file.get_tensor(k).numel() * file.get_tensor(k).element_size() for k in file.keys())  # noqa: SIM118
    assert size == sum(m.numel() for m in pruner.masks_.values()) / 8
    cuts, tensors, facts = read(tmp_path)
    assert all(torch.equal(~pruner.masks_[n], c) for n, c in cuts.items()) and not tensors
    assert facts["step"] == 20


@pytest.mark.parametrize("kind", ["parallel", "structured", "sequential"])
def test_adapter_and_masks_come_back(kind, tmp_path):
    def make():
        return sequential(lora_net()) if kind == "sequential" else lora_net()

    model = make()
    importance = "lora_prune_seq" if kind == "sequential" else "lora_prune"
    pattern = "structured" if kind == "structured" else "unstructured"
    pruner, _ = tune(model, PruneConfig(importance, 0.5, pattern=pattern))
    wanted = model(**batch()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base model has no configuration
        model.save_pretrained(tmp_path)
    pruner.save(tmp_path)
    if kind == "sequential":
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        again = make()
        set_peft_model_state_dict(again, load_peft_weights(tmp_path))
    else:
        again = PeftModel.from_pretrained(net(), tmp_path)
    assert not torch.allclose(again(**batch()).logits, wanted)
    torch.testing.assert_close(restore(again, tmp_path)(**batch()).logits, wanted)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, wanted)
    for name, keep in pruner.masks_.items():
        assert torch.equal(merged.get_submodule(name).weight != 0, keep)


def test_restored_to_a_merged_or_plain_model(tmp_path):
    model = net()
    pruner = prune(model, "magnitude", 0.5)
    pruner.save(tmp_path)
    fresh = restore(net(), tmp_path)
    assert all(torch.equal(v, state(model)[n]) for n, v in state(fresh).items())
