"""Runs side by side: differences worked out by hand, Pareto fronts by brute force, and what is refused."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from serpette.comparing import compare, pareto_front

MACHINE = {"cpu": "A CPU", "cores": 2, "threads": 1, "memory_bytes": 2**33, "device": "cpu"}
GPU = {"cpu": "B CPU", "cores": 8, "threads": 8, "device": "cuda:0", "gpu": "A GPU"}
N = 40


def make_arm(name, value=0.8, seconds=10.0, **more):
    return {
        "name": name, "scorer": None, "select": None, "keep": 1.0, "method": "lora", "tune": {},
        "examples": 90, "trainable_parameters": 10, "peak_bytes": 2**30, "accuracy": value,
        "seconds": {"tuning": seconds, "scoring": 1.0, "evaluation": 99.0}, **more,
    }  # fmt: skip


def make_weights(after, sparsity=0.5):
    """`weights` of a pruned arm: 8 ms became `after` of that in a batch of 8."""
    return {
        "sparsity": sparsity,
        "before": {"parameters": 1000, "file_bytes": 4000, "packed_bytes": 4000},
        "after": {"parameters": int(1000 * after), "file_bytes": int(4000 * after), "packed_bytes": 500},
        "timings": [
            {"batch_size": 1, "before": 0.002, "after": 0.002 * after},
            {"batch_size": 8, "before": 0.008, "after": 0.008 * after},
        ],
    }


def make_run(folder, arms, name=None, seeds=(0,), each=None, test_limit=None, **more):
    """A run folder; `each` {arm: {seed: (N,)}} is written where the pipeline would."""
    folder.mkdir(parents=True)
    several = {"seeds": list(seeds)} if len(seeds) > 1 else {}
    data = {
        "train": "d[train]", "test": "d[test]", "train_examples": 90, "test_examples": N,
        "classes": ["a", "b"], "set_aside": [],
    }  # fmt: skip
    result = {
        "kind": "run", "name": name or folder.name, "seed": seeds[0], **several, "task": "classification",
        "metric": "accuracy", "recipe": {"data": {"test_limit": test_limit}}, "versions": {},
        "hardware": MACHINE, "data": data, "model": {"name": "m", "parameters": 1000}, "arms": arms,
        "comparisons": [], **more,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    for place, arm in enumerate(arms):
        for seed, values in ((each or {}).get(arm["name"]) or {}).items():
            place_of = folder / "seeds" / str(seed) if several else folder
            (place_of / "arms").mkdir(parents=True, exist_ok=True)
            entry = {"name": arm["name"], "each": list(map(int, values)), "test_set_aside": {}}
            (place_of / "arms" / f"{place:02d}-x.json").write_text(json.dumps(entry))
    return folder


def seeded(name, values, **more):
    """An arm of several seeds, {seed: accuracy}."""
    mean = float(np.mean(list(values.values())))
    by_seed = [{"seed": seed, "accuracy": value} for seed, value in values.items()]
    return make_arm(name, mean, by_seed=by_seed, interval=[mean - 0.1, mean + 0.1], **more)


def row_of(result, name):
    return next(row for row in result["arms"] if row["arm"] == name)


def test_common_seeds_are_paired_seed_by_seed(tmp_path):
    a = make_run(tmp_path / "a", [seeded("full", {0: 0.5, 1: 0.80, 2: 0.82})], seeds=(0, 1, 2))
    b = make_run(tmp_path / "b", [seeded("lora", {2: 0.85, 0: 0.52, 7: 0.1})], seeds=(0, 2, 7))
    found = row_of(compare([a, b]), "lora")["difference"]
    half = stats.t.ppf(0.975, 1) * 0.005  # differences 0.02 and 0.03: standard error 0.005
    assert found["difference"] == pytest.approx(0.025)
    assert [found["low"], found["high"]] == pytest.approx([0.025 - half, 0.025 + half])
    assert found["within_noise"] and found["count"] == 2 and found["paired_over"] == "seeds"
    assert found["common_seeds"] == [2, 0]


def each_of(right):
    return {0: [1] * right + [0] * (N - right)}


def test_one_seed_is_paired_over_the_test_examples(tmp_path):
    a = make_run(tmp_path / "a", [make_arm("full", 0.75)], each={"full": each_of(30)})
    b = make_run(tmp_path / "b", [make_arm("lora", 0.45)], each={"lora": each_of(18)})
    found = row_of(compare([a, b]), "lora")["difference"]
    d = np.array([-1.0] * 12 + [0.0] * 28)
    half = stats.t.ppf(0.975, N - 1) * d.std(ddof=1) / math.sqrt(N)
    assert [found["difference"], found["low"], found["high"]] == pytest.approx(
        [-0.3, -0.3 - half, -0.3 + half]
    )
    assert not found["within_noise"] and (found["paired_over"], found["count"]) == ("test examples", N)


def test_the_one_seed_in_common_is_what_is_paired(tmp_path):
    each = {"full": {0: [1] * N, 1: [0] * 20 + [1] * 20}}
    a = make_run(tmp_path / "a", [seeded("full", {0: 1.0, 1: 0.5})], seeds=(0, 1), each=each)
    b = make_run(tmp_path / "b", [make_arm("lora", 0.9)], each={"lora": each_of(36)})
    found = row_of(compare([a, b]), "lora")["difference"]
    assert found["difference"] == pytest.approx(-0.1) and found["common_seeds"] == [0]
    assert row_of(compare([a, b], "b"), "full")["difference"]["difference"] == pytest.approx(0.1)
    c = make_run(tmp_path / "c", [make_arm("rows", 0.9)], each={"rows": {5: [1] * 36 + [0] * 4}}, seeds=(5,))
    found = row_of(compare([a, c]), "rows")["difference"]  # to the mean of both seeds
    assert found["difference"] == pytest.approx(0.9 - 0.75) and found["common_seeds"] == []


def test_without_results_by_example_the_runs_own_comparison_counts(tmp_path):
    stored = {"arm": "lora", "to": "full", "difference": -0.02, "low": -0.03, "high": -0.01}
    run = make_run(tmp_path / "a", [make_arm("full"), make_arm("lora", 0.78)], comparisons=[stored])
    found = row_of(compare([run]), "lora")["difference"]
    assert (found["difference"], found["low"], found["high"], found["count"]) == (-0.02, -0.03, -0.01, N)
    found = row_of(compare([run], "a:lora"), "full")["difference"]
    assert (found["difference"], found["low"], found["high"]) == (0.02, 0.01, 0.03)


def test_what_cannot_be_paired_says_why(tmp_path):
    a = make_run(tmp_path / "a", [make_arm("full")], each={"full": each_of(30)}, test_limit=N)
    b = make_run(tmp_path / "b", [make_arm("lora")], test_limit=N)
    assert "(arms/*.json) of b" in row_of(compare([a, b]), "lora")["difference"]["not_paired"]
    c = make_run(tmp_path / "c", [make_arm("rows")], each={"rows": {3: [1] * N}}, seeds=(3,), test_limit=N)
    found = row_of(compare([a, c]), "rows")["difference"]
    assert found == {"not_paired": "other test examples: c drew by seed 3, a drew by seed 0"}
    whole = make_run(tmp_path / "d", [make_arm("rows")], each={"rows": {3: [1] * N}}, seeds=(3,))
    assert "d took all" in row_of(compare([a, whole]), "rows")["difference"]["not_paired"]
    more = make_run(
        tmp_path / "e", [make_arm("rows")], each={"rows": {3: [1] * N}}, seeds=(3,), test_limit=N + 1
    )
    assert "difference" in row_of(compare([whole, more], "e"), "rows")["difference"]  # both took all


def test_arms_that_were_not_evaluated(tmp_path):
    arms = [{k: v for k, v in make_arm(name).items() if k != "accuracy"} for name in ("full", "lora")]
    result = compare([make_run(tmp_path / "a", arms)])
    assert "not_paired" in row_of(result, "lora")["difference"] and result["fronts"] == {}
    assert "full has accuracy unknown and cost 11.0 s." in result["verdict"]


def test_seeds_of_other_draws_are_not_paired(tmp_path):
    values = {1: 0.8, 2: 0.9}
    a = make_run(tmp_path / "a", [seeded("full", {0: 0.7, **values})], seeds=(0, 1, 2), test_limit=N)
    b = make_run(tmp_path / "b", [seeded("lora", values)], seeds=(1, 2), test_limit=N)
    assert "drew by seed" in row_of(compare([a, b]), "lora")["difference"]["not_paired"]


def test_other_unreadable_test_examples_are_not_paired(tmp_path):
    a = make_run(tmp_path / "a", [make_arm("full")], each={"full": each_of(30)})
    b = make_run(tmp_path / "b", [make_arm("lora")], each={"lora": each_of(30)})
    path = b / "arms" / "00-x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_set_aside": {"7": "broken"}}))
    assert "could not be read" in row_of(compare([a, b]), "lora")["difference"]["not_paired"]


def test_training_examples_that_were_set_aside_are_no_test_examples(tmp_path):
    aside = {"set_aside": [{"id": name, "reason": "broken"} for name in ("x", "y")]}

    def made(name, seed, limit):
        run = make_run(
            tmp_path / name, [make_arm(name)], each={name: {seed: [1] * N}}, seeds=(seed,), test_limit=limit
        )
        saved = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(saved | {"data": saved["data"] | aside}))
        return run

    whole, more, drawn = made("whole", 0, None), made("more", 1, N + 1), made("drawn", 1, N)
    assert "difference" in row_of(compare([whole, more]), "more")["difference"]
    assert "drew by seed 1" in row_of(compare([whole, drawn]), "drawn")["difference"]["not_paired"]
    path = more / "arms" / "00-x.json"  # of the same draw, but one of them is a test example
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_set_aside": {"x": "broken"}}))
    assert "drew by seed 1" in row_of(compare([whole, more]), "more")["difference"]["not_paired"]


def test_an_arm_that_cost_nothing_is_on_the_front(tmp_path):
    none = make_arm("none", 0.5, method="none") | {"seconds": {"tuning": 0.0, "evaluation": 9.0}}
    result = compare([make_run(tmp_path / "a", [make_arm("lora"), none])])
    assert result["fronts"]["seconds"]["front"] == ["a: none", "a: lora"]


def test_perplexity_is_compared_by_its_loss_and_lower_is_better(tmp_path):
    def arm(name, value, seconds):
        by_seed = [{"seed": s, "loss": math.log(value) + 0.01 * s, "perplexity": value} for s in (0, 1)]
        return make_arm(name, seconds=seconds, perplexity=value, by_seed=by_seed, interval=[value, value])

    arms = [arm("full", 8.0, 10), arm("lora", 9.0, 5), arm("worse", 10.0, 20)]
    task = {"task": "causal-lm", "metric": "perplexity"}
    result = compare([make_run(tmp_path / "a", arms, seeds=(0, 1), **task)])
    assert row_of(result, "lora")["difference"]["difference"] == pytest.approx(math.log(9 / 8))
    assert result["fronts"]["seconds"]["front"] == ["a: lora", "a: full"]
    assert result["verdict"].startswith("No arm that was cheaper held the perplexity of full:")


def test_an_unpruned_arm_has_the_sizes_that_pruned_arms_were_measured_against(tmp_path):
    arms = [
        make_arm("lora"),
        make_arm("half", 0.79, weights=make_weights(0.5)),
        make_arm("zeros", weights=make_weights(1)),
    ]
    run = make_run(tmp_path / "a", arms)
    other = make_run(tmp_path / "b", [make_arm("rows")])
    result = compare([run, other])
    lora, half, rows = (row_of(result, name) for name in ("lora", "half", "rows"))
    assert (lora["parameters"], lora["file_bytes"], lora["packed_bytes"]) == (1000, 4000, None)
    assert (half["parameters"], half["file_bytes"], half["packed_bytes"]) == (500, 2000, 500)
    assert (rows["parameters"], rows["file_bytes"], rows["timings"]) == (1000, None, [])
    assert (
        lora["timings"][1] == {"batch_size": 8, "seconds": 0.008} and half["timings"][1]["seconds"] == 0.004
    )
    assert result["latency_batch"] == 8 and lora["seconds"] == 11.0
    assert result["fronts"]["file_bytes"]["front"] == ["a: half", "a: lora", "a: zeros"]
    assert [p["cost"] for p in result["fronts"]["latency"]["points"]] == [0.008, 0.004, 0.008]


def test_other_machines_are_not_compared(tmp_path):
    a = make_run(tmp_path / "a", [make_arm("lora"), make_arm("half", weights=make_weights(0.5))])
    b = make_run(tmp_path / "b", [make_arm("rows", weights=make_weights(0.2))], hardware=GPU)
    c = make_run(tmp_path / "c", [make_arm("head")], hardware=MACHINE | {"cores": 4})
    result = compare([a, b, c])
    assert row_of(result, "rows")["not_compared"] == ["seconds", "latency", "peak_bytes"]
    assert row_of(result, "head")["not_compared"] == ["seconds", "latency"]
    assert [p["name"] for p in result["fronts"]["seconds"]["points"]] == ["a: lora", "a: half"]
    assert [p["name"] for p in result["fronts"]["latency"]["points"]] == ["a: lora", "a: half"]
    assert (
        len(result["fronts"]["peak_bytes"]["points"]) == 3
        and len(result["fronts"]["file_bytes"]["points"]) == 3
    )
    assert (
        "b ran on A GPU, a on A CPU, 2 cores, 1 threads: their seconds, latency and memory"
        in result["notes"][0]
    )
    assert not any("Runs were timed" in note for note in result["notes"])  # b and c are not compared in it
    alone = compare([a, b], arms=["lora", "rows"])
    assert "seconds" not in alone["fronts"] and "latency" not in alone["fronts"]
    unknown = make_run(tmp_path / "d", [make_arm("rows")], hardware={})
    same = make_run(tmp_path / "e", [make_arm("rows")], hardware={})
    assert compare([unknown, same])["arms"][1]["not_compared"] == ["seconds", "latency", "peak_bytes"]


def test_the_baseline(tmp_path):
    pruned = make_arm("kept", keep=0.3, scorer="dlc", select="top_hard")
    a = make_run(tmp_path / "a", [pruned, make_arm("cut", weights=make_weights(0.5)), make_arm("whole")])
    b = make_run(tmp_path / "b", [make_arm("full"), make_arm("x:y")])
    assert compare([a, b])["baseline"] == "a: whole" and compare([b, a])["baseline"] == "b: full"
    assert compare([a, b], "b:x:y")["baseline"] == compare([a, b], "b: x:y")["baseline"] == "b: x:y"
    assert compare([a, b], f"{a}:kept")["baseline"] == "a: kept"
    assert compare([a, b], f"{b}/")["baseline"] == "b: full"
    result = compare([a, b], "b", arms=["cut", "a:kept"])
    assert [row["name"] for row in result["arms"]] == ["a: kept", "a: cut", "b: full"]
    assert compare([a], arms=["kept", "cut"])["baseline"] == "a: kept"


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / x / y, [make_arm("full")], name="demo") for x, y in ("pq", "pr", "sq")]
    assert [r["name"] for r in compare(runs[:2])["runs"]] == ["q", "r"]
    assert [r["name"] for r in compare(runs)["runs"]] == list(map(str, runs))
    assert [row["name"] for row in compare(runs[:2])["arms"]] == ["q: full", "r: full"]


def test_what_else_differs_is_noted(tmp_path):
    a = make_run(tmp_path / "a", [make_arm("full")], versions={"torch": "2.9"})
    b = make_run(tmp_path / "b", [make_arm("lora")], versions={"torch": "2.8"}, model={"name": "n"})
    notes = compare([a, b])["notes"]
    assert any("Runs were timed one after the other" in note for note in notes)
    assert "b has torch 2.8, a 2.9." in notes and "b has the model n, a m." in notes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "regression"}, "'a' and 'b' differ in tasks: classification and regression"),
        ({"metric": "r2"}, "differ in metrics"),
        (
            {"data": {"test": "other", "test_examples": N, "classes": ["a", "b"]}},
            "differ in test sets: d[test]",
        ),
        (
            {"data": {"test": "d[test]", "test_examples": 7, "classes": ["a", "b"]}},
            "the same data.test, data.t",
        ),
        ({"data": {"test": "d[test]", "test_examples": N, "classes": ["a"]}}, "differ in classes"),
        ({"kind": "memory"}, "holds a memory, not a run"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, change, words):
    a = make_run(tmp_path / "a", [make_arm("full")])
    b = make_run(tmp_path / "b", [make_arm("full")], **change)
    with pytest.raises(ValueError) as caught:
        compare([a, b])
    assert words in str(caught.value)


def test_what_is_no_run_or_not_finished(tmp_path):
    with pytest.raises(ValueError, match=r"nothing' has no result.json; make one: serpette run"):
        compare([tmp_path / "nothing"])
    (tmp_path / "begun" / "arms").mkdir(parents=True)
    (tmp_path / "begun" / "recipe.yaml").touch()
    with pytest.raises(ValueError, match=r"is not finished; go on with it: serpette run .*begun/recipe.yaml"):
        compare([tmp_path / "begun"])
    (tmp_path / "begun" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        compare([tmp_path / "begun"])


def test_bad_arms_and_runs(tmp_path):
    run = make_run(tmp_path / "a", [make_arm("full"), make_arm("lora")])
    with pytest.raises(ValueError, match=r"arm='lorra' is in none of the runs; did you mean 'lora'\?"):
        compare([run], arms=["lorra"])
    with pytest.raises(ValueError, match=r"baseline='a:ful' is no RUN or RUN:ARM of these; did you mean"):
        compare([run], "a:ful")
    with pytest.raises(ValueError, match="there is 1 arm to compare; give two or more"):
        compare([run], arms=["lora"])
    with pytest.raises(ValueError, match="there is no arm to compare"):
        compare([])
    with pytest.raises(ValueError, match="is given twice"):
        compare([run, tmp_path / "a" / "."])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_that_of_brute_force(points):
    expected = [not any(c <= x and v >= y and (c, v) != (x, y) for c, v in points) for x, y in points]
    assert pareto_front([x for x, _ in points], [y for _, y in points]) == expected
