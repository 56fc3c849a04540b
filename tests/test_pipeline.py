"""A recipe from end to end on a tiny model: what it writes, that it goes on, that it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from language import character_tokenizer
from transformers import PreTrainedTokenizerFast

from serpette import run
from serpette.data import pruner
from serpette.data.scores import Scores
from serpette.evaluate import paired_over_seeds
from serpette.pipeline.reading import read
from serpette.recipe import ArmSpec, DataSpec, ModelSpec, Recipe, load
from serpette.zoo import tiny

SRC = Path(__file__).parent.parent / "src"
RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_file(places: Path, out: Path, extra: str = "") -> Path:
    file = out.parent / f"{out.name}.yaml"
    file.write_text(
        f"""
name: tiny
out: {out}
model: {{name: {places / "model"}}}
data: {{train: {places / "images"}}}
tune: {{epochs: 2, batch_size: 6, rank: 2, learning_rate: 3e-3}}
batch_size: 8
arms:
  - {{name: full}}
  - {{name: random, select: random, keep: 0.5}}
  - {{name: dlc, scorer: dlc, select: flex_rand, keep: 0.5}}
  - {{name: equal, scorer: el2n, select: top_easy, keep: 0.5, per_class: equal}}
{extra}"""
    )
    return file


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    report = run(load(recipe_file(places, out)), progress=False)
    assert report == out / "report.html" and report.exists()
    return out


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_what_a_run_writes(finished):
    got = result(finished)
    arms = {arm["name"]: arm for arm in got["arms"]}
    assert list(arms) == ["full", "random", "dlc", "equal"]
    assert [arms[a]["examples"] for a in arms] == [35, 18, 18, 18], (
        "one image does not decode; keep is of all 36"
    )
    assert arms["equal"]["kept_by_class"] == [6, 6, 6]
    assert arms["dlc"]["gamma"] is not None and arms["full"]["select"] is None
    for arm in arms.values():
        assert 0 <= arm["accuracy"] <= 1 and len(arm["accuracy_by_class"]) == 3
        assert arm["seconds"]["tuning"] > 0 and arm["flops"]["tuning"] > 0 and arm["peak_bytes"] > 0
    assert arms["full"]["seconds"]["scoring"] == arms["random"]["seconds"]["scoring"] == 0
    assert arms["dlc"]["seconds"]["scoring"] > arms["equal"]["seconds"]["scoring"] > 0
    assert arms["dlc"]["flops"]["scoring"] > arms["equal"]["flops"]["scoring"]
    assert arms["full"]["mmd"] == pytest.approx(0, abs=1e-6) and arms["dlc"]["mmd"] > 0
    assert arms["full"]["steps"] == 2 * 6 and arms["dlc"]["steps"] == 2 * 3
    assert "ant/0.png" in got["data"]["set_aside"][0]["id"]
    assert {(c["arm"], c["to"]) for c in got["comparisons"]} >= {
        ("dlc", "full"),
        ("dlc", "random"),
        ("random", "full"),
    }
    assert got["scorers"]["dlc"]["curve"] and got["versions"]["torch"] and got["hardware"]["cores"] >= 1
    assert got["model"]["trainable_parameters"] < got["model"]["parameters"]
    gallery = json.loads((finished / "gallery.json").read_text())
    assert {(g["class"], g["kind"]) for g in gallery} == {
        (c, k) for c in range(3) for k in ("easiest", "hardest")
    }
    page = (finished / "report.html").read_text()
    assert "&lt;b&gt;cat" in page and "<b>cat" not in page


def test_a_run_that_is_finished_is_not_run_again(places, finished, monkeypatch):
    monkeypatch.setattr("serpette.pipeline.tune.train", lambda *a, **k: pytest.fail("tuned again"))
    before = result(finished)["arms"]
    run(load(recipe_file(places, finished)), progress=False)
    assert result(finished)["arms"] == before


def test_the_folder_of_another_recipe_is_refused(places, finished):
    file = recipe_file(places, finished, extra="seed: 5")
    with pytest.raises(ValueError, match="another recipe.*--out"):
        run(load(file), progress=False)


def test_one_scorer_with_two_options_and_names_alike(places, tmp_path):
    file = recipe_file(
        places,
        tmp_path / "out",
        extra="""  - {name: "a b", scorer: dlc, select: top_hard, keep: 0.2}
  - name: a_b
    scorer: dlc
    scorer_options: {variant: official, points: [0, 0.3]}
    select: top_hard
    keep: 0.2
