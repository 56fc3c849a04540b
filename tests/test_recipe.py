"""Reading a recipe: strict, and back again."""

import dataclasses
from pathlib import Path

import pytest

from serpette.recipe import (
    ArmSpec,
    DataSpec,
    EvaluateSpec,
    ModelSpec,
    PruneSpec,
    Recipe,
    ShrinkSpec,
    check,
    check_task,
    dump,
    load,
    to_dict,
)

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
    options = "scorer_options: {variant: official, points: [0, 0.3]}, select_options: {gamma: 0.3}"
    recipe = load(file(TINY.replace("keep: 0.3", f"keep: 0.3, per_class: equal, {options}")))
    assert load(file(dump(recipe))) == recipe
    assert to_dict(recipe)["arms"][1]["per_class"] == "equal"


def test_the_demo_is_what_the_readme_says():
    recipe = load(Path(__file__).parents[1] / "recipes" / "demo.yaml")
    assert (recipe.data.train_limit or 10**9) >= 1000 and (recipe.data.test_limit or 10**9) >= 1000
    assert [(a.scorer, a.select, a.keep) for a in recipe.arms] == [
        (None, None, 1.0),
        (None, "random", 0.3),
        ("dlc", "flex_rand", 0.3),
        ("herding", "top_hard", 0.3),
        ("dlc", "flex_rand", 0.3),
    ]
    first, last = recipe.arms[0], recipe.arms[-1]
    prune = recipe.prune_of(last)
    assert prune is not None and (prune.pattern, prune.sparsity) == ("structured", 0.5)
    assert recipe.shrink_of(last) is not None and recipe.shrink_of(first) is None
    assert recipe.prune_of(first) is None and recipe.tune_of(first) == recipe.tune_of(last)
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


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
CAUSAL = {"smollm2_instruct": "causal-lm", "smollm2_prune": "causal-lm"}
TASKS = {"minilm_regression": "regression", **CAUSAL}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_folder(path):
    recipe = load(path)
    assert recipe.name == path.stem and path.read_text().startswith("# ")
    check_task(recipe, TASKS.get(path.stem, "classification"))
    if path.stem.endswith("_rows"):  # arms differ in what trains, not in the data
        methods = [recipe.tune_of(arm).method for arm in recipe.arms]
        assert recipe.arms[0].name == "full" and all(arm.select is None for arm in recipe.arms)
        assert set(methods) == {"full", "head", "lora", "dora", "shira", "rows"} and recipe.seeds >= 5
        assert {recipe.tune_of(arm).dropout for arm in recipe.arms} == {0, 0.1}
        return
    if path.stem.endswith("_prune"):  # each cut has its control, random or magnitude, and the unpruned arm
        assert recipe.arms[0] == ArmSpec("lora") and recipe.seeds >= (2 if path.stem in CAUSAL else 5)
        cuts = [recipe.prune_of(arm) for arm in recipe.arms[1:]]
        assert all(recipe.tune_of(arm) == recipe.tune for arm in recipe.arms) and None not in cuts
        assert {c.pattern for c in cuts if c} == {"unstructured", "structured"}
        controls = {(c.pattern, c.sparsity) for c in cuts if c and c.importance in ("random", "magnitude")}
        assert ("unstructured", 0.5) in controls
        return
    assert recipe.arms[0] == ArmSpec("full")
    for arm in recipe.arms[1:]:  # each has its control: a random choice of the same share
        assert any(a.scorer is None and a.select == "random" and a.keep == arm.keep for a in recipe.arms)
    if path.stem != "demo":
        assert recipe.seeds >= (2 if path.stem == "smollm2_instruct" else 5)
        assert {"full", "random", "tsa", "loss"} <= {a.name.split()[0] for a in recipe.arms}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("name: tiny", "name: tiny\nseeds: 0", ["seeds=0", "at least 1"]),
        ("name: tiny", "name: tiny\ntask: causal", ["task='causal'", "'causal-lm'"]),
        (
            "scorer: dlc",
            "scorer: dlc, scorer_options: {point: [0]}",
            ["arms.1.scorer", "did you mean 'points'"],
        ),
        ("keep: 0.3", "keep: 0.3, select_options: {gama: 1}", ["arms.1.select", "did you mean 'gamma'"]),
        ("scorer: dlc", "scorer: tsa, scorer_options: {damping: -1}", ["arms.1.scorer", "damping=-1"]),
        (
            "data: {train: digits}",
            "data: {train: digits}\ntune: {method: full}\nARM",
            ["scorer='tsa'", "tune.method='full'", "tune.method: lora"],
        ),
        ("scorer: dlc", "scorer: less", ["arms.1.scorer_options has no target", "target_split"]),
        (
            "scorer: dlc",
            "scorer: less, scorer_options: {target: digits}",
            ["target='digits'", "are the test examples", "target_split: train"],
        ),
        (
            "name: tiny",
            "name: tiny\ntask: causal-lm\nHEAD",
            ["tune.method='head'", "'lora', 'rows' or 'full'"],
        ),
        ("name: tiny", "name: tiny\ntask: regression\nENTROPY", ["'entropy' has no meaning", "el2n"]),
        ("name: tiny", "name: tiny\ntask: classification\nIFD", ["'ifd' has no meaning", "dlc"]),
        ("name: tiny", "name: tiny\ntask: causal-lm\nCLASSES", ["per_class=True", "this is a causal-lm"]),
        ("name: tiny", "name: tiny\ntask: causal-lm", ["select='flex_rand' is open", "gamma: 0.5"]),
    ],
)
def test_arms_without_a_meaning_are_refused(file, old, new, said):
    text = TINY.replace(old, new, 1)
    for word, instead in {
        "ARM": ("scorer: dlc", "scorer: tsa"),
        "HEAD": ("data:", "tune: {method: head}\ndata:"),
        "ENTROPY": ("scorer: dlc", "scorer: entropy"),
        "IFD": ("scorer: dlc", "scorer: ifd"),
        "CLASSES": ("keep: 0.3", "keep: 0.3, per_class: true"),
    }.items():
        if f"\n{word}" in text:
            text = text.replace(f"\n{word}", "").replace(*instead)
    with pytest.raises(ValueError) as error:
        load(file(text))
    for words in ["tiny.yaml", *said]:
        assert words in str(error.value)


