import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from trainers import ByHand, close, model, orders, rows, same, train
from transformers import Trainer, TrainerCallback

import serpette
from serpette import ScoreWhileTraining
from serpette.lora_gradients import LoraGradients
from serpette.scorers import EL2N, TSA
from serpette.types import Signals, uniform_of

N, B = 37, 4


def tsa_by_hand(net, data, order, loss_of):
    """Running TSA of a model that stands still: one backward pass of a summed loss a batch, by ourselves."""
    reading = TSA(statistics="running").reading
    scores = torch.full((N,), torch.nan, dtype=torch.float64)
    plain = data.with_format(None)
    x, y = torch.tensor(plain["input_ids"]), torch.tensor(plain["labels"])
    offsets = (uniform_of(serpette.data.examples.Examples(data).ids, 0) * 2**20).long()
    with LoraGradients(net, lambda seen: reader.layer(seen)) as hooks:
        reader = reading.reader(hooks.layers)
        for batch in order.split(B):
            hooks.begin(len(batch))
            loss = loss_of(net(input_ids=x[batch]).logits, y[batch])
            reader.begin(len(batch), torch.device("cpu"), offsets[batch], hooks.input_of)
            loss.backward()
            hooks.end()
            signals = Signals(
                batch.numpy().astype(str), readings={reading: reader.batch()}, task="regression"
            )
            scores[batch] = TSA(statistics="running")(signals)
    return scores


def summed(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def summed_responses(logits, labels):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )


@pytest.mark.parametrize("kind, loss_of", [("bert", summed), ("llama", summed_responses)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_tsa_reads_the_summed_loss_whatever_the_trainer_makes_of_it(tmp_path, kind, loss_of, accumulation):
    data = rows(N, kind)
    for name, parameter in (net := model(kind)).named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    callback = ScoreWhileTraining("tsa", keep=0.4, ids=data, seed=3)
    train(tmp_path, callback, data, net, learning_rate=0.0, gradient_accumulation_steps=accumulation)
    wanted = tsa_by_hand(net, data, orders(N, 3, 0), loss_of)
    assert torch.allclose(callback.scores_, wanted, rtol=1e-3)
    assert torch.equal(callback.scores_.argsort(), wanted.argsort())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_equals_a_loop_by_hand(tmp_path, accumulation):
    data, k = rows(N), 15
    callback = ScoreWhileTraining("loss", keep=0.4, ids=data, seed=3, per_class=False)
    trained, diary = train(tmp_path, callback, data, gradient_accumulation_steps=accumulation)
    hand, losses = ByHand(model(), data, diary.scaled), torch.zeros(N)

    def steps(batches):  # of a Trainer epoch, 10 batches: the last step is shorter
        units = [batches[i : i + 10] for i in range(0, len(batches), 10)]
        return [unit[i : i + accumulation] for unit in units for i in range(0, len(unit), accumulation)]

    first = steps(list(orders(N, 3, 0).split(B)))
    wanted = -(-2 * k // B)  # batches for two passes over the kept
    wanted = -(-wanted // accumulation) * accumulation
    total = len(first) + wanted // accumulation
    number = 0
    for step in first:
        found = hand.step([(batch, torch.ones(len(batch))) for batch in step], 1 - number / total)
        for batch, each in zip(step, found, strict=True):
            losses[batch] = each
        number += 1
    kept = losses.argsort(descending=True)[:k].sort().values
    later = torch.cat([orders(N, 3, p, kept) for p in (1, 2, 3)])  # the third fills the last step
    for step in steps(list(later.split(B))[:wanted]):
        hand.step([(batch, torch.ones(len(batch))) for batch in step], 1 - number / total)
        number += 1
    assert len(diary.rates) == total == number
    assert diary.rates == pytest.approx([3e-3 * (1 - i / total) for i in range(1, total + 1)], abs=1e-12)
    assert diary.rates[-1] == 0
    assert torch.equal(callback.kept_, kept)
    assert torch.allclose(callback.scores_.float(), losses, atol=1e-6)
    assert callback.ids_.tolist() == [f"r{row}" for row in kept.tolist()]
    assert close(trained, hand.net)


@pytest.mark.parametrize("scorer, accumulation", [("tsa", 1), ("el2n", 1), ("tsa", 3)])
def test_resumed_run_has_the_same_bits(tmp_path, scorer, accumulation):
    data = rows(N)

    def fresh():
        return ScoreWhileTraining(scorer, keep=0.4, epochs=1, at_epoch=1)

    every = 5 if accumulation == 1 else 2
    whole, options = fresh(), {"gradient_accumulation_steps": accumulation}
    one, diary = train(
        tmp_path, whole, data, model(dropout=0.1), save_strategy="steps", save_steps=every, **options
    )
    assert len(diary.rates) == 3 * every + (3 if accumulation == 1 else 1)
    for step in (every, 2 * every, 3 * every):  # in the scored epoch, at its end, in the pruned part
        again = fresh()
        other, rest = train(
            tmp_path, again, data, model(dropout=0.1), resume=tmp_path / f"checkpoint-{step}", **options
        )
        assert same(one, other), step
        assert torch.equal(whole.scores_, again.scores_) and torch.equal(whole.kept_, again.kept_)
        assert torch.equal(whole.losses_, again.losses_)
        assert rest.rates == diary.rates[step:]
        assert again.cost_["seconds"]["scored_epochs"] > 0


def test_second_epoch_scores_after_one_that_is_as_without(tmp_path):
    data = rows(N)
    callback = ScoreWhileTraining(EL2N(), at_epoch=2, epochs=2, keep=0.5, per_class="equal")
    train(tmp_path, callback, data, num_train_epochs=5, save_strategy="steps", save_steps=15)
    again = ScoreWhileTraining(EL2N(), at_epoch=2, epochs=2, keep=0.5, per_class="equal")
    train(tmp_path, again, data, num_train_epochs=5, resume=tmp_path / "checkpoint-15")
    assert torch.equal(callback.scores_, again.scores_)
    history = callback._tally.losses_TN
    assert history.shape == (2, N) and not torch.equal(history[0], history[1])
    labels = torch.tensor(data.with_format(None)["labels"])[callback.kept_]
    counts = labels.bincount(minlength=3)
    assert len(callback.kept_) == 19 and counts.max() - counts.min() <= 1


def test_passes_end_where_epochs_would(tmp_path):
    callback = ScoreWhileTraining("loss", keep=0.4)
    strategies = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch")
    _, diary = train(tmp_path, callback, rows(N), num_train_epochs=4, **strategies)
    evaluated = [event[1:] for event in diary.events if event[0] == "evaluate"]
    assert evaluated == [event[1:] for event in diary.events if event[0] == "save"]
    # 10 batches, then the steps that hold row 15, 30 and 45 of the kept
    assert [step for step, _ in evaluated] == [10, 14, 18, 22]
    assert [math.floor(epoch) for _, epoch in evaluated] == [1, 2, 3, 4]


def test_max_steps_and_parts_of_epochs(tmp_path):
    callback = ScoreWhileTraining("loss", keep=0.4)
    _, diary = train(tmp_path, callback, rows(N), max_steps=25)
    assert len(diary.rates) == 25 and diary.rates[9] == pytest.approx(3e-3 * 15 / 25)
    callback = ScoreWhileTraining("loss", keep=0.4)
    _, diary = train(tmp_path, callback, rows(N), num_train_epochs=2.5)
    assert len(diary.rates) == 10 + -(-(15 + 8) // B) and diary.rates[-1] == 0


def test_workers_read_what_is_counted(tmp_path):
    one, other = (ScoreWhileTraining("loss", keep=0.4) for _ in range(2))
    a, _ = train(tmp_path, one, rows(N))
    b, _ = train(tmp_path, other, rows(N), dataloader_num_workers=2, dataloader_persistent_workers=True)
    assert same(a, b) and torch.equal(one.scores_, other.scores_)


def test_bf16_and_gradient_checkpointing_score_alike(tmp_path):
    found = []
    for options in ({}, {"bf16": True}, {"gradient_checkpointing": True}):
        callback = ScoreWhileTraining("tsa", keep=0.4)
        train(tmp_path, callback, rows(N), learning_rate=1e-5, **options)
        found.append(callback.scores_)
    assert torch.allclose(found[0], found[2], rtol=1e-4)
    assert serpette.evaluate.spearman(found[0], found[1]) > 0.95


def test_cost_and_files(tmp_path):
    data = rows(N)
    callback = ScoreWhileTraining("tsa", keep=0.4, ids=data, out=tmp_path / "scores")
    train(tmp_path, callback, data)
    seconds = callback.cost_["seconds"]
    assert 0 < seconds["hooks"] < seconds["scored_epochs"] and seconds["selection"] > 0
    extra = seconds["hooks"] + seconds["selection"]
    assert callback.cost_["extra_share"] == pytest.approx(
        extra / (seconds["scored_epochs"] - seconds["hooks"])
    )
    held = serpette.Scores.load(tmp_path / "scores")
    assert held.signals.ids.tolist() == data.with_format(None)["id"]
    assert torch.equal(held.values["tsa"], callback.scores_) and held.cost["extra_share"] > 0
    assert (tmp_path / "scores" / "kept.txt").read_text().split() == callback.ids_.tolist()
    assert serpette.select(held, "top_hard", 0.4).rows.tolist() == callback.kept_.tolist()
    assert callback._visits is None and not any(m._forward_hooks for m in model().modules())


def test_example_without_a_response_is_set_aside(tmp_path):
    labels = list(rows(N, "llama").with_format(None)["labels"])
    labels[5] = [-100] * 8
    for scorer in ("loss", "tsa"):
        callback = ScoreWhileTraining(scorer, keep=0.4)
        train(tmp_path, callback, rows(N, "llama", labels=labels), model("llama"))
        assert callback.set_aside_ == {"5": "no response token"}
        assert torch.isnan(callback.scores_).nonzero().tolist() == [[5]] and 5 not in callback.kept_.tolist()


def test_changed_data_and_settings_are_refused_on_resume(tmp_path):
    data = rows(N)
    train(tmp_path, ScoreWhileTraining("loss", keep=0.4), data, save_strategy="steps", save_steps=5)

    def resume(callback, data=data, **options):
        train(tmp_path, callback, data, resume=tmp_path / "checkpoint-5", **options)

    y = data.with_format(None)["labels"]
    changed = [(y[0] + 1) % 3, *y[1:]]
    with pytest.raises(ValueError, match="training data changed"):
        resume(ScoreWhileTraining("loss", keep=0.4), rows(N, labels=changed))
    with pytest.raises(ValueError, match="training data changed"):
        resume(ScoreWhileTraining("loss", keep=0.4), rows(N, seed=1, labels=y))
    with pytest.raises(ValueError, match=r"keep: 0.4 -> 0.5"):
        resume(ScoreWhileTraining("loss", keep=0.5), data)
    with pytest.raises(ValueError, match=r"accumulation: 1 -> 2"):
        resume(ScoreWhileTraining("loss", keep=0.4), data, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="ignore_data_skip"):
        resume(ScoreWhileTraining("loss", keep=0.4), data, ignore_data_skip=True)
    elsewhere = tmp_path / "elsewhere"
    os.rename(tmp_path / "checkpoint-5", elsewhere)
    with pytest.raises(ValueError, match="resume_from="):
        train(tmp_path, ScoreWhileTraining("loss", keep=0.4), data, resume=elsewhere)
    with pytest.raises(ValueError, match="is of step 10"):
        callback = ScoreWhileTraining("loss", keep=0.4, resume_from=tmp_path / "checkpoint-10")
        train(tmp_path, callback, data, resume=elsewhere)
    train(tmp_path, ScoreWhileTraining("loss", keep=0.4, resume_from=elsewhere), data, resume=elsewhere)
    next(elsewhere.glob("serpette-*")).write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        train(tmp_path, ScoreWhileTraining("loss", keep=0.4, resume_from=elsewhere), data, resume=elsewhere)


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            output.logits, inputs["labels"], weight=torch.tensor([1.0, 5.0, 1.0])
        )
        return (loss, output) if return_outputs else loss


class Twice(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**inputs).loss


def test_class_weights_stop_tsa_and_not_the_loss(tmp_path):
    with pytest.raises(ValueError, match="not the plain loss"):
        train(tmp_path, ScoreWhileTraining("tsa", keep=0.4), rows(N), cls=Weighted)
    callback = ScoreWhileTraining("loss", keep=0.4)
    train(tmp_path, callback, rows(N), cls=Weighted)
    assert len(callback.kept_) == 15


@pytest.mark.parametrize(
    "options, words, training",
    [
        ({"keep": 0.05}, "keeps 2 of 37 examples, fewer than one batch of 4", {}),
        ({"keep": 0.11, "per_class": True}, "keep at least", {"per_device_train_batch_size": 8}),
        ({"at_epoch": 3}, "nothing would be left", {}),
        ({"at_epoch": 1}, "nothing would be left", {"max_steps": 10}),
        ({"ids": ["a", "b"]}, "ids has 2 entries, the training set 37 rows", {}),
        ({"ids": ["a"] * N}, "must be unique", {}),
        ({}, "LengthGroupedSampler", {"train_sampling_strategy": "group_by_length"}),
        ({}, "dataloader_drop_last", {"dataloader_drop_last": True}),
        ({}, "label_smoothing_factor", {"label_smoothing_factor": 0.1}),
        ({}, "runs twice in one training batch", {"cls": Twice}),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, words, training):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, ScoreWhileTraining(**({"scorer": "loss"} | options)), rows(N), **training)


def test_models_and_tasks_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="has no LoRA layer"):
        train(tmp_path, ScoreWhileTraining("tsa"), rows(N), model(lora=False))
    with pytest.raises(ValueError, match="'el2n' has no meaning in a causal-lm"):
        train(tmp_path, ScoreWhileTraining("el2n"), rows(N, "llama"), model("llama"))
    with pytest.raises(ValueError, match="needs classes, and this is a causal-lm"):
        train(tmp_path, ScoreWhileTraining("loss", per_class=True), rows(N, "llama"), model("llama"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scorer": "tsaa"}, "did you mean 'tsa'"),
        ({"scorer": "herding"}, "'herding' needs embeddings"),
        ({"scorer": "dlc"}, "'dlc' needs features along a path"),
        ({"scorer": TSA()}, "statistics='sampled' wants moments"),
        ({"scorer": TSA(statistics="running", epochs=3)}, "epochs=3 of the scorer"),
        ({"select": "dq"}, "select='dq' needs embeddings"),
        ({"select": "flex_rand"}, "open hyperparameter"),
        ({"keep": 1.5}, "keep=1.5 must be in"),
        ({"at_epoch": 0}, "at_epoch=0 must be"),
        ({"epochs": True}, "epochs=True must be"),
        ({"per_class": "yes"}, "per_class='yes' must be"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ScoreWhileTraining(**options)


def test_settings_tell_scorers_apart():
    one = ScoreWhileTraining(TSA(statistics="running"))._settings()
    other = ScoreWhileTraining(TSA(statistics="running", damping=0.2))._settings()
    assert one != other and dataclasses.is_dataclass(TSA().reading)


TWO_PROCESSES = """
    import os, pathlib, sys
    import torch
    sys.path[:0] = {paths!r}
    torch.set_num_threads(1)
    from trainers import rows, train
    from serpette import DynamicPruning, ScoreWhileTraining
    folder, rank = pathlib.Path({folder!r}), os.environ["RANK"]
    for name, make in (
        ("score", lambda: ScoreWhileTraining("loss", keep=0.4)),
        ("tsa", lambda: ScoreWhileTraining("tsa", keep=0.4)),
        ("dynamic", lambda: DynamicPruning()),
    ):
        options = {{"num_train_epochs": 4, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}}
        one = make()
        net, diary = train(folder / name, one, rows(37), save_strategy="steps", save_steps=3, **options)
        held = dict(net.state_dict())
        for step in (3, 6):
            two = make()
            checkpoint = folder / name / f"checkpoint-{{step}}"
            other, _ = train(folder / name, two, rows(37), resume=checkpoint, **options)
            assert all(torch.equal(v, held[k]) for k, v in other.state_dict().items()), (name, step)
        found = {{"losses": one.losses_, "rates": diary.rates, "kept": list(map(int, one.kept_))}}
        if name != "dynamic":
            found["scores"] = one.scores_
        torch.save(found, folder / f"{{name}}-{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_choose_the_same(tmp_path):
    script = tmp_path / "run.py"
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[2] / "src")]
    script.write_text(textwrap.dedent(TWO_PROCESSES.format(paths=paths, folder=str(tmp_path))))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--nproc_per_node=2", "--master_port=29617"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("score", "tsa", "dynamic"):
        one, other = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert one["kept"] == other["kept"] and torch.equal(one["losses"], other["losses"])
        assert torch.isfinite(one["losses"]).all() and one["rates"][-1] == 0
        if name != "dynamic":
            assert torch.equal(one["scores"], other["scores"]) and len(one["kept"]) == 15


class Interrupts(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_model_of_an_interrupted_training_is_free_again(tmp_path):
    data, net = rows(N), model()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ScoreWhileTraining("tsa", keep=0.4), data, net, more=[Interrupts()])
    x = torch.randint(3, 100, (2, 8))
    for _ in range(3):  # a loop by hand, with batches of another size
        net(input_ids=x, labels=torch.tensor([0, 1])).loss.backward()
    callback = ScoreWhileTraining("tsa", keep=0.4)
    train(tmp_path, callback, data, net)
    assert len(callback.kept_) == 15
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
