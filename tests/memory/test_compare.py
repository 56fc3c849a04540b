"""Predicted with fake tensors = measured with real ones; setups, presets, errors, table and chart."""

import copy
from dataclasses import asdict
from xml.etree import ElementTree

import pytest
import torch
import transformers as hf
from torch import nn

from serpette.memory import inference_memory, saved_bytes, step_memory
from serpette.memory.compare import Setup, compare, parse, tuned
from serpette.memory.cuda import cuda_memory
from serpette.memory.shapes import PRESETS, example_batch, fake_copy, preset, without_memory
from serpette.report import memory as reports

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZE, "vocab_size": 50, "max_position_embeddings": 40}


def make(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False))
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**TEXT))
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=16, patch_size=4))


SETUPS = [
    "full",
    "rows",
    "columns",
    "both",
    "rows,freeze_attention",
    "rows,recompute",
    "lora",
    "lora,dropout=0.1",
]
SETUPS += ["lora,checkpointing", "dora", "head"]


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_prediction_is_measurement(kind):
    base = make(kind)
    chosen = (
        SETUPS[:-1] if kind == "llama" else ["full", "rows", "columns", "lora", "lora,dropout=0.1", "head"]
    )
    setups = [parse(text, Setup(r=4)) for text in chosen]
    result = compare(base, setups, tokens=33, batch_size=2, device="cpu", measure=True)
    assert result["inference"] == result["measured_inference"]
    for row in result["rows"]:
        assert row["measured"] == {key: row[key] for key in row["measured"]}, row["name"]
        assert sum(row["at_peak"].values()) == row["peak"] and min(row["at_peak"].values()) >= 0
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["rows, r 4"]["activations"] < by_name["lora, r 4"]["activations"]
    assert by_name["columns, r 4"]["peak"] < by_name["rows, r 4"]["peak"]
    assert by_name["rows, r 4"]["states"] == pytest.approx(2 * by_name["rows, r 4"]["trainable"], rel=0.1)
    for name in ("rows, r 4", "lora, r 4", "columns, r 4", "full"):
        row = by_name[name]
        assert row["lower_bound"] <= 1.1 * (row["peak"] + row["gradients"])  # tiny models: embeddings weigh


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd", "adafactor"])
def test_prediction_is_measurement_for_each_optimizer(optimizer):
    base = make("llama")
    setup = Setup("lora", r=4, optimizer=optimizer)
    batch = example_batch(base, 17, 1)
    real = step_memory(tuned(copy.deepcopy(base), setup), batch, optimizer)
    with without_memory() as mode:
        assert step_memory(tuned(fake_copy(base, mode), setup), batch, optimizer) == real
    states = {"adamw": 2, "adamw-fused": 2, "sgd": 0}
    if optimizer in states:  # and a step counter for each parameter
        assert real.states - states[optimizer] * real.trainable in (0, 4 * 2 * 2 * 7)


