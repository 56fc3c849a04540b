"""The stages of a recipe: each of them for each task, killed and gone on with, and what they leave out."""

import copy
import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import yaml
from language import character_tokenizer
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from serpette import run
from serpette.pipeline import checkpoints, tune
from serpette.pipeline.job import Job
from serpette.pipeline.progress import Sayer
from serpette.pipeline.stages import Stages
from serpette.recipe import ArmSpec, DataSpec, ModelSpec, PruneSpec, Recipe, ShrinkSpec, TuneSpec, check
from serpette.weights.load import load as load_model
from serpette.weights.packed import load_packed
from serpette.zoo import tiny

HALF = {"pattern": "structured", "round_to": 1, "sparsity": 0.5}


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def recipe_of(places: Path, out: Path, *arms: ArmSpec, **more) -> Recipe:
    data = DataSpec(str(places / "images"), train_limit=24, test_limit=12)
    tune = TuneSpec(epochs=2, batch_size=6, rank=2, learning_rate=3e-3)
    return Recipe("tiny", ModelSpec(str(places / "model")), data, arms, tune, out=str(out), **more)


class Killed(Exception):
    pass


def kill(monkeypatch, target, after=False):
    """Calls of `target` end in Killed, before or after they have done their work; once."""
    module, name = target
    work = getattr(module, name)

    def dying(*args, **kwargs):
        monkeypatch.setattr(module, name, work)
        if after:
            work(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(module, name, dying)


def kill_at_step(monkeypatch, step):
    monkeypatch.setattr(checkpoints, "EVERY_SECONDS", 0.0)

    def dying(self, at, total):
        if at == step:
            monkeypatch.setattr(Sayer, "step", lambda self, at, total: seen.append(at))
            raise Killed

    seen: list[int] = []
    monkeypatch.setattr(Sayer, "step", dying)
    return seen


@pytest.fixture(scope="module")
def job(places, tmp_path_factory):
    recipe = recipe_of(places, tmp_path_factory.mktemp("job"), ArmSpec("full"))
    return Job(recipe, Sayer(False), recipe.folder, 0)


@pytest.fixture(scope="module")
def batch_norm_job(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    tiny("resnet").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text((places / "model/preprocessor_config.json").read_text())
    recipe = recipe_of(places, tmp_path_factory.mktemp("job"), ArmSpec("full"))
    recipe = dataclasses.replace(recipe, model=ModelSpec(str(folder)))
    return Job(recipe, Sayer(False), recipe.folder, 0)


def state(made):
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def the_same(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(value, b[name]) for name, value in a.items())


ROWS = {"method": "rows", "importance": "taylor", "rank": 3}
RESUMED = {
    "lora, dropout": ({"dropout": 0.3}, None),
    "lora, checkpointing": ({"checkpointing": True}, None),
    "dora": ({"method": "dora"}, None),
    "shira": ({"method": "shira"}, None),
    "rows, global": ({**ROWS, "scope": "global"}, None),
    "rows, live": ({**ROWS, "kernel": "live", "modes": "both"}, None),
    "full": ({"method": "full"}, None),
    "head": ({"method": "head"}, None),
    "lora, pruned": ({}, {"average": 0.5}),
    "lora, heads pruned": ({}, HALF),
    "sequential": ({}, {"importance": "lora_prune_seq"}),
    "full, pruned": ({"method": "full"}, {"importance": "magnitude"}),
    "BatchNorm": ({"method": "full"}, None),
    "BatchNorm, rows": ({**ROWS, "target_modules": "all-layers"}, None),
}


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.filterwarnings("ignore:a training of 8 steps")
def test_a_tuning_goes_on_with_the_same_bits(case, job, batch_norm_job, tmp_path, monkeypatch):
    """Killed at step 6 of 8, gone on with from the checkpoint after step 5; then read from disk."""
    job = copy.copy(batch_norm_job if case.startswith("BatchNorm") else job)
    settings, prune = RESUMED[case]
    arm = ArmSpec("x", tune=settings, prune=prune)
    job.recipe = dataclasses.replace(job.recipe, arms=(arm,))
    check(job.recipe)
    positions = torch.arange(len(job.scores.rows))
    whole = tune.tuned(job, arm, positions, Stages(tmp_path / "whole"))
    stages = Stages(tmp_path / "killed")
    seen = kill_at_step(monkeypatch, 6)
    with pytest.raises(Killed):
        tune.tuned(job, arm, positions, stages)
    assert [p.name for p in stages.place("checkpoints").iterdir()] == ["checkpoint-5"]
    again = tune.tuned(job, arm, positions, stages)
    assert seen == [6, 7, 8] and not stages.place("checkpoints").exists()
    the_same(state(whole), state(again))
    monkeypatch.setattr(tune, "train", lambda *a, **k: pytest.fail("tuned again"))
    read = tune.tuned(job, arm, positions, stages)
    the_same(state(whole), state(read))
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        outputs = [made.model.eval()(pixel_values=x).logits for made in (whole, again, read)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert (read.masks is None) == (prune is None)
    if prune is not None:
        the_same(whole.masks, again.masks)
        the_same(whole.masks, read.masks)
    assert whole.facts["flops"] == read.facts["flops"] and whole.facts["steps"] == 8
    assert again.facts == read.facts and read.facts["seconds"]["tuning"] > 0


def test_a_checkpoint_that_is_not_whole_is_not_taken(job, tmp_path, monkeypatch):
    """Killed while the checkpoint after step 5 is written: the one after step 4 counts."""
    positions, arm, stages = torch.arange(len(job.scores.rows)), job.recipe.arms[0], Stages(tmp_path)
    whole = tune.tuned(job, arm, positions, Stages(tmp_path / "whole"))
    monkeypatch.setattr(checkpoints, "EVERY_SECONDS", 0.0)
    save = checkpoints.Checkpoints.on_save

    def dying(self, args, at, *more, **kwargs):
        if at.global_step == 5:
            raise Killed
        save(self, args, at, *more, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoints, "on_save", dying)
        with pytest.raises(Killed):
            tune.tuned(job, arm, positions, stages)
    folder = stages.place("checkpoints")
    assert {p.name for p in folder.iterdir()} == {"checkpoint-4", "checkpoint-5"}
    assert checkpoints.last(folder) == folder / "checkpoint-4"
    earlier = checkpoints.spent(folder / "checkpoint-4")
    (folder / "checkpoint-4" / checkpoints.SPENT).write_text(json.dumps(earlier | {"tuning": 1000.0}))
    again = tune.tuned(job, arm, positions, stages)
    the_same(state(whole), state(again))
    assert 1000 < again.facts["seconds"]["tuning"] < 1100, "what earlier runs spent counts"


def test_a_short_tuning_writes_no_checkpoint(job, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoints.Checkpoints, "on_save", lambda self, *args, **kwargs: pytest.fail("saved a checkpoint")
    )
    tune.tuned(job, job.recipe.arms[0], torch.arange(len(job.scores.rows)), Stages(tmp_path))


CUT = ArmSpec(
    "cut", None, "random", 0.5, prune=HALF, shrink={"ragged": True}, export=("safetensors", "packed")
)


@pytest.fixture(scope="module")
def undisturbed(places, tmp_path_factory):
    recipe = recipe_of(places, tmp_path_factory.mktemp("runs") / "whole", CUT, ArmSpec("lora"))
    run(recipe, progress=False)
    return recipe


def weights_in(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(out)}/{name}": value
        for path in (out / "arms").rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.filterwarnings("ignore:a training of 4 steps")
@pytest.mark.parametrize("stage", ["tune", "shrink", "export", "evaluate", "measure", "sensitivity", "card"])
def test_a_killed_run_goes_on_at_its_stage(stage, undisturbed, tmp_path, monkeypatch):
    from serpette.pipeline import arm, card, weights

    recipe = dataclasses.replace(undisturbed, out=str(tmp_path / "out"))
    targets = {
        "shrink": (weights, "shrunk"),
        "export": (arm, "export"),
        "evaluate": (arm, "predict"),
        "measure": (weights, "measured"),
        "sensitivity": (weights, "sensitivity_of"),
        "card": (card, "write"),
    }
    if stage == "tune":
        kill_at_step(monkeypatch, 3)
    else:
        kill(monkeypatch, targets[stage], after=stage in ("export", "card"))
    with pytest.raises(Killed):
        run(recipe, progress=False)
    trained, train = [], tune.train
    monkeypatch.setattr(tune, "train", lambda *a, **k: trained.append(k["resume_from"]) or train(*a, **k))
    run(recipe, progress=False)
    assert len(trained) == (
        1 if stage not in ("tune", "sensitivity") else {"tune": 2, "sensitivity": 0}[stage]
    )
    if stage == "tune":
        assert trained[0].name == "checkpoint-2" and trained[1] is None
    before, after = result(undisturbed.folder), result(recipe.folder)
    spent = ("seconds", "peak_bytes", "weights", "export")
    for old, new in zip(before["arms"], after["arms"], strict=True):
        assert {k: v for k, v in old.items() if k not in spent} == {
            k: v for k, v in new.items() if k not in spent
        }
        assert old["seconds"].keys() == new["seconds"].keys()
        assert old["export"]["formats"] == new["export"]["formats"]
    assert before["arms"][0]["weights"]["layers"] == after["arms"][0]["weights"]["layers"]
    assert before["comparisons"] == after["comparisons"]
    the_same(weights_in(undisturbed.folder), weights_in(recipe.folder))
    assert not list(recipe.folder.rglob("unfinished")), "what only an unfinished arm needs is gone"


def test_what_an_export_says_of_itself(undisturbed):
    out = undisturbed.folder
    cut, lora = result(out)["arms"]
    assert cut["export"]["formats"] == ["safetensors", "packed"] and lora["export"]["formats"] == ["adapter"]
    for number, arm in enumerate((cut, lora)):
        folder = out / "arms" / f"{number:02d}-{arm['name']}" / "model"
        sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
        assert arm["export"]["files"] | {"README.md": sizes["README.md"]} == sizes
        assert "preprocessor_config.json" in arm["export"]["files"]
    assert cut["weights"]["files"] == cut["export"]["files"] and cut["weights"]["stock"] in (True, False)


def words(n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{j}" for j in rng.integers(0, 40, 6)) for _ in range(n)]


@pytest.fixture(scope="module")
def worlds(places, tmp_path_factory):
    """(model, train, test) by task; a class name is YAML and HTML at once."""
    root = tmp_path_factory.mktemp("worlds")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *[f"w{i}" for i in range(40)]])}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="[PAD]", unk_token="[UNK]")
    found = {"image": (places / "model", places / "images", None)}
    for task, labels in (("text", ["- 'a': {", "b"]), ("regression", None)):
        folder = root / task
        tiny("bert", num_labels=2 if labels else 1).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for split, n in (("train", 24), ("test", 12)):
            texts = words(n, n)
            targets = [text.count("w1") for text in texts]
            column = [labels[t % 2] for t in targets] if labels else [t + 0.5 for t in targets]
            datasets.Dataset.from_dict({"text": texts, "label": column}).to_json(folder / f"{split}.jsonl")
        found[task] = (folder / "model", folder / "train.jsonl", folder / "test.jsonl")
    folder = root / "causal-lm"
    tiny("llama").save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 8)):
        rows = [
            {"prompt": "".join(rng.choice([*"abcd"], 4)), "response": "".join(rng.choice([*"xyz"], 4))}
            for _ in range(n)
        ]
        datasets.Dataset.from_list(rows).to_json(folder / f"{split}.jsonl")
    found["causal-lm"] = (folder / "model", folder / "train.jsonl", folder / "test.jsonl")
    return found


