# ruff: noqa: E501  (long expected sentences)
"""The report of arms whose weights were pruned: one story, no speed that was not measured."""

import copy

import pytest
from test_report import make_arm, make_result, make_run, read

from serpette.report.answer import answer
from serpette.report.run import Run
from serpette.report.weights import short, split_name


def words(page):
    return " ".join(" ".join(page.text).split())


def cut_arm(
    name, value, cost, pattern, speedup, low, after, importance="lora_prune", scorer=None, examples=1000
):
    """An arm with 2 blocks of 3 layers, timed at batches of 1 and 8."""
    before = {
        "parameters": 2_000_000,
        "nonzero_parameters": 1_990_000,
        "flops_per_example": 4e9,
        "file_bytes": 8_000_000,
    }
    seconds = {1: 0.010, 8: 0.040}
    shrink = pattern == "structured"
    layers = [
        {"name": f"encoder.layer.{b}.{kind}", "sparsity": share}
        for b in range(2)
        for kind, share in (("attention.query", 0.5), ("attention.output.dense", 0.4), ("output.dense", 0.6))
    ]
    arm = make_arm(name, value, cost, scorer, "flex_rand" if scorer else None, examples, classes=2)
    return arm | {
        "method": "lora", "tune": {}, "trainable_parameters": 100_000,
        "prune": {"importance": importance, "sparsity": 0.5, "pattern": pattern, "targets": "both", "shrink": shrink},
        "weights": {
            "sparsity": 0.5, "before": before, "after": before | after, "layers": layers,
            "timings": [
                {"batch_size": size, "before": s, "after": s / speedup, "speedup": speedup, "low": low, "high": 2 * speedup}
                for size, s in seconds.items()
            ],
        },
    }  # fmt: skip


def against(arm, to, difference, noise):
    return {
        "arm": arm,
        "to": to,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "within_noise": noise,
    }


SMALL = {
    "parameters": 1_200_000,
    "nonzero_parameters": 1_190_000,
    "flops_per_example": 2.2e9,
    "file_bytes": 4_800_000,
}
ZEROS = {"nonzero_parameters": 1_000_000, "packed_bytes": 4_400_000}


def result(*arms, comparisons=()):
    made = make_result(classes=["good", "bad"])
    plain = {"method": "lora", "tune": {}, "trainable_parameters": 100_000}
    made["arms"] = [
        make_arm("full", 0.812, (0.0, 0.0, 60.0), examples=1000, classes=2) | plain,
        make_arm("dlc", 0.79, (5.0, 0.0, 18.0), "dlc", "flex_rand", 300, classes=2) | plain,
        *arms,
    ]
    made["arms"][0]["per_class"] = None
    made["comparisons"] = list(comparisons)
    return made | {"scorers": {"dlc": {"seconds": 5.0}}, "model": {"name": "m", "parameters": 2_000_000}}


@pytest.fixture
def shrunk():
    arm = cut_arm(
        "all three", 0.78, (5.0, 0.0, 17.0), "structured", 1.8, 1.5, SMALL, scorer="dlc", examples=300
    )
    arm["seconds"]["pruning"] = 1.0
    pairs = [against("all three", "full", -0.032, False), against("all three", "dlc", -0.01, True)]
    return result(arm, comparisons=pairs)


def test_one_story_from_the_examples_to_the_weights(shrunk, tmp_path):
    page = read(make_run(tmp_path, shrunk, classes=2, gallery=False, scores=False))
    assert page.answer == (
        "Pruning examples and weights made the tuning cheaper and the model smaller and faster, at a price: all three "
        "tuned lora on 300 of 1,000 examples (30 %, flex_rand by dlc), 100 k weights of it (5 %), cut 50 % of "
        "the heads and channels meanwhile, and cost 23.0 s of scoring, selection, tuning and pruning, against 60.0 s "
        "for full (38.3 %). What is left: 1.2 M parameters (60 %), a file of 4.6 MiB (60 %), measured 1.80 times "
        "as fast in batches of 8. It lost 3.2 points of accuracy against full (beyond the noise of this test set) and "
        "lost 1.0 points of accuracy against dlc without the cut (within the noise of one seed and this test set)."
    )
    text = words(page)
    assert "The model, before and after" in text and "parameters 2 M 1.2 M 60 %" in text
    assert "22.2 ms unpruned 40 ms" in text and "360 unpruned 200" in text, (
        "examples a second in batches of 8"
    )
    assert "unpruned 79.0 %" in text and "Nothing gets faster" not in text
    assert "all three is measured 1.80 times as fast in batches of 8." in text
    assert "Sparsity by layer of all three" in text and "Sensitivity" not in text


