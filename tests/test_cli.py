"""The command line: what it prints, how it ends, and what it says when it is used wrongly."""

import errno
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from serpette import cli
from serpette.data.scores import Scores
from serpette.types import Signals
from serpette.zoo import ZooError

COMMANDS = [
    "list", "fetch", "score", "select", "run", "report", "compare", "prune", "shrink", "memory", "bench",
    "doctor",
]  # fmt: skip


@pytest.fixture
def serpette(capsys):
    """Calls the command line; returns (exit code, stdout, stderr)."""

    def call(*args):
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as stop:  # how tyro ends --help and its own errors
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def module(monkeypatch):
    """Puts a stand-in with the given attributes where the commands import `serpette.NAME`."""

    def put(name, **attributes):
        import importlib

        stand_in = types.ModuleType(f"serpette.{name}")
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, f"serpette.{name}", stand_in)
        parent, _, leaf = f"serpette.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), leaf, stand_in, raising=False)

    return put


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("name: tiny\nmodel: {name: m}\ndata: {train: digits}\narms: [{name: full}]\n")
    return path


def test_help_names_every_command(serpette):
    code, out, _ = serpette("--help")
    assert code == 0 and all(f"• {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_and_a_sentence_for_each_option(serpette, command):
    code, out, _ = serpette(command, "--help")
    assert code == 0
    assert f"Example: serpette {command}" in out
    text = " ".join(" ".join(out.replace("│", " ").split()).split("Example: ")[1:])
    for option in [w for w in text.split(" --")[1:] if w.split()[0] not in ("help",)]:
        if "(default" in option or "(required)" in option:
            said = option.split("(default")[0].split("(required)")[0].split()
            assert len(said) >= 4, f"--{option} says nothing"


def test_help_and_version_are_quick():
    script = (
        "import sys; from serpette import cli; cli.main(['--version']);\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("serpette ") and out.strip().endswith("[]")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("scorers", "dlc"),
        ("selectors", "flex_rand"),
        ("importances", "taylor"),
        ("neuron-importances", "qm_taylor"),
        ("weight-importances", "lora_prune"),
        ("models", "vit-s"),
        ("datasets", "digits"),
    ],
)
def test_list(serpette, kind, name):
    code, out, _ = serpette("list", kind)
    assert code == 0 and name in out.splitlines()
    assert all(line == line.strip() and " " not in line for line in out.splitlines())
    code, as_json, _ = serpette("list", kind, "--json")
    assert [o["name"] for o in json.loads(as_json)] == out.splitlines()
    assert all(o["about"] for o in json.loads(as_json))


@pytest.mark.parametrize(
    "args, words",
    [
        (["lst"], "lst"),
        (["list", "scorer"], "scorers"),
        (["score", "--model", "m"], "--dataset"),
        (["select", "--scores", "x", "--selector", "random", "--keep", "lots", "--out", "o.txt"], "lots"),
        (["fetch"], "serpette fetch vit-s"),
        (["fetch", "vit-x"], "vit-s"),
        (["run", "none.yaml"], "none.yaml"),
        (["report", "none"], "result.json"),
        (["compare", "none"], "serpette run RECIPE.yaml --out none"),
        (["compare"], "no arm to compare"),
        (["score", "--model", "m", "--dataset", "d", "--out", "o", "--limit", "0"], "limit=0"),
        (["score", "--model", "m", "--dataset", "d", "--out", "o", "--scorer", "less"], "--target"),
        (["score", "--model", "m", "--dataset", "d", "--out", "o", "--rank", "0"], "rank=0"),
        (["select", "--scores", "x", "--selector", "random", "--keep", "0.3", "--out", "o.csv"], ".parquet"),
    ],
)
def test_bad_input_ends_with_2_and_no_traceback(serpette, monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = serpette(*args)
    assert code == 2 and words in out + err and "Traceback" not in err


def test_debug_shows_where(serpette):
    with pytest.raises(FileNotFoundError):
        serpette("run", "none.yaml", "--debug")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("keep=2 must be in (0, 1]"), 2, "keep=2 must be"),
        (ZooError("run serpette fetch x"), 2, "run serpette fetch x"),
        (OSError(errno.ENOSPC, "No space left on device", "full/scores.parquet"), 2, "disk is full: full."),
        (KeyboardInterrupt(), 130, "kept; the same command goes on"),
    ],
)
def test_how_an_error_ends(serpette, module, recipe, error, code, words):
    def run(job):
        raise error

    module("pipeline", run=run)
    ended, out, err = serpette("run", recipe)
    assert ended == code and words in err and out == "" and "Traceback" not in err


