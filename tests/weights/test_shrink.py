import copy

import pytest
import torch
from families import FAMILIES, SMALL_IMAGES, answer, cnn, inputs_of, masked, scramble
from peft import LoraConfig, get_peft_model
from torch import nn

from serpette.weights.groups import base_layer, find_groups
from serpette.weights.sequential import sequential
from serpette.weights.shrink import needed_units, possible_units, shrink, slice_

MODELS = {**FAMILIES, "cnn": cnn}


def example_of(model):
    return SMALL_IMAGES if type(model).__name__ == "CNN" else None


def uneven_cuts(model):
    """In the first layers half of the units go, in the later ones more."""
    groups = find_groups(model, example_inputs=example_of(model))
    return {
        g.name: list(range(0, g.units, 2)) if i < 2 else list(range(g.units // 2 + g.units // 8))
        for i, g in enumerate(groups)
    }


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_shrunk_computes_what_masked_computes(family, ragged):
    model = scramble(MODELS[family]()) if family != "cnn" else cnn()
    cuts = uneven_cuts(model)
    zeroed = masked(model, cuts, example_of(model))
    before = copy.deepcopy(zeroed.state_dict())
    small = shrink(zeroed, ragged=ragged, round_to=2, example_inputs=example_of(model))
    wanted = answer(zeroed)
    assert (answer(model) - wanted).abs().max() > 1e-2  # the zeros matter
    torch.testing.assert_close(answer(small), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in zeroed.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def units(model):
    return {g.name.split(".", 2)[2]: g.units for g in find_groups(model)}


def test_all_layers_keep_the_width_that_the_widest_needs():
    model = FAMILIES["vit"]()
    cuts = {
        "vit.layers.0.attention.heads": [0],
        "vit.layers.1.attention.heads": [1, 2],
        "vit.layers.0.mlp.channels": list(range(30)),
        "vit.layers.1.mlp.channels": list(range(50)),
    }
    zeroed = masked(model, cuts)
    small = shrink(zeroed)
    assert {g.units for g in find_groups(small, "attention")} == {3}
    assert {g.units for g in find_groups(small, "ffn")} == {40}  # 34, rounded up to a multiple of 8
    assert (small.config.num_attention_heads, small.config.head_dim, small.config.intermediate_size) == (
        3,
        8,
        40,
    )
    assert small.vit.layers[0].attention.num_attention_heads == 3
    assert small.shrunk == {"stock": True, "reason": ""}
    ragged = shrink(zeroed, ragged=True, round_to=1)
    assert [g.units for g in find_groups(ragged)] == [3, 34, 2, 14]
    assert not ragged.shrunk["stock"] and "save_shrunk" in ragged.shrunk["reason"]


def half(model):
    return {g.name: list(range(g.units // 2)) for g in find_groups(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_configuration_or_the_reason_why_not(family):
    model = FAMILIES[family]()
    small = shrink(masked(model, half(model)))
    if family == "bert":
        assert not small.shrunk["stock"]
        assert small.config.intermediate_size == 32 and small.config.num_attention_heads == 4
        assert small.bert.encoder.layer[0].attention.self.all_head_size == 16
        assert small.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    else:
        assert small.shrunk["stock"], small.shrunk["reason"]
        stock = type(small)(small.config)
        assert {n: p.shape for n, p in stock.named_parameters()} == {
            n: p.shape for n, p in small.named_parameters()
        }
    assert model.config.to_dict() == FAMILIES[family]().config.to_dict()


def test_ffn_of_a_bert_alone_stays_stock():
    model = FAMILIES["bert"]()
    small = shrink(masked(model, {n: c for n, c in half(model).items() if n.endswith("channels")}))
    assert small.shrunk["stock"]


def test_a_dinov2_keeps_whole_multiples_of_its_hidden_size():
    model = FAMILIES["dinov2"]()
    group = find_groups(model, "ffn")[0]
    assert possible_units(model, group) == [32, 64, 96]
    assert possible_units(model, group, 16, ragged=True) == [16, 32, 48, 64, 80, 96]
    small = shrink(masked(model, {g.name: range(40) for g in find_groups(model, "ffn")}))
    assert small.config.mlp_ratio == 2 and find_groups(small, "ffn")[0].units == 64


def test_a_llama_keeps_a_number_of_heads_that_divides_its_hidden_size():
    model = scramble(FAMILIES["llama"]())
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    model = scramble(type(model)(config)).eval()
    assert possible_units(model, find_groups(model, "attention")[0]) == [1, 2, 4]
    zeroed = masked(model, {g.name: [0] for g in find_groups(model, "attention")})
    with pytest.raises(ValueError, match="no head or channel can be removed.*ragged=True"):
        shrink(zeroed)
    small = shrink(zeroed, ragged=True)
    assert small.model.layers[0].self_attn.q_proj.out_features == 24
    torch.testing.assert_close(answer(small), answer(zeroed), rtol=1e-5, atol=1e-5)


def test_a_shrunk_llama_generates_what_the_masked_one_does():
    model = scramble(FAMILIES["llama"]())
    zeroed = masked(model, half(model))
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    ids = inputs_of(model)["input_ids"]
    assert torch.equal(shrink(zeroed).generate(ids, **settings), zeroed.generate(ids, **settings))


def test_masks_are_applied_and_count():
    model = scramble(FAMILIES["vit"]())
    zeroed = masked(model, half(model))
    masks = {
        name: module.weight != 0 for name, module in zeroed.named_modules() if isinstance(module, nn.Linear)
    }
    masks["vit.layers.0.mlp.fc1"][40, :5] = False  # a weight of a channel that stays
    with torch.no_grad():
        zeroed.vit.layers[0].mlp.fc1.weight[40, :5] = 0
    torch.testing.assert_close(answer(shrink(model, masks)), answer(zeroed), rtol=1e-5, atol=1e-5)


def test_masks_of_a_convolution_are_flat():
    model = cnn()
    keep = torch.ones(10, 12 * 9, dtype=torch.bool)
    keep[:, 9:27] = False
    with pytest.raises(ValueError, match="no head or channel can be removed"):  # the blocks still read them
        shrink(model, {"head": keep}, round_to=1, example_inputs=SMALL_IMAGES)
    masks = {"head": keep}
    for i, wide in ((0, 24), (1, 16)):
        masks[f"blocks.{i}.expand"] = keep[:1, ::9].repeat(wide, 1)
    small = shrink(model, masks, round_to=1, example_inputs=SMALL_IMAGES)
    assert small.stem.out_channels == small.bn.num_features == small.head.in_channels == 10


@pytest.mark.parametrize(
    "masks, error",
    [
        ({"vit.layers.0.mlp.fc3": torch.ones(2, 2, dtype=torch.bool)}, "no such layer"),
        ({"vit.layers.0.mlp.fc1": torch.ones(32, 64, dtype=torch.bool)}, r"must be bool \(64, 32\)"),
        ({"vit.layers.0.mlp.fc1": torch.ones(64, 32)}, "must be bool"),
        (None, "no head or channel can be removed"),
    ],
)
def test_bad_masks(masks, error):
    with pytest.raises(ValueError, match=error):
        shrink(FAMILIES["vit"](), masks)


def test_refused():
    model = FAMILIES["vit"]()
    with pytest.raises(ValueError, match="round_to=0"):
        shrink(model, round_to=0)
    tied = masked(model, half(model))
    tied.vit.layers[1].mlp.fc1.weight = tied.vit.layers[0].mlp.fc1.weight
    with pytest.raises(ValueError, match="are one tensor"):
        shrink(tied)
    with pytest.raises(ValueError, match="merge_and_unload"):
        shrink(get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"])))


def lora(family, targets):
    torch.manual_seed(0)
    name = family.removesuffix(" sequential")
    model = get_peft_model(scramble(FAMILIES[name]()), LoraConfig(r=2, target_modules=targets))
    if name != family:
        sequential(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def zero_columns(model, groups, cuts):
    """Zeros in the columns of base layer and A that read the units `cuts`."""
    for group in groups:
        for member in group.members:
            layer = model.get_submodule(member.module)
            factors = layer.lora_A.values() if hasattr(layer, "lora_A") else ()
            for linear in (base_layer(layer), *factors) if member.side == "columns" else ():
                linear.weight.data[:, member.index[cuts[group.name]].flatten()] = 0


TARGETS = {
    "vit": ["q_proj", "o_proj", "fc1", "fc2"],
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    "llama sequential": ["q_proj", "o_proj", "down_proj"],
}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_training_goes_on_after_a_cut_as_if_masked(family, kind):
    zeroed = lora(family, TARGETS[family]).double()
    cuts, groups = half(zeroed), find_groups(zeroed)
    small = copy.deepcopy(zeroed)

    def step(model, optimizer):
        optimizer.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        optimizer.step()
        if model is zeroed:
            zero_columns(model, groups, cuts)
        return logits.detach()

    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in inputs_of(zeroed.get_base_model()).items()
    }
    optimizers = {}
    for model in (zeroed, small):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers[model] = (
            torch.optim.AdamW(parameters, lr=1e-2)
            if kind == "adam"
            else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
        )
        step(model, optimizers[model])
    zero_columns(small, groups, cuts)
    shapes = {p: p.shape for p in small.parameters()}
    slice_(small, groups, {g.name: torch.arange(g.units) >= g.units // 2 for g in groups}, optimizers[small])
    assert list(small.parameters()) == list(shapes)
    assert sum(p.shape != shape for p, shape in shapes.items()) > 10
    assert all(p.grad is None for p, shape in shapes.items() if p.shape != shape)
    assert [g.units for g in find_groups(small)] == [g.units - g.units // 2 for g in groups]
    for _ in range(3):
        torch.testing.assert_close(step(small, optimizers[small]), step(zeroed, optimizers[zeroed]))
    with torch.no_grad():
        zeroed, small = zeroed.merge_and_unload(), small.merge_and_unload()
        torch.testing.assert_close(small(**inputs).logits, zeroed(**inputs).logits)


def test_features_follow_the_weights():
    model = lora("llama", TARGETS["llama"])
    groups = find_groups(model)
    kept = {g.name: torch.arange(g.units) >= g.units // 2 for g in groups}
    slice_(model, groups, kept)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if hasattr(module, "lora_A"):
            base = base_layer(module)
            assert (module.out_features, module.in_features) == (base.out_features, base.in_features)


@pytest.mark.parametrize(
    "keep", [torch.zeros(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(4)]
)
def test_slice_refuses_masks_that_do_not_fit(keep):
    model = FAMILIES["vit"]()
    groups = find_groups(model, "attention")
    with pytest.raises(ValueError, match=r"must be a bool tensor \(4,\)"):
        slice_(model, groups, {groups[0].name: keep})


def test_slice_refuses_a_factored_optimizer_state_before_it_cuts():
    model = FAMILIES["vit"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.vit.layers[0].mlp.fc2.weight
    optimizer.state[weight]["row"] = torch.zeros(32)
    groups = find_groups(model, "ffn")
    with pytest.raises(ValueError, match="'row' has shape"):
        slice_(model, groups, {groups[0].name: torch.arange(64) < 8}, optimizer)
    assert model.vit.layers[0].mlp.fc1.weight.shape == (64, 32)


def test_needed_units():
    model = masked(FAMILIES["bert"](), {"bert.encoder.layer.0.channels": [3, 5]})
    group = find_groups(model, "ffn")[0]
    assert (~needed_units(model, group)).nonzero().flatten().tolist() == [3, 5]


def test_a_head_of_which_one_channel_is_read_is_needed():
    model = FAMILIES["llama"]()
    group = find_groups(model, "attention")[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 1:] = 0
    assert needed_units(model, group).tolist() == [True, False]
