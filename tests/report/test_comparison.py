"""The page, the table and the verdict of a comparison."""

import re

import pytest
from test_comparing import GPU, N, make_arm, make_run, make_weights, seeded
from test_report import Page

from serpette.comparing import compare
from serpette.report.comparison import render, show, table, verdict


def make_arms(first=30, second=29, seconds=5.0):
    """Two arms right on so many of N test examples; the second one costs `seconds`."""
    arms = [make_arm("full", first / N, 99.0), make_arm("lora", second / N, seconds)]
    right = {"full": first, "lora": second}
    return arms, {name: {0: [1] * n + [0] * (N - n)} for name, n in right.items()}


def make_page(result):
    page = Page(render(result))
    assert "script" not in page.tags and len(page.ids) == len(set(page.ids))
    assert not [a for a in page.attributes if a[1] in ("src", "href") and not a[2].startswith("#")]
    return page


def words(text):
    return " ".join(text.split())


def test_the_verdict_names_the_cheapest_within_the_noise(tmp_path):
    arms, each = make_arms()
    said, figures = verdict(compare([make_run(tmp_path / "a", arms, each=each)]))
    assert said == "lora was the cheapest arm that was not measured worse than full:"
    assert figures.startswith("it cost 6.0 s, against 100 s (6 %), and lost 2.5 points of accuracy (")
    assert f"within the noise of {N} test examples" in figures and "1 paired difference at 95 %." in figures
    assert "Pareto front of accuracy against time: lora, full." in figures and "memory" not in figures


def test_a_loss_beyond_the_noise_is_no_bargain(tmp_path):
    arms, each = make_arms(second=10)
    said, figures = verdict(compare([make_run(tmp_path / "a", arms, each=each)]))
    assert said == "No arm that was cheaper held the accuracy of full:"
    assert figures.startswith(
        "full has accuracy 75.0 % and cost 100 s; closest came lora: it lost 50.0 points"
    )
    assert "beyond the noise of" in figures


def test_an_arm_as_dear_as_the_baseline_saves_nothing(tmp_path):
    arms, each = make_arms(second=40, seconds=98.0)  # 99 s to 100 s: the noise of timing
    said, figures = verdict(compare([make_run(tmp_path / "a", arms, each=each)]))
    assert said.startswith("No arm that was cheaper") and "closest" not in figures


def test_a_gain_is_said(tmp_path):
    arms, each = make_arms(second=40)
    _, figures = verdict(compare([make_run(tmp_path / "a", arms, each=each)]))
    assert "and gained 25.0 points of accuracy (+" in figures and "beyond the noise" in figures
    arms, each = make_arms(second=30)
    _, figures = verdict(compare([make_run(tmp_path / "b", arms, each=each)]))
    assert "and reached the same (−" in figures


def test_nothing_is_claimed_of_what_is_not_paired_or_ran_elsewhere(tmp_path):
    arms, each = make_arms()
    result = compare([make_run(tmp_path / "a", arms)])
    assert verdict(result)[0] == "No arm could be paired with full, so no loss is known:"
    assert ["not paired", ""] in [list(cell) for row in table(result)[1] for cell in row]
    assert "Not paired (no two seeds in common" in words(" ".join(make_page(result).text))
    a = make_run(tmp_path / "b" / "a", arms[:1], each=each)
    b = make_run(tmp_path / "b" / "b", arms[1:], each={"lora": each["lora"]}, hardware=GPU)
    result = compare([a, b])
    said, figures = verdict(result)
    assert said.startswith("No arm that was cheaper") and "time" not in figures
    cells = dict(zip(table(result)[0], table(result)[1][1], strict=True))
    assert cells["cost"] == ("6.0 s", "elsewhere") and cells["peak memory"][1] == "elsewhere"
    page = make_page(result)
    assert "svg" not in page.tags and "b ran on A GPU" in words(" ".join(page.text))