def test_zeros_are_never_called_fast(tmp_path):
    """Even where a measurement happens to be faster: nothing of the zeros makes it so."""
    arm = cut_arm("masked", 0.80, (0.0, 0.0, 61.0), "unstructured", 1.3, 1.1, ZEROS)
    page = read(
        make_run(
            tmp_path,
            result(arm, comparisons=[against("masked", "full", -0.012, True)]),
            classes=2,
            gallery=False,
            scores=False,
        )
    )
    assert page.answer.startswith(
        "Pruning made the packed file smaller, and nothing faster: masked tuned lora on 1,000 examples"
    )
    assert "What is left: a packed file of 4.2 MiB (55 %); it is not faster." in page.answer
    text = words(page)
    assert "Nothing gets faster where weights are only set to zero (masked)" in text
    assert "times as fast" not in text and "are not of the zeros' making" in text


def test_a_speed_within_the_noise_is_no_speed(shrunk):
    for timing in shrunk["arms"][2]["weights"]["timings"]:
        timing["low"] = 0.97
    verdict, figures = answer(Run(shrunk))
    assert "faster" not in verdict and "smaller" in verdict and "it is not faster" in figures
    for arm in shrunk["arms"][2:]:
        del arm["weights"]["timings"]
    assert "its speed was not measured" in answer(Run(shrunk))[1]


def test_the_story_is_of_a_score_and_not_of_its_controls():
    arms = [
        cut_arm(name, value, (0.0, 0.0, 61.0), "unstructured", 1.0, 0.9, ZEROS, importance=name)
        for name, value in (("random", 0.5), ("magnitude", 0.9), ("lora_prune", 0.7), ("taylor", 0.95))
    ]
    assert "lora_prune tuned lora" in answer(Run(result(*arms)))[1]


def test_sensitivity_names_the_most_sensitive_layers(shrunk, tmp_path):
    losses = {f"encoder.layer.{i}.output.dense": [1.0, 1.0 + i / 10] for i in range(5)}
    shrunk["arms"][0]["sensitivity"] = {
        "dense": 0.9, "of": 12, "sparsities": [0.5, 0.9], "layers": [{"name": n, "losses": v} for n, v in losses.items()],
    }  # fmt: skip
    page = read(make_run(tmp_path, shrunk, classes=2, gallery=False, scores=False))
    assert "Sensitivity of each layer of full" in words(page) and "5 of 12 layers, drawn." in words(page)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Most sensitive: encoder.layer.4.output.dense up to 1.4; encoder.layer.3.output.dense" in source
    assert source.count("encoder.layer.1.output.dense") == 0


def test_figures_that_are_missing_are_left_out(shrunk, tmp_path):
    arm = shrunk["arms"][2]
    arm["weights"] |= {"before": {}, "after": {}, "layers": [], "timings": []}
    page = read(make_run(tmp_path, shrunk, classes=2, gallery=False, scores=False))
    assert "Pruning the weights made nothing smaller" in page.answer
    without = copy.deepcopy(shrunk)
    without["arms"] = without["arms"][:2]
    page = read(make_run(tmp_path / "none", without, classes=2, gallery=False, scores=False))
    assert "before and after" not in words(page) and "pruning" not in words(page)


def test_names_of_layers():
    assert split_name("bert.encoder.layer.11.output.dense") == ("11", "output.dense")
    assert split_name("blocks.1.0.conv_pw") == ("1.0", "conv_pw") and split_name("stem") == ("", "stem")
    assert short(["a.dense", "b.dense", "query"]) == ["a.dense", "b.dense", "query"]
