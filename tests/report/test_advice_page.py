# ruff: noqa: E501  (long expected sentences)
"""The page of an advice: one story, its figures those of result.json, and nothing for what is missing."""

import copy
import json
import re

import pytest
from test_report import CLASSES, Page, read

from serpette import report

RANDOM = "stratified random"


def make_choice(name, scorer, select, keep, value, seconds, to_random=None, full=84.6):
    return {
        "name": name, "scorer": scorer, "select": select, "per_class": True, "keep": keep, "examples": int(1000 * keep),
        "value": value, "low": value - 1.6, "high": value + 1.5,
        "loss": full - value, "loss_low": full - value - 1.1, "loss_high": full - value + 1.2,
        "to_random": to_random, "seconds": seconds,
    }  # fmt: skip


def make_advice():
    """Of a ViT on 1,000 images in ten classes, as `serpette advise --time 0.4x --memory 2GiB` writes it."""
    choices = []
    for keep, base in ((0.1, 70.2), (0.3, 78.1), (0.5, 81.4), (0.7, 83.0)):
        seconds = 176.0 * keep
        choices += [
            make_choice(RANDOM, None, "random", keep, base, seconds),
            make_choice("herding", "herding", "top_hard", keep, base + 2.3, seconds + 22.3, [2.3, 0.9, 3.6]),
            make_choice("dlc, flex_rand", "dlc", "flex_rand", keep, base + 0.7, seconds + 121.5, [0.7, -0.6, 2.0]),
            make_choice("el2n, top_hard", "el2n", "top_hard", keep, base - 8.4 * (1 - keep), seconds + 19.0, [-8.4 * (1 - keep), -10.1, -1.2]),
            make_choice("moderate", "moderate", "top_hard", keep, base - 0.4, seconds + 22.4, [-0.4, -1.5, 0.8]),
            make_choice("k_center", "k_center", "top_hard", keep, base - 1.9, seconds + 23.0, [-1.9, -3.2, -0.6]),
            make_choice("ssp", "ssp", "flex_rand", keep, base + 0.1, seconds + 22.8, [0.1, -1.0, 1.3]),
        ]  # fmt: skip
    tunings = [
        {"name": "full", "method": "full", "modes": None, "freeze_attention": False, "checkpointing": False,
         "trainable_parameters": 14_443_786, "peak_bytes": 1_050_000_000, "step_seconds": 0.62, "measured": True},
        {"name": "LoRA", "method": "lora", "modes": None, "freeze_attention": False, "checkpointing": False,
         "trainable_parameters": 450_058, "peak_bytes": 720_000_000, "step_seconds": 0.35, "measured": True},
        {"name": "LoRA, checkpointing", "method": "lora", "modes": None, "freeze_attention": False, "checkpointing": True,
         "trainable_parameters": 450_058, "peak_bytes": 310_000_000, "step_seconds": 0.47, "measured": False},
        {"name": "rows, frozen attention", "method": "rows", "modes": "rows", "freeze_attention": True, "checkpointing": False,
         "trainable_parameters": 470_000, "peak_bytes": 540_000_000, "step_seconds": 0.29, "measured": False},
    ]  # fmt: skip
    plan = {"choice": choices[8], "tuning": tunings[1], "sparsity": 0.0, "loss": 4.2, "low": 3.1, "high": 5.4,
            "seconds": 75.1, "peak_bytes": 720_000_000, "speedup": 1.0}  # fmt: skip
    return {
        "kind": "advice", "name": "vit-s on fashion-mnist", "serpette": "0.2.0", "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "memory_bytes": 8 * 2**30, "device": "cpu"},
        "task": "classification", "metric": "accuracy",
        "model": {"name": "vit-s", "parameters": 14_443_786},
        "data": {"train": "fashion-mnist[train]", "examples": 1000, "observed": 800, "classes": CLASSES},
        "budget": {"time": {"text": "0.45x", "seconds": 79.2}, "memory": {"text": "0.9GiB", "bytes": int(0.9 * 2**30)}, "max_loss": 5.0},
        "full": {"method": "lora", "epochs": 8, "steps": 504, "seconds": 176.0, "step_seconds": 0.35, "value": 84.6, "low": 83.2, "high": 86.1},
        "advising": {"seconds": {"observing": 17.8, "probes": 4.1, "tuning": 2.6, "weights": 3.9}, "share": 0.161},
        "health": {
            "exact_duplicates": {"examples": 6, "share": 0.006, "groups": [["12", "640"], ["77", "301", "550", "551"]]},
            "near_duplicates": {"examples": 31, "share": 0.031, "groups": [["5", "9"]], "similarity": 0.98},
            "classes": {name: 100 - 3 * i for i, name in enumerate(CLASSES)},
            "wrong_labels": {"share": 0.034, "low": 0.019, "high": 0.052, "suspects": [
                {"id": "918", "label": 6, "likely": 0, "confidence": 0.97}, {"id": "31", "label": "Coat", "likely": "Pullover", "confidence": 0.91}]},
            "outliers": [{"id": "404", "distance": 9.13}],
            "set_aside": [{"id": "812", "reason": "the image does not decode"}],
        },
        "choices": choices,
        "curve": {
            "points": [{"examples": n, "value": v, "low": v - 1.2, "high": v + 1.2} for n, v in ((80, 69.0), (240, 77.5), (400, 80.2), (560, 82.2), (800, 83.7))],
            "fitted": [{"examples": n, "value": 90.6 - 85 * n**-0.38, "low": 89.9 - 85 * n**-0.38, "high": 91.3 - 85 * n**-0.38} for n in range(80, 1001, 40)],
        },
        "tunings": tunings,
        "weights": {
            "recovery": False,
            "sparsities": [
                {"sparsity": s, "loss": loss, "low": 0.7 * loss, "high": 1.5 * loss, "parameters": 1 - 0.98 * s, "file": 1 - 0.98 * s,
                 "timings": [{"batch_size": b, "speedup": 1 + s * g, "low": 1 + s * g - 0.04, "high": 1 + s * g + 0.05} for b, g in ((1, 1.1), (8, 1.5))]}
                for s, loss in ((0.2, 0.8), (0.35, 3.1), (0.5, 11.4))
            ],
            "layers": [
                {"name": f"encoder.layer.{i}.{kind}", "losses": {"0.25": 0.1 * i, "0.5": 0.4 + 0.3 * i, "0.75": 2.0 + i}}
                for i in range(4) for kind in ("attention.q_proj", "mlp.fc1")
            ],
        },
        "recommendation": {
            "sentence": "Keep 30 % of the examples, chosen by herding, and tune with LoRA: predicted loss of 4.2 points (3.1 to 5.4), in 75 s instead of 176 s.",
            **plan,
        },
        "runners_up": [
            plan | {"choice": choices[7], "loss": 6.5, "low": 5.2, "high": 7.7, "seconds": 52.8},
            plan | {"choice": None, "sparsity": 0.35, "loss": 3.1, "low": 2.2, "high": 4.7, "seconds": 176.0, "speedup": 1.52},
        ],
        "notes": ["Probes see 800 of 1,000 examples."],
    }  # fmt: skip


