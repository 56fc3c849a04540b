"""A recipe that prunes weights, from end to end on a tiny model; and the commands prune and shrink."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from serpette import run
from serpette.pipeline.job import Job
from serpette.pipeline.progress import Sayer
from serpette.pipeline.weights import inputs_of
from serpette.recipe import ArmSpec, DataSpec, ModelSpec, Recipe, load

RECIPES = Path(__file__).parent.parent / "recipes"


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def small_prune(places, tmp_path_factory):
    """recipes/minilm_prune.yaml with a tiny model, two seeds, and a cut on a part of the data."""
    recipe = load(RECIPES / "minilm_prune.yaml")
    prune = {"pattern": "structured", "round_to": 1, "sparsity": 0.5}
    arms = {arm.name: arm for arm in recipe.arms}
    return dataclasses.replace(
        recipe,
        seeds=2,
        out=str(tmp_path_factory.mktemp("runs") / "prune"),
        model=ModelSpec(str(places / "model")),
        data=DataSpec(str(places / "images"), train_limit=24, test_limit=20),
        tune=dataclasses.replace(recipe.tune, epochs=3, batch_size=6, rank=2),
        arms=(
            arms["lora"],
            arms["random"],
            arms["lora_prune"],
            ArmSpec("half", None, "random", 0.5),
            ArmSpec("half, shrunk", None, "random", 0.5, prune=prune, shrink={}),
        ),
    )


@pytest.fixture(scope="module")
def pruned(small_prune):
    run(small_prune, progress=False)
    return small_prune.folder


def test_arms_whose_weights_are_pruned(pruned):
    got = result(pruned)
    arms = {arm["name"]: arm for arm in got["arms"]}
    for name, arm in arms.items():
        assert ("weights" in arm) == ("prune" in name or name == "random" or "shrunk" in name)
        assert (arm["seconds"].get("pruning", 0) > 0) == ("weights" in arm)
    found = arms["lora_prune"]["weights"]
    before, after = found["before"], found["after"]
    assert found["sparsity"] == 0.5 and all(layer["sparsity"] == 0.5 for layer in found["layers"])
    assert before["parameters"] == after["parameters"] == got["model"]["parameters"]
    cut = before["nonzero_prunable_weights"] - after["nonzero_prunable_weights"]
    assert cut == pytest.approx(before["prunable_weights"] / 2, abs=len(found["layers"]))
    assert after["packed_bytes"] < before["file_bytes"] == after["file_bytes"]
    assert [t["batch_size"] for t in found["timings"]] == [1, 8]
    assert all(t["low"] <= t["speedup"] <= t["high"] for t in found["timings"])
    assert arms["lora_prune"]["trainable_parameters"] == arms["lora"]["trainable_parameters"]
    small = arms["half, shrunk"]["weights"]
    assert small["after"]["parameters"] < small["before"]["parameters"]
    assert small["after"]["flops_per_example"] < small["before"]["flops_per_example"]
    pairs = {(c["arm"], c["to"]) for c in got["comparisons"]}
    assert pairs == {
        ("random", "lora"), ("lora_prune", "lora"), ("lora_prune", "random"), ("half", "lora"),
        ("half, shrunk", "half"), ("half, shrunk", "lora"),
    }  # fmt: skip
    losses = arms["lora"]["by_seed"][0]["sensitivity"]
    assert losses["of"] == len(losses["layers"]) and len(losses["layers"][0]["losses"]) == 4
    assert not any("sensitivity" in one for arm in got["arms"] for one in arm["by_seed"][1:])
    page = (pruned / "report.html").read_text()
    assert "The model, before and after" in page and "Nothing gets faster where" in page


def test_what_is_saved_is_what_was_measured(pruned, places):
    """The model that a stock from_pretrained reads has the accuracy of result.json, without serpette."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from serpette.weights.packed import load_packed

    folder = pruned / "seeds" / "0" / "arms"
    model = AutoModelForImageClassification.from_pretrained(folder / "04-half__shrunk" / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "04-half__shrunk" / "model", backend="pil")
    each = json.loads((folder / "04-half__shrunk.json").read_text())["each"]
    files = sorted((places / "images" / "test").glob("*/*.png"))
    right = 0
    with torch.inference_mode():
        for file in files:
            logits = model(**processor(Image.open(file), return_tensors="pt")).logits
            right += model.config.id2label[int(logits.argmax())] == file.parent.name
    assert len(each) == 20 and abs(right - sum(each)) <= 4, "of 24 files 20 were drawn"
    packed = load_packed(folder / "02-lora_prune" / "model" / "packed.safetensors")
    zeros = [float((t == 0).double().mean()) for n, t in packed.items() if n.endswith("fc1.weight")]
    assert zeros and zeros == [0.5] * len(zeros)


