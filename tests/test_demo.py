"""The recipe of `make demo` on the real model and the real data, with few images and one epoch."""

import dataclasses
import json
from pathlib import Path

import pytest

from serpette import run, zoo
from serpette.recipe import load

ROOT = Path(__file__).parent.parent


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:a training of 2 steps")  # so few images
def test_the_demo_recipe_on_few_images(tmp_path):
    for name in ("vit-s", "fashion-mnist"):
        if not zoo.is_cached(name):
            pytest.skip(f"{name} is not cached; run `serpette fetch {name}`")
    demo = load(ROOT / "recipes" / "demo.yaml")
    assert demo.data.train_limit >= 1000 and demo.data.test_limit >= 1000
    small = dataclasses.replace(
        demo,
        out=str(tmp_path),
        data=dataclasses.replace(demo.data, train_limit=60, test_limit=40),
        tune=dataclasses.replace(demo.tune, epochs=1),
        model=dataclasses.replace(demo.model, options={"layers": 2, "image_size": 28}),
    )
    report = run(small, progress=False)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(arm["name"], arm["examples"]) for arm in result["arms"]] == [
        ("full", 60),
        ("random", 18),
        ("dlc", 18),
        ("herding", 18),
        ("data and weights", 18),
    ]
    small_one = result["arms"][-1]["weights"]
    assert small_one["sparsity"] == 0.5 and small_one["stock"]
    assert small_one["after"]["parameters"] < 0.6 * small_one["before"]["parameters"]
    assert len(result["data"]["classes"]) == 10
    assert all(kept >= 1 for arm in result["arms"] for kept in arm["kept_by_class"])
    page = report.read_text(encoding="utf-8")
    assert "The model, before and after" in page and "cut 50" in page
    assert "Ankle boot" in page and page.count("data:image/png;base64,") >= 20