def make_language_advice():
    """Of a causal language model: no choices, no classes; values are losses in nats."""
    advice = make_advice()
    for key in ("health", "choices", "weights", "budget", "runners_up"):
        del advice[key]
    nats = {"value": 1.912, "low": 1.87, "high": 1.95}
    tuning = advice["tunings"][2]
    return advice | {
        "name": "smollm2-135m on mmlu-cot", "task": "causal-lm", "metric": "loss",
        "model": {"name": "smollm2-135m", "parameters": 134_515_008},
        "data": {"train": "mmlu-cot[train]", "examples": 500, "observed": 96},
        "full": advice["full"] | nats,
        "curve": {"points": [{"examples": n, "value": v, "low": v - 0.03, "high": v + 0.03} for n, v in ((24, 2.31), (48, 2.16), (96, 2.05))],
                  "fitted": [{"examples": n, "value": 1.7 + 1.9 * n**-0.36, "low": 1.66 + 1.9 * n**-0.36, "high": 1.74 + 1.9 * n**-0.36} for n in (24, 48, 96, 200, 350, 500)]},
        "recommendation": {"sentence": "Keep everything and tune with LoRA, checkpointing.", "choice": None, "tuning": tuning,
                           "sparsity": 0.0, "loss": 0.0, "low": 0.0, "high": 0.0, "seconds": 176.0, "peak_bytes": 310_000_000},
        "notes": [],
    }  # fmt: skip


