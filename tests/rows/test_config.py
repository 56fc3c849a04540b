"""Bad input is told what is wrong with it and what to do; good input means what it says."""

import copy

import pytest
import torch
from models import Net, quietly
from peft import LoraConfig, PeftModel, get_peft_model
from test_tuner import make, rows_of
from torch import nn

from serpette.rows import RowConfig
from serpette.rows.layer import row_layers


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "r=None and fraction=None: give exactly one"),
        ({"r": 2, "fraction": 0.5}, "r=2 and fraction=0.5: give exactly one"),
        ({"r": 0}, "r=0 must be"),
        ({"r": 2.0}, "r=2.0 must be a whole number"),
        ({"r": True}, "r=True must be"),
        ({"fraction": 5}, r"fraction=5 must be in \(0, 1\]; did you mean 0.05\?"),
        ({"fraction": 0}, r"fraction=0 must be in \(0, 1\]$"),
        ({"fraction": float("nan")}, "fraction=nan must be"),
        ({"fraction": "0.5"}, "fraction='0.5' must be"),
        ({"r": 2, "modes": "row"}, "modes='row' is not known; did you mean 'rows'"),
        ({"r": 2, "modes": {"fc": "column"}}, "modes='column'.*did you mean 'columns'"),
        ({"r": 2, "modes": {"(": "rows"}}, r"modes: '\(' is not a regular expression"),
        ({"r": 2, "kernel": "alive"}, "kernel='alive' is not known; did you mean 'live'"),
        ({"r": 2, "running_statistics": "freeze"}, "running_statistics='freeze'.*'frozen'"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        RowConfig(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 33}, "r=33 is more than the 32 that 'model.layers.0.self_attn.q_proj' has"),
        ({"r": 40, "modes": "columns"}, "r=40 is more than the 32"),
        ({"r": 2, "target_modules": ["q_porj"]}, "nothing is named 'q_porj'.*did you mean '?q_proj"),
        ({"r": 2, "target_modules": ["q_proj", "layers.7.mlp"]}, "nothing is named 'layers.7.mlp'"),
        ({"r": 2, "target_modules": r".*\.c_attn"}, "matches no module of LlamaForCausalLM"),
        ({"r": 2, "target_modules": "all-liner"}, "did you mean 'all-linear'"),
        ({"r": 2, "target_modules": "("}, "target_modules"),
        ({"r": 2, "target_modules": []}, "matches no module"),
        ({"r": 2, "target_modules": None}, "matches no module"),
        ({"r": 2, "target_modules": ["mlp"]}, "'model.layers.0.mlp': the rows of a LlamaMLP cannot train"),
        ({"r": 2, "importance": "taylor"}, "'taylor' needs data.*rank_rows"),
        ({"r": 2, "importance": "tailor"}, "did you mean 'taylor'"),
        ({"r": 2, "target_modules": ["norm"], "modes": {"norm": "columns"}}, "its columns cannot train"),
        ({"r": 2, "target_modules": ["q_proj"], "freeze_attention": True}, "all is attention"),
        ({"r": 2, "exclude_modules": ["_proj"], "target_modules": r".*_proj"}, None),
    ],
)
def test_bad_targets(options, words):
    model = make("llama")
    before = set(model.state_dict())
    if words is None:
        assert quietly(get_peft_model, model, RowConfig(**options))
        return
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, RowConfig(**options))
    assert set(model.state_dict()) == before, "an error must leave the model alone"
    assert not row_layers(model)


def test_freeze_attention():
    base, model = rows_of("llama", target_modules="all-linear", freeze_attention=True)
    names = [name for name, _ in row_layers(model)]
    assert len(names) == 6 and not any("attn" in name for name in names)
    base, model = rows_of("vit", target_modules="all-linear", freeze_attention=True)
    names = [name for name, _ in row_layers(model)]
    assert names and not any("attention" in name for name in names)
    with pytest.raises(ValueError, match="no module of Net has attention in its name"):
        get_peft_model(Net(nn.Linear(3, 4)), RowConfig(r=1, freeze_attention=True, target_modules=["layer"]))