""",
    )
    file.write_text(file.read_text().replace("epochs: 2", "epochs: 1"))
    run(load(file), progress=False)
    got = result(tmp_path / "out")
    assert [arm["name"] for arm in got["arms"]][-2:] == ["a b", "a_b"], "one spelling as a file name"
    assert set(got["scorers"]) == {"dlc", "el2n", "dlc:a_b"}
    assert got["scorers"]["dlc:a_b"]["points"] == [0, 0.3] and got["scorers"]["dlc"]["passes"] >= 4


def test_training_on_the_test_split_is_refused(places, tmp_path):
    file = recipe_file(places, tmp_path / "out")
    file.write_text(
        file.read_text().replace(
            f"train: {places / 'images'}", f"train: {places / 'images'}, test_split: train"
        )
    )
    with pytest.raises(ValueError, match="the training split, too"):
        load(file)


@pytest.fixture
def before_tuning(monkeypatch):
    """How many examples the model is given before anything is tuned, batch by batch."""
    from serpette.pipeline import job, tune

    given, opened, train = [], job.open_model, tune.train
    counts = {"until": None}

    def open_model(*args, **kwargs):
        model, processor = opened(*args, **kwargs)
        model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(len([*args, *kwargs.values()][0])), with_kwargs=True
        )
        return model, processor

    def first(*args, **kwargs):
        counts["until"] = len(given) if counts["until"] is None else counts["until"]
        return train(*args, **kwargs)

    monkeypatch.setattr(job, "open_model", open_model)
    monkeypatch.setattr(tune, "train", first)
    return lambda: given[: counts["until"]]


def with_arms(places: Path, out: Path, *names: str, **changes) -> Recipe:
    recipe = load(recipe_file(places, out))
    return dataclasses.replace(recipe, arms=tuple(a for a in recipe.arms if a.name in names), **changes)


def test_random_arms_alone_need_no_pass_of_the_model(places, finished, tmp_path, monkeypatch, before_tuning):
    out = tmp_path / "random"
    recipe = with_arms(places, out, "full", "random")
    run(recipe, progress=False)
    assert before_tuning() == []
    got, whole = result(out), result(finished)
    assert [arm["name"] for arm in got["arms"]] == ["full", "random"]
    assert got["data"]["set_aside"] == whole["data"]["set_aside"] != []
    for arm, number in (("full", "00"), ("random", "01")):
        mine, its = (json.loads((o / "arms" / f"{number}-{arm}.json").read_text()) for o in (out, finished))
        for key in ("ids", "each", "accuracy", "kept_by_class", "steps", "flops"):
            assert mine[key] == its[key], key
        assert mine["mmd"] is None and mine["seconds"]["scoring"] == 0
    assert got["observing"]["decoding"] > 0 and got["scorers"]["random"]["passes"] == 0
    assert "How far the subsets are" in (finished / "report.html").read_text()
    assert "How far the subsets are" not in (out / "report.html").read_text()

    (out / "result.json").unlink()
    (out / "arms" / "01-random.json").unlink()
    monkeypatch.setattr("serpette.data.observe._Work.decode", lambda *a: pytest.fail("read again"))
    run(recipe, progress=False)
    assert stable(result(out)["arms"]) == stable(got["arms"])


def test_what_is_only_read_is_chosen_from_as_what_is_scored(tmp_path):
    model = tiny("vit")
    data = [{"pixel_values": torch.rand(3, 32, 32), "label": i % 3} for i in range(12)]
    seen = read(model, data, seed=3, out=tmp_path, progress=False)
    scored = pruner.score(model, data, "random", seed=3, progress=False)
    assert list(seen.values) == ["random"] and torch.equal(seen.values["random"], scored.values["random"])
    assert torch.equal(seen.rows, scored.rows) and seen.total == 12 and seen.cost["passes"] == 0
    held = Scores.load(tmp_path)
    assert held.signals.ids.tolist() == scored.signals.ids.tolist() and held.signals.embeddings is None
    picks = [pruner.select(s, "random", 0.5, seed=3).ids.tolist() for s in (seen, held, scored)]
    assert picks[0] == picks[1] == picks[2] and len(picks[0]) == 6


def test_bad_examples_stop_a_run_that_only_reads(places, tmp_path):
    recipe = with_arms(places, tmp_path / "out", "random", on_bad="raise")
    with pytest.raises(ValueError, match=r"ant/0\.png.*on_bad='set_aside'"):
        run(recipe, progress=False)


def test_one_scored_arm_is_one_pass_of_the_model(places, tmp_path, before_tuning):
    run(with_arms(places, tmp_path / "out", "full", "random", "equal"), progress=False)
    assert sorted(before_tuning()) == [4, 7, 8, 8, 8], "each of the 35 once"
    got = result(tmp_path / "out")
    assert [arm["mmd"] is None for arm in got["arms"]] == [False] * 3 and "random" not in got["scorers"]


@pytest.mark.parametrize("select", ["d2", "flex_rand"])
def test_a_selector_that_looks_at_embeddings_gets_them(places, tmp_path, select, before_tuning):
    recipe = with_arms(places, tmp_path / "out", "random")
    run(dataclasses.replace(recipe, arms=(ArmSpec("chosen", None, select, 0.5),)), progress=False)
    assert sum(before_tuning()) == 35
    (chosen,) = result(tmp_path / "out")["arms"]
    assert chosen["examples"] == 18 and chosen["mmd"] > 0 and chosen["seconds"]["scoring"] > 0


def stable(arms: list[dict]) -> list[dict]:
    measured = ("seconds", "peak_bytes")
    return [{k: v for k, v in arm.items() if k not in measured} for arm in arms]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_and_ends_the_same(places, finished, tmp_path, how):
    out = tmp_path / "stopped"
    file = recipe_file(places, out)
    command = [sys.executable, "-m", "serpette.cli", "run", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored in the background
        )
    deadline = time.monotonic() + 120
    while (
        not (out / "arms" / "00-full.json").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(how)
    code = process.wait(60)
    assert code == (-9 if how == signal.SIGKILL else 130), (tmp_path / "log").read_text()
    if how == signal.SIGINT:
        assert "goes on" in (tmp_path / "log").read_text()
    assert not (out / "report.html").exists()
    run(load(file), progress=False)
    assert stable(result(out)["arms"]) == stable(result(finished)["arms"])
    assert (out / "scores.parquet").read_bytes() == (finished / "scores.parquet").read_bytes()


def test_a_regression_recipe(tmp_path):
    rng = np.random.default_rng(0)
    model = tiny("bert", num_labels=1)
    model.save_pretrained(tmp_path / "model")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *[f"w{i}" for i in range(40)]])}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, n in (("train", 40), ("test", 20)):
        texts = [" ".join(f"w{j}" for j in rng.integers(0, 40, 6)) for _ in range(n)]
        targets = [float(text.count("w1")) + 0.5 for text in texts]
        datasets.Dataset.from_dict({"text": texts, "label": targets}).to_json(tmp_path / f"{split}.jsonl")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
name: regression
out: {tmp_path / "out"}
model: {{name: {tmp_path / "model"}}}
data:
  train: {tmp_path / "train.jsonl"}
  test: {tmp_path / "test.jsonl"}
  max_length: 16
tune: {{method: head, epochs: 1}}
arms:
  - {{name: full}}
  - {{name: random, select: random, keep: 0.5, per_class: false}}
  - {{name: dlc, scorer: dlc, select: flex_rand, keep: 0.5}}
"""
    )
    run(load(file), progress=False)
    got = result(tmp_path / "out")
    assert got["task"] == "regression" and got["metric"] == "r2"
    assert [arm["examples"] for arm in got["arms"]] == [40, 20, 20]
    assert all("accuracy_by_class" not in arm for arm in got["arms"])