def test_a_bug_of_ours_keeps_its_traceback(serpette, module, recipe):
    def run(job):
        raise TypeError("a bug")

    module("pipeline", run=run)
    with pytest.raises(TypeError, match="a bug"):
        serpette("run", recipe)


def test_markup_in_an_error_is_plain_text(serpette, module, recipe):
    def run(job):
        raise ValueError("id '[red]7[/red]' [/] appears twice")

    module("pipeline", run=run)
    assert "id '[red]7[/red]' [/] appears twice" in serpette("run", recipe)[2]


def test_run_with_overrides(serpette, module, recipe, tmp_path):
    jobs = []
    module("pipeline", run=lambda job: jobs.append(job) or tmp_path / "report.html")
    args = [
        "--tune.epochs",
        7,
        "--seed",
        1,
        "--arms.0.keep",
        1.0,
        "--arms.0.per-class",
        "equal",
        "--data.train-limit",
        9,
    ]
    code, out, _ = serpette("run", recipe, *args)
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "report.html")
    (job,) = jobs
    assert (job.tune.epochs, job.seed, job.arms[0].per_class, job.data.train_limit) == (7, 1, "equal", 9)
    assert job.name == "tiny" and job.tune.rank == 8


def test_overrides_are_checked_and_explained(serpette, module, recipe):
    module("pipeline", run=lambda job: pytest.fail("must not run"))
    assert "tune.epochs=0 must be at least 1" in serpette("run", recipe, "--tune.epochs", 0)[2]
    code, out, err = serpette("run", recipe, "--tune.epoch", 1)
    assert code == 2 and "--tune.epochs" in out + err
    code, out, _ = serpette("run", recipe, "--help")
    assert code == 0 and "--tune.learning-rate" in out and "tiny)" in out


@pytest.fixture
def tiny_vit(tmp_path):
    """A folder with a model for digits."""
    from transformers import ViTImageProcessor

    from serpette import zoo

    model = tmp_path / "model"
    network = zoo.tiny("vit", num_labels=10)
    network.save_pretrained(model)
    size = network.config.image_size
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(model)
    return model


def test_scores_that_need_a_lora(serpette, tiny_vit, tmp_path):
    given = ["--model", tiny_vit, "--dataset", "digits", "--limit", 20, "--out", tmp_path / "scores"]
    given += ["--scorer", "tsa", "--scorer", "less", "--scorer", "loss", "--target", "digits", "--rank", 2]
    code, _, err = serpette("score", *given)
    assert code == 0, err
    held = Scores.load(tmp_path / "scores")
    assert list(held.values) == ["tsa", "less", "loss"] and len(held.values["tsa"]) == 20
    assert held.settings["lora"] == {"rank": 2, "alpha": 4}
    how = json.loads((tmp_path / "scores" / "result.json").read_text())["methods"]
    assert how["less"]["target"] == "digits" and how["less"]["target_split"] == "train"


def test_score_then_select(serpette, tiny_vit, tmp_path):
    given = ["--model", tiny_vit, "--dataset", "digits", "--limit", 40, "--batch-size", 16]
    given += ["--out", tmp_path / "scores"]
    code, out, err = serpette("score", *given, "--scorer", "dlc", "--scorer", "entropy", "--seed", 2)
    assert code == 0, err
    assert not (tmp_path / "scores" / "lora").exists()
    assert out.splitlines()[-1] == str(tmp_path / "scores" / "scores.parquet")
    given = ["--scores", tmp_path / "scores", "--scorer", "dlc", "--selector", "random", "--keep", 0.5]
    assert serpette("select", *given, "--out", tmp_path / "kept.txt")[0] == 0
    assert len(set((tmp_path / "kept.txt").read_text().split())) == 20


