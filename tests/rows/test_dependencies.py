import copy
import sys

import pytest
import torch
from torch import nn

from serpette.rows.dependencies import Group, Member, chosen, group_scores, groups
from serpette.zoo.tiny_models import make

pytest.importorskip("torch_pruning", reason="the extra 'prune' is not installed")

IMAGES = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
TOKENS = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}


def inputs_of(kind):
    return TOKENS if kind in ("llama", "bert") else IMAGES


def ends(group):
    return {(m.module, m.side) for m in group.members}


def with_member(found, module, side):
    (group,) = [g for g in found if (module, side) in ends(g)]
    return group


def index_of(group, module):
    (member,) = [m for m in group.members if m.module == module]
    return member.index


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(4, 4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2),
    ).eval()  # fmt: skip


def efficientnet():
    from serpette.zoo.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

    stages = [(1, 3, 1, 1, 8), (2, 3, 2, 6, 12)]
    config = EfficientNetLiteConfig(stages=stages, stem_channels=8, hidden_size=20, num_labels=3)
    return EfficientNetLiteForImageClassification(config).eval()


def test_a_sequential_by_hand():
    found = groups(conv_net(), torch.zeros(1, 3, 8, 8))
    rows = {(str(i), "rows") for i in (0, 1, 3, 4)}
    assert [ends(g) for g in found] == [
        rows | {("8", "columns")},
        {("8", "rows"), ("10", "columns")},
        {("10", "rows")},
    ]
    assert index_of(found[0], "3").tolist() == [[0], [1], [2], [3]]
    assert index_of(found[0], "8").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_vit():
    model = make("vit")
    found = groups(model, IMAGES)
    mlp = with_member(found, "vit.layers.1.mlp.fc1", "rows")
    assert ends(mlp) == {("vit.layers.1.mlp.fc1", "rows"), ("vit.layers.1.mlp.fc2", "columns")}
    assert all(torch.equal(m.index, torch.arange(64)[:, None]) for m in mlp.members)
    at = "vit.layers.0.attention."
    expected = {
        (at + "q_proj", "rows"),
        (at + "k_proj", "rows"),
        (at + "v_proj", "rows"),
        (at + "o_proj", "columns"),
    }
    assert ends(with_member(found, at + "q_proj", "rows")) == expected
    assert len(found) == 5 and len(groups(model, IMAGES, residual=True)) == 6


def test_dinov2_whose_head_reads_the_stream_twice():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=32, patch_size=8))
    stream = with_member(groups(model, IMAGES, residual=True), "classifier", "columns")
    assert index_of(stream, "classifier").tolist() == [[i, i + 32] for i in range(32)]


def test_bert_with_its_pooler():
    found = groups(make("bert"), TOKENS)
    at = "bert.encoder.layer.0.attention."
    expected = {(at + f"self.{x}", "rows") for x in ("query", "key", "value")} | {
        (at + "output.dense", "columns")
    }
    assert ends(with_member(found, at + "self.key", "rows")) == expected
    assert ends(with_member(found, "bert.pooler.dense", "rows")) == {
        ("bert.pooler.dense", "rows"), ("classifier", "columns")}  # fmt: skip
    stream = with_member(
        groups(make("bert"), TOKENS, residual=True), "bert.embeddings.word_embeddings", "columns"
    )
    assert ("bert.encoder.layer.1.output.LayerNorm", "rows") in ends(stream)
    assert ("bert.encoder.layer.1.attention.self.value", "columns") in ends(stream)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grouped_kv_heads(heads, implementation):
    model = make("llama")  # 4 heads of 8, 2 KV heads
    model.set_attn_implementation(implementation)
    found = groups(model, TOKENS, heads=heads)
    mlp = with_member(found, "model.layers.0.mlp.up_proj", "rows")
    at = "model.layers.0."
    assert ends(mlp) == {
        (at + "mlp.up_proj", "rows"),
        (at + "mlp.gate_proj", "rows"),
        (at + "mlp.down_proj", "columns"),
    }
    attention = with_member(found, at + "self_attn.k_proj", "rows")
    assert len(attention.members) == 4
    for j in range(16):
        h, c = divmod(j, 8)
        queries = [16 * h + c, 16 * h + 8 + c]  # the two query heads of KV head h
        for name, expected in (("q", queries), ("o", queries), ("k", [j]), ("v", [j])):
            owned = index_of(attention, f"{at}self_attn.{name}_proj")[h if heads else j].tolist()
            assert (set(expected) <= set(owned)) if heads else (owned == expected)
    shape = (2, 16) if heads else (16, 2)
    assert index_of(attention, at + "self_attn.q_proj").shape == shape
    assert index_of(attention, at + "self_attn.q_proj").unique().numel() == 32


def test_resnet_with_residuals():
    model = make("resnet")
    at = "resnet.encoder.stages.0.layers.0.layer."
    found = groups(model, IMAGES)
    inner = with_member(found, at + "0.convolution", "rows")
    rows = {(at + "0.convolution", "rows"), (at + "0.normalization", "rows")}
    assert ends(inner) == rows | {(at + "1.convolution", "columns")}
    stream = ("resnet.embedder.embedder.convolution", "rows")
    assert not any(stream in ends(g) for g in found)
    residual = ends(with_member(groups(model, IMAGES, residual=True), *stream))
    assert {(at + "1.convolution", "rows"), (at + "1.normalization", "rows")} <= residual


