"""The whole adviser on tiny models: an answer, a recipe that runs; killed and gone on with; bad budgets."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from language import character_tokenizer

from serpette import cli, pipeline, recipe
from serpette.adviser import advise, work
from serpette.adviser.pilot import learning_curve, sizes_for
from serpette.data.examples import Examples
from serpette.recipe import TuneSpec
from serpette.zoo import tiny

KEEPS = (0.3, 0.6)
TUNE = TuneSpec(epochs=1, batch_size=4, rank=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A model and an image folder with three classes that tell themselves apart; one image is broken."""
    from PIL import Image
    from transformers import ViTImageProcessor

    root = tmp_path_factory.mktemp("pictures")
    tiny("vit").save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 24)):
        for i in range(n):
            folder = root / "images" / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (32, 32, 3)) + 80 * np.eye(3)[i % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "images" / "train" / "a" / "0.png").write_bytes(b"broken")
    (root / "images" / "train" / "b" / "4.png").write_bytes(
        (root / "images" / "train" / "b" / "1.png").read_bytes()
    )
    return root


def advised(root, out, **budget):
    return advise(
        root / "model",
        root / "images",
        tune=TUNE,
        keeps=KEEPS,
        out=out,
        progress=False,
        **(budget or {"max_loss": 50.0}),
    )


@pytest.fixture(scope="module")
def advice(pictures, tmp_path_factory):
    return advised(
        pictures, tmp_path_factory.mktemp("advice") / "pick.yaml", max_loss=50.0, latency="1x", compare=True
    )


def test_it_says_what_it_found(advice):
    result = json.loads((advice.folder / "result.json").read_text())
    assert result == json.loads(json.dumps(advice.result))
    assert (
        result["kind"] == "advice" and result["data"]["examples"] == 60 and result["data"]["observed"] == 59
    )
    assert result["health"]["classes"] == {"a": 19, "b": 20, "c": 20}
    assert [s["id"] for s in result["health"]["set_aside"]] == ["train/a/0.png"] or "0.png" in str(
        result["health"]["set_aside"]
    )
    assert result["health"]["exact_duplicates"]["examples"] == 1
    assert {c["keep"] for c in result["choices"]} == set(KEEPS)
    assert {"random", "herding"} <= {c["name"] for c in result["choices"]}
    assert result["recommendation"]["sentence"] == advice.sentence and "predicted to lose" in advice.sentence
    assert result["full"]["seconds"] > result["full"]["steps"] * result["full"]["step_seconds"]  # and reading
    assert len(result["runners_up"]) == 2 and result["recommendation"]["seconds"] <= result["full"]["seconds"]
    assert [s["sparsity"] for s in result["weights"]["sparsities"]][0] == 0.25
    assert (advice.folder / "report.html").stat().st_size > 10_000


def test_its_recipe_runs_as_it_is_and_the_prediction_stands_beside_what_came(advice, tmp_path):
    job = recipe.load(advice.folder.with_suffix(".yaml"))
    assert job == advice.recipe and job.arms[0].name == "everything"
    pipeline.run(dataclasses.replace(job, out=str(tmp_path)), progress=False)
    arms = {a["name"]: a for a in json.loads((tmp_path / "result.json").read_text())["arms"]}
    assert arms["advised"]["predicted"] == advice.recipe.arms[1].predicted
    assert arms["advised"]["examples"] == advice.result["recommendation"]["choice"]["examples"]


@pytest.mark.parametrize("part", ["tunings", "measure", "cuts"])
def test_a_killed_advice_goes_on_and_says_the_same(part, advice, pictures, tmp_path, monkeypatch):
    """With the costs of the first call, which are measured, all else is the same."""
    out = tmp_path / "pick.yaml"
    (tmp_path / "pick" / "found").mkdir(parents=True)
    home = {"observed": work.observing, "recommend": importlib.import_module("serpette.adviser")}.get(
        part, work
    )

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    shutil.copy(advice.folder / "found" / "step.json", tmp_path / "pick" / "found")
    if part == "tunings":
        (tmp_path / "pick" / "found" / "step.json").unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(home, part, killed)
        advised(pictures, out, max_loss=50.0, latency="1x")
    assert not out.exists()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "pick" / "found").iterdir()}
    again = advised(pictures, out, max_loss=50.0, latency="1x")
    assert all(f.stat().st_mtime_ns == time for f, time in before.items() if f.name != "probing.json")
    first = [
        {k: c[k] for k in ("name", "keep", "value", "loss", "to_random")} for c in advice.result["choices"]
    ]
    assert [
        {k: c[k] for k in ("name", "keep", "value", "loss", "to_random")} for c in again.result["choices"]
    ] == first
    assert again.result["health"] == advice.result["health"]


