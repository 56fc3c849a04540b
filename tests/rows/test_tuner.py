"""The handshake with peft, transformers and torch, on tiny models of each family."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from models import quietly, randomise
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    TaskType,
    get_peft_model,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from serpette.rows import RowConfig
from serpette.rows.layer import row_layers
from serpette.zoo import tiny_models

SRC = str(Path(__file__).parents[2] / "src")
TARGETS = {
    "vit": "all-layers",
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj", "norm"],
    "bert": "all-linear",
    "gpt2": ["c_attn", "c_fc", "wte", "ln_1"],
}
KINDS = list(TARGETS)


def make(kind, width=32):
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=100, intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config).eval()
    return tiny_models.make(kind)


def batch(kind, n=4):
    g = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(n, 3, 32, 32, generator=g), "labels": torch.arange(n) % 3}
    ids = torch.randint(3, 100, (n, 8), generator=g)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | {"labels": torch.arange(n) % 3 if kind == "bert" else ids}


def out(model, kind):
    with torch.no_grad():
        return model(**batch(kind)).logits


def rows_of(kind, base=None, **options):
    base = make(kind) if base is None else base
    config = RowConfig(
        **{
            "r": None if "fraction" in options else 2,
            "target_modules": TARGETS[kind],
            "train_bias": True,
            **options,
        }
    )
    # peft warns of tied words if the model has any, which is right
    return base, quietly(get_peft_model, copy.deepcopy(base), config).eval()


def steps(model, kind, n=2, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(n):
        optimizer.zero_grad()
        model(**batch(kind)).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kernel", ["additive", "live"])
@pytest.mark.parametrize("modes", ["rows", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_life_of_an_adapter(kind, modes, kernel, tmp_path):
    base, model = rows_of(kind, modes=modes, kernel=kernel)
    start = out(base, kind)
    assert torch.equal(out(model, kind), start)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".rows_" in n for n in trained)
    steps(model, kind)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    learnt = out(model, kind)
    assert not torch.equal(learnt, start)
    with model.disable_adapter():
        assert torch.equal(out(model, kind), start)
    assert torch.equal(out(model, kind), learnt)

    quietly(model.save_pretrained, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    for low in (False, True):
        loaded = quietly(PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(out(loaded, kind), learnt)
        assert not any(p.is_meta for p in loaded.parameters())
        assert not any(p.requires_grad for p in loaded.parameters())
    loaded = quietly(PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path), is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trained

    twin = copy.deepcopy(model)
    assert torch.equal(out(twin, kind), learnt)
    twin.merge_adapter()
    torch.testing.assert_close(out(twin, kind), learnt, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="[Mm]erged"):
        twin.merge_adapter()  # twice is once
    twin.unmerge_adapter()
    torch.testing.assert_close(out(twin, kind), learnt, rtol=1e-4, atol=1e-5)
    merged = quietly(copy.deepcopy(model).merge_and_unload, safe_merge=True)
    torch.testing.assert_close(out(merged, kind), learnt, rtol=1e-4, atol=1e-5)
    unloaded = model.unload()
    assert torch.equal(out(unloaded, kind), start)
    for left in (merged, unloaded):
        assert not row_layers(left) and type(left) is type(base)
        assert left.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_and_adds(kind, tmp_path):
    pytest.importorskip("peft.utils.transformers_weight_conversion", reason="transformers asks for peft 0.20")
    base, model = rows_of(kind)
    randomise(model)
    quietly(model.save_pretrained, str(tmp_path))
    loaded = copy.deepcopy(base)
    quietly(loaded.load_adapter, str(tmp_path))
    assert torch.equal(out(loaded, kind), out(model, kind))
    loaded.disable_adapters()
    assert torch.equal(out(loaded, kind), out(base, kind))
    loaded.enable_adapters()
    quietly(loaded.add_adapter, RowConfig(r=3, target_modules=TARGETS[kind]), "other")
    assert torch.equal(out(loaded, kind), out(base, kind)), "the new one is active, and zero"
    loaded.set_adapter("default")
    assert torch.equal(out(loaded, kind), out(model, kind))
    loaded.delete_adapter("other")
    assert torch.equal(out(loaded, kind), out(model, kind))


@pytest.mark.parametrize(
    "kind, auto, task",
    [
        ("llama", AutoPeftModelForCausalLM, TaskType.CAUSAL_LM),
        ("gpt2", AutoPeftModelForCausalLM, TaskType.CAUSAL_LM),
        ("bert", AutoPeftModelForSequenceClassification, TaskType.SEQ_CLS),
    ],
)
def test_auto_model(kind, auto, task, tmp_path):
    make(kind).save_pretrained(tmp_path / "base")
    base = type(make(kind)).from_pretrained(tmp_path / "base")
    _, model = rows_of(kind, base, task_type=task)
    steps(model, kind)
    quietly(model.save_pretrained, str(tmp_path / "adapter"))
    options = {"num_labels": 3} if kind == "bert" else {}
    loaded = quietly(auto.from_pretrained, str(tmp_path / "adapter"), **options)
    assert isinstance(loaded, PeftModel) and torch.equal(out(loaded, kind), out(model.eval(), kind))


def test_head_of_a_classifier_trains_whole_and_is_saved(tmp_path):
    base, model = rows_of("bert", task_type=TaskType.SEQ_CLS)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in trained if ".rows_" not in n}
    assert head == {f"base_model.model.classifier.modules_to_save.default.{k}" for k in ("weight", "bias")}
    assert not any(name == "classifier" for name, _ in row_layers(model))
    steps(model, "bert")
    quietly(model.save_pretrained, str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.equal(out(loaded, "bert"), out(model, "bert"))
    merged = model.merge_and_unload()
    assert not torch.equal(merged.classifier.weight, base.classifier.weight)


def test_modules_to_save(tmp_path):
    base, model = rows_of("vit", modules_to_save=["classifier"])
    assert "classifier" not in dict(row_layers(model))
    steps(model, "vit")
    quietly(model.save_pretrained, str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.equal(out(loaded, "vit"), out(model, "vit"))


def test_tied_words_are_untied_when_one_of_them_is_merged():
    base = make("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(copy.deepcopy(base), RowConfig(fraction=0.5, target_modules=["embed_tokens"]))
    assert any("tie" in str(w.message) for w in caught), "peft says that they are tied"
    randomise(model)
    learnt = out(model, "llama")
    merged = model.merge_and_unload()
    torch.testing.assert_close(out(merged, "llama"), learnt, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert not merged.config.tie_word_embeddings and base.config.tie_word_embeddings
    with pytest.raises(ValueError, match="which another layer shares"):
        quietly(get_peft_model, base, RowConfig(r=2, target_modules=["lm_head"], kernel="live"))


# -- several adapters


def two_adapters(kind="llama", **options):
    base, model = rows_of(kind, **options)
    other = RowConfig(
        r=3, target_modules=TARGETS[kind], importance="random", seed=3, modes="both", train_bias=True
    )
    quietly(model.add_adapter, "other", other)
    return base, randomise(model)


@pytest.mark.parametrize("kind", KINDS)
def test_second_adapter(kind, tmp_path):
    base, model = two_adapters(kind)
    layer = row_layers(model)[0][1]
    assert len(layer.rows_index["default"]) == 2 and len(layer.rows_index["other"]) == 3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".default" in n for n in trained), "a new adapter is not active"
    first = out(model, kind)
    model.set_adapter("other")
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    second = out(model, kind)
    assert not torch.equal(first, second)

    quietly(model.save_pretrained, str(tmp_path))
    loaded = quietly(PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path), "default")
    quietly(loaded.load_adapter, str(tmp_path / "other"), "other")
    assert torch.equal(out(loaded, kind), first)
    loaded.set_adapter("other")
    assert torch.equal(out(loaded, kind), second)

    quietly(model.delete_adapter, "other")
    assert "other" not in model.peft_config
    assert not any("other" in n for n in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(out(model, kind), first)


def dense_sum(base, model, weights):
    """The base with the weighted changes of the adapters in its weights."""
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in row_layers(model):
            module = dense.get_submodule(name)
            for adapter, w in weights.items():
                module.weight += w * layer.get_delta_weight(adapter)
                if adapter in layer.rows_bias:
                    module.bias[layer.rows_index[adapter]] += w * layer.rows_bias[adapter]
    return dense


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_weighted_adapter(kind, tmp_path):
    base, model = two_adapters(kind)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert model.active_adapter == "default" and not any(
        p.requires_grad for n, p in model.named_parameters() if "sum" in n
    )
    model.set_adapter("sum")
    dense = dense_sum(base, model, {"default": 0.5, "other": -2.0})
    torch.testing.assert_close(out(model, kind), out(dense, kind), rtol=1e-4, atol=1e-5)
    quietly(model.save_pretrained, str(tmp_path), selected_adapters=["sum"])
    loaded = quietly(PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path / "sum"))
    assert torch.equal(out(loaded, kind), out(model, kind))
    add = model.base_model.add_weighted_adapter
    for names, weights, name, words in (
        (["default"], [1, 2], "x", "1 adapters and 2 weights"),
        (["defualt"], [1], "x", "did you mean 'default'"),
        (["default"], [1], "sum", "'sum' is taken"),
        ([], [], "x", "0 adapters"),
    ):
        with pytest.raises(ValueError, match=words):
            add(names, weights, name)
    assert "x" not in model.peft_config


def test_adapters_of_other_layers():
    base = make("llama")
    model = get_peft_model(copy.deepcopy(base), RowConfig(r=2, target_modules=["up_proj"]))
    model.add_adapter("other", RowConfig(r=2, target_modules=["down_proj"]))
    randomise(model)
    for weights in ({"default": 1.0}, {"other": 1.0}, {"default": 1.0, "other": 1.0}):
        model.base_model.set_adapter(list(weights))
        torch.testing.assert_close(
            out(model, "llama"), _dense_of_some(base, model, weights), rtol=1e-4, atol=1e-5
        )
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    both = out(model, "llama")
    model.base_model.set_adapter("sum")
    torch.testing.assert_close(out(model, "llama"), both, rtol=1e-4, atol=1e-5)


def _dense_of_some(base, model, weights):
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in row_layers(model):
            for adapter in weights:
                if adapter in layer.rows_weight:
                    dense.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return out(dense, "llama")


def test_merged_while_another_is_added():
    base, model = rows_of("vit")
    randomise(model)
    learnt = out(model, "vit")
    model.merge_adapter()
    quietly(model.add_adapter, "other", RowConfig(r=2))  # peft unmerges, and says so
    torch.testing.assert_close(out(model, "vit"), learnt, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("other")
    torch.testing.assert_close(out(model, "vit"), out(base, "vit"), rtol=1e-4, atol=1e-5)


# -- configuration


def test_configuration_survives_json_and_is_not_changed(tmp_path):
    config = RowConfig(
        fraction=0.1, modes={"o_proj": "columns"}, exclude_modules=("k_proj",), train_bias=True
    )
    before = copy.deepcopy(config)
    one, other = (get_peft_model(make("llama"), config) for _ in range(2))
    config.base_model_name_or_path = None  # which old peft sets
    assert config == before and config.counts is None and config.target_modules == "all-linear"
    assert one.peft_config["default"].counts == other.peft_config["default"].counts
    quietly(one.save_pretrained, str(tmp_path))
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["peft_type"] == "ROWS" and text["counts"]["model.layers.0.self_attn.q_proj"] == [3, 0, 32, 32]
    assert text["counts"]["model.layers.0.self_attn.o_proj"] == [0, 3, 32, 32]
    read = RowConfig.from_pretrained(str(tmp_path))
    assert type(read) is RowConfig
    for name, value in one.peft_config["default"].to_dict().items():
        if name not in ("inference_mode", "auto_mapping"):  # which peft changes as it saves
            assert getattr(read, name) == (sorted(value) if isinstance(value, set) else value), name
    assert not any("k_proj" in name or "lm_head" in name for name in read.counts)


def test_importance_is_not_run_again_at_load(tmp_path, monkeypatch):
    base, model = rows_of("vit", importance="random", seed=4)
    quietly(model.save_pretrained, str(tmp_path))
    monkeypatch.setattr("serpette.rows.tuner.initial_rows", lambda *a, **k: pytest.fail("chosen again"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    for (_, one), (_, two) in zip(row_layers(model), row_layers(loaded), strict=True):
        assert torch.equal(one.rows_index["default"], two.rows_index["default"])


def test_ranked_rows_of_other_counts_are_loaded(tmp_path):
    from serpette.rows import rank_rows

    base, model = rows_of("vit")
    rank_rows(model, importance="magnitude", scope="global")
    counts = {len(layer.rows_index["default"]) for _, layer in row_layers(model)}
    assert len(counts) > 1
    randomise(model)
    quietly(model.save_pretrained, str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.equal(out(loaded, "vit"), out(model, "vit"))