ROWS = "tune: {method: rows, fraction: 0.05, importance: taylor, modes: {fc1: columns}, kernel: live}"


def test_an_arm_changes_the_tuning(file):
    text = TINY + "tune: {rank: 4, dropout: 0.1, epochs: 2}\n"
    text = text.replace("{name: full}", "{name: full, tune: {method: full, learning_rate: 1}}")
    recipe = load(file(text.replace("keep: 0.3}", "keep: 0.3, tune: {method: rows, fraction: 0.05}}")))
    first, second = (recipe.tune_of(arm) for arm in recipe.arms)
    assert (first.method, first.learning_rate, first.epochs) == ("full", 1.0, 2)
    assert type(first.learning_rate) is float
    assert (second.method, second.fraction, second.epochs, second.rank) == ("rows", 0.05, 2, 4)
    assert first.differing(recipe.tune) == {"method": "full", "learning_rate": 1.0}
    assert second.differing(recipe.tune) == {"method": "rows", "fraction": 0.05}
    assert recipe.tune.differing(recipe.tune) == {}
    assert load(file(dump(recipe))) == recipe


def test_settings_of_another_method_are_no_difference(file):
    text = TINY + ROWS
    recipe = load(
        file(text.replace("keep: 0.3}", "keep: 0.3, tune: {method: lora, rank: 3, target_modules: [fc1]}}"))
    )
    assert recipe.tune.modes == {"fc1": "columns"} and recipe.tune.kernel == "live"
    lora = recipe.tune_of(recipe.arms[1])
    assert lora.differing(recipe.tune) == {"method": "lora", "rank": 3, "target_modules": ["fc1"]}
    assert set(lora.adapter(0)) == {
        "method",
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "freeze_attention",
        "checkpointing",
    }
    rows = recipe.tune.adapter(7)
    assert rows["seed"] == 7 and rows["fraction"] == 0.05 and "importance_examples" not in rows
    assert rows["importance"] == "magnitude", "taylor ranks afterwards"
    assert recipe.tune.needs and not lora.needs