@pytest.mark.parametrize(
    "budget, words",
    [
        ({"time": "0.001x"}, "time='0.001x' is too little: the cheapest option takes"),
        ({"memory": "0.01MB"}, "memory='0.01MB' is too little for every way to tune: the least is"),
        ({"latency": "0.01x"}, "latency='0.01x' is not reached: the fastest model measured is"),
    ],
)
def test_impossible_budgets_say_what_comes_nearest_and_keep_what_was_found(
    budget, words, pictures, advice, tmp_path
):
    shutil.copytree(advice.folder, tmp_path / "pick")
    shutil.copy(advice.folder.with_suffix(".yaml"), tmp_path)
    with pytest.raises(ValueError, match=words):
        advised(pictures, tmp_path / "pick.yaml", **budget)
    assert not (tmp_path / "pick.yaml").exists()  # what was advised before is not what was asked for
    assert "no recommendation yet" in (tmp_path / "pick" / "report.html").read_text()
    assert json.loads((tmp_path / "pick" / "result.json").read_text())["choices"]


def test_a_limit_of_the_latency_looks_at_all_shares_anew(advice, pictures, tmp_path):
    shutil.copytree(advice.folder, tmp_path / "pick")
    found = tmp_path / "pick" / "found"
    held = json.loads((found / "weights for latency.json").read_text())
    held["found"]["cuts"] = held["found"]["cuts"][:1]
    (found / "weights.json").write_text(json.dumps(held))  # as a call without the limit may leave it
    again = advised(pictures, tmp_path / "pick.yaml", max_loss=50.0, latency="1x")
    assert again.result["weights"] == advice.result["weights"]


def test_where_the_short_tuning_learned_nothing_a_cut_loses_who_knows_what(advice, pictures, tmp_path):
    shutil.copytree(advice.folder, tmp_path / "pick")
    pilot = tmp_path / "pick" / "found" / "pilot.json"
    held = json.loads(pilot.read_text())
    held["found"] |= {"learned": False, "trivial": 34.0}
    pilot.write_text(json.dumps(held))
    again = advised(pictures, tmp_path / "pick.yaml", max_loss=50.0, latency="1x")
    for cut in again.result["weights"]["sparsities"]:
        assert cut["high"] - cut["loss"] == pytest.approx(33) == pytest.approx(cut["loss"] - cut["low"])


def test_cut_models_are_judged_by_examples_of_all_classes(advice, pictures, tmp_path, monkeypatch):
    """Also in a folder that is sorted by class."""
    seen = []

    def cuts(model, read, n, **rest):
        seen.append(read(list(range(n)))["labels"])
        raise ValueError("enough")

    shutil.copytree(advice.folder, tmp_path / "pick")
    (tmp_path / "pick" / "found" / "weights for latency.json").unlink()
    monkeypatch.setattr(work, "cuts", cuts)
    monkeypatch.setattr(work, "CUT_EXAMPLES", {"classification": 20})
    with pytest.raises(ValueError, match="latency='0.9x' cannot be kept: enough"):
        advised(pictures, tmp_path / "pick.yaml", latency="0.9x")
    assert len(seen[0]) == 20 and set(seen[0].tolist()) == {0, 1, 2}


def test_data_that_changed_are_not_answered_from_the_folder(pictures, tmp_path):
    shutil.copytree(pictures / "images", tmp_path / "images")
    (tmp_path / "pick").mkdir()
    ask = {"tune": TUNE, "keeps": KEEPS, "out": tmp_path / "pick.yaml", "progress": False}
    with pytest.raises(ValueError, match="is too little"):
        advise(pictures / "model", tmp_path / "images", **ask, memory="0.01MB")
    (tmp_path / "images" / "train" / "a" / "3.png").rename(tmp_path / "images" / "train" / "b" / "3.png")
    with pytest.raises(ValueError, match="holds the advice on something else, or on data that have changed"):
        advise(pictures / "model", tmp_path / "images", **ask)


def test_another_job_does_not_take_the_folder(advice, pictures):
    with pytest.raises(ValueError, match="holds the advice on something else"):
        advise(
            pictures / "model",
            pictures / "images",
            keeps=(0.5,),
            out=advice.folder.with_suffix(".yaml"),
            progress=False,
        )


def one_class(folder):
    datasets.Dataset.from_dict({"text": ["x", "y"] * 6, "label": ["a"] * 12}).to_csv(folder / "one.csv")
    return folder / "one.csv"


def constant(folder):
    datasets.Dataset.from_dict({"text": ["x", "y"] * 6, "target": [0.5] * 12}).to_csv(folder / "flat.csv")
    return folder / "flat.csv"


def test_where_it_writes(tmp_path, monkeypatch):
    adviser = importlib.import_module("serpette.adviser")
    assert adviser.places("a/my advice.yaml") == (Path("a/my advice"), Path("a/my advice.yaml"))
    assert adviser.places("advice-0.3x") == (Path("advice-0.3x"), Path("advice-0.3x/recipe.yaml"))
    assert adviser._name(Path("a/my advice")) == "my_advice"
    monkeypatch.chdir(tmp_path)
    assert adviser._name(Path("runs/demo")) == "demo-run"
    (tmp_path / "mine.yaml").write_text("name: mine")
    with pytest.raises(ValueError, match="mine.yaml exists and is no advice's"):
        adviser._claim(tmp_path / "mine", tmp_path / "mine.yaml", {})


