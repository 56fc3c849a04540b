"""Metrics and comparisons of arms: by hand, and against the model's own loss."""

import math

import pytest
import torch

from serpette.arms import comparisons, controls, mean_of_seeds, predict, quality
from serpette.data.examples import Examples
from serpette.evaluate import paired_difference, paired_over_seeds, seeds_interval
from serpette.zoo import tiny


def arm(name, scorer=None, select="top_hard", keep=0.5, per_class=True, **more):
    return {"name": name, "scorer": scorer, "select": select, "keep": keep, "per_class": per_class} | more


def test_perplexity_weights_tokens_and_each_weights_examples():
    got = quality("causal-lm", torch.tensor([[1.0, 1.0], [2.0, 3.0]]), None, None, 0)
    assert got["perplexity"] == pytest.approx(math.exp((1 * 1 + 2 * 3) / 4))
    assert got["loss"] == 1.5 and got["each"] == [1.0, 2.0] and got["response_tokens"] == 4


def test_losses_of_test_examples_are_those_of_the_model():
    model = tiny("llama")
    rows = [
        {"input_ids": [1, 5, 9, 7], "labels": [-100, -100, 9, 7]},
        {"input_ids": [1, 8], "labels": [-100, 8]},
    ]
    outputs, kept, bad = predict(model, Examples(rows, task="causal-lm"), 2)
    for row, output in zip(rows, outputs, strict=True):
        own = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert output[0] == pytest.approx(own.item(), rel=1e-5)
    assert outputs[:, 1].tolist() == [2, 1] and kept == [0, 1] and not bad


def test_controls_have_the_same_share():
    full = arm("full", select=None, keep=1.0)
    plain, balanced = arm("a", select="random", per_class=False), arm("b", select="random")
    small = arm("c", select="random", keep=0.1)
    loss, other_loss = arm("loss", "loss"), arm("loss over all", "loss", per_class=False)
    tsa, tsa_small = arm("tsa", "tsa"), arm("tsa small", "tsa", keep=0.1)
    tsa_all = arm("tsa over all", "tsa", per_class=False)
    arms = [full, plain, balanced, small, other_loss, loss, tsa, tsa_small, tsa_all]

    def names(which):
        return [a["name"] for a in controls(which, arms)]

    assert names(full) == []
    assert names(tsa) == ["full", "b", "loss"]
    assert names(tsa_all) == ["full", "b", "loss over all"]
    assert names(tsa_small) == ["full", "c"]
    assert names(loss) == ["full", "b"] and names(balanced) == ["full", "a"] and names(small) == ["full"]


def test_controls_of_arms_that_are_tuned_otherwise():
    rows = {"method": "rows", "fraction": 0.05}
    lora = arm("lora", select=None, keep=1.0, method="lora", tune={})
    full = arm("full", select=None, keep=1.0, method="full", tune={"method": "full"})
    whole_rows = arm("rows", select=None, keep=1.0, method="rows", tune=rows)
    more_rows = arm("more rows", select=None, keep=1.0, method="rows", tune=rows | {"fraction": 0.1})
    chance = arm("random", select="random", method="lora", tune={})
    rows_chance = arm("random rows", select="random", method="rows", tune=rows)
    dlc = arm("dlc", "dlc", method="lora", tune={})
    rows_dlc = arm("dlc rows", "dlc", method="rows", tune=rows)
    head_dlc = arm("dlc head", "dlc", method="head", tune={"method": "head"})
    arms = [lora, full, whole_rows, more_rows, chance, rows_chance, dlc, rows_dlc, head_dlc]

    def names(which, among=arms):
        return [a["name"] for a in controls(which, among)]

    assert names(full) == [] and names(lora) == ["full"]
    assert names(whole_rows) == names(more_rows) == ["full", "lora"]
    assert names(dlc) == ["lora", "random"] and names(rows_dlc) == ["rows", "random rows"]
    assert names(head_dlc) == ["full"], "no head keeps all: the recipe's own control"
    assert names(lora, [lora, whole_rows]) == [] and names(whole_rows, [lora, whole_rows]) == ["lora"]