def world(worlds, task, out, *arms, **more):
    model, train, test = worlds[task]
    data = DataSpec(str(train), None if test is None else str(test), train_limit=20, max_length=64)
    tuning = TuneSpec(epochs=1, batch_size=4, rank=2)
    return Recipe("all-stages", ModelSpec(str(model)), data, arms, tuning, batch_size=8, out=str(out), **more)


def logits(model, inputs):
    with torch.inference_mode():
        return model.eval()(**inputs).logits


@pytest.mark.filterwarnings("ignore:a training of 3 steps")
@pytest.mark.parametrize("task", ["image", "text", "regression", "causal-lm"])
def test_all_stages_of_each_task(task, worlds, tmp_path):
    scorer = "loss" if task == "causal-lm" else "el2n"
    targets = {"targets": "ffn"} if task == "causal-lm" else {}
    recipe = world(
        worlds, task, tmp_path / "out",
        ArmSpec("lora", export=("adapter", "safetensors")),
        ArmSpec(
            "all of it", scorer, "top_hard", 0.5, prune=HALF | targets, shrink={}, export=("safetensors",),
            evaluate={"latency_batch_sizes": [2], "batch_size": 3},
            predicted={"value": 0.5, "seconds": 3},
        ),
        ArmSpec("one shot", tune={"method": "none"}, prune={"importance": "wanda"}, export=("packed",)),
        ArmSpec("as it is", tune={"method": "none"}),
    )  # fmt: skip
    run(recipe, progress=False)
    got = result(recipe.folder)
    lora, whole, once, base = got["arms"]
    metric = "perplexity" if task == "causal-lm" else "accuracy"
    assert all(metric in arm for arm in got["arms"])
    assert whole["predicted"] == {"value": 0.5, "seconds": 3} and "predicted" not in lora
    assert whole["examples"] == 10 and whole["weights"]["after"]["parameters"] < got["model"]["parameters"]
    assert [t["batch_size"] for t in whole["weights"]["timings"]] == [2]
    assert whole["prune"]["shrink"] and not once["prune"]["shrink"]
    assert once["steps"] == once["epochs"] == once["trainable_parameters"] == once["flops"]["tuning"] == 0
    assert once["weights"]["sparsity"] == pytest.approx(0.5, abs=0.02) and once["seconds"]["tuning"] == 0
    assert base["export"]["formats"] == [] and base["prune"] is None and base["steps"] == 0
    assert not (recipe.folder / "arms" / "03-as_it_is").exists()

    arms = recipe.folder / "arms"
    inputs = {"input_ids": torch.randint(3, 40, (2, 6))}
    if task == "image":
        inputs = {"pixel_values": torch.rand(2, 3, 32, 32)}
    from serpette.data.sources import open_model

    count = {"image": 3, "text": 2, "regression": 1}.get(task)
    kind = task if task in ("regression", "causal-lm") else "classification"
    from peft import PeftModel

    opened, _ = open_model(recipe.model.name, task=kind, num_labels=count, seed=0)
    adapter = logits(PeftModel.from_pretrained(opened, arms / "00-lora" / "model" / "adapter"), inputs)
    merged = logits(load_model(arms / "00-lora" / "model"), inputs)
    assert torch.allclose(adapter, merged, atol=1e-5) and not torch.equal(
        merged, logits(open_model(recipe.model.name, task=kind, num_labels=count, seed=0)[0], inputs)
    )
    assert logits(load_model(arms / "01-all_of_it" / "model"), inputs).shape == adapter.shape
    packed = load_packed(arms / "02-one_shot" / "model" / "packed.safetensors")
    assert packed.keys() == load_model(arms / "00-lora" / "model").state_dict().keys()
    check_card(arms / "00-lora" / "model", task, "peft", "from peft import PeftModel")
    text = check_card(arms / "01-all_of_it" / "model", task, "transformers", "from_pretrained" if whole[
        "export"]["stock"] else "serpette.weights.load")  # fmt: skip
    assert "against lora:" in text and "10 of 20" in text and "(50 %)" in text and scorer in text
    text = check_card(arms / "02-one_shot" / "model", task, "transformers", "load_packed")
    assert "in one shot" in text and "Tuning: none" in text


