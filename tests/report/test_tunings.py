# ruff: noqa: E501  (long expected sentences)
"""The report of arms that differ in what trains, with and without pruned data beside them."""

from test_report import make_arm, make_result, make_run, read

from serpette.report.answer import answer
from serpette.report.run import Run


def words(page):
    return " ".join(" ".join(page.text).split())


def tuned(name, method, value, tuning, trainable, ranking=0.0, examples=1000, select=None, **tune):
    changed = {} if method == "lora" and not tune else {"method": method, **tune}
    arm = make_arm(name, value, (0.0, 0.0, tuning), select=select, examples=examples, classes=2)
    arm["seconds"]["ranking"] = ranking
    return arm | {"method": method, "tune": changed, "trainable_parameters": trainable, "per_class": None}


def against(arm, to, difference, noise):
    return {
        "arm": arm,
        "to": to,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "within_noise": noise,
    }


def tunings(rows=0.80, rows_seconds=(1.5, 30.5), to_full=(-0.012, True), to_lora=(0.031, False), **more):
    result = make_result(classes=["good", "bad"])
    ranking, tuning = rows_seconds
    result["arms"] = [
        tuned("full", "full", 0.812, 61.2, 14_200_000, learning_rate=1e-5),
        tuned("lora", "lora", 0.769, 40.0, 120_000),
        tuned(
            "rows",
            "rows",
            rows,
            tuning,
            710_000,
            ranking,
            fraction=0.05,
            importance="taylor",
            freeze_attention=True,
        ),
    ]
    result["comparisons"] = [
        against("lora", "full", -0.043, False),
        against("rows", "full", *to_full),
        against("rows", "lora", *to_lora),
    ]
    return result | {"scorers": {"random": {"seconds": 0.0}}} | more


def page_of(folder, result):
    return read(make_run(folder, result, classes=2, gallery=False, scores=False))


def test_the_story_is_of_what_trains(tmp_path):
    page = page_of(tmp_path, tunings())
    assert page.answer == (
        "Training fewer weights saved time: rows trained 710,000 weights (5.0 % of the model's) and cost 32.0 s of "
        "ranking and tuning, against 61.2 s for full (52 %) and 40.0 s for lora (80 %). It lost 1.2 points of "
        "accuracy against full (within the noise of one seed and this test set) and gained 3.1 points of accuracy "
        "against lora (beyond the noise of this test set)."
    )
    text = words(page)
    assert (
        "prun" not in text.lower()
        and "To random choice" not in text
        and "Kept" not in text.split("classes")[0]
    )
    assert "Trains" in text and "710 k 5.0 %" in text and "14.2 M 100.0 %" in text and "120 k 0.85 %" in text
    assert "To full" in text and "To LoRA" in text and "52 % of full" in text
    assert (
        "rows, fraction 0.05, importance taylor, freeze attention" in text
        and "full, learning rate 1e-05" in text
    )
    assert "Peak memory is that of the whole process" in text
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        source.count("<svg") == 3
        and "parameters that train" in source
        and "ranking + tuning, seconds" in source
    )
    assert "MMD" not in source


def test_verdicts_of_tunings():
    def verdict(**options):
        return answer(Run(tunings(**options)))[0].removesuffix(":")

    assert verdict(rows_seconds=(9.0, 60.0)) == "Training fewer weights saved no time"
    assert verdict(to_full=(-0.05, False)) == "Training fewer weights saved time at a price"
    assert verdict(to_full=(0.05, False)) == "Training fewer weights saved time and gained"
    better = dict(rows_seconds=(0.0, 61.0), to_full=(0.05, False))
    assert verdict(**better) == "Training fewer weights saved no time, but was more accurate"


def test_memory_is_a_saving_where_it_was_measured_alone(tmp_path):
    result = tunings(rows_seconds=(9.0, 60.0))
    result["arms"][2]["peak_bytes"] = 600_000_000
    assert page_of(tmp_path / "cpu", result).answer.startswith("Training fewer weights saved no time:")
    result["hardware"]["device"] = "cuda:0"
    page = page_of(tmp_path / "gpu", result)
    assert page.answer.startswith("Training fewer weights saved memory:")
    assert "of the whole process" not in words(page)


def test_no_ranking_is_not_spoken_of(tmp_path):
    page = page_of(tmp_path, tunings(rows_seconds=(0.0, 30.0)))
    assert "cost 30.0 s of tuning, against" in page.answer and "ranking" not in page.answer


def test_rows_on_a_part_of_the_data_are_compared_with_rows_on_all(tmp_path):
    result = tunings()
    result["arms"] += [
        tuned("random lora", "lora", 0.70, 15.0, 120_000, examples=300, select="random"),
        tuned("dlc rows", "rows", 0.78, 11.0, 710_000, 1.0, 300, "top_hard", fraction=0.05, importance="taylor", freeze_attention=True)
        | {"scorer": "dlc"},
        tuned("random rows", "rows", 0.75, 10.0, 710_000, 1.0, 300, "random", fraction=0.05, importance="taylor", freeze_attention=True),
    ]  # fmt: skip
    result["comparisons"] += [
        against("dlc rows", "rows", -0.025, False),
        against("dlc rows", "random rows", 0.034, False),
        against("random lora", "lora", -0.069, False),
    ]
    page = page_of(tmp_path, result)
    assert (
        "dlc rows kept 300 of 1,000 training examples (30 %) and cost 12.0 s of scoring, selection, ranking and tuning, against 32.0 s for the full set"
        in page.answer
    )
    assert "11.0 s for the random choice" in page.answer
    assert "lost 2.5 points of accuracy against the full set" in page.answer
    assert "gained 3.4 points of accuracy against the random choice" in page.answer
    text = words(page)
    assert "Kept" in text and "To random choice" in text and "compared with the arm tuned alike" in text
    assert "−6.9 (−8.9 to −4.9)" in text


def test_a_pruned_arm_without_one_tuned_alike(tmp_path):
    result = tunings()
    result["arms"] = result["arms"][:1] + [
        tuned("random lora", "lora", 0.7, 15.0, 120_000, examples=300, select="random")
    ]
    result["comparisons"] = [against("random lora", "full", -0.112, False)]
    answer = page_of(tmp_path, result).answer
    assert (
        "against 61.2 s for full (25 %)" in answer and "lost 11.2 points of accuracy against full" in answer
    )


def test_results_of_older_versions(tmp_path):
    page = read(make_run(tmp_path, gallery=False))
    text = words(page)
    assert "Trains" not in text and "To LoRA" not in text and "ranking and" not in text
    assert "To random choice" in text and "scoring, selection and tuning" in text