@pytest.fixture
def scores(tmp_path):
    """A folder as `serpette score` leaves it: 12 examples of 3 classes, two scores."""
    signals = Signals(
        ids=np.array([f"e{i}" for i in range(11)] + ["ü 7"]),
        labels=torch.arange(12) // 4,
        num_classes=3,
        embeddings=torch.randn(12, 4),
    )
    values = {"dlc": torch.arange(12.0), "el2n": -torch.arange(12.0)}
    return Scores(signals, values, rows=torch.arange(12), total=12).save(tmp_path / "scores")


@pytest.mark.parametrize("suffix", [".txt", ".json", ".parquet"])
def test_select_writes_the_ids(serpette, scores, tmp_path, suffix):
    out = tmp_path / "deep" / f"kept{suffix}"
    given = [
        "--scores",
        scores,
        "--scorer",
        "dlc",
        "--selector",
        "top_hard",
        "--keep",
        "0.25",
        "--no-per-class",
    ]
    code, said, _ = serpette("select", *given, "--out", out)
    assert code == 0 and said.strip() == f"3 ids in {out}"
    if suffix == ".parquet":
        import pyarrow.parquet

        ids = pyarrow.parquet.read_table(out)["id"].to_pylist()
    else:
        text = out.read_text(encoding="utf-8")
        ids = json.loads(text) if suffix == ".json" else text.splitlines()
    assert ids == ["e9", "e10", "ü 7"]
    assert {p.name for p in out.parent.iterdir()} == {out.name, "kept.result.json"}  # no temporary file stays
    how = json.loads((out.parent / "kept.result.json").read_text())
    assert how["selector"]["name"] == "top_hard" and how["scorer"] == "dlc" and how["examples"] == 3


def test_select_by_class_and_by_the_other_score(serpette, scores, tmp_path):
    out = tmp_path / "kept.txt"
    given = ["--scores", scores, "--selector", "top_hard", "--keep", "0.25", "--out", out]
    assert serpette("select", *given, "--scorer", "el2n")[0] == 0
    assert out.read_text().split() == ["e0", "e4", "e8"]
    for more in ([], ["--scorer", "dcl"]):  # which of the two is not said; there is no such score
        code, _, err = serpette("select", *given, *more)
        assert code == 2 and "dlc" in err


