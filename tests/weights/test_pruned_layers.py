"""Which layers are pruned, and which are refused."""

import pytest
import torch
from lora_nets import ALL, batch, lora, lora_net, net, tune
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import unfold

from serpette.weights import PruneConfig, attach, prune
from serpette.weights.layers import PrunedLayer, pruned_layers
from serpette.weights.masked import MaskedLora


def names(model, *args, **kwargs):
    return [layer.name for layer in pruned_layers(model, *args, **kwargs)]


def wanted(*parts, blocks=(0, 1)):
    inside = {"fc1": "mlp", "fc2": "mlp"}
    return [f"blocks.{b}.{inside.get(p, 'self_attn')}.{p}" for b in blocks for p in parts]


ORDER = ["q_proj", "o_proj", "k_proj", "v_proj", "fc1", "fc2"]


@pytest.mark.parametrize("make", [net, lora_net])
def test_targets_and_exclude(make):
    assert names(make()) == wanted(*ORDER)
    assert names(make(), "attention") == wanted(*ORDER[:4])
    assert names(make(), "ffn") == wanted("fc1", "fc2")
    assert names(make(), "ffn", ["fc1"]) == wanted("fc2")
    left = wanted("q_proj", "o_proj", "k_proj", "fc1", "fc2", blocks=(1,))
    assert names(make(), "both", ["blocks.0.*", "*v_proj"]) == left


def test_only_layers_with_lora_where_there_is_any():
    assert names(lora_net(targets=["v_proj", "fc2"])) == wanted("v_proj", "fc2")


def test_the_head_of_a_language_model_stays():
    from serpette.zoo import tiny

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head", "up_proj"]))
    assert names(model) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert not any("lm_head" in name or "embed" in name for name in names(tiny("llama")))


def test_the_head_of_a_classifier_stays_also_with_lora():
    everywhere = lora_net(targets="all-linear")
    assert hasattr(everywhere.base_model.model.head, "lora_A")
    assert names(everywhere) == wanted(*ORDER)
    assert names(lora_net(targets=["head"])) == ["head"]  # it alone was asked for


def test_the_last_linear_layer_of_a_model_without_blocks_stays():
    assert names(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 4), nn.Linear(4, 2), nn.ReLU())) == ["0", "1"]


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"exclude": ["fc3"]}, "exclude='fc3' matches no layer that is pruned; they are blocks.0.self_attn"),
        ({"exclude": ["*"]}, r"targets='both' and exclude=\['\*'\] leave no layer of \w+ to prune"),
        ({"targets": "attention", "exclude": ["self_attn"]}, "leave no layer"),
    ],
)
@pytest.mark.parametrize("make", [net, lora_net])
def test_nothing_left(make, settings, error):
    with pytest.raises(ValueError, match=error):
        pruned_layers(make(), **settings)
    with pytest.raises(ValueError, match=error):
        attach(make(), PruneConfig("magnitude", **settings), 20)


def second_adapter():
    model = lora_net()
    model.add_adapter("other", LoraConfig(r=2, target_modules=ALL))
    model.base_model.set_adapter(["default", "other"])
    return model


def frozen():
    model = lora_net()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def merged():
    model = lora_net()
    model.merge_adapter()
    return model


def tied(model):
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    base = [getattr(b.mlp.fc1, "base_layer", b.mlp.fc1) for b in inner.blocks]
    base[1].weight = base[0].weight
    return model


def conv(**how):
    return lora(nn.Sequential(nn.Conv2d(4, 4, 3, **how), nn.Linear(4, 2)), targets=["0"])