@pytest.fixture(scope="module")
def small_loprune(places):
    """recipes/vit_loprune.yaml with a tiny model, two seeds and other images in each."""
    recipe = load(RECIPES / "vit_loprune.yaml")
    return dataclasses.replace(
        recipe,
        seeds=2,
        model=ModelSpec(str(places / "model")),
        data=DataSpec(str(places / "images"), train_limit=24, test_limit=20),
        tune=dataclasses.replace(recipe.tune, epochs=1),
    )


@pytest.fixture(scope="module")
def seeds_done(small_loprune, tmp_path_factory):
    recipe = dataclasses.replace(small_loprune, out=str(tmp_path_factory.mktemp("runs") / "seeds"))
    run(recipe, progress=False)
    return recipe


def test_several_seeds(seeds_done):
    out = seeds_done.folder
    got, parts = result(out), [result(out / "seeds" / str(seed)) for seed in (0, 1)]
    assert got["seeds"] == [0, 1] and got["recipe"]["seeds"] == 2 and got["seed"] == 0
    arms = {arm["name"]: arm for arm in got["arms"]}
    assert list(arms) == [arm.name for arm in seeds_done.arms]
    for number, arm in enumerate(got["arms"]):
        accuracies = [part["arms"][number]["accuracy"] for part in parts]
        assert arm["accuracy"] == pytest.approx(np.mean(accuracies))
        assert [one["accuracy"] for one in arm["by_seed"]] == accuracies
        assert arm["interval"][0] <= arm["accuracy"] <= arm["interval"][1]
    pairs = {(c["arm"], c["to"]): c for c in got["comparisons"]}
    assert {("tsa 50", "full"), ("tsa 50", "random 50"), ("tsa 50", "loss 50")} <= set(pairs)
    assert ("tsa 50", "random 70") not in pairs
    mine, its = ([one["accuracy"] for one in arms[name]["by_seed"]] for name in ("tsa 50", "full"))
    assert pairs["tsa 50", "full"]["difference"] == paired_over_seeds(mine, its)[0]

    files = [json.loads((out / "seeds" / s / "arms" / "00-full.json").read_text()) for s in "01"]
    assert set(files[0]["ids"]) != set(files[1]["ids"]), "each seed draws its own training examples"
    assert {len(f["each"]) for f in files} == {20}
    for arm in got["arms"]:
        assert (arm["seconds"]["scoring"] > 0) == (arm["scorer"] is not None)
    spent = parts[0]["observing"]
    assert spent["warmup"] > 0 and spent["moments"] > 0
    tsa = parts[0]["arms"][list(arms).index("tsa 50")]["seconds"]["scoring"]
    assert spent["warmup"] + spent["moments"] < tsa, "the warm-up and the moments are part of what tsa costs"
    assert arms["loss 50"]["seconds"]["scoring"] < arms["tsa 50"]["seconds"]["scoring"]
    assert arms["tsa 50"]["flops"]["scoring"] > 3 * arms["loss 50"]["flops"]["scoring"]
    page = (out / "report.html").read_text()
    assert "2 seeds, 0 to 1" in page and "paired seed by seed" in page