def check_card(folder, task, library, loading):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    tag = {"image": "image-classification", "causal-lm": "text-generation"}.get(task, "text-classification")
    metric = {"regression": "r_squared", "causal-lm": "perplexity"}.get(task, "accuracy")
    assert front["base_model"] == "model" and front["library_name"] == library and "serpette" in front["tags"]
    assert front["pipeline_tag"] == tag and front["metrics"] == [metric] and len(front["datasets"]) == 1
    for said in (loading, "seed 0", "torch ", "hardware: ", "export: ", "examples of "):
        assert said in body, said
    assert (
        "<b>" not in body and "&lt;b&gt;cat" in body if task == "image" else "/" not in front["datasets"][0]
    )
    assert str(folder.parent.parent.parent) not in text, "no path of this machine"
    return body


@pytest.mark.parametrize("importance", ["obs", "taylor", "magnitude"])
def test_one_shot_is_what_serpette_prune_does(importance, places, tmp_path):
    from serpette.weights import prune

    spec = {"importance": importance, "sparsity": 0.4, "importance_examples": 7}
    arm = ArmSpec("once", tune={"method": "none"}, prune=spec, export=("safetensors",), evaluate=False)
    recipe = recipe_of(places, tmp_path / "out", arm)
    run(recipe, progress=False)
    job = Job(recipe, Sayer(False), recipe.folder, 0)
    seen = tune.seen(job, 7, torch.arange(len(job.scores.rows)))
    assert len(seen) == 7
    batch = job.reader(seen)(list(range(7)))
    model = copy.deepcopy(job.model)
    prune(model, importance, 0.4, loader=[batch], progress=False)
    saved = load_model(recipe.folder / "arms" / "00-once" / "model").state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, saved[name], atol=1e-5), name


