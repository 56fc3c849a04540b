"""What is observed of causal language models: losses of responses, and all that goes with an observation."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from language import CHAT, character_tokenizer

import serpette
from serpette.data.examples import Examples
from serpette.data.language import LanguageReader, answers_alone, is_causal_lm, response_losses
from serpette.data.observe import observe
from serpette.data.scores import Scores
from serpette.masking import MaskedPath
from serpette.scorers import DLC
from serpette.zoo import tiny

LETTERS = "abcdefghij"
TOKENIZER = character_tokenizer(CHAT)


def rows_of_text(n=24, seed=0):
    """Prompts and responses of different lengths, all of which fit the tiny model's 64 positions."""
    rng = np.random.default_rng(seed)

    def words(least, most):
        return "".join(rng.choice(list(LETTERS), size=rng.integers(least, most)))

    return [{"id": f"e{i}", "prompt": words(2, 12), "response": words(1, 12)} for i in range(n)]


@pytest.fixture(scope="module")
def data():
    return datasets.Dataset.from_list(rows_of_text())


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def batch_of(data, rows):
    return Examples(data, processing_class=TOKENIZER, task="causal-lm").read(rows)[1]


def slow_losses(model, batch):
    """[(mean loss, tokens)] by one example, one token at a time, in float64."""
    model = type(model)(model.config).double().eval().requires_grad_(False)
    model.load_state_dict({k: v.double() for k, v in tiny("llama").state_dict().items()})
    found = []
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        ids, labels = ids[mask == 1].tolist(), labels[mask == 1].tolist()
        losses = []
        for t in range(1, len(ids)):
            if labels[t] != -100:
                z = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].tolist()
                top = max(z)
                losses.append(top + math.log(sum(math.exp(v - top) for v in z)) - z[ids[t]])
        found.append((sum(losses) / len(losses), len(losses)))
    return found


def test_losses_equal_a_slow_loop(data, llama, monkeypatch):
    batch = batch_of(data, range(6))
    expected = slow_losses(llama, batch)
    monkeypatch.setattr("serpette.data.language.LOGITS", 300)  # three tokens at a time
    losses, counts = response_losses(llama, batch)
    torch.testing.assert_close(
        losses.double(), torch.tensor([e for e, _ in expected]).double(), rtol=1e-5, atol=1e-5
    )
    assert counts.tolist() == [k for _, k in expected]


def test_losses_are_those_of_the_model_itself_and_have_its_gradient(data, llama):
    batch = batch_of(data, [3])
    own = llama(**batch).loss
    losses, _ = response_losses(llama, batch)
    torch.testing.assert_close(losses[0], own)
    weight = llama.model.layers[0].mlp.up_proj.weight
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in (losses[0], own))
    torch.testing.assert_close(a, b)


