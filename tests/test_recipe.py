"""Reading a recipe: strict, and back again."""

import dataclasses

import pytest

from serpette.recipe import ArmSpec, DataSpec, ModelSpec, Recipe, check, dump, load, to_dict

TINY = """
name: tiny
model: {name: vit-s}
data: {train: digits}
arms:
  - {name: full}
  - {name: dlc, scorer: dlc, select: flex_rand, keep: 0.3}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "tiny.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_values_and_defaults(file):
    recipe = load(
        file(TINY + "tune: {learning_rate: 1e-4, target_modules: [q_proj, v_proj], alpha: 8}\nseed: 3")
    )
    assert recipe.model == ModelSpec("vit-s")
    assert recipe.data == DataSpec("digits", train_split="train", test_split="test")
    assert recipe.arms[1] == ArmSpec("dlc", "dlc", "flex_rand", 0.3, None)
    assert (recipe.tune.learning_rate, recipe.tune.target_modules) == (1e-4, ("q_proj", "v_proj"))
    assert type(recipe.tune.alpha) is float and recipe.seed == 3 and recipe.tune.rank == 8
    assert str(recipe.folder) == "runs/tiny"
    assert str(dataclasses.replace(recipe, out="elsewhere").folder) == "elsewhere"


def test_dump_and_load_are_a_round_trip(file):
    recipe = load(
        file(
            TINY.replace(
                "keep: 0.3",
                "keep: 0.3, per_class: equal, select_options: {gamma: 0.3}, scorer_options: {a: [1, x]}",
            )
        )
    )
    assert load(file(dump(recipe))) == recipe
    assert to_dict(recipe)["arms"][1]["per_class"] == "equal"


def test_the_demo_is_what_the_readme_says():
    from pathlib import Path

    recipe = load(Path(__file__).parents[1] / "recipes" / "demo.yaml")
    assert (recipe.data.train_limit or 10**9) >= 1000 and (recipe.data.test_limit or 10**9) >= 1000
    assert [(a.scorer, a.select, a.keep) for a in recipe.arms] == [
        (None, None, 1.0),
        (None, "random", 0.3),
        ("dlc", "flex_rand", 0.3),
        ("herding", "top_hard", 0.3),
    ]
    assert {a.per_class for a in recipe.arms[1:]} == {True}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("name: vit-s", "nam: vit-s", ["unknown key model.nam", "did you mean 'name'"]),
        ("scorer: dlc", "scorrer: dlc", ["unknown key arms.1.scorrer", "'scorer'"]),
        ("name: tiny", "name: tiny\nsede: 1", ["unknown key sede", "'seed'"]),
        ("name: tiny", "name: tiny\nseed: one", ["seed='one'", "a whole number"]),
        ("name: tiny", "name: tiny\nseed: true", ["seed=True", "a whole number"]),
        ("name: tiny", "name: tiny\nseed: -1", ["seed=-1", "2**32"]),
        ("name: tiny", "name: 3", ["name=3", "text"]),
        ("name: tiny", "name: ../up", ["name='../up'", "letters"]),
        ("name: tiny", "name: tiny\nproxy: prob", ["proxy='prob'", "'probe'"]),
        ("name: tiny", "name: tiny\nmodel: {name: a}", ["'model'", "twice"]),
        ("keep: 0.3", "keep: lots", ["arms.1.keep='lots'", "a number"]),
        ("keep: 0.3", "keep: true", ["arms.1.keep=True", "a number"]),
        ("keep: 0.3", "keep: 1.3", ["arms.1", "keep=1.3", "(0, 1]", "0.13"]),
        ("keep: 0.3", "keep: 0", ["arms.1", "keep=0", "(0, 1]"]),
        ("keep: 0.3", "keep: .nan", ["arms.1", "keep=nan", "(0, 1]"]),
        ("select: flex_rand, ", "", ["arms.1.select is missing"]),
        ("select: flex_rand", "select: flexrand", ["arms.1.select='flexrand'", "'flex_rand'"]),
        ("scorer: dlc", "scorer: dcl", ["arms.1.scorer='dcl'", "'dlc'"]),
        ("keep: 0.3", "keep: 0.3, per_class: balanced", ["arms.1.per_class='balanced'", "'equal'"]),
        ("keep: 0.3", "keep: 0.3, scorer_options: [1]", ["arms.1.scorer_options=[1]", "a mapping"]),
        ("name: full", "name: dlc", ["arms.1.name='dlc'", "taken by arms.0"]),
        ("data: {train: digits}", "", ["key data is missing"]),
        ("{train: digits}", "digits", ["data='digits'", "a mapping"]),
        ("{train: digits}", "{train: digits, test_limit: 0}", ["data.test_limit=0", "at least 1"]),
        ("{train: digits}", "{train: digits}\ntune: {epochs: 0}", ["tune.epochs=0", "at least 1"]),
        ("{train: digits}", "{train: digits}\ntune: {epochs: 1.5}", ["tune.epochs=1.5", "a whole number"]),
        ("{train: digits}", "{train: digits}\ntune: {warmup: 2}", ["tune.warmup=2.0", "[0, 1]"]),
        (
            "{train: digits}",
            "{train: digits}\ntune: {learning_rate: .nan}",
            ["tune.learning_rate=nan", "above 0"],
        ),
        ("name: tiny", "name: [tiny", ["is not YAML", "line"]),
        ("name: tiny", "name: !!python/object:os.system x", ["is not YAML"]),
    ],
)
def test_bad_recipes_name_the_file_the_key_and_the_way_out(file, old, new, said):
    assert old in TINY
    with pytest.raises(ValueError) as error:
        load(file(TINY.replace(old, new, 1)))
    for words in ["tiny.yaml", *said]:
        assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b"])
def test_what_is_no_mapping(file, text):
    with pytest.raises(ValueError, match="must be a mapping"):
        load(file(text))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="recipes/demo.yaml"):
        load(tmp_path / "none.yaml")


def test_no_arms():
    with pytest.raises(ValueError, match="at least one arm"):
        check(Recipe("x", ModelSpec("m"), DataSpec("d"), arms=()))