@pytest.mark.parametrize("seeds", [1, 2])
def test_without_evaluation_no_test_examples_are_needed(seeds, worlds, tmp_path):
    model, train, _ = worlds["text"]
    recipe = Recipe(
        "no-test",
        ModelSpec(str(model)),
        DataSpec(str(train), test="not/there", max_length=16),
        (ArmSpec("full", tune={"method": "full"}), ArmSpec("cut", prune=HALF)),
        TuneSpec(epochs=1, batch_size=12, rank=2),
        shrink=ShrinkSpec(),
        evaluate=None,
        seeds=seeds,
        out=str(tmp_path / "out"),
    )
    with pytest.warns(UserWarning, match="a training of 2 steps"):
        report = run(recipe, progress=False)
    got = result(recipe.folder)
    assert got["data"]["test"] is None and got["data"]["test_examples"] == 0 and got["comparisons"] == []
    assert not any("accuracy" in arm or "evaluation" in arm["seconds"] for arm in got["arms"])
    assert got["arms"][1]["weights"]["timings"] == []
    assert got["arms"][1]["weights"]["after"]["parameters"] < got["model"]["parameters"]
    assert [arm["export"]["formats"] for arm in got["arms"]] == [["safetensors"], ["safetensors"]]
    first = recipe.folder / "seeds" / "0" if seeds > 1 else recipe.folder
    assert "Nothing was measured" in (first / "arms" / "00-full" / "model" / "README.md").read_text()
    assert report.exists()
    if seeds > 1:  # whole models are large
        assert not list((recipe.folder / "seeds" / "1" / "arms").glob("*/model"))