def page_of(folder, advice):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(advice), encoding="utf-8")
    page = read(folder)
    page.words = " ".join(" ".join(page.text).split())
    page.source = (folder / "report.html").read_text(encoding="utf-8")
    return page


def test_the_first_line_is_the_recommendation(tmp_path):
    page = page_of(tmp_path, make_advice())
    assert page.tags[page.tags.index("body") :][:4] == ["body", "main", "header", "h1"]
    assert page.answer == make_advice()["recommendation"]["sentence"]
    assert "advising took 28.4 s, 16.1 % of the full fine-tune" in page.words
    assert "1,000 examples, 800 of them looked at" in page.words and "vit-s (14.4 M parameters)" in page.words
    assert (
        "Budget: 79.2 s of time (0.45x), 921.6 MiB of memory (0.9GiB), at most 5 points of accuracy lost."
        in page.words
    )


def test_its_figures_are_those_of_the_result(tmp_path):
    page = page_of(tmp_path, make_advice())
    text = page.words
    for figures in (
        "30 %, herding (300 examples) recommended LoRA none 4.2 (3.1 to 5.4) 75.1 s 42.7 % of full 686.6 MiB 1.00 times",
        "all examples runner-up LoRA 35 % 3.1 (2.2 to 4.7)",
        "exact duplicates 6 (0.6 %) near duplicates 31 (3.1 %), of a similarity of 0.98 or more",
        "wrong labels, estimated 3.4 % (1.9 % to 5.2 %)",
        "10, of 73 to 100 examples",
        "918 Shirt T-shirt/top 0.97 31 Coat Pullover 0.91",
        "77, 301, 550, 551",
        "404 distance 9.13",
        "812 the image does not decode",
        "Keeping 30 %, 300 examples",
        "herding recommended 80.4 (78.8 to 81.9) 4.2 (3.1 to 5.4) +2.3 (+0.9 to +3.6) 75.1 s",
        "dlc, flex_rand 78.8 (77.2 to 80.3) 5.8 (4.7 to 7.0) +0.7 (−0.6 to +2.0) noise",
        "stratified random control 78.1",
        "LoRA, checkpointing 450 k 295.6 MiB 0.47 s predicted",
        "full 14.4 M 1001.4 MiB over budget 0.62 s LoRA recommended",
        "35 % 3.1 (2.2 to 4.7) 65.7 % 65.7 % 1.39 times at 1, 1.52 times at 8",
        "before any recovery by tuning",
        "observing 17.8 s",
        "Probes see 800 of 1,000 examples.",
    ):
        assert figures in text, figures
    assert text.count(" noise ") == 3 * 4  # three choices at four shares
    assert page.source.count("<svg") == 5
    labels = re.findall(r'aria-label="([^"]*)"', page.source)
    assert "herding 72.5 at 10 %, 80.4 at 30 %" in labels[0] and "79.8" not in labels[0]
    assert "Extrapolated: 84.4 at 1,000." in labels[1] and "69.0 at 80" in labels[1]
    assert "LoRA 0.671 GiB" in labels[2]
    assert "11.4 lost at 50 %" in labels[3] and "batch of 8 1.75 times at 50 %" in labels[3]
    assert "Most sensitive: encoder.layer.3.attention.q_proj up to 5" in labels[4]


def test_one_story_in_order(tmp_path):
    source = page_of(tmp_path, make_advice()).source
    titles = re.findall("<h2>(.*?)</h2>", source)
    assert titles == [
        "The recommendation and its runners-up", "How healthy the data are", "What a share of the data would do",
        "What each way of tuning would need", "What fewer weights would do",
    ]  # fmt: skip


