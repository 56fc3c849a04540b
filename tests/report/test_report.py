# ruff: noqa: E501  (long expected sentences, and the script that runs in the browser)
"""The report: its first line against the figures, escaping, gaps, and what a browser makes of it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from serpette import report

CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")


def make_arm(name, value, cost, scorer=None, select=None, examples=300, classes=10, **more):
    scoring, selection, tuning = cost
    return {
        "name": name, "scorer": scorer, "select": select, "keep": examples / 1000, "per_class": examples < 1000,
        "gamma": 1.5 if select == "flex_rand" else None, "examples": examples, "epochs": 4,
        "steps": examples * 4 // 32, "accuracy": value,
        "accuracy_by_class": [round(value + 0.02 * (c % 5 - 2), 3) for c in range(classes)],
        "kept_by_class": [examples // max(classes, 1)] * classes, "mmd": 0.0 if examples == 1000 else 0.02 + scoring / 400,
        "seconds": {"scoring": scoring, "selection": selection, "tuning": tuning, "evaluation": 9.1},
        "flops": {"scoring": 1e12 * scoring, "tuning": 2e11 * tuning}, "peak_bytes": 1_234_567_890, **more,
    }  # fmt: skip


def make_result(
    dlc=0.791, chance=0.788, dlc_cost=(11.2, 0.4, 18.9), to_full=None, to_chance=None, classes=None
):
    classes = CLASSES if classes is None else classes
    arms = [
        make_arm("full", 0.812, (0.0, 0.0, 61.2), examples=1000),
        make_arm("stratified", chance, (0.0, 0.01, 18.7), "random", "random"),
        make_arm("dlc", dlc, dlc_cost, "dlc", "flex_rand"),
        make_arm("herding", 0.752, (3.1, 0.1, 18.8), "herding", "top_hard"),
    ]
    to_full = to_full or (-0.035, -0.007, False)
    to_chance = to_chance or (-0.011, 0.017, True)
    comparisons = [
        {"arm": a, "to": b, "difference": d, "low": low, "high": high, "within_noise": noise}
        for a, b, d, (low, high, noise) in [
            ("dlc", "full", dlc - 0.812, to_full),
            ("dlc", "stratified", dlc - chance, to_chance),
            ("herding", "full", -0.060, (-0.078, -0.042, False)),
            ("herding", "stratified", -0.036, (-0.055, -0.017, False)),
            ("stratified", "full", chance - 0.812, (-0.039, -0.009, False)),
        ]
    ]
    return {
        "kind": "run", "name": "demo", "serpette": "0.1.0", "seed": 0, "task": "classification",
        "metric": "accuracy", "finished": True,
        "recipe": {"name": "demo", "data": {"train": "fashion-mnist[train]", "limit": 1000},
                   "arms": [{"scorer": "dlc", "select": "flex_rand", "keep": 0.3}]},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "threads": 2, "memory_bytes": 8 * 2**30, "device": "cpu"},
        "data": {"train": "fashion-mnist[train]", "train_examples": 1000, "test_examples": 1000,
                 "classes": classes, "set_aside": [{"id": "812", "reason": "the image does not decode"}]},
        "model": {"name": "vit-s", "parameters": 14_200_000, "trainable_parameters": 100_000},
        "scorers": {"dlc": {"seconds": 11.2, "points": [0, 0.5, 0.25, 0.75, 0.125],
                            "curve": [[2, 0.951], [3, 0.982], [4, 0.989], [5, 0.9931]], "tolerance": 0.99,
                            "flops": 1e12, "passes": 5},
                    "herding": {"seconds": 3.1}},
        "arms": arms, "comparisons": comparisons,
    }  # fmt: skip


def make_png(seed):
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28]
    a, b, c = rng.uniform(4, 12, 3)
    image = 255 * np.exp(-(((x - 14) / a) ** 4) - ((y - 14) / b) ** 4) * (0.6 + 0.4 * np.sin(x * c / 9))
    buffer = io.BytesIO()
    Image.fromarray(image.astype("uint8")).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(folder, result=None, classes=10, gallery=True, scores=True):
    """A run folder as the pipeline writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result or make_result()), encoding="utf-8")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 1000)
    dlc = rng.gamma(2.0 + 0.6 * (labels % 5), 0.5)
    if scores:
        columns = {"id": [str(i) for i in range(1000)], "label": labels, "score:dlc": dlc, "dlc@0": dlc,
                   "dlc@0.5": dlc * 1.1, "score:herding": -np.arange(1000.0)}  # fmt: skip
        pq.write_table(pa.table(columns), folder / "scores.parquet")
    if gallery:
        items = [
            {"class": c, "kind": kind, "id": str(100 * c + i), "score": 0.1 * i, "png": make_png(c * 20 + i)}
            for c in range(classes) for kind in ("easiest", "hardest") for i in range(6)
        ]  # fmt: skip
        (folder / "gallery.json").write_text(json.dumps(items))
    return folder