def test_an_adapter_without_running_statistics(batch_norm_job):
    from serpette.pipeline.export import formats

    job = copy.copy(batch_norm_job)
    rows = {**ROWS, "target_modules": "all-layers"}
    job.recipe = dataclasses.replace(job.recipe, arms=(ArmSpec("x", tune=rows),))
    assert formats(job, job.recipe.arms[0]) == ("safetensors",)
    with pytest.raises(ValueError, match="export=adapter of arm 'x'.*BatchNorm.*use safetensors"):
        formats(job, dataclasses.replace(job.recipe.arms[0], export=("adapter",)))


def test_what_is_saved_unless_a_recipe_says(job):
    from serpette.pipeline.export import formats

    job = copy.copy(job)
    one_shot = ArmSpec("o", tune={"method": "none"}, prune={"importance": "wanda"})
    cases = [
        (ArmSpec("a"), ("adapter",), ("adapter",)),
        (ArmSpec("f", tune={"method": "full"}), ("safetensors",), ()),
        (ArmSpec("p", prune={}), ("safetensors",), ()),
        (one_shot, ("safetensors",), ()),
        (ArmSpec("n", tune={"method": "none"}), (), ()),
        (ArmSpec("e", prune={}, export=()), (), ()),
        (ArmSpec("k", prune={}, export=("packed",)), ("packed",), ("packed",)),
    ]
    for arm, first, later in cases:
        for job.first, wanted in ((True, first), (False, later)):
            assert formats(job, arm) == wanted, arm.name
    job.recipe = dataclasses.replace(job.recipe, prune=PruneSpec(sparsity=0.2), export=("onnx",))
    assert formats(job, ArmSpec("a")) == ("onnx",)


def test_a_test_set_with_one_target_is_refused_before_the_tuning(worlds, tmp_path, monkeypatch):
    model, train, test = worlds["regression"]
    rows = datasets.Dataset.from_json(str(test), cache_dir=str(tmp_path / "cache"))
    same = rows.map(lambda row: row | {"label": 2.5}, load_from_cache_file=False)
    same.to_json(tmp_path / "test.jsonl")
    changed = {**worlds, "regression": (model, train, tmp_path / "test.jsonl")}
    recipe = world(changed, "regression", tmp_path / "out", ArmSpec("full"))
    monkeypatch.setattr("serpette.scoring.score", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(ValueError, match="has 12 targets in 'test', all of them 2.5; r2 needs targets that"):
        Job(recipe, Sayer(False), recipe.folder, 0)


class Watched:
    """A progress bar that says what is done with it."""

    def __init__(self, seen):
        self.seen = seen

    def start(self):
        self.seen.append("start")

    def stop(self):
        self.seen.append("stop")

    def add_task(self, what, total):
        return 0

    def update(self, task, completed, total, description):
        self.seen.append(f"{description} {completed}/{total}")


def test_a_bar_says_what_runs_and_ends_with_it(monkeypatch, capsys):
    seen: list[str] = []
    monkeypatch.setattr("rich.progress.Progress", lambda **options: Watched(seen))
    say = Sayer(True)
    say._terminal = True
    say.step(1, 2)
    say.step(2, 2)
    assert seen == ["start", "tuning 1/2", "tuning 2/2", "stop"]
    seen.clear()
    say.step(1, 9, "probing")  # and no further
    say.done()
    say.done()
    assert seen == ["start", "probing 1/9", "stop"]
    seen.clear()
    say.step(1, 9)
    say("what comes next")
    say.step(1, 9)
    assert seen == ["start", "tuning 1/9", "stop", "start", "tuning 1/9"]
    assert capsys.readouterr().out == "==> what comes next\n"