def test_a_rank_of_an_arm_takes_the_place_of_a_fraction(file):
    recipe = load(file((TINY + ROWS).replace("keep: 0.3}", "keep: 0.3, tune: {rank: 3}}")))
    tune = recipe.tune_of(recipe.arms[1])
    assert (tune.rank, tune.fraction) == (3, None)


@pytest.mark.parametrize(
    "whole, arm, said",
    [
        ("fraction: 0.05", "", ["tune.fraction=0.05 means nothing to method='lora'", "of 'rows'"]),
        ("method: shira, dropout: 0.1", "", ["tune.dropout=0.1", "'lora' or 'dora'"]),
        ("method: full, freeze_attention: true", "", ["tune.freeze_attention=True", "method='full'"]),
        ("method: rows, fraction: 5", "", ["tune.fraction=5.0 must be", "(0, 1]", "did you mean 0.05"]),
        ("method: rows, importance: tailor", "", ["tune.importance='tailor'", "'taylor'"]),
        ("method: rows, importance_examples: 0", "", ["tune.importance_examples=0", "at least 1"]),
        ("method: rows, kernel: fast", "", ["tune.kernel='fast'", "'additive' or 'live'"]),
        (
            "method: rows, scope: global, dependencies: true",
            "",
            ["tune.scope='global' must be 'layer' if dependencies"],
        ),
        ("method: rows, scope: all", "", ["tune.scope='all'", "'layer' or 'global'"]),
        ("method: rows, modes: cols", "", ["tune.modes='cols'", "'columns'", "a mapping"]),
        ("method: rows, modes: {fc1: col}", "", ["tune.modes['fc1']='col'", "'columns'"]),
        ("method: row", "", ["tune.method='row'", "'rows'"]),
        ("rank: 4", "metod: rows", ["unknown key arms.1.tune.metod", "'method'"]),
        ("rank: 4", "epochs: 0", ["arms.1.tune.epochs=0", "at least 1"]),
        ("rank: 4", "epochs: many", ["arms.1.tune.epochs='many'", "a whole number"]),
        ("rank: 4", "kernel: additive", ["arms.1.tune.kernel='additive' means nothing to method='lora'"]),
        ("rank: 4", "{method: head, rank: 2}", ["arms.1.tune.rank=2 means nothing to method='head'"]),
        ("rank: 4", "method: rows, rank: 2, fraction: 0.1", ["arms.1.tune has both rank and fraction"]),
        ("rank: 4", "[1]", ["arms.1.tune=[1]", "a mapping"]),
    ],
)
def test_bad_settings_of_the_tuning(file, whole, arm, said):
    arm = arm if arm.startswith(("{", "[")) else f"{{{arm}}}"
    text = TINY.replace("keep: 0.3}", f"keep: 0.3, tune: {arm}}}") + f"tune: {{{whole}}}"
    with pytest.raises(ValueError) as error:
        load(file(text))
    for words in ["tiny.yaml", *said]:
        assert words in str(error.value)


@pytest.mark.parametrize("task", ["regression", "causal-lm"])
def test_an_importance_of_classes_needs_classes(file, task):
    text = TINY.replace("{name: full}", "{name: full, tune: {method: rows, importance: qm_taylor}}")
    recipe = load(file(text.replace("select: flex_rand", "select: top_hard")))
    with pytest.raises(ValueError, match=f"arms.0.tune.importance='qm_taylor' needs classes.* {task}"):
        check_task(dataclasses.replace(recipe, arms=recipe.arms[:1]), task)
    check_task(recipe, "classification")


def test_an_arm_changes_the_pruning(file):
    text = TINY + "prune: {sparsity: 0.3, importance: magnitude, exclude: [fc2]}"
    text = text.replace("{name: full}", "{name: full, prune: {sparsity: 0}}")
    recipe = load(file(text.replace("keep: 0.3}", "keep: 0.3, prune: {pattern: structured}, shrink: {}}")))
    assert recipe.prune_of(recipe.arms[0]) is None, "none is cut at 0"
    cut = recipe.prune_of(recipe.arms[1])
    assert cut is not None and (cut.sparsity, cut.importance, cut.exclude) == (0.3, "magnitude", ("fc2",))
    assert cut.pattern == "structured" and recipe.shrink_of(recipe.arms[1]) == ShrinkSpec()
    assert recipe.shrink_of(recipe.arms[0]) is None
    assert load(file(dump(recipe))) == recipe
    plain = load(file(TINY.replace("keep: 0.3}", "keep: 0.3, prune: {}}")))
    assert plain.prune is None and plain.prune_of(plain.arms[0]) is None
    assert plain.prune_of(plain.arms[1]) == PruneSpec()