class Page(HTMLParser):
    """Tags, attributes, ids and visible text of a page; the text of the element with id "answer"."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text, self.answer = [], [], [], [], ""
        self._inside = False
        self.feed(text.replace("\u00a0", " "))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self.ids += [v for k, v in attrs if k == "id"]
        self._inside = self._inside or ("id", "answer") in attrs

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "h1"

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text.append(data)
        if self._inside:
            self.answer += data


def read(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    return Page(path.read_text(encoding="utf-8"))


def test_answer_is_first_and_holds_the_figures(tmp_path):
    page = read(make_run(tmp_path))
    assert page.tags[page.tags.index("body") :][:4] == ["body", "main", "header", "h1"]
    answer = page.answer
    assert answer.startswith("Pruning saved time, but the score did not pay: it chose no better than chance")
    assert "dlc kept 300 of 1,000 training examples (30 %)" in answer
    assert "cost 30.5 s of scoring, selection and tuning, against 61.2 s for the full set (50 %)" in answer
    assert "18.7 s for the balanced random choice" in answer
    assert "lost 2.1 points of accuracy against the full set (beyond the noise of this test set)" in answer
    assert "gained 0.3 points of accuracy against the balanced random choice" in answer
    assert "(within the noise of one seed and this test set)" in answer


@pytest.mark.parametrize(
    "options, start",
    [
        (dict(dlc=0.81, to_full=(-0.01, 0.006, True), to_chance=(0.01, 0.03, False)), "Pruning paid: dlc kept"),
        (dict(to_chance=(0.001, 0.02, False)), "Pruning saved time and beat chance, at a price: dlc"),
        (dict(dlc=0.76, to_chance=(-0.04, -0.01, False)), "Pruning saved time, but the score did not pay: it chose worse"),
        (dict(dlc_cost=(50.0, 1.0, 18.9), to_chance=(0.01, 0.03, False)), "Pruning did not pay: dlc kept"),
        (dict(dlc_cost=(42.0, 0.0, 18.9), to_chance=(0.01, 0.03, False)), "Pruning did not pay: dlc kept"),
    ],
)  # fmt: skip
def test_verdicts(tmp_path, options, start):
    answer = read(make_run(tmp_path, make_result(**options), gallery=False)).answer
    assert answer.startswith(start), answer


def test_both_within_noise_is_said_once(tmp_path):
    result = make_result(dlc=0.81, to_full=(-0.01, 0.006, True), to_chance=(-0.01, 0.05, True))
    answer = read(make_run(tmp_path, result, gallery=False)).answer
    assert "lost 0.2 points of accuracy against the full set and gained 2.2 points of accuracy" in answer
    assert answer.endswith("both within the noise of one seed and this test set.")


def test_regression(tmp_path):
    result = make_result(dlc=0.5, chance=0.48, to_chance=(0.005, 0.035, False), classes=[])
    result |= {"task": "regression", "metric": "r2"}
    for arm in result["arms"]:
        arm |= {"accuracy_by_class": [], "kept_by_class": []}
    folder = make_run(tmp_path, result, gallery=False)
    texts = [{"class": None, "kind": "hardest", "id": "7", "score": 2.0, "text": "a dull film"}]
    (folder / "gallery.json").write_text(json.dumps(texts))
    page = read(folder)
    assert "lost 0.312 of R² against the full set" in page.answer
    assert "gained 0.020 of R² against the balanced random choice" in page.answer
    assert "points" not in page.answer
    text = " ".join(page.text)
    assert "0.500" in text and "a dull film" in text and "by class" not in text


def test_reversed_and_missing_comparisons(tmp_path):
    result = make_result(dlc=0.832)
    result["comparisons"] = [{"arm": "full", "to": "dlc", "difference": -0.02, "low": -0.03, "high": -0.01,
                              "within_noise": False}]  # fmt: skip
    page = read(make_run(tmp_path, result, gallery=False))
    assert "gained 2.0 points of accuracy against the full set (beyond" in page.answer
    assert "against the balanced random choice (noise not measured)" in page.answer
    assert "+1.0 to +3.0" in "".join(page.text)


def test_table_of_arms(tmp_path):
    page = read(make_run(tmp_path))
    text = " ".join(" ".join(page.text).split())
    assert "81.2 %" in text and "−2.1 −3.5 to −0.7" in text.replace("(", "").replace(")", "")
    assert "Beyond the noise of this test set" in text and "herding to full −6.0 (−7.8 to −4.2)" in text
    assert "812" in text and "the image does not decode" in text
    assert "30 (30 %)" in text  # kept of one class
    assert "vit-s (14.2 M parameters)" in text and "8.0 GiB" in text


def test_everything_from_data_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>$x^2$ & \"quote' \x00\x07 {{ 7*7 }} 漢字"
    result = make_result(classes=[evil, *CLASSES[1:]])
    result["arms"][2]["name"] = evil
    result["arms"][2]["scorer"] = evil
    for comparison in result["comparisons"]:
        comparison["arm"] = evil if comparison["arm"] == "dlc" else comparison["arm"]
    result["scorers"] = {evil: result["scorers"]["dlc"]}
    result["metric"] = "<b>accuracy"
    result["recipe"] = {evil: evil}
    result["versions"][evil] = result["hardware"][evil] = result["name"] = evil
    result["model"]["name"] = result["data"]["train"] = evil
    result["data"]["set_aside"] = [{"id": evil, "reason": evil}]
    folder = make_run(tmp_path, result)
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "scores.parquet")
    names = [n.replace("dlc", evil) if "dlc" in n else n for n in table.column_names]
    pq.write_table(table.rename_columns(names), folder / "scores.parquet")
    items = [
        {"class": 0, "kind": evil, "id": evil, "score": 1.0, "text": evil},
        {"class": evil, "kind": "hardest", "id": '"><script>', "score": None, "png": make_png(0)},
        {"class": 1, "kind": "hardest", "id": "x", "score": 1, "png": '"><script>alert(1)</script>'},
    ]
    (folder / "gallery.json").write_text(json.dumps(items))
    page = read(folder)
    assert "script" not in page.tags and page.tags.count("b") == 1  # b: the verdict
    assert not [a for a in page.attributes if a[1].startswith("on")]
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source.lower() and "{{ 7*7 }}" in source and "49" not in page.answer
    assert evil.replace("\x00", "").split("\x07")[0].split(" & ")[0] in page.answer


def test_dollars_in_figures_are_no_formula(tmp_path):
    result = make_result(classes=["$x^2$", *CLASSES[1:]])
    result["arms"][1]["name"] = "a $x_2$ b"
    make_run(tmp_path, result, gallery=False)
    source = report.write(tmp_path).read_text(encoding="utf-8")
    texts = re.findall(r"<text[^>]*>(.*?)</text>", source, re.S)
    assert texts.count("$x^2$") == 1 and texts.count("a $x_2$ b") == 3  # scatter, split, distance


def test_nothing_from_outside_and_unique_ids(tmp_path):
    page = read(make_run(tmp_path))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    without_names = re.sub(r'xmlns(:\w+)?="http[^"]*"', "", source)
    assert "http:" not in without_names and "https:" not in without_names and "//" not in re.sub(
        r"base64,[^\"]*", "", without_names
    ).replace("</", "")  # fmt: skip
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value[:60])
    assert "@import" not in source
    assert len(page.ids) == len(set(page.ids)) > 20
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | set(re.findall(r'href="#([^"]+)"', source))
    assert used and used <= set(page.ids)
    assert source.count("<svg") == 5
    assert not re.search(r"#010[ab]", source)  # every stand-in colour was replaced


def test_alt_texts_and_images(tmp_path):
    page = read(make_run(tmp_path))
    alts = [v for tag, k, v in page.attributes if tag == "img" and k == "alt"]
    assert len(alts) == 120 and "hardest: id 105, score 0.5" in alts
    assert page.tags.count("img") == 120


@pytest.mark.parametrize("classes", [2, 100])
def test_few_and_many_classes(tmp_path, classes):
    result = make_result(classes=[f"class number {c}" for c in range(classes)])
    page = read(make_run(tmp_path, result, classes=classes))
    assert ("89 others" in page.text) == (classes == 100)
    assert ("88 more classes" in page.text) == (classes == 100)


def test_gaps_are_left_out(tmp_path):
    result = make_result()
    result["arms"] = result["arms"][:1]
    result |= {"comparisons": [], "scorers": {}, "recipe": None}
    result["arms"][0]["accuracy_by_class"] = None
    page = read(make_run(tmp_path / "one", result, gallery=False, scores=False))
    assert page.answer == (
        "Nothing was pruned, so there is nothing to compare: only the full set was tuned, to 81.2 % accuracy in 61.2 s."
    )
    assert "When the path" not in " ".join(page.text) and "img" not in page.tags

    unfinished = {"kind": "run", "finished": False, "arms": []}
    page = read(make_run(tmp_path / "none", unfinished, gallery=False, scores=False))
    assert page.answer.startswith("This run is not finished; so far: No arm") and "svg" not in page.tags

    result = make_result()
    result["finished"] = False
    result["arms"][2] |= {"accuracy": None, "mmd": None}
    result["arms"][2]["seconds"] = {"scoring": 11.2}
    result["arms"][3] = {"name": "bare"}
    result["comparisons"] = []
    page = read(make_run(tmp_path / "part", result, gallery=False))
    assert page.answer.startswith("This run is not finished; so far: Whether pruning paid is unknown")
    assert page.answer.endswith("What was lost is not known yet.")

    result = make_result()
    del result["arms"][1]
    assert "No random choice of the same size was run." in read(make_run(tmp_path / "alone", result)).answer

    result = make_result()
    result["arms"] = result["arms"][:2]
    assert read(make_run(tmp_path / "chance", result)).answer.startswith(
        "Pruning by chance saved time at a price: stratified kept 300"
    )


def test_nan_and_constant_figures(tmp_path):
    result = make_result()
    for arm in result["arms"]:
        arm |= {"accuracy": float("nan"), "mmd": 0.0}
        arm["seconds"] = {"scoring": 0.0, "selection": 0.0, "tuning": 0.0, "evaluation": 0.0}
    result["scorers"]["dlc"]["curve"] = [[2, 1.0], [3, float("nan")]]
    folder = make_run(tmp_path, result, gallery=False)
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = {
        "id": ["a", "b", "c"],
        "label": [0, 1, 1],
        "score:dlc": [1.0, 1.0, float("nan")],
        "dlc@0": [1.0] * 3,
    }
    pq.write_table(pa.table(same), folder / "scores.parquet")
    page = read(folder)
    assert "nan" not in " ".join(page.text).lower().split()


def test_bad_run_directories(tmp_path):
    with pytest.raises(ValueError, match="has no result.json; give the folder"):
        report.write(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        report.write(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        report.write(tmp_path)


def test_same_run_same_bytes_and_settings_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    run = make_run(tmp_path)
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first
    assert dict(matplotlib.rcParams) == before


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    report.write(run)
    old = (run / "report.html").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        report.write(run)
    assert (run / "report.html").read_bytes() == old
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("arms", [4, 7])
def test_scatter_labels_do_not_overlap(arms):
    from serpette.report import figures, svg
    from serpette.report.run import Run

    result = make_result()
    for i in range(arms - 4):
        result["arms"].append(make_arm(f"method {i}", 0.787 + 0.002 * i, (8 + i, 0, 19), f"s{i}", "top_hard"))
    boxes = []

    def keep_boxes(fig, ax, *more):
        place(fig, ax, *more)
        boxes.extend(text.get_window_extent(fig.canvas.get_renderer()) for text in ax.texts)

    place = figures.place_labels
    figures.place_labels = keep_boxes
    try:
        with svg.style():
            figures.accuracy_against_cost(Run(result))
    finally:
        figures.place_labels = place
    assert len(boxes) == arms
    for i, a in enumerate(boxes):
        assert 0 <= a.x0 and a.x1 <= svg.WIDTH
        assert not any(a.overlaps(b) for b in boxes[i + 1 :])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(tmp_path, *options):
    """Runs headless Chromium; returns its stdout."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--disable-dev-shm-usage", "--hide-scrollbars", "--virtual-time-budget=3000",
               f"--user-data-dir={tmp_path / 'profile'}", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (install `chromium` to run this test)"
)
def test_in_a_browser(tmp_path):
    from PIL import Image

    run = make_run(
        tmp_path / "run", make_result(classes=["a class with quite a long name" * 2, *CLASSES[1:]])
    )
    source = report.write(run).read_text(encoding="utf-8")
    # frames of exactly 390 and 1200 px, as a window of Chromium cannot be that narrow
    frames = "".join(
        f'<iframe width="{w}" height="844" srcdoc="{html.escape(source.replace("<details", "<details open"))}"></iframe>'
        for w in (390, 1200)
    )
    measure = """<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")]
      .map(frame => { const d = frame.contentDocument, out = [];
        for (const e of d.querySelectorAll("svg text")) { const r = e.getBoundingClientRect();
          if (r.right > d.documentElement.clientWidth || r.left < 0) out.push(e.textContent); }
        return [d.documentElement.clientWidth, d.documentElement.scrollWidth, d.querySelectorAll("svg").length,
                [...d.images].filter(i => !i.complete).length, out,
                parseFloat(d.defaultView.getComputedStyle(d.querySelector("#answer")).fontSize)]; })) }</script>"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{measure}{frames}", encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", wrapper.as_uri())
    sizes = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))
    for (client, scroll, svgs, _, outside, font), width in zip(sizes, (390, 1200), strict=True):
        assert abs(client - width) <= 20 and scroll <= client, (client, scroll)
        assert svgs == 5 and outside == [] and font >= 18
    dom = browse(tmp_path, "--dump-dom", (run / "report.html").as_uri())
    assert "Pruning saved time" in Page(dom).answer
    for width, height in ((390, 844), (1200, 900)):
        shot = tmp_path / f"{width}.png"
        browse(
            tmp_path,
            f"--screenshot={shot}",
            f"--window-size={width},{height}",
            (run / "report.html").as_uri(),
        )
        with Image.open(shot) as image:
            assert image.size == (width, height)
            assert len(image.convert("L").getcolors(256) or range(257)) > 20  # not blank


def test_a_folder_of_scores_is_not_a_run(tmp_path):
    (tmp_path / "result.json").write_text('{"kind": "scores", "scorers": ["dlc"]}')
    with pytest.raises(ValueError, match="holds scores, not a run"):
        report.write(tmp_path)
