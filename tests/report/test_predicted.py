# ruff: noqa: E501  (long expected sentences)
"""The run's page of arms that carry a prediction, of arms that nothing measured, and of saved models."""

import json

import pytest
from test_report import make_result, make_run, read
from test_weights import SMALL, cut_arm, result

from serpette.report.answer import find_subject
from serpette.report.histograms import histogram_of
from serpette.report.predicted import forecasts, predicted_words
from serpette.report.run import Run

FORETOLD = {
    "value": 80.0, "low": 78.8, "high": 81.2, "loss": 1.3, "loss_low": 0.2, "loss_high": 1.9,
    "seconds": 25.0, "peak_bytes": 1_000_000_000,
}  # fmt: skip


def words(page):
    return " ".join(" ".join(page.text).split())


def test_predicted_beside_actual(tmp_path):
    made = make_result()
    made["arms"][2]["predicted"] = FORETOLD
    page = read(make_run(tmp_path, made, gallery=False))
    text = words(page)
    assert "accuracy, points 80.0 (78.8 to 81.2) 79.1 within" in text
    assert "loss to the full set, points 1.3 (0.2 to 1.9) 2.1 outside" in text
    assert "cost 25.0 s 30.5 s 1.22 times" in text and "peak memory 953.7 MiB 1.1 GiB 1.23 times" in text
    assert page.answer.endswith(
        "Foretold for dlc: loss to the full set of 1.3 points of accuracy (0.2 to 1.9); it did not come true, with 2.1."
    )
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "dlc predicted 1.3 (0.2 to 1.9), actual 2.1" in source


def test_a_prediction_that_came_true_and_one_without_ends():
    made = make_result()
    made["arms"][2]["predicted"] = FORETOLD | {"loss_high": 2.2}
    run = Run(made)
    assert predicted_words(run, find_subject(run)).endswith("it came true, with 2.1.")
    made["arms"][2]["predicted"] = {"seconds": 25.0, "value": None}
    assert predicted_words(run, None) == "Foretold for dlc: cost of 25.0 s; it came to 30.5 s."
    made["arms"][2]["predicted"] = {}
    assert predicted_words(run, None) == ""


def test_the_ends_themselves_are_within():
    made = make_result()
    made["arms"][2]["predicted"] = {"seconds": 25.0, "seconds_low": 20.0, "seconds_high": 30.5}
    made["arms"][2]["seconds"] = {"scoring": 11.5, "selection": 0.0, "tuning": 19.0}
    assert [f.held for f in forecasts(Run(made), made["arms"][2])] == [True]


def test_a_language_model_is_predicted_in_nats():
    made = make_result() | {"task": "causal-lm", "metric": "perplexity"}
    for arm, loss in zip(made["arms"], (2.0, 2.2, 2.13, 2.3), strict=True):
        arm |= {"perplexity": 8.0, "loss": loss}
    made["arms"][2]["predicted"] = {"value": 2.1, "loss": 0.1, "loss_low": 0.05, "loss_high": 0.15}
    run = Run(made)
    assert predicted_words(run, find_subject(run)) == (
        "Foretold for dlc: rise of the loss to the full set of 0.100 nats (0.050 to 0.150); it came true, with 0.130."
    )


def test_the_speed_is_the_greatest_that_was_measured():
    arm = cut_arm("cut", 0.78, (5.0, 0.0, 17.0), "structured", 1.8, 1.5, SMALL)
    arm["weights"]["timings"][0]["speedup"] = 1.2
    arm["predicted"] = {"speedup": 1.6}
    found = forecasts(Run(result(arm)), arm)
    assert [(f.predicted, f.actual) for f in found] == [(1.6, 1.8)]