def test_a_killed_run_of_seeds_trains_only_what_is_missing(seeds_done, monkeypatch, tmp_path):
    from serpette.pipeline import tune as stage

    out, trained, train = seeds_done.folder, [], stage.train
    before = result(out)
    part = out / "seeds" / "1"
    (out / "result.json").unlink()
    (part / "result.json").unlink()
    gone = sorted((part / "arms").iterdir())[-1]
    gone.unlink()
    monkeypatch.setattr(stage, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    run(seeds_done, progress=False)
    assert len(trained) == 1 and gone.exists()
    after = result(out)
    for old, new in zip(before["arms"], after["arms"], strict=True):
        assert old["accuracy"] == new["accuracy"] and old["mmd"] == new["mmd"]
        assert stable(old["by_seed"]) == stable(new["by_seed"])
    assert before["comparisons"] == after["comparisons"]


def test_a_seed_alone_is_that_seed_of_several(seeds_done, tmp_path):
    alone = dataclasses.replace(seeds_done, seeds=1, seed=1, out=str(tmp_path))
    alone = dataclasses.replace(alone, arms=(alone.arms[0], alone.arms[6]))
    run(alone, progress=False)
    got = result(tmp_path)["arms"]
    several = {arm["name"]: arm["by_seed"][1] for arm in result(seeds_done.folder)["arms"]}
    for arm in got:
        assert arm["mmd"] == several[arm["name"]]["mmd"] and arm["steps"] == several[arm["name"]]["steps"]


@pytest.fixture(scope="module")
def small_instruct(tmp_path_factory):
    """recipes/smollm2_instruct.yaml with a tiny model and few instructions, one of them without an answer."""
    root = tmp_path_factory.mktemp("instruct")
    tiny("llama").save_pretrained(root / "model")
    character_tokenizer().save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 8)):
        prompts = ["".join(rng.choice(list("abcd"), 4)) for _ in range(n)]
        answers = ["".join(rng.choice(list("xyz"), 3 + i % 3)) for i in range(n)]
        rows = [{"prompt": p, "response": a} for p, a in zip(prompts, answers, strict=True)]
        rows[-1]["response"] = "" if split == "train" else "xy"
        datasets.Dataset.from_list(rows).to_json(root / f"{split}.jsonl")
    recipe = load(RECIPES / "smollm2_instruct.yaml")
    arms = tuple(
        dataclasses.replace(a, scorer_options=a.scorer_options | {"target": str(root / "train.jsonl")})
        if a.scorer == "less"
        else a
        for a in recipe.arms
    )
    return dataclasses.replace(
        recipe,
        seeds=1,
        out=str(root / "out"),
        model=ModelSpec(str(root / "model")),
        data=DataSpec(str(root / "train.jsonl"), test=str(root / "test.jsonl"), max_length=64),
        arms=arms,
    )


