"""The report of several seeds, and of a metric that is better when it is lower."""

from test_report import make_result, make_run, read


def several(**options):
    result = make_result(**options) | {"seeds": [4, 5, 6], "seed": 4}
    for arm in result["arms"]:
        arm |= {"interval": [arm["accuracy"] - 0.0123, arm["accuracy"] + 0.0123], "by_seed": [{"seed": 4}]}
    return result


def words(page):
    return " ".join(" ".join(page.text).split())


def test_several_seeds_are_said(tmp_path):
    page = read(make_run(tmp_path, several(), gallery=False))
    assert "(within the noise of these 3 seeds)" in page.answer
    assert "(beyond the noise of these 3 seeds)" in page.answer and "one seed" not in page.answer
    text = words(page)
    assert "3 seeds, 4 to 6" in text and "All figures are means over 3 seeds." in text
    assert "81.2 % (80.0 to 82.4 %)" in text
    assert "paired seed by seed" in text and "5 comparisons: about one in twenty" in text
    assert "Beyond the noise of these 3 seeds" in text and "seeds 4, 5, 6" in text
    assert "Bars: 95 % interval over the seeds" in text


def test_means_that_are_no_whole_numbers(tmp_path):
    result = several()
    result["arms"][2] |= {"examples": 299.6667, "steps": 36.5, "interval": [None, None]}
    text = words(read(make_run(tmp_path, result, gallery=False)))
    assert "dlc kept 300 of 1,000 training examples (30 %)" in text and "299.6" not in text


def perplexity(to_full, to_chance):
    result = make_result(classes=[]) | {"task": "causal-lm", "metric": "perplexity"}
    for arm, value in zip(result["arms"], (8.0, 8.5, 8.25, 9.0), strict=True):
        for key in ("accuracy", "accuracy_by_class", "kept_by_class"):
            del arm[key]
        arm |= {"perplexity": value, "loss": value / 4, "per_class": None}
    result["comparisons"] = [
        {"arm": "dlc", "to": to, "difference": d, "low": d - 0.01, "high": d + 0.01, "within_noise": noise}
        for to, (d, noise) in (("full", to_full), ("stratified", to_chance))
    ]
    return result


def test_a_lower_perplexity_is_better(tmp_path):
    page = read(make_run(tmp_path, perplexity((0.031, False), (-0.03, False)), gallery=False, scores=False))
    assert page.answer.startswith("Pruning saved time and beat chance, at a price: dlc kept")
    assert "was worse by 0.031 nats of loss than the full set" in page.answer
    assert "was better by 0.030 nats of loss than the random choice" in page.answer
    text = words(page)
    assert "8.25" in text and "8.00" in text and "%" not in text.split("8.25")[1][:8]
    assert "A lower perplexity is better." in text and "Down and to the left is better." in text
    assert "less is better; 0.01 is about 1 % of perplexity" in text and "+0.031 (+0.021 to +0.041)" in text


def test_a_higher_perplexity_than_chance_is_no_gain(tmp_path):
    page = read(make_run(tmp_path, perplexity((0.031, False), (0.03, False)), gallery=False, scores=False))
    assert "it chose worse than chance" in page.answer
    page = read(make_run(tmp_path, perplexity((0.0, True), (-0.004, True)), gallery=False, scores=False))
    assert "it chose no better than chance" in page.answer and "matched the full set" in page.answer