def test_states_of_eight_bits():
    with without_memory():
        found = step_memory(nn.Linear(100, 60, bias=False), torch.zeros(2, 100), "adamw-8bit")
        small = step_memory(nn.Linear(10, 10), torch.zeros(2, 10), "adamw-8bit")
    assert found.states == 2 * (6000 + 4 * -(-6000 // 256))
    assert small.states == 2 * small.trainable


def test_eight_bits_as_bitsandbytes_has_them():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = nn.Linear(100, 60, bias=False)
    real = step_memory(layer, torch.zeros(2, 100), "adamw-8bit")
    assert real.states - 2 * (6000 + 4 * -(-6000 // 256)) <= 2 * 256 * 4  # their table of 256 values


def test_a_step_by_hand():
    layer = nn.Linear(4, 3)
    found = step_memory(layer, torch.zeros(2, 4), "sgd")
    assert (found.parameters, found.weights, found.trainable, found.gradients) == (15, 0, 60, 60)
    assert found.activations == 4  # the loss; the input was there before
    assert found.forward_peak == 60 + 32 + 24 + 4  # layer, input, output, sum


@pytest.mark.skipif(not hasattr(nn.functional, "linear_cross_entropy"), reason="torch has no chunked loss")
def test_chunked_cross_entropy_with_rows():
    class Chunked(nn.Module):
        def __init__(self, model, options):
            super().__init__()
            self.model, self.options = model, options

        def forward(self, input_ids, labels):
            hidden = self.model.model.model(input_ids=input_ids).last_hidden_state.flatten(0, 1)
            words = self.model.get_output_embeddings().weight
            return nn.functional.linear_cross_entropy(hidden, words, labels.flatten(), options=self.options)

    base = make("llama")
    batch = example_batch(base, 33, 2)
    found = []
    for options in (None, nn.LinearCrossEntropyOptions()):
        model = Chunked(tuned(copy.deepcopy(base), Setup("rows", r=4)), options)
        loss = model(**batch)
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name, parameters", [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)])
def test_presets_have_the_published_sizes(name, parameters):
    with without_memory():
        model = preset(name)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs(name):
    small = {"num_hidden_layers": 1}
    with without_memory("cuda"):
        model = tuned(preset(name, **small), Setup("rows", r=8))
        found = step_memory(model, example_batch(preset(name, **small), 16, 1))
    assert found.peak > found.weights + found.trainable + found.states > 0


@pytest.mark.parametrize("name, whole, without_attention", [
    ("llama-2-7b", 145_752_064, 78_643_200), ("llama-3-8b", 159_383_552, 92_274_688),
])  # fmt: skip
def test_parameters_of_the_paper(name, whole, without_attention):
    for freeze, expected in ((False, whole), (True, without_attention)):
        with without_memory():
            model = tuned(preset(name, num_hidden_layers=2), Setup("rows", r=128, freeze_attention=freeze))
            assert 16 * sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_a_fake_copy_shares_what_the_model_shares():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    with without_memory() as mode:
        fake = fake_copy(model, mode)
    assert fake.lm_head.weight is fake.model.embed_tokens.weight
    assert model.lm_head.weight.sum().item() != 0  # the given one is as it was


def test_half_precision():
    row = compare(make("llama"), [parse("full")], tokens=8, dtype="bfloat16")["rows"][0]
    assert row["trainable"] == 2 * row["parameters"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("lroa", "did you mean 'lora'"),
        ("rows,q=3", "'q' is not an option"),
        ("rows,r=many", "r must be a number"),
        ("rows,recompute=maybe", "true or false"),
        ("rows,optimizer=adam", "adamw"),
        ("rows,r=0", "at least 1"),
        ("lora,dropout=1.5", r"\[0, 1\)"),
        ("lora,fraction=0.1", "give 'lora' an r"),
    ],
)
def test_bad_setups(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_setup_takes_the_rest_from_the_options():
    common = Setup(r=8, fraction=0.05, checkpointing=True)
    assert parse("lora,r=4", common) == Setup("lora", r=4, checkpointing=True)
    assert parse("columns,checkpointing=false", common) == Setup("columns", r=8, fraction=0.05)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 41}, "40 positions"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"setups": []}, "setups is empty"),
    ],
)
def test_bad_input(options, words):
    given = {"setups": [Setup("full")], "tokens": 8, **options}
    with pytest.raises(ValueError, match=words):
        compare(make("llama"), given.pop("setups"), **given)


def test_what_does_not_fit_is_not_measured():
    with pytest.raises(ValueError, match="needs .* GiB"):
        compare(make("llama"), [Setup("full")], tokens=40, batch_size=10**8, device="cpu", measure=True)


def test_unknown_models_and_devices(tmp_path):
    with pytest.raises(ValueError, match=r"is no preset.*no readable config.json"):
        compare(str(tmp_path), [Setup("full")])
    with pytest.raises(ValueError, match="did you mean 'llama-3-8b'"):
        preset("llama-3-8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda'"):
            cuda_memory(lambda: make("llama"), [Setup("full")], (8, 1, torch.float32), "cuda")


def test_a_folder_gives_its_configuration(tmp_path):
    make("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the weights are not read
    found = compare(str(tmp_path), [parse("rows,r=4")], tokens=8, labels=7)
    assert (
        found["rows"][0]["peak"]
        == compare(str(tmp_path), [parse("rows,r=4")], tokens=8, labels=7)["rows"][0]["peak"]
    )


def test_table_and_chart(capsys):
    result = compare(
        make("vit"), [parse("rows,r=4"), parse("head")], batch_size=2, device="cpu", measure=True
    )
    reports.show(result)
    out = capsys.readouterr().out
    assert "rows, r 4" in out and "measured" in out and "GiB" in out
    assert reports.gib(3 * 2**30) == "3.00" and reports.gib(2**20) == "0.000977" and reports.gib(None) == "-"
    picture = ElementTree.fromstring(reports.chart(result))
    assert picture.tag.endswith("svg") and "rows, r 4" in "".join(picture.itertext())
    assert asdict(parse("head"))["tuner"] == result["rows"][1]["setup"]["tuner"]


@pytest.mark.gpu
def test_protocol_on_cuda():
    model, setups = make("llama"), [parse("rows,r=4")]
    result = compare(model, setups, tokens=32, device="cuda", measure=True)
    row = result["rows"][0]
    assert row["measured"]["peak"] >= row["weights"] + row["trainable"] + row["states"]
    assert result["measured_inference"] > 0


def test_saved_bytes_are_predicted_too():
    base = make("llama")
    batch = example_batch(base, 17, 2)
    real = saved_bytes(base, batch), inference_memory(base, batch)
    with without_memory() as mode:
        fake = fake_copy(base, mode)
        assert (saved_bytes(fake.train(base.training), batch), inference_memory(fake, batch)) == real