def test_a_killed_run_of_prunings_goes_on(small_prune, pruned, monkeypatch):
    from serpette.pipeline import tune as stage

    trained, train, before = [], stage.train, result(pruned)
    (pruned / "result.json").unlink()
    (pruned / "seeds" / "1" / "result.json").unlink()
    gone = pruned / "seeds" / "1" / "arms" / "02-lora_prune.json"
    gone.unlink()
    monkeypatch.setattr(stage, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    run(small_prune, progress=False)
    assert len(trained) == 1 and gone.exists()
    after = result(pruned)
    assert before["comparisons"] == after["comparisons"]
    for old, new in zip(before["arms"], after["arms"], strict=True):
        assert old["accuracy"] == new["accuracy"]


def test_the_commands_prune_and_shrink(places, tmp_path):
    from serpette import cli
    from serpette.weights.load import load as load_model

    out, options = tmp_path / "out", ["--limit", "24", "--test-limit", "12", "--epochs", "2"]
    options += ["--batch-size", "6", "--rank", "2", "--pattern", "structured", "--targets", "ffn"]
    given = ["--model", str(places / "model"), "--dataset", str(places / "images"), "--out", str(out)]
    assert cli.main(["prune", *given, *options]) == 0
    saved = out / "arms" / "00-pruned" / "model"
    assert result(out)["arms"][0]["weights"]["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert (out / "report.html").exists() and (saved / "preprocessor_config.json").exists()
    assert cli.main(["shrink", str(saved), "--out", str(tmp_path / "small")]) == 0
    got = result(tmp_path / "small")
    assert got["kind"] == "shrink" and got["after"]["parameters"] < got["before"]["parameters"]
    assert got["after"]["bytes"] < got["before"]["bytes"]
    assert (tmp_path / "small" / "preprocessor_config.json").exists()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        masked, small = (load_model(f)(pixel_values=x).logits for f in (saved, tmp_path / "small"))
    assert torch.allclose(masked, small, atol=1e-5)
    assert cli.main(["shrink", str(saved), "--out", str(saved)]) == 2


def test_examples_that_are_timed_are_those_that_can_be_read(places, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(places / "images", folder)
    for file in min((folder / "test").iterdir()).iterdir():  # the first class, whose images come first
        file.write_bytes(b"broken")
    data = DataSpec(str(folder), train_limit=12)
    recipe = Recipe(
        "timed", ModelSpec(str(places / "model")), data, (ArmSpec("full"),), out=str(tmp_path / "o")
    )
    job = Job(recipe, Sayer(False), recipe.folder, 0)
    assert not job.test_examples.read([0, 1])[0]
    expected = [i for i in range(24) if job.test_examples.read([i])[0]]
    assert len(expected) == 16
    for size in (1, 3, 24):
        found = inputs_of(job, size)["pixel_values"]
        rows = (expected * 2)[:size]
        assert torch.equal(found, torch.cat([job.test_examples.read([i])[1]["pixel_values"] for i in rows]))
    job.test_examples.read = lambda rows: ([], {}, [], {})
    with pytest.raises(ValueError, match="none of the 24 test examples could be read"):
        inputs_of(job, 1)