def test_padding_side_and_batch_size_do_not_matter(data, llama):
    batch = batch_of(data, range(8))
    together, _ = response_losses(llama, batch)
    alone = torch.cat([response_losses(llama, batch_of(data, [i]))[0] for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    lengths = batch["attention_mask"].sum(1)
    shifts = batch["input_ids"].shape[1] - lengths
    assert shifts.any()

    def left(name):
        return torch.stack([row.roll(int(s)) for row, s in zip(batch[name], shifts, strict=True)])

    moved = {name: left(name) for name in batch}
    torch.testing.assert_close(response_losses(llama, moved)[0], together, rtol=1e-5, atol=1e-5)
    embedded, again = LanguageReader(llama)(batch)[0], LanguageReader(llama)(moved)[0]
    torch.testing.assert_close(again, embedded, rtol=1e-5, atol=1e-5)
    hidden = llama.model(input_ids=batch["input_ids"][:1, : lengths[0]]).last_hidden_state[0].mean(0)
    torch.testing.assert_close(embedded[0], hidden, rtol=1e-5, atol=1e-5)


def test_absolute_positions_do_not_move_with_padding_on_the_left():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=100, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    assert is_causal_lm(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    }
    alone, counts = response_losses(model, {"input_ids": ids})
    torch.testing.assert_close(response_losses(model, padded)[0], alone)
    torch.testing.assert_close(alone[0], model(input_ids=ids, labels=ids).loss)
    assert counts.tolist() == [3]


def test_prompts_never_count(data, llama):
    batch = batch_of(data, range(6))
    _, counts = response_losses(llama, batch)
    assert counts.tolist() == [len(data[i]["response"]) + 1 for i in range(6)], (
        "and the token that ends the turn"
    )
    everything = {k: v for k, v in batch.items() if k != "labels"}
    assert response_losses(llama, everything)[1].tolist() == (batch["attention_mask"].sum(1) - 1).tolist()
    with pytest.raises(ValueError, match="example 1 of the batch has no response token"):
        response_losses(
            llama, {"input_ids": torch.tensor([[5, 6], [5, 6]]), "labels": torch.tensor([[5, 6], [5, -100]])}
        )


def test_answers_alone_are_the_same_tokens_after_the_first_of_the_model(data, llama):
    batch = batch_of(data, range(5))
    alone = answers_alone(llama, batch)
    for i in range(5):
        answer = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert alone["input_ids"][i, : len(answer) + 1].tolist() == [1, *answer]
        assert alone["labels"][i].tolist() == [-100, *answer] + [-100] * (
            alone["labels"].shape[1] - len(answer) - 1
        )
        assert int(alone["attention_mask"][i].sum()) == len(answer) + 1
    assert response_losses(llama, alone)[1].tolist() == response_losses(llama, batch)[1].tolist()
    text = Examples([{"text": "abc"}, {"text": "ab"}], processing_class=TOKENIZER, task="causal-lm").read(
        [0, 1]
    )[1]
    with pytest.raises(ValueError, match="plain text without prompts"):
        answers_alone(llama, text)


def test_other_logits_than_those_of_the_head_are_refused(data):
    class Louder(type(tiny("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = Louder(tiny("llama").config).eval()
    model.__class__.__name__ = "LouderForCausalLM"
    with pytest.raises(ValueError, match="LouderForCausalLM makes its logits in a way that is not known"):
        serpette.score(model, data, "loss", processing_class=TOKENIZER, progress=False)


def test_soft_capped_logits(data):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, final_logit_softcapping=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    batch = batch_of(data, [0])
    LanguageReader(model).check()
    losses = LanguageReader(model)(batch)[1][:, 0]
    torch.testing.assert_close(losses[0], model(**batch).loss)


def test_a_model_of_another_kind_is_refused(data):
    with pytest.raises(ValueError, match="needs a causal language model, and BertForSeq"):
        observe(tiny("bert"), Examples(data, processing_class=TOKENIZER), task="causal-lm", progress=False)
    with pytest.raises(ValueError, match="features='model' has no meaning"):
        serpette.score(
            tiny("llama"), data, "loss", features="model", processing_class=TOKENIZER, progress=False
        )


def test_an_observation_has_losses_and_no_labels(data, llama):
    labelled = data.add_column("label", [i % 2 for i in range(len(data))])
    seen = observe(llama, Examples(labelled, processing_class=TOKENIZER), batch_size=5, progress=False)
    signals = seen.signals
    assert signals.task == "causal-lm" and signals.labels is None and signals.num_classes == 0
    assert signals.logits is None and signals.answer_losses is None and seen.passes == 1
    assert signals.embeddings.shape == (24, 32)
    expected, _ = response_losses(llama, batch_of(data, range(24)))
    torch.testing.assert_close(signals.response_losses, expected, rtol=1e-5, atol=1e-5)


def test_a_path_holds_the_losses_of_the_masked_models(data, llama):
    scorer = DLC(points=[0, 0.5, 0.25])
    result = serpette.score(llama, data, scorer, processing_class=TOKENIZER, progress=False)
    masked = MaskedPath(llama, scorer.path, llama.lm_head)
    along = torch.empty(3, 24)
    for p in range(3):
        with masked.at(p), torch.no_grad():
            along[p] = response_losses(llama, batch_of(data, range(24)))[0]
    torch.testing.assert_close(result.values["dlc"], along.double().mean(0), rtol=1e-5, atol=1e-5)
    assert along.std(0).min() > 0, "masks change the losses"
    assert result.cost["passes"] == 3


def test_a_run_is_resumed_and_its_scores_are_read_again(data, llama, tmp_path, monkeypatch):
    names = ["dlc", "ifd", "loss", "k_center"]
    options = {"processing_class": TOKENIZER, "batch_size": 4, "progress": False}
    whole = serpette.score(llama, data, names, **options)
    monkeypatch.setattr("serpette.data.observe.PILOT", 8)
    serpette.score(llama, data, names, out=tmp_path, **options)
    chunk = sorted((tmp_path / "observed").glob("*[0-9].safetensors"))[-1]
    chunk.unlink()
    again = serpette.score(llama, data, names, out=tmp_path, **options)
    for name in ("ifd", "loss"):
        torch.testing.assert_close(again.values[name], whole.values[name], rtol=1e-5, atol=1e-5)
    loaded = Scores.load(tmp_path)
    assert loaded.signals.task == "causal-lm" and loaded.signals.labels is None
    torch.testing.assert_close(loaded.methods["dlc"](loaded.signals), again.values["dlc"])
    assert len(serpette.select(loaded, "top_hard", 0.5, scorer="ifd").rows) == 12
    with pytest.raises(ValueError, match="differs in: answers"):
        serpette.score(llama, data, ["dlc", "loss"], out=tmp_path, **options)
    with pytest.raises(ValueError, match="differs in: .*max_length"):
        serpette.score(llama, data, names, out=tmp_path, max_length=60, **options)


def test_bad_rows_are_set_aside_and_what_is_cut_is_known(llama):
    rows = [*rows_of_text(6), {"id": "none", "prompt": "a", "response": None}]
    rows.append({"id": "long", "prompt": "a" * 50, "response": "b"})
    data = datasets.Dataset.from_list(rows)
    options = {"processing_class": TOKENIZER, "progress": False}
    result = serpette.score(llama, data, "loss", max_length=45, **options)
    assert set(result.set_aside) == {"none", "long"} and "max_length=45" in result.set_aside["long"]
    assert len(result.values["loss"]) == 6
    with pytest.raises(ValueError, match="'none': 'response' is missing.*set_aside"):
        serpette.score(llama, data, "loss", on_bad="raise", **options)


def test_a_loss_that_is_not_finite_is_named(data):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.convert_tokens_to_ids("j")] = torch.nan
    with pytest.raises(ValueError, match=r"id 'e\d+' is not finite"):
        serpette.score(model, data, "loss", processing_class=TOKENIZER, progress=False)


def test_data_pruner_on_a_language_model(data, llama):
    pruner = serpette.DataPruner("ifd", select="top_hard", keep=0.5, progress=False)
    small = pruner.fit(llama, data, processing_class=TOKENIZER).transform(data)
    assert len(small) == 12
    top = pruner.scores_.argsort(descending=True)[:12].sort().values
    assert torch.equal(pruner.indices_, top)
    with pytest.raises(ValueError, match="per_class=True needs classes, and this is a causal-lm"):
        serpette.DataPruner("ifd", keep=0.5, per_class=True).fit(llama, data, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match=r"causal-lm has none; give its option"):
        serpette.DataPruner("ifd", keep=0.5, progress=False).fit(llama, data, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="'el2n' has no meaning in a causal-lm; those that have: .*ifd"):
        serpette.score(llama, data, "el2n", processing_class=TOKENIZER)


def test_a_lora_changes_nothing_until_it_is_trained(data, llama):
    from peft import LoraConfig, get_peft_model

    plain = serpette.score(llama, data, "ifd", processing_class=TOKENIZER, progress=False)
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear"))
    again = serpette.score(adapted, data, "ifd", processing_class=TOKENIZER, progress=False)
    torch.testing.assert_close(again.values["ifd"], plain.values["ifd"])


def test_scores_do_not_depend_on_order(data, llama):
    options = {"processing_class": TOKENIZER, "progress": False}
    names = ["ifd", "dlc", "herding", "moderate"]
    a = serpette.score(llama, data, names, batch_size=5, **options)
    order = np.random.default_rng(0).permutation(len(data))
    b = serpette.score(llama, data.select(order), names, batch_size=7, **options)
    for name in names:
        torch.testing.assert_close(b.values[name], a.values[name][order], rtol=1e-4, atol=1e-4)


def test_a_collator_of_transformers_gives_the_same_losses(data, llama):
    from transformers import DataCollatorForSeq2Seq

    coded = Examples(data, processing_class=TOKENIZER, task="causal-lm")
    rows = [{k: v[0].tolist() for k, v in coded.read([i])[1].items()} for i in range(len(data))]
    tokens = datasets.Dataset.from_list(rows)
    collator = DataCollatorForSeq2Seq(TOKENIZER, padding=True)
    plain = serpette.score(llama, data, "loss", processing_class=TOKENIZER, progress=False)
    ready = serpette.score(llama, tokens, "loss", progress=False)
    collated = serpette.score(llama, tokens, "loss", data_collator=collator, progress=False)
    torch.testing.assert_close(ready.values["loss"], plain.values["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(collated.values["loss"], plain.values["loss"], rtol=1e-5, atol=1e-5)


def saved(folder, seed=0):
    tiny("llama", seed=seed).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_superfiltering_looks_through_its_own_model(data, llama, tmp_path):
    small = saved(tmp_path / "small", seed=1)
    options = {"processing_class": TOKENIZER, "progress": False}
    expected = serpette.score(tiny("llama", seed=1), data, "superfiltering", **options)
    assert expected.settings["models"] == {"superfiltering": "the scored model"}
    alone = serpette.score(llama, data, serpette.scorers.Superfiltering(model=small), **options)
    beside = serpette.score(
        llama, data, ["ifd", serpette.scorers.Superfiltering(model=small)], out=tmp_path / "out", **options
    )
    for result in (alone, beside):
        torch.testing.assert_close(result.values["superfiltering"], expected.values["superfiltering"])
        assert result.settings["models"] == {"superfiltering": small}
    torch.testing.assert_close(
        beside.values["ifd"], serpette.score(llama, data, "ifd", **options).values["ifd"]
    )
    assert not torch.equal(beside.values["ifd"].argsort(), expected.values["superfiltering"].argsort())
    module = serpette.score(llama, data, serpette.scorers.Superfiltering(tiny("llama", seed=1)), **options)
    torch.testing.assert_close(module.values["superfiltering"], expected.values["superfiltering"])
    made = json.loads((tmp_path / "out" / "result.json").read_text())["methods"]["superfiltering"]
    assert made == {"name": "superfiltering", "model": small, "processing_class": None}
    with pytest.raises(ValueError, match="'smollm2' is not in the zoo; did you mean 'smollm2-135m'"):
        serpette.score(llama, data, serpette.scorers.Superfiltering("smollm2"), **options)


def test_what_one_model_sets_aside_is_left_out_of_all_scores(llama, tmp_path):
    rows = [
        {
            "id": str(i),
            "messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c" * (i + 1)}],
        }
        for i in range(5)
    ]
    rows[2]["messages"].insert(0, {"role": "system", "content": "be"})
    from language import NO_SYSTEM

    tiny("llama").save_pretrained(tmp_path)
    character_tokenizer(NO_SYSTEM).save_pretrained(tmp_path)
    scorers = ["loss", serpette.scorers.Superfiltering(str(tmp_path))]
    result = serpette.score(
        llama, datasets.Dataset.from_list(rows), scorers, processing_class=TOKENIZER, progress=False
    )
    assert set(result.set_aside) == {"2"} and result.signals.ids.tolist() == ["0", "1", "3", "4"]
    assert result.rows.tolist() == [0, 1, 3, 4] and all(len(v) == 4 for v in result.values.values())


def test_the_command_line_finds_the_task(tmp_path, capsys):
    from serpette import cli

    model = saved(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows_of_text(8)))
    capsys.readouterr()

    def score(out, *more):
        code = cli.main(
            ["score", "--model", model, "--dataset", str(file), "--out", str(tmp_path / out), *more]
        )
        return code, capsys.readouterr().err

    assert score("a", "--scorer", "ifd", "--scorer", "loss") == (0, "")
    held = Scores.load(tmp_path / "a")
    assert held.signals.task == "causal-lm" and held.settings["max_length"] == 1024
    expected = serpette.score(
        tiny("llama"),
        datasets.Dataset.from_list(rows_of_text(8)),
        "ifd",
        processing_class=TOKENIZER,
        progress=False,
    )
    torch.testing.assert_close(held.values["ifd"], expected.values["ifd"], rtol=1e-5, atol=1e-5)
    assert cli.main(["select", "--scores", str(tmp_path / "a"), "--selector", "top_hard", "--scorer", "ifd",
                     "--keep", "0.5", "--out", str(tmp_path / "kept.txt")]) == 0  # fmt: skip
    assert len((tmp_path / "kept.txt").read_text().split()) == 4

    file.write_text("\n".join(json.dumps({**row, "label": i % 2}) for i, row in enumerate(rows_of_text(8))))
    code, err = score("b", "--scorer", "loss", "--task", "causal-lm")
    assert (code, err) == (0, "") and Scores.load(tmp_path / "b").signals.labels is None
    file.write_text("\n".join(json.dumps(row) for row in rows_of_text(8)))
    tiny("bert").save_pretrained(tmp_path / "bert")
    model = str(tmp_path / "bert")
    capsys.readouterr()
    code, err = score("c", "--scorer", "loss")
    assert code == 2 and "no label column found" in err


def test_the_trainer_learns_from_the_batches_of_examples(data):
    from serpette.tuning import train

    model = tiny("llama")
    examples = Examples(data, processing_class=TOKENIZER, task="causal-lm")
    before = serpette.score(model, data, "loss", processing_class=TOKENIZER, progress=False).values["loss"]
    train(
        model,
        len(data),
        lambda rows: examples.read(rows)[1],
        epochs=4,
        batch_size=8,
        learning_rate=1e-2,
        seed=0,
    )
    after = serpette.score(model, data, "loss", processing_class=TOKENIZER, progress=False).values["loss"]
    assert (after < before - 0.5).all()