def test_the_table(tmp_path):
    arms = [
        seeded("lora", {0: 0.8, 1: 0.82}, seconds=10.0),
        seeded("half", {0: 0.79, 1: 0.812}, seconds=5.0, weights=make_weights(0.5)),
    ]
    result = compare([make_run(tmp_path / "a", arms, seeds=(0, 1))])
    heads, (whole, half) = table(result)
    cells = {
        head: tuple(text.replace("\u00a0", " ") for text in cell)
        for head, cell in zip(heads, half, strict=True)
    }
    assert cells["accuracy"] == ("80.1 %", "70.1 to 90.1")
    assert cells["to lora"] == ("−0.9", "−2.2 to +0.4, noise")  # -0.9 +- 12.706 x 0.1
    assert cells["cost"] == ("6.0 s", "55 %") and cells["parameters"] == ("500", "50 %")
    assert cells["latency, batch of 8"] == ("4 ms", "50 %")
    assert cells["file"] == ("2,000 B", "50 %, packed 500 B")
    assert dict(zip(heads, whole, strict=True))["to lora"] == ("baseline", "")
    text = words(" ".join(make_page(result).text))
    assert "paired seed by seed" in text and "pruned arms of its run were measured against" in text
    assert "Accuracy against what it costs" in text and "within the noise of 2 seeds" in text


def test_columns_of_which_nothing_is_known_are_left_out(tmp_path):
    arms, each = make_arms()
    heads, _ = table(compare([make_run(tmp_path / "a", arms, each=each)]))
    assert heads == ["accuracy", "to full", "kept", "trains", "parameters", "cost", "peak memory"]


@pytest.mark.parametrize("cost", [0.0, 50.0])
def test_a_cost_of_nothing_has_a_place_in_the_panel(tmp_path, cost):
    none = make_arm("none", 0.5) | {"seconds": {"tuning": 0.0}}
    other = make_arm("lora", 0.8) | {"seconds": {"tuning": cost}}
    text = render(compare([make_run(tmp_path / "a", [other, none])]))
    panels = dict(re.findall(r'aria-label="accuracy against ([\w ]+?), (.*?)"', text))
    said = f"seconds. lora 80 at {cost:.3g}; none 50 at 0. On the front: {'none, ' * (cost > 0)}lora"
    assert panels["time"] == said


def test_panels_mark_what_is_dominated(tmp_path):
    arms = [make_arm("lora", 0.8, 50.0), make_arm("half", 0.7, 60.0, weights=make_weights(0.5))]
    text = render(compare([make_run(tmp_path / "a", arms)]))
    panels = dict(re.findall(r'aria-label="accuracy against ([\w ]+?), (.*?)"', text))
    assert set(panels) == {"time", "peak memory", "latency", "file size"}
    assert panels["time"] == "seconds. lora 80 at 51; half 70 at 61. On the front: lora"
    assert panels["file size"].endswith("On the front: half, lora")
    markers = re.findall(r"<svg.*?</svg>", text, re.S)[0]
    assert len(re.findall(r"fill: var\(--page\); stroke: var\(--arm1\)", markers)) == 1  # half is hollow
    assert "fill: var(--page); stroke: var(--arm0)" not in markers


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "</svg><b>$x$", "[red]bold[/red] & \ud800\n"])
def test_names_are_text(tmp_path, capsys, name):
    arms = [make_arm(name, 0.8), make_arm("lora", 0.7, 5.0)]
    result = compare([make_run(tmp_path / "a", arms, name=name, model={"name": name})])
    page = make_page(result)
    assert "b" not in [tag for tag in page.tags if tag == "b"][1:]  # the verdict's alone
    assert words(name).rstrip("\ud800") in words(" ".join(page.text))
    result = compare([make_run(tmp_path / "b", [make_arm(name.rstrip("\ud800\n")), make_arm("lora")])])
    show(result)
    assert name.split()[0][:12] in capsys.readouterr().out
