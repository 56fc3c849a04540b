import pytest
import torch
from families import CNN, FAMILIES, SMALL_IMAGES, cnn
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, SwinConfig, SwinModel

from serpette.weights.groups import find_groups

UNITS = {"llama": 2, "mistral": 2, "qwen2": 2}  # KV heads; 4 heads elsewhere
CHANNELS = {"dinov2": 96, "dinov2 swiglu": 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_heads_and_channels(family):
    groups = find_groups(FAMILIES[family]())
    assert sorted((g.kind, g.units) for g in groups) == sorted(
        2 * [("heads", UNITS.get(family, 4)), ("channels", CHANNELS.get(family, 64))]
    )
    assert len({g.name for g in groups}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_units_share_out_each_side_of_each_member(family):
    model = FAMILIES[family]()
    for group in find_groups(model):
        for module, side, index in group.members:
            size = model.get_submodule(module).weight.shape[0 if side == "rows" else 1]
            assert index.shape[0] == group.units
            assert torch.equal(index.flatten().sort().values, torch.arange(size))


def test_a_kv_head_takes_its_query_heads_along():
    heads = find_groups(FAMILIES["llama"](), "attention")[0]
    rows = {module.rpartition(".")[2]: index[1].tolist() for module, _, index in heads.members}
    assert rows["k_proj"] == rows["v_proj"] == list(range(8, 16))  # 2 KV heads of width 8
    assert rows["q_proj"] == rows["o_proj"] == list(range(16, 32))  # 2 query heads each


@pytest.mark.parametrize("family", ["llama", "vit", "dinov2", "bert"])
def test_lora_layers_are_seen_through(family):
    model = FAMILIES[family]()
    plain = find_groups(model)
    targets = sorted({m.module.rpartition(".")[2] for g in plain for m in g.members})
    lora = find_groups(get_peft_model(model, LoraConfig(r=2, target_modules=targets)))
    prefix = "base_model.model."
    assert [g.name for g in lora] == [prefix + g.name for g in plain]
    assert [m.module for g in lora for m in g.members] == [
        prefix + m.module for g in plain for m in g.members
    ]


def test_targets():
    model = FAMILIES["bert"]()
    kinds = {t: {g.kind for g in find_groups(model, t)} for t in ("attention", "ffn", "both")}
    assert kinds == {"attention": {"heads"}, "ffn": {"channels"}, "both": {"heads", "channels"}}
    with pytest.raises(ValueError, match="targets='mlp'"):
        find_groups(model, "mlp")


def test_fused_projections_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=16))
    with pytest.raises(ValueError, match="GPT-2's c_attn.*example_inputs"):
        find_groups(model)


def test_an_attention_with_a_bias_for_each_head_is_left_out():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    assert {g.kind for g in find_groups(SwinModel(config))} == {"channels"}


def test_layers_with_weights_between_them_are_no_ffn():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    with pytest.raises(ValueError, match="has no heads or channels"):
        find_groups(Normed())


def test_traced_cnn():
    model = cnn()
    found = {g.owner: g for g in find_groups(model, "ffn", SMALL_IMAGES)}
    assert {name: g.units for name, g in found.items()} == {
        "stem": 12,
        "blocks.0.expand": 24,
        "blocks.0.gate.reduce": 4,
        "blocks.1.expand": 16,
        "blocks.1.gate.reduce": 4,
        "head": 10,
    }
    inner = {(m.module.removeprefix("blocks.0."), m.side) for m in found["blocks.0.expand"].members}
    writers = ("expand", "bn1", "depthwise", "bn2", "gate.expand")
    assert inner == {
        *((name, "rows") for name in writers),
        ("gate.reduce", "columns"),
        ("project", "columns"),
    }
    assert {m.module for m in found["stem"].members} == {
        "stem", "bn", "head", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("project", "bn3", "expand"))
    }  # fmt: skip
    assert found["head"].members[-1].index[1].tolist() == list(range(16, 32))  # 4x4 pixels of channel 1


def test_tracing_leaves_the_model_as_it_was():
    model = CNN().train()
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, example_inputs=SMALL_IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model.stem.weight.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


class Mixed(nn.Module):
    """Only `a -> b` is free: the others meet a norm, a softmax, the input or the output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)
        self.c, self.norm, self.d = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8)
        self.e, self.f = nn.Linear(8, 6), nn.Linear(6, 8)
        self.g, self.h = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.b(self.a(x).relu()) + self.d(self.norm(self.c(x))) + self.f(self.e(x).softmax(-1))
        return self.h(self.g(y) + x), y


def test_only_what_can_be_cut_like_it_is_masked_is_found():
    groups = find_groups(Mixed(), example_inputs=torch.randn(3, 8))
    assert [g.owner for g in groups] == ["a"]


def test_a_model_that_does_not_run_on_the_example():
    with pytest.raises(ValueError, match="CNN cannot be traced"):
        find_groups(CNN(), example_inputs=torch.zeros(1, 5))