def test_a_language_model(tmp_path):
    page = page_of(tmp_path, make_language_advice())
    assert page.answer == "Keep everything and tune with LoRA, checkpointing."
    assert (
        "Rise of the loss" in page.words
        and "all examples recommended LoRA, checkpointing none 0.000" in page.words
    )
    assert "all examples everything lora none 0.000 of 1.912 (1.870 to 1.950) 176 s" in page.words
    assert (
        "How healthy" not in page.words
        and "fewer weights" not in page.words
        and "points" not in page.words.lower().replace("points: observed", "")
    )
    assert page.source.count("<svg") == 2


def test_regression_is_in_points(tmp_path):
    advice = make_advice() | {"task": "regression", "metric": "r2"}
    del advice["health"]["classes"], advice["health"]["wrong_labels"]
    page = page_of(tmp_path, advice)
    assert "in points, 100 R²" in page.words and "accuracy" not in page.words


@pytest.mark.parametrize("missing", [*make_advice()])
def test_any_part_may_be_missing(tmp_path, missing):
    advice = make_advice()
    del advice[missing]
    if missing == "kind":
        advice["kind"] = "advice"
    page_of(tmp_path, advice)


def test_bare_entries_and_figures_that_are_no_numbers(tmp_path):
    advice = {"kind": "advice"}
    assert page_of(tmp_path / "none", advice).answer == "There is no recommendation yet."

    def bare(value):
        if isinstance(value, dict):
            return {key: bare(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [bare(entry) for entry in value]
        return float("nan") if isinstance(value, float) else value

    page = page_of(tmp_path / "nan", bare(make_advice()))
    assert "nan" not in page.words.lower().replace("−", " ").split()
    empty = {
        key: {} if isinstance(v, dict) else [{}] if isinstance(v, list) else v
        for key, v in make_advice().items()
    }
    empty["notes"] = []
    assert page_of(tmp_path / "empty", empty).source.count("<svg") == 0


def test_everything_from_data_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>$x^2$ & \"quote' \x00\x07 {{ 7*7 }} 漢字"

    def spoilt(value):
        if isinstance(value, dict):
            return {key if key in KEYS else evil + key: spoilt(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [spoilt(entry) for entry in value]
        return evil + value if isinstance(value, str) else value

    KEYS = _keys_of_the_schema(make_advice())
    advice = spoilt(make_advice()) | {"kind": "advice", "metric": "accuracy"}
    page = page_of(tmp_path, advice)
    assert "script" not in page.tags and page.tags.count("b") == 1
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "<script" not in page.source.lower() and "{{ 7*7 }}" in page.source
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"#010[ab]", page.source)
    assert page.source.count("<svg") == 5


def _keys_of_the_schema(advice):
    """Every key but those that are data themselves: names of classes, of versions, of the machine."""
    data = {*advice["health"]["classes"], *advice["versions"], *advice["hardware"]}
    found = set()

    def walk(value):
        for key, entry in value.items() if isinstance(value, dict) else ():
            found.add(key)
            walk(entry)
        for entry in value if isinstance(value, list) else ():
            walk(entry)

    walk(advice)
    return found - data


def test_more_choices_than_colours_and_one_share_alone(tmp_path):
    advice = copy.deepcopy(make_advice())
    advice["choices"] = [
        make_choice(f"method {i}", f"s{i}", "top_hard", 0.3, 70.0 + i, 60.0) for i in range(12)
    ]
    page = page_of(tmp_path, advice)
    svg = page.source[page.source.index("<svg") : page.source.index("</svg>")]
    assert [f"method {i}" for i in range(12) if f">method {i}<" in svg] == [
        "method 7",
        "method 8",
        "method 9",
        "method 10",
        "method 11",
    ]
    assert page.words.count("Keeping 30 %") == 1


def test_same_advice_same_bytes(tmp_path):
    page_of(tmp_path, make_advice())
    first = (tmp_path / "report.html").read_bytes()
    assert report.write(tmp_path).read_bytes() == first
    assert Page(first.decode()).answer