def test_nothing_was_evaluated(tmp_path):
    made = make_result()
    for arm in made["arms"]:
        for key in ("accuracy", "accuracy_by_class", "mmd"):
            del arm[key]
        del arm["seconds"]["evaluation"]
    made["arms"][2]["predicted"] = FORETOLD
    made["comparisons"], made["data"]["test_examples"] = [], None
    page = read(make_run(tmp_path, made, gallery=False))
    assert page.answer.startswith("Pruning saved time: dlc kept 300 of 1,000 training examples (30 %)")
    assert "What was lost was not measured. No random choice" not in page.answer
    assert "What was lost was not measured. Foretold for dlc: loss to the full set of 1.3" in page.answer
    assert page.answer.endswith("; what came of it was not measured.")
    text = words(page)
    assert "Nothing was evaluated, so what the arms lost is not known." in text
    assert "To full" not in text and "1,000 training examples" in text and "test examples" not in text
    assert "accuracy, points 80.0 (78.8 to 81.2) not measured –" in text
    alone = make_result()
    alone["arms"] = alone["arms"][:1]
    del alone["arms"][0]["accuracy"]
    assert read(make_run(tmp_path / "alone", alone, gallery=False)).answer.endswith(
        "only the full set was tuned, in 61.2 s."
    )


def test_a_pruned_model_that_was_not_evaluated(tmp_path):
    arm = cut_arm("cut", 0.7, (0.0, 0.0, 17.0), "structured", 1.8, 1.5, SMALL)
    made = result(arm | {"method": "none", "seconds": {"scoring": 0.0, "tuning": 0.0, "pruning": 3.0}})
    for entry in made["arms"]:
        entry.pop("accuracy")
    page = read(make_run(tmp_path, made, classes=2, gallery=False, scores=False))
    assert "cut trained nothing, cut 50 % of the heads and channels at once" in page.answer
    assert "What was lost was not measured." in page.answer


def test_where_the_models_are(tmp_path):
    made = make_result()
    assert "What is left to use" not in words(read(make_run(tmp_path / "none", made, gallery=False)))
    made["arms"][2] |= {
        "model": "arms/02-dlc/model",
        "export": {
            "formats": ["adapter"],
            "files": {"adapter_model.safetensors": 1_048_576, "README.md": 900},
        },
    }
    text = words(read(make_run(tmp_path, made, gallery=False)))
    assert "dlc arms/02-dlc/model adapter_model.safetensors 1.0 MiB, README.md 900 B" in text


def test_one_story_in_order(tmp_path):
    made = make_result()
    made["arms"][2]["predicted"] = FORETOLD
    source = read_source(make_run(tmp_path, made))
    marks = ['id="answer"', "What each arm cost and what it lost", "Accuracy against cost", "Predicted beside actual",
             "Which examples were cut", "Easiest and hardest", "kept examples by class", "Versions, hardware"]  # fmt: skip
    places = [source.index(mark) for mark in marks]
    assert places == sorted(places)


def read_source(folder):
    read(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_histogram_of_the_result_is_drawn_without_the_scores(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    found = histogram_of(rng.normal(size=500), np.arange(500) % 3, ["a", "b", "c"])
    assert found is not None and sum(found["counts"]) == 500 and len(found["edges"]) == 25
    assert sum(sum(group["counts"]) for group in found["groups"]) == 500
    with_scores = read_source(make_run(tmp_path / "scores", make_result(), gallery=False))
    made = make_result()
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "scores" / "scores.parquet")
    values, labels = table.column("score:dlc").to_numpy(), table.column("label").to_numpy()
    made["scorers"]["dlc"]["histogram"] = json.loads(
        json.dumps(histogram_of(values, labels, made["data"]["classes"]))
    )
    assert picture(with_scores) == picture(
        read_source(make_run(tmp_path / "json", made, gallery=False, scores=False))
    )


def picture(source):
    start = source.index("Histograms of the score dlc")
    return source[start : source.index("</svg>", start)]


@pytest.mark.parametrize("values", [[], [float("nan")]])
def test_no_histogram_of_no_scores(values):
    import numpy as np

    assert histogram_of(np.array(values)) is None
