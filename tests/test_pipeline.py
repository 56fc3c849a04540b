"""A recipe from end to end on a tiny model: what it writes, that it goes on, that it refuses."""

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
from PIL import Image
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from serpette import run
from serpette.recipe import load
from serpette.zoo import tiny

SRC = Path(__file__).parent.parent / "src"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model saved to disk and an image folder with two splits; one training image does not decode."""
    root = tmp_path_factory.mktemp("places")
    tiny("vit").save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 36), ("test", 24)):
        for i in range(n):
            folder = root / "images" / split / ("ant", "bee", "<b>cat</b>")[i % 3].replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (32, 32, 3)) + 80 * np.eye(3)[i % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "images" / "train" / "ant" / "0.png").write_bytes(b"broken")
    return root


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
    monkeypatch.setattr("serpette.pipeline.train", lambda *a, **k: pytest.fail("tuned again"))
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