def test_depthwise_convolutions():
    found = groups(efficientnet(), IMAGES)
    at = "backbone.blocks.2."
    names = ("expand.conv", "expand.norm", "depthwise.conv", "depthwise.norm")
    expected = {(at + name, "rows") for name in names} | {(at + "project.conv", "columns")}
    assert ends(with_member(found, at + "depthwise.conv", "rows")) == expected


def without(model, group, k):
    """A copy from which the channels of neuron k are cut out."""
    model = copy.deepcopy(model)
    for m in group.members:
        layer = model.get_submodule(m.module)
        n = layer.weight.shape[m.side == "columns"]
        kept = torch.tensor([c for c in range(n) if c not in m.index[k].tolist()])
        if m.side == "columns":
            layer.weight = nn.Parameter(layer.weight.data[:, kept])
            continue
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).data = getattr(layer, name).data[kept]
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.groups = len(kept)
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_channels = len(kept)
    return model


def zeroed(model, group, k):
    model = copy.deepcopy(model)
    for m in group.members:
        layer = model.get_submodule(m.module)
        layer.weight.data.index_fill_(int(m.side == "columns"), m.index[k], 0)
        if m.side == "rows" and layer.bias is not None:
            layer.bias.data[m.index[k]] = 0
    return model


@pytest.mark.parametrize("kind", ["sequential", "vit", "bert", "llama", "resnet", "efficientnet"])
def test_zeroing_a_neuron_is_removing_it(kind):
    made = {"sequential": conv_net, "efficientnet": efficientnet}
    model = made[kind]() if kind in made else make(kind)
    for p in model.parameters():  # mostly positive: no dead ReLU
        nn.init.uniform_(p, 0.5, 1) if p.dim() == 1 else nn.init.uniform_(p, -0.2, 0.4)
    x = {"input": torch.randn(1, 3, 8, 8)} if kind == "sequential" else inputs_of(kind)
    found = groups(model, x, heads=True, residual=kind in ("resnet", "efficientnet"))
    tested = 0
    with torch.no_grad():
        before = model(**x)
        for group in found:
            if len(group.members) == 1:
                continue  # the head
            a, b = (out if kind == "sequential" else out.logits
                    for out in (zeroed(model, group, 1)(**x), without(model, group, 1)(**x)))  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            tested += 1
            assert not torch.allclose(a, before if kind == "sequential" else before.logits, atol=1e-5)
    assert tested >= 2


@pytest.mark.parametrize("works", [True, False])
def test_the_model_is_left_as_it_was(works):
    model = make("llama").train()
    model.model.embed_tokens.eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    state = (
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [(m, m.training) for m in model.modules()],
    )
    with torch.no_grad():
        if works:
            groups(model, TOKENS)
        else:
            with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be traced .* or rank without"):
                groups(model, {"input_ids": TOKENS["input_ids"] + 1000})
    assert state == (
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [(m, m.training) for m in model.modules()],
    )
    assert not any(m._forward_hooks for m in model.modules())


def test_peft_layers_go_by_their_outer_names():
    from peft import LoraConfig, get_peft_model

    plain = [(m.module, m.side) for g in groups(make("llama"), TOKENS) for m in g.members]
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(make("llama"), config)
    modules = list(model.modules())
    found = groups(model, TOKENS)
    assert [(m.module, m.side) for g in found for m in g.members] == [
        (f"base_model.model.{n}", s) for n, s in plain
    ]
    assert list(model.modules()) == modules


def test_only_the_modules_that_count():
    found = groups(
        make("llama"), TOKENS, modules={"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    )
    assert [ends(g) for g in found] == [
        {("model.layers.0.mlp.up_proj", "rows"), ("model.layers.0.mlp.down_proj", "columns")}
    ]


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT) @ v)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(4, 4), nn.Parameter(torch.eye(4))

    def forward(self, x):
        return self.inner(x) @ self.weight


def test_what_cannot_be_traced_is_said():
    with pytest.raises(
        ValueError, match=r"different numbers \(qkv rows 12, out columns 4; expected 12\), as fused"
    ):
        groups(Fused(), torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="'weight' multiplies as a weight"):
        groups(Bare(), torch.randn(1, 4))


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r"pip install 'serpette\[prune\]'"):
        groups(nn.Linear(2, 2), torch.zeros(1, 2))


def test_scores_are_summed_over_members_and_channels():
    group = Group([
        Member("q", "rows", torch.tensor([[0, 2], [1, 3]])),
        Member("k", "rows", torch.tensor([[0], [1]])),
        Member("norm", "rows", torch.tensor([[0], [1]])),
    ])  # fmt: skip
    scores = {("q", "rows"): torch.tensor([1.0, 2, 4, 8]), ("k", "rows"): torch.tensor([16.0, 32]),
              ("k", "columns"): torch.full((2,), 99.0)}  # fmt: skip
    (total,) = group_scores([group], scores)
    assert total.tolist() == [21, 42]
    picked = chosen([group], [torch.tensor([1, 0])])
    assert {key: index.tolist() for key, index in picked.items()} == {
        ("q", "rows"): [0, 1, 2, 3], ("k", "rows"): [0, 1], ("norm", "rows"): [0, 1]}  # fmt: skip
    assert chosen([group], [torch.tensor([1])])["q", "rows"].tolist() == [1, 3]