def test_a_recipe_of_instructions(small_instruct):
    run(small_instruct, progress=False)
    out = small_instruct.folder
    got = result(out)
    assert got["task"] == "causal-lm" and got["metric"] == "perplexity" and got["data"]["classes"] == []
    arms = {arm["name"]: arm for arm in got["arms"]}
    assert [arm["examples"] for arm in arms.values()] == [19, 10, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert [s["id"] for s in got["data"]["set_aside"]] == ["19"]
    for arm in arms.values():
        assert 1 < arm["perplexity"] < 200 and "accuracy" not in arm and arm["flops"]["tuning"] > 0
        assert arm["perplexity"] == pytest.approx(np.exp(arm["loss"]), rel=0.2)
    full = json.loads((out / "arms" / "00-full.json").read_text())
    assert len(full["each"]) == 8 and np.mean(full["each"]) == pytest.approx(full["loss"])
    difference = next(c for c in got["comparisons"] if (c["arm"], c["to"]) == ("random 10", "full"))
    assert difference["difference"] == pytest.approx(arms["random 10"]["loss"] - arms["full"]["loss"])
    assert ("tsa 50", "loss 50") in {(c["arm"], c["to"]) for c in got["comparisons"]}
    assert got["model"]["trainable_parameters"] == 2 * 8 * (3 * (32 + 64) + 2 * (32 + 32) + 2 * (32 + 16))
    page = (out / "report.html").read_text()
    assert "A lower perplexity is better" in page and "Down and to the left is better" in page


def test_random_instructions_need_no_pass_of_the_model(small_instruct, tmp_path, before_tuning):
    arms = small_instruct.arms[:2]
    assert arms[1].select == "random" and arms[1].scorer is None
    run(dataclasses.replace(small_instruct, arms=arms, out=str(tmp_path / "out")), progress=False)
    assert before_tuning() == [1, 1], "the four tokens on which the model's head is checked"
    got = result(tmp_path / "out")
    assert [arm["examples"] for arm in got["arms"]] == [19, 10]
    assert [s["id"] for s in got["data"]["set_aside"]] == ["19"]
    assert all(arm["mmd"] is None and 1 < arm["perplexity"] < 200 for arm in got["arms"])


def test_what_has_no_meaning_is_refused_before_the_model_is_opened(small_instruct, tmp_path, monkeypatch):
    monkeypatch.setattr("serpette.pipeline.job.open_model", lambda *a, **k: pytest.fail("opened"))
    full, half = small_instruct.arms[0], dataclasses.replace(small_instruct.arms[2], name="x")
    for arm, words in (
        (dataclasses.replace(half, scorer="el2n"), "arms.1.scorer='el2n' has no meaning in a causal-lm"),
        (dataclasses.replace(half, per_class=True), "arms.1.per_class=True needs classes"),
        (dataclasses.replace(half, select="flex_rand"), "arms.1.select='flex_rand' is open"),
    ):
        with pytest.raises(ValueError, match=words):
            run(
                dataclasses.replace(small_instruct, arms=(full, arm), out=str(tmp_path / arm.name)),
                progress=False,
            )


def test_test_examples_without_responses_are_refused_in_time(small_instruct, tmp_path, monkeypatch):
    monkeypatch.setattr("serpette.scoring.score", lambda *a, **k: pytest.fail("scored"))
    datasets.Dataset.from_list([{"question_only": "abc"}] * 3).to_json(tmp_path / "test.jsonl")
    data = dataclasses.replace(small_instruct.data, test=str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match="no instructions found in a row with columns"):
        run(dataclasses.replace(small_instruct, data=data, out=str(tmp_path / "out")), progress=False)


@pytest.fixture(scope="module")
def small_rows(places, tmp_path_factory):
    """recipes/vit_rows.yaml with a tiny model, two seeds and a pruned arm beside the others."""
    recipe = load(RECIPES / "vit_rows.yaml")
    names = {"full", "lora", "shira", "rows", "rows taylor", "rows fa"}
    quantiles = ArmSpec("qm_taylor", tune={"method": "rows", "rank": 2, "importance": "qm_taylor"})
    pruned = ArmSpec("pruned rows", None, "random", 0.5, tune={"method": "rows", "fraction": 0.05})
    return dataclasses.replace(
        recipe,
        seeds=2,
        out=str(tmp_path_factory.mktemp("runs") / "rows"),
        model=ModelSpec(str(places / "model")),
        data=DataSpec(str(places / "images"), train_limit=24, test_limit=20),
        tune=dataclasses.replace(recipe.tune, epochs=1, rank=2, importance_examples=256),
        arms=(*(arm for arm in recipe.arms if arm.name in names), quantiles, pruned),
    )


def test_arms_that_differ_in_what_trains(small_rows, monkeypatch):
    from serpette.pipeline import tune as stage

    ranked, rank = [], stage.rank
    monkeypatch.setattr(stage, "rank", lambda *a: ranked.append((a[1], a[3])) or rank(*a))
    run(small_rows, progress=False)
    got = result(small_rows.folder)
    arms = {arm["name"]: arm for arm in got["arms"]}
    assert ranked == 2 * [(24, "taylor"), (24, "qm_taylor")], "never more examples than an arm keeps"
    for name, arm in arms.items():
        assert (arm["seconds"]["ranking"] > 0) == ("taylor" in name) == (arm["flops"]["ranking"] > 0)
        assert arm["trainable_parameters"] > 0 and arm["peak_bytes"] > 0
    assert arms["full"]["tune"] == {"method": "full", "learning_rate": 5e-5} and arms["lora"]["tune"] == {}
    assert arms["full"]["trainable_parameters"] == got["model"]["parameters"]
    assert arms["rows fa"]["trainable_parameters"] < arms["rows"]["trainable_parameters"]
    assert arms["rows"]["accuracy_by_class"] and arms["pruned rows"]["examples"] == 12
    pairs = {(c["arm"], c["to"]) for c in got["comparisons"]}
    assert {("rows", "full"), ("rows", "lora"), ("lora", "full"), ("pruned rows", "rows")} <= pairs
    assert ("pruned rows", "full") not in pairs and not {p for p in pairs if p[0] == "full"}
    page = (small_rows.folder / "report.html").read_text()
    assert "Accuracy against what trains" in page and "rows, fraction 0.05, importance taylor" in page


def test_a_killed_run_of_rows_goes_on(small_rows, monkeypatch):
    from serpette.pipeline import tune as stage

    out, trained, train = small_rows.folder, [], stage.train
    before = result(out)
    (out / "result.json").unlink()
    (out / "seeds" / "1" / "result.json").unlink()
    gone = next((out / "seeds" / "1" / "arms").glob("*-rows_taylor.json"))
    gone.unlink()
    monkeypatch.setattr(stage, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    run(small_rows, progress=False)
    assert len(trained) == 1 and gone.exists()
    after = result(out)
    assert before["comparisons"] == after["comparisons"]
    for old, new in zip(before["arms"], after["arms"], strict=True):
        assert stable(old["by_seed"]) == stable(new["by_seed"])


def test_rows_are_ranked_on_examples_of_each_class(small_rows):
    from serpette.pipeline.job import Job
    from serpette.pipeline.progress import Sayer
    from serpette.pipeline.tune import seen

    one = dataclasses.replace(small_rows, seeds=1)
    job = Job(one, Sayer(False), small_rows.folder / "seeds" / "0", one.seed)
    positions = torch.arange(2, 20)
    labels = job.scores.signals.labels
    for count in (3, 7, 50):
        found = seen(job, count, positions)
        assert len(found) == len(set(found.tolist())) == min(count, 18)
        assert set(found.tolist()) <= set(positions.tolist()) and len(labels[found].unique()) == 3
        assert seen(job, count, positions).tolist() == found.tolist()