@pytest.mark.parametrize(
    "cut, tune, said",
    [
        ("sparsity: 50", "", ["arms.1.prune: sparsity=50.0", "[0, 1)", "did you mean 0.5"]),
        ("sparsity: -0.1", "", ["sparsity=-0.1", "[0, 1)"]),
        ("sparsty: 0.5", "", ["unknown key arms.1.prune.sparsty", "'sparsity'"]),
        ("sparsity: half", "", ["arms.1.prune.sparsity='half'", "a number"]),
        ("pattern: structred", "", ["pattern 'structred'", "'structured'"]),
        ("pattern: '2:4', sparsity: 0.3", "", ["arms.1.prune", "0.5", "2:4"]),
        ("pattern: '4:2'", "", ["arms.1.prune", "4:2"]),
        ("importance: lora_prun", "", ["arms.1.prune", "'lora_prun'", "'lora_prune'"]),
        ("importance: qm_taylor", "", ["importance 'qm_taylor'", "single weights", "magnitude"]),
        ("importance: obs", "", ["importance='obs'", "one shot", "tune.method: none"]),
        ("importance: obs, scope: global", "method: none", ["layer by layer"]),
        ("importance: lora_prune", "method: none", ["gradients of a LoRA", "tune.method='none'"]),
        (
            "importance: wanda, end: 0.2",
            "method: none",
            ["prune.end=0.2 means nothing to tune.method='none'"],
        ),
        ("importance_examples: 9", "", ["importance_examples=9 means nothing to tune.method='lora'"]),
        (
            "importance: wanda, importance_examples: 0",
            "method: none",
            ["importance_examples=0", "at least 1"],
        ),
        ("importance_options: {a: 1}", "", ["'lora_prune' has no option 'a'"]),
        ("schedule: cubical", "", ["'cubical'", "'cubic'"]),
        ("start: 0.8", "", ["start=0.8 and end=0.3"]),
        ("scope: row", "", ["scope='row'", "'layer' or 'global'"]),
        ("mask_grad: none", "", ["mask_grad='none'", "'ste'"]),
        ("every_k: 0", "", ["every_k=0", "at least 1"]),
        ("average: 1", "", ["average=1.0", "[0, 1)"]),
        ("round_to: 16", "", ["round_to=16 means nothing to pattern='unstructured'", "'structured'"]),
        ("shrink: true", "", ["unknown key arms.1.prune.shrink"]),
        ("sparsity: 0.5", "method: rows", ["arms.1.prune", "method='rows'", "'lora'"]),
        ("sparsity: 0.5", "method: dora", ["arms.1.prune", "method='dora'", "'lora'"]),
        ("sparsity: 0.5", "dropout: 0.1", ["arms.1.prune", "dropout=0.1 must be 0"]),
        ("sparsity: 0.5", "method: full", ["importance='lora_prune'", "method='full'", "magnitude"]),
    ],
)
def test_bad_settings_of_the_pruning(file, cut, tune, said):
    text = TINY.replace("keep: 0.3}", f"keep: 0.3, prune: {{{cut}}}}}") + f"tune: {{{tune}}}"
    with pytest.raises(ValueError) as error:
        load(file(text))
    for words in ["tiny.yaml", *said]:
        assert words in str(error.value)


def test_what_trains_whole_may_be_pruned_by_magnitude(file):
    text = TINY.replace("keep: 0.3}", "keep: 0.3, prune: {importance: magnitude}}") + "tune: {method: full}"
    recipe = load(file(text))
    assert recipe.prune_of(recipe.arms[1]) == PruneSpec("magnitude")