def test_bad_arguments(pictures, tmp_path):
    for given, words in (
        ({"keeps": (1.5,)}, "keep=1.5"),
        ({"tune": TuneSpec(method="head")}, "tune.method='head' is not advised on"),
        ({"metric": "f1"}, "metric='f1' must be"),
        ({"dataset": [1, 2]}, "dataset=list must be a name or a path"),
        ({"tune": TuneSpec(checkpointing=True)}, "tune.checkpointing=True is not advised on; leave it at"),
        ({"tune": TuneSpec("rows"), "latency": "0.6x"}, "which tune.method='rows' does not allow"),
        ({"tune": TuneSpec(dropout=0.1), "latency": "0.6x"}, "which tune.dropout=0.1 does not allow"),
        ({"test": str(tmp_path / "none.csv")}, "none.csv"),
        ({"seed": -1}, "seed"),
        ({"dataset": one_class(tmp_path)}, "the examples have one class, 'a'"),
        ({"dataset": constant(tmp_path), "task": "regression"}, "all targets are the same"),
    ):
        with pytest.raises(ValueError, match=words):
            advise(pictures / "model", **({"dataset": pictures / "images", "out": tmp_path} | given))


def test_on_the_command_line(pictures, tmp_path, capsys):
    out = tmp_path / "line.yaml"
    args = [
        "advise",
        "--model",
        str(pictures / "model"),
        "--dataset",
        str(pictures / "images"),
        "--out",
        str(out),
    ]
    assert cli.main([*args, "--epochs", "1", "--batch-size", "4", "--rank", "2", "--max-loss", "60"]) == 0
    said = capsys.readouterr().out
    assert "predicted to lose" in said and str(out) in said and out.exists()
    assert cli.main([*args, "--time", "30"]) == 2
    assert "time='30' must be" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    tiny("llama").save_pretrained(root / "model")
    character_tokenizer().save_pretrained(root / "model")
    rows = [{"prompt": "ab" * (i % 5 + 1), "response": "ba" * (i % 3 + 1)} for i in range(80)]
    long = [{"prompt": "ab" * 40, "response": "b"}] * 20  # of which 64 tokens leave no response
    for split, part in (("train", rows[:60]), ("test", rows[60:]), ("some too long", long + rows[:60])):
        datasets.Dataset.from_list(part).to_json(root / f"{split}.jsonl")
    return root


def test_a_language_model_has_a_curve_of_short_tunings(chats, tmp_path):
    """Also where the first batches, and batches of the short tunings, could not be read."""
    advice = advise(
        chats / "model",
        chats / "some too long.jsonl",
        test=str(chats / "test.jsonl"),
        max_length=64,
        max_loss=90.0,
        tune=TuneSpec(epochs=1, batch_size=4, rank=2, learning_rate=0.01),
        keeps=KEEPS,
        out=tmp_path / "lm.yaml",
        progress=False,
    )
    result = advice.result
    assert result["metric"] == "loss" and {c["name"] for c in result["choices"]} == {"random"}
    assert [p["examples"] for p in result["curve"]["points"]] == [4, 8, 15]
    assert (
        result["data"]["examples"] == 80
        and result["data"]["readable"] == 60
        and len(result["health"]["set_aside"]) == 20
    )
    assert result["health"]["exact_duplicates"]["examples"] == 60 - 15  # 5 prompts x 3 responses
    assert result["full"]["steps"] == 15 and any("20 of 80 examples" in note for note in result["notes"])
    best, told = result["recommendation"], advice.recipe.arms[0].predicted
    assert result["budget"]["max_loss"] == 0.9 and " nats (" in result["runners_up"][0]["sentence"]
    assert [told[k] for k in ("loss", "loss_low", "loss_high")] == pytest.approx(
        [best[k] for k in ("loss", "low", "high")], abs=1e-3
    )
    for choice in result["choices"]:
        assert choice["value"] - result["full"]["value"] == pytest.approx(choice["loss"])
    assert result["full"]["value"] > 0 and recipe.load(tmp_path / "lm.yaml").arms
    assert (tmp_path / "lm" / "report.html").exists()


def test_pilots_are_those_of_a_loop_and_are_kept(chats, tmp_path):
    from serpette.data.sources import open_dataset, open_model

    model, tokenizer = open_model(chats / "model", task="causal-lm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    examples = Examples(
        open_dataset(chats / "train.jsonl"), processing_class=tokenizer, max_length=64, task="causal-lm"
    )
    _, values = learning_curve(model, examples, [4, 8], TUNE, folder=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 6 and (values < 0).all()
    _, again = learning_curve(None, examples, [4, 8], TUNE, folder=tmp_path)
    assert np.array_equal(values, again)


def test_pilot_sizes_keep_the_time():
    assert sizes_for(52.5, 0.1, 1, 10_000, 4) == [25, 50, 100]
    assert sizes_for(0.0, 0.1, 1, 10_000, 4) == [4, 8, 16]
    assert sizes_for(1e9, 0.1, 1, 400, 4) == [25, 50, 100]