def test_controls_of_arms_whose_weights_are_pruned():
    def cut(name, importance="lora_prune", sparsity=0.5, **more):
        prune = {"importance": importance, "sparsity": sparsity, "pattern": "2:4", "targets": "both"}
        return arm(name, select=None, keep=1.0, method="lora", tune={}) | {"prune": prune} | more

    full = arm("full", select=None, keep=1.0, method="lora", tune={}, prune=None)
    dlc = arm("dlc", "dlc", method="lora", tune={}, prune=None)
    chance, magnitude, taylor = (
        cut("random", "random"),
        cut("magnitude", "magnitude"),
        cut("taylor", "taylor"),
    )
    other = cut("random 90", "random", 0.9)
    both = cut("both", scorer="dlc", select="top_hard", keep=0.5)
    alone = cut("alone", tune={"method": "full"})
    arms = [other, chance, magnitude, full, dlc, taylor, both, alone]

    def names(which):
        return [a["name"] for a in controls(which, arms)]

    assert names(full) == [] and names(dlc) == ["full"], "no arm is compared with one that is cut"
    assert names(taylor) == ["full", "random", "magnitude"] and names(magnitude) == ["full", "random"]
    assert names(chance) == names(other) == ["full"]
    assert names(both) == ["dlc", "full"], "the same examples first"
    assert names(alone) == ["full"], "none is tuned alike"


def test_seeds_of_arms_that_are_tuned_otherwise():
    parts = [part(s, 0.8, 0.7) for s in range(3)]
    for seed, one in enumerate(parts):
        one["arms"][1] |= {"select": None, "keep": 1.0, "method": "rows", "tune": {"method": "rows"}}
        one["arms"][1] |= {"trainable_parameters": 10 + seed}
        one["arms"][0] |= {"method": "full", "tune": {}}
    del parts[2]["arms"][1]["trainable_parameters"]  # of a run that an older version began
    got = mean_of_seeds(parts)
    assert got["arms"][1]["tune"] == {"method": "rows"} and got["arms"][1]["trainable_parameters"] == 10.5
    assert [(c["arm"], c["to"]) for c in got["comparisons"]] == [("x", "full")]


def test_one_seed_is_paired_over_examples():
    arms = [arm("full", select=None, each=[0.5, 1.0, 2.0, 1.0]), arm("x", "dlc", each=[0.4, 0.9, 1.7, 1.1])]
    (got,) = comparisons(arms, "causal-lm")
    assert (got["difference"], got["low"], got["high"]) == paired_difference(arms[1]["each"], arms[0]["each"])
    assert got["difference"] < 0


def part(seed, full, x, task="classification"):
    key = "perplexity" if task == "causal-lm" else "accuracy"

    def values(value):
        loss = {"loss": math.log(value)} if task == "causal-lm" else {}
        return {
            key: value,
            "gamma": None,
            "examples": 3,
            "kept_by_class": [1, 2 + seed % 2],
            "epochs": 1,
        } | loss

    return {
        "task": task,
        "seed": seed,
        "data": {"set_aside": [{"id": str(seed), "reason": "why"}]},
        "observing": {"decoding": float(seed)},
        "scorers": {"dlc": {"seconds": float(seed), "passes": 2}},
        "arms": [
            arm("full", select=None, keep=1.0, seconds={"tuning": 2.0 * seed}, selector=None, **values(full)),
            arm("x", "dlc", seconds={"tuning": 1.0}, selector=f"s({seed})", **values(x)),
        ],
    }


def test_several_seeds_are_means_with_intervals_paired_by_seed():
    full, x = [0.8, 0.9, 0.7], [0.7, 0.85, 0.6]
    got = mean_of_seeds([part(s, f, v) for s, (f, v) in enumerate(zip(full, x, strict=True))])
    assert got["seeds"] == [0, 1, 2] and [s["id"] for s in got["data"]["set_aside"]] == ["0", "1", "2"]
    first, second = got["arms"]
    assert first["accuracy"] == pytest.approx(0.8) and first["seconds"] == {"tuning": 2.0}
    assert (first["accuracy"], *first["interval"]) == pytest.approx(seeds_interval(full))
    assert second["selector"] == "s(0), s(1), s(2)" and first["selector"] is None and first["gamma"] is None
    assert second["kept_by_class"] == pytest.approx([1, 7 / 3]) and second["examples"] == 3
    assert [(one["seed"], one["accuracy"]) for one in second["by_seed"]] == list(enumerate(x))
    (comparison,) = got["comparisons"]
    expected = paired_over_seeds(x, full)
    assert (comparison["difference"], comparison["low"], comparison["high"]) == expected
    assert comparison["within_noise"] == (expected[1] <= 0 <= expected[2])
    assert got["scorers"]["dlc"] == {"seconds": 1.0, "passes": 2} and got["observing"] == {"decoding": 1.0}


def test_seeds_of_a_language_model_are_compared_by_their_loss():
    got = mean_of_seeds([part(s, 10.0 + s, 9.0 + s, "causal-lm") for s in range(3)])
    assert got["arms"][0]["perplexity"] == pytest.approx(11)
    expected = sum(math.log((9 + s) / (10 + s)) for s in range(3)) / 3
    assert got["comparisons"][0]["difference"] == pytest.approx(expected) and expected < 0