def test_an_arm_changes_what_becomes_of_its_model(file):
    text = TINY + "prune: {pattern: structured}\nshrink: {ragged: true}\nexport: [packed]\n"
    text += "evaluate: {batch_size: 3}"
    text = text.replace("{name: full}", "{name: full, prune: {sparsity: 0}, evaluate: false}")
    recipe = load(file(text.replace("keep: 0.3}", "keep: 0.3, shrink: {ragged: false}, export: []}")))
    full, cut = recipe.arms
    assert recipe.shrink_of(full) is None and recipe.shrink_of(cut) == ShrinkSpec()
    assert recipe.export_of(full) == ("packed",) and recipe.export_of(cut) == ()
    assert recipe.evaluate_of(full) is None and recipe.evaluate_of(cut) == EvaluateSpec(3, (1, 8), True)
    assert recipe.evaluated and load(file(dump(recipe))) == recipe
    more = load(file(text.replace("keep: 0.3}", "keep: 0.3, shrink: false, evaluate: {sensitivity: false}}")))
    assert more.shrink_of(more.arms[1]) is None
    assert more.evaluate_of(more.arms[1]) == EvaluateSpec(3, (1, 8), False)
    plain = load(file(TINY))
    assert plain.evaluate == EvaluateSpec() and plain.export_of(plain.arms[0]) is None
    none = load(
        file(TINY.replace("{train: digits}", "{train: digits, test_split: train}") + "evaluate: null")
    )
    assert not none.evaluated and none.evaluate_of(none.arms[0]) is None
    whole = load(file(TINY + "evaluate: null"))
    assert whole.evaluate_of(dataclasses.replace(whole.arms[0], evaluate=True)) == EvaluateSpec()


def test_what_was_predicted(file):
    recipe = load(file(TINY.replace("keep: 0.3}", "keep: 0.3, predicted: {loss: 1, low: 0.5}}")))
    assert recipe.arms[1].predicted == {"loss": 1, "low": 0.5} and load(file(dump(recipe))) == recipe


@pytest.mark.parametrize(
    "whole, arm, said",
    [
        ("shrink: {}", "", ["shrink means nothing where no arm is pruned"]),
        ("prune: {}\nshrink: {}", "", ["shrink means nothing to pattern='unstructured'", "structured"]),
        ("shrink: {rag: true}", "", ["unknown key shrink.rag", "'ragged'"]),
        ("prune: {}", "shrink: {}", ["arms.1.shrink means nothing to pattern='unstructured'"]),
        ("", "shrink: {}", ["arms.1.shrink means nothing where no weight is pruned"]),
        ("", "shrink: 3", ["arms.1.shrink=3", "a mapping or true or false"]),
        ("", "shrink: {rag: 1}", ["unknown key arms.1.shrink.rag"]),
        ("export: [onx]", "", ["export.0='onx'", "'onnx'"]),
        ("", "export: [packed, packed]", ["arms.1.export=", "a name twice"]),
        ("export: [adapter]\ntune: {method: full}", "", ["export=adapter", "'full' has no adapter"]),
        ("prune: {}\nexport: [adapter]", "", ["export=adapter", "merged"]),
        ("", "tune: {method: none}, export: [adapter]", ["arms.1.export=adapter", "'none' has no adapter"]),
        ("evaluate: {batch_size: 0}", "", ["evaluate.batch_size=0", "at least 1"]),
        ("", "evaluate: {latency_batch_sizes: [1, 0]}", ["arms.1.evaluate.latency_batch_sizes=[1, 0]"]),
        ("", "evaluate: {latency: [1]}", ["unknown key arms.1.evaluate.latency"]),
        ("", "predicted: {los: 1}", ["unknown key arms.1.predicted.los", "'loss'"]),
        ("", "predicted: {loss: low}", ["arms.1.predicted.loss='low'", "a number"]),
        ("tune: {method: none, checkpointing: true}", "", ["tune.checkpointing=True", "method: none"]),
    ],
)
def test_bad_settings_of_the_later_stages(file, whole, arm, said):
    text = TINY.replace("keep: 0.3}", f"keep: 0.3, {arm}}}" if arm else "keep: 0.3}") + whole
    with pytest.raises(ValueError) as error:
        load(file(text))
    for words in ["tiny.yaml", *said]:
        assert words in str(error.value)