REFUSED = {
    "dropout": (
        lambda: lora_net(lora_dropout=0.1),
        r"lora_dropout=0.1 of 'blocks.0.self_attn.q_proj' must be 0",
    ),
    "DoRA": (lambda: lora_net(use_dora=True), "blocks.0.self_attn.q_proj' is a LoRA variant .*[Dd]o[Rr][Aa]"),
    "two adapters": (second_adapter, "has 2 active adapters; activate one"),
    "frozen": (frozen, r"are frozen \(12 of 12 layers\)"),
    "merged": (merged, "is merged or disabled"),
    "tied": (lambda: tied(lora_net()), r"mlp.fc1' shares its weight with 'blocks.1.mlp.fc1'.*exclude=\["),
    "tied, plain": (lambda: tied(net()), r"mlp.fc1' shares its weight with 'blocks.1.mlp.fc1'"),
    "LoRA's bias": (lambda: lora_net(lora_bias=True), "has a bias"),
    "same padding": (lambda: conv(padding="same"), "the convolution '0' has padding='same'"),
    "reflected": (lambda: conv(padding=1, padding_mode="reflect"), "'0'.* padding_mode='reflect'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    make, error = REFUSED[kind]
    with pytest.raises(ValueError, match=error):
        attach(make(), PruneConfig("magnitude"), 20)


def test_tied_layers_that_are_left_alone_are_fine():
    model = tied(lora_net())
    assert wanted("fc1")[0] not in names(model, exclude=["fc1"])


@pytest.mark.parametrize("pattern", ["unstructured", "structured"])
def test_a_model_that_is_pruned_already(pattern):
    model = lora_net()
    tune(model, PruneConfig("lora_prune", 0.5, pattern=pattern))
    with pytest.raises(ValueError, match="is pruned already; merge first"):
        attach(model, PruneConfig("lora_prune"), 20)
    again = lora(model.merge_and_unload())  # what it says helps
    attach(again.double(), PruneConfig("lora_prune"), 20)


def test_a_pattern_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match="layer '0' has 10 inputs, which 4 does not divide"):
        attach(nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2)), PruneConfig("magnitude", pattern="2:4"), 20)
    model = lora(nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2)), targets=["0"])
    with pytest.raises(ValueError, match="layer '0' has 10 inputs"):
        attach(model, PruneConfig("lora_prune", pattern="2:4"), 20)


def test_lora_is_needed():
    for name in ("lora_prune", "lora_prune_seq"):
        with pytest.raises(ValueError, match=f"'{name}' needs LoRA, and Net has none; peft.get_peft_model"):
            attach(net(), PruneConfig(name), 20)
    with pytest.raises(ValueError, match="'obs' prunes at once"):
        attach(net(), PruneConfig("obs"), 20)


def test_structured_needs_lora_on_a_unit():
    model = lora_net(targets=["head"])
    with pytest.raises(ValueError, match="finds no head and no channel with LoRA"):
        attach(model, PruneConfig("lora_prune", pattern="structured"), 20)


def test_a_refused_model_computes_what_it_did():
    model = lora_net(trained=True, targets=["q_proj", "fc1"])
    before = model(**batch()).logits
    with pytest.raises(ValueError):
        attach(model, PruneConfig("lora_prune", pattern="3:7", sparsity=4 / 7), 20)
    torch.testing.assert_close(model(**batch()).logits, before)
    assert all(m.cut is None for m in model.modules() if isinstance(m, MaskedLora))


@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1)}])
def test_inputs_of_a_convolution_are_its_patches(how):
    conv = nn.Conv2d(3, 4, (3, 2), bias=False, **how)
    layer = PrunedLayer("", conv)
    layer.watch_inputs()
    layer.watch_products()
    x = torch.randn(2, 3, 9, 8)
    out = conv(x)
    X = unfold(x, (3, 2), how.get("dilation", 1), how.get("padding", 0), how.get("stride", 1)).mT
    torch.testing.assert_close((X @ layer.weight().T).mT.reshape(out.shape), out)  # in its order
    X = X.reshape(-1, 18)
    torch.testing.assert_close(layer.products, X.T @ X)
    torch.testing.assert_close(layer.stats({"input_norms"}).input_norms, X.double().norm(dim=0))


@pytest.mark.parametrize("how, error", [({"groups": 2}, "groups=2"), ({"padding": "same"}, "padding='same'")])
@pytest.mark.parametrize("importance", ["wanda", "obs"])
def test_convolutions_whose_inputs_cannot_be_watched(how, error, importance):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **how), nn.Flatten(), nn.LazyLinear(2))
    data = [(torch.randn(2, 4, 6, 6),)]
    model(*data[0])
    with pytest.raises(ValueError, match=f"'0' has {error}.*exclude"):
        prune(model, importance, 0.5, loader=data, progress=False)
    assert prune(model, "magnitude", 0.5).sparsity_ == {"0": 0.5}