def test_all_linear_is_all_but_the_head():
    _, model = rows_of("llama", target_modules="all-linear")
    names = {name for name, _ in row_layers(model)}
    assert len(names) == 14 and "lm_head" not in names
    _, model = rows_of("vit", target_modules="all-layers")
    kinds = {type(layer.base_layer).__name__ for _, layer in row_layers(model)}
    assert kinds == {"Linear", "Conv2d", "LayerNorm"}
    with pytest.raises(ValueError, match="has no linear layers; use target_modules='all-layers'"):
        get_peft_model(Net(nn.Conv2d(3, 4, 3)), RowConfig(r=1))


def test_modes_by_pattern():
    _, model = rows_of(
        "llama", target_modules="all-linear", modes={"layers.0.*": "columns", "o_proj": "both"}
    )
    layers = dict(row_layers(model))
    assert not len(layers["model.layers.0.self_attn.o_proj"].rows_index)
    assert len(layers["model.layers.1.self_attn.o_proj"].rows_column_index["default"]) == 2
    assert len(layers["model.layers.1.self_attn.q_proj"].rows_index["default"]) == 2
    with pytest.raises(ValueError, match="modes: 'o_porj' matches none of the modules.*'o_proj'"):
        rows_of("llama", target_modules="all-linear", modes={"o_porj": "columns"})


def test_base_that_is_wrapped_already():
    _, model = rows_of("llama")
    with pytest.raises(ValueError, match="PeftModel already"):
        quietly(get_peft_model, model, RowConfig(r=2))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        quietly(get_peft_model, model.base_model.model, RowConfig(r=2))
    lora = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftModel already"):
        quietly(get_peft_model, lora, RowConfig(r=2))
    with pytest.raises(ValueError, match="another adapter method"):
        quietly(get_peft_model, lora.base_model.model, RowConfig(r=2))


def test_adapter_of_other_shapes(tmp_path):
    def net(*sizes):
        return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))

    def names(n):
        return [str(i) for i in range(n)]

    quietly(
        get_peft_model(net(8, 12, 12, 4), RowConfig(r=2, target_modules=names(3))).save_pretrained,
        str(tmp_path),
    )
    for other, words in (
        (net(8, 10, 12, 4), "'0' with 12 rows and 8 columns, and here it has 10 and 8"),
        (net(8, 16, 12, 4), "'0' with 12 rows"),
        (net(9, 12, 12, 4), "12 rows and 8 columns, and here it has 12 and 9"),
        (net(8, 12, 12), "'2', which this model does not have"),
    ):
        with pytest.raises(ValueError, match=words):
            PeftModel.from_pretrained(other, str(tmp_path))
    PeftModel.from_pretrained(net(8, 12, 12, 4), str(tmp_path))


def test_layers_that_cannot_train():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

    for target, words in (
        (["out_proj"], "'attn.out_proj': the rows of a MultiheadAttention cannot train"),
        (["attn"], "'attn': the rows of a MultiheadAttention cannot train"),
    ):
        with pytest.raises(ValueError, match=words):
            get_peft_model(Attention(), RowConfig(r=2, target_modules=target))
    for layer in (nn.ConvTranspose2d(3, 4, 2), nn.EmbeddingBag(4, 3), nn.LSTM(3, 4), nn.LayerNorm((3, 4))):
        with pytest.raises(ValueError, match=f"the rows of a {type(layer).__name__} cannot train"):
            get_peft_model(Net(layer), RowConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match="max_norm"):
        get_peft_model(Net(nn.Embedding(4, 3, max_norm=1.0)), RowConfig(r=2, target_modules=["layer"]))


def test_live_has_room_for_one():
    _, model = rows_of("llama", kernel="live", target_modules="all-linear")
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="live.*use kernel='additive'"):
        model.add_adapter("other", RowConfig(r=2, kernel="live"))
    assert set(model.state_dict()) == names


def test_several_adapters_share_a_kernel():
    _, model = rows_of("llama", target_modules="all-linear")
    with pytest.raises(ValueError, match="kernel"):
        model.add_adapter("other", RowConfig(r=2, kernel="live"))


def test_broken_index_in_a_file():
    _, model = rows_of("vit")
    state = copy.deepcopy(model.state_dict())
    key = next(k for k in state if "rows_index" in k)
    for wrong in (-1, 10_000):
        state[key] = torch.full_like(state[key], wrong)
        with pytest.raises(ValueError, match=r"must lie in \[0, "):
            model.load_state_dict(state)