def test_report_writes_the_page_anew(serpette, module, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    module("report", write=lambda folder: folder / "report.html")
    assert serpette("report", tmp_path)[:2] == (0, f"{tmp_path / 'report.html'}\n")


def test_compare_shows_and_writes_what_it_found(serpette, tmp_path):
    from test_comparing import N, make_arm, make_run

    each = {name: {0: [1] * n + [0] * (N - n)} for name, n in (("full", 30), ("lora", 29))}
    run = make_run(tmp_path / "a", [make_arm("full", 0.75, 99.0), make_arm("lora", 0.725, 5.0)], each=each)
    code, out, _ = serpette("compare", run)
    assert code == 0 and out.startswith("lora was the cheapest arm") and "a: lora" in out and "−2.5" in out
    code, out, _ = serpette("compare", run, "--baseline", "a:lora", "--json")
    assert code == 0 and json.loads(out)["baseline"] == "a: lora"
    code, out, _ = serpette("compare", run, "--out", tmp_path / "out")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["kind"] == "comparison"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lora was the cheapest arm" in page
    assert serpette("report", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").read_text() == page
    before = (run / "result.json").read_bytes()
    assert serpette("compare", run, "--out", tmp_path / "out")[0] == 0  # its own are written over
    code, _, err = serpette("compare", run, "--out", run)
    assert code == 2 and "name another" in err and (run / "result.json").read_bytes() == before


def test_bench(serpette, monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks" / "tiny_bench"
    folder.mkdir(parents=True)
    (folder / "bench.py").write_text("def main(out, args):\n    print(out.name, args)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "tiny_bench" in serpette("bench", "--list")[1].splitlines()
    assert serpette("bench", "tiny_bench", "--seeds", "2")[:2] == (0, "tiny_bench ['--seeds', '2']\n")
    assert serpette("bench", "tiny_bench")[:2] == (0, "tiny_bench []\n")
    code, _, err = serpette("bench", "tiny_bensh")
    assert code == 2 and "did you mean 'tiny_bench'" in err


def test_doctor(serpette):
    code, out, _ = serpette("doctor", "--json")
    findings = json.loads(out)
    assert code == 0 and not [f for f in findings if f["state"] == "fault"]
    what = {f["what"]: f for f in findings}
    assert {"python", "device", "threads", "cache", "torchvision"} <= set(what)
    assert all(f["remedy"] for f in findings if f["state"] != "ok")
    code, table, _ = serpette("doctor")
    assert code == 0 and "zoo vit-s" in table


@pytest.mark.parametrize(
    "line, extra, state",
    [
        ("no-such-package>=1", "", "fault"),
        ("no-such-package>=1", "ray", "absent"),
        ("numpy>=9999", "", "fault"),
        ("numpy>=9999", "zoo", "warning"),
        ("numpy>=1", "", "ok"),
    ],
)
def test_doctor_judges(line, extra, state):
    from packaging.requirements import Requirement

    from serpette.doctor import judge

    finding = judge(Requirement(line), extra)
    assert finding.state == state
    assert ("pip install" in finding.remedy) == (state != "ok")


def test_doctor_names_a_torchvision_that_does_not_import(monkeypatch):
    from serpette import doctor

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "version_of", lambda package: "0.28.0")
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (finding,) = doctor._torchvision()
    assert finding.state == "warning" and "nms does not exist" in finding.found


def test_overrides_of_the_pruning(serpette, recipe, module):
    ran = []
    module("pipeline", run=lambda job: ran.append(job) or "report")
    recipe.write_text(recipe.read_text() + "prune: {sparsity: 0.3}\n")
    code, _, err = serpette("run", recipe, "--prune.sparsity", "0.7", "--prune.importance", "magnitude")
    assert code == 0, err
    assert (ran[0].prune.sparsity, ran[0].prune.importance) == (0.7, "magnitude")
    code, _, err = serpette("run", recipe, "--prune.sparsity", "7")
    assert code == 2 and "prune: sparsity=7.0" in err


def test_prune_is_a_recipe(serpette, module, tmp_path):
    ran, made = [], ["00-unpruned", "01-pruned"]

    def run(job):
        ran.append(job)
        for name in made:
            (job.folder / "arms" / name / "model").mkdir(parents=True)
        return job.folder / "report.html"

    module("pipeline", run=run)
    options = ["prune", "--model", "m", "--dataset", "digits", "--sparsity", "0.4", "--out", tmp_path / "out"]
    code, out, err = serpette(*options, "--pattern", "structured", "--shrink", "--compare", "--rank", "4")
    assert code == 0, err
    assert "01-pruned/model" in out and "unpruned" not in out and "report.html" in out
    (job,) = ran
    assert [job.prune_of(arm) is None for arm in job.arms] == [True, False]
    assert job.shrink is not None and job.prune.sparsity == 0.4 and job.tune.rank == 4 and job.tune.alpha == 8
    for wrong, said in (
        (["--sparsity", "40"], "did you mean 0.4"),
        (["--shrink"], "means nothing to pattern"),
    ):
        code, _, err = serpette(*options, *wrong)
        assert code == 2 and said in err
    made.remove("01-pruned")
    code, out, err = serpette(*options[:-1], tmp_path / "other", "--compare")
    assert code == 0 and "unpruned" not in out, err
