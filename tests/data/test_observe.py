"""The one place where a model reads examples: order, batch size, one decoding, processes, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import serpette
from serpette.data.examples import Examples
from serpette.data.observe import PILOT, observe
from serpette.scorers import DLC
from serpette.zoo import tiny


def image_rows(n=40, size=32, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "id": [f"im{i:03d}" for i in range(n)],
        "pixel_values": [rng.normal(size=(3, size, size)).astype(np.float32).tolist() for _ in range(n)],
        "label": [int(i % classes) for i in range(n)],
    }


@pytest.fixture(scope="module")
def images():
    return datasets.Dataset.from_dict(image_rows()).with_format("torch")


@pytest.fixture(scope="module")
def vit():
    return tiny("vit")


def scores(model, data, names=("dlc", "herding", "el2n", "k_center"), **options):
    result = serpette.score(model, data, list(names), progress=False, **options)
    return {
        name: dict(zip(result.signals.ids.tolist(), v.tolist(), strict=True))
        for name, v in result.values.items()
    }


def assert_same(a, b, tolerance=1e-5):
    for name in a:
        assert a[name].keys() == b[name].keys()
        np.testing.assert_allclose(
            [a[name][i] for i in a[name]], [b[name][i] for i in a[name]], rtol=tolerance, atol=tolerance
        )


def test_scores_do_not_depend_on_batch_size_or_order(images, vit):
    base = scores(vit, images, batch_size=32)
    assert_same(base, scores(vit, images, batch_size=7))
    assert_same(base, scores(vit, images.select(np.random.default_rng(1).permutation(len(images)))))


def test_padding_does_not_change_a_text_score():
    bert = tiny("bert")
    rng = np.random.default_rng(0)
    rows = [
        {"id": str(i), "input_ids": rng.integers(5, 60, size=4 + i % 9).tolist(), "label": i % 3}
        for i in range(20)
    ]

    def collate(items):
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            ids[row, :length] = torch.as_tensor(item["input_ids"])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask}

    data = datasets.Dataset.from_list(rows)
    alone = scores(bert, data, ("dlc",), data_collator=collate, batch_size=1)
    assert_same(alone, scores(bert, data, ("dlc",), data_collator=collate, batch_size=20), 1e-4)


def test_each_example_is_decoded_once_also_along_a_path(vit):
    class Counting(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 30

        def __getitem__(self, i):
            self.reads += 1
            return torch.full((3, 32, 32), float(i) / 30), i % 3

    data = Counting()
    result = serpette.score(
        vit, data, ["dlc", "learning_confidence", "herding", DLC(variant="official")][:3], progress=False
    )
    assert data.reads == 30
    assert result.cost["passes"] == len(result.path_values["dlc"]) >= 4


def test_the_path_stops_when_the_ranking_stands_still(images, vit):
    patient = DLC(tolerance=2.0, max_points=6)  # a correlation of 2 is never reached
    result = serpette.score(vit, images, [patient], progress=False)
    assert len(result.path_values["dlc"]) == 6
    hasty = DLC(tolerance=-1.0)
    result = serpette.score(vit, images, [hasty], progress=False)
    assert len(result.path_values["dlc"]) == 4, "at least 4 points"
    assert [k for k, _ in result.curves["dlc"]] == [2, 3, 4]


def test_scorers_that_share_a_path_do_not_depend_on_each_other(vit):
    for seed in range(3):
        data = datasets.Dataset.from_dict(image_rows(seed=seed)).with_format("torch")
        alone = scores(vit, data, ("dlc",))
        assert_same(alone, {"dlc": scores(vit, data, ("learning_confidence", "dlc"))["dlc"]}, 0)
        assert_same(alone, {"dlc": scores(vit, data, ("dlc", "learning_confidence"))["dlc"]}, 0)


def test_the_model_is_left_as_it_was(images, vit):
    vit.train()
    vit.dropout_probe = torch.nn.Dropout().eval()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    scores(vit, images, ("dlc",))
    assert vit.training and not vit.dropout_probe.training
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    del vit.dropout_probe
    vit.eval()


def test_embeddings_are_the_input_of_the_head(images, vit):
    observed = observe(vit, Examples(images), progress=False)
    with torch.no_grad():
        logits = vit(pixel_values=images["pixel_values"][:]).logits
    assert observed.signals.embeddings is not None and observed.signals.logits is not None
    again = vit.classifier(observed.signals.embeddings)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(observed.signals.logits, logits, rtol=1e-4, atol=1e-4)


def test_many_chunks_and_a_pilot_give_the_same_as_one_chunk(images, vit, monkeypatch):
    one = scores(vit, images, ("dlc",))
    monkeypatch.setattr("serpette.data.observe.PILOT", 16)
    spec = DLC(points=[0, 0.5])
    a = observe(vit, Examples(images), [spec], chunk_size=8, batch_size=4, progress=False)
    b = observe(vit, Examples(images), [spec], progress=False)
    torch.testing.assert_close(spec(a.signals), spec(b.signals), rtol=1e-5, atol=1e-6)
    assert PILOT == 1024
    assert set(one["dlc"]) == set(images["id"])


WORKER = textwrap.dedent(
    """
    import sys, torch, datasets
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from data.test_observe import image_rows
    import serpette, serpette.data.observe as observe_module
    from serpette.data.processes import processes
    from serpette.zoo import tiny
    observe_module.PILOT = 32
    data = datasets.Dataset.from_dict(image_rows(n=120)).with_format("torch")
    out = sys.argv[1] if sys.argv[1] != "-" else None
    scores = serpette.score(tiny("vit"), data, ["dlc", "el2n"], batch_size=4, out=out, progress=False)
    if len(sys.argv) > 3:
        held = {"dlc": scores.values["dlc"], "el2n": scores.values["el2n"]}
        torch.save({**held, "processes": processes()[1]}, sys.argv[3])
    print("done", flush=True)
    """
)


def start(tmp_path: Path, *arguments: str, **env: str) -> subprocess.Popen:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    tests = Path(__file__).parent.parent
    root = tests.parent / "src"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{tests}", **env}
    command = [sys.executable, str(script), arguments[0], str(tests), *arguments[1:]]
    with open(tmp_path / "stderr", "a") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def test_two_processes_give_the_scores_of_one(tmp_path):
    single = start(tmp_path, "-", str(tmp_path / "one.pt"))
    assert single.wait(120) == 0, (tmp_path / "stderr").read_text()
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
    }
    pair = [
        start(
            tmp_path,
            "-",
            str(tmp_path / f"two{r}.pt"),
            RANK=str(r),
            LOCAL_RANK=str(r),
            ACCELERATE_USE_CPU="true",
            **rendezvous,
        )
        for r in range(2)
    ]
    for process in pair:
        assert process.wait(180) == 0, (tmp_path / "stderr").read_text()
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    for r in range(2):
        two = torch.load(tmp_path / f"two{r}.pt", weights_only=True)
        assert (one["processes"], two["processes"]) == (1, 2), "two that know nothing of each other"
        assert torch.equal(one["dlc"], two["dlc"]) and torch.equal(one["el2n"], two["el2n"])


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    whole = start(tmp_path, str(tmp_path / "whole"))
    assert whole.wait(120) == 0, (tmp_path / "stderr").read_text()
    rng = np.random.default_rng(int(time.time()))  # random moments are the point of this test
    chunks_seen = []
    observed = tmp_path / "killed" / "observed"
    for wait in sorted(rng.uniform(0.0, 0.25, size=3)):
        run = start(tmp_path, str(tmp_path / "killed"))
        while run.poll() is None and not (observed / "manifest.json").exists():
            time.sleep(0.005)
        time.sleep(wait)
        run.send_signal(signal.SIGKILL)
        run.wait()
        chunks_seen.append(len(list(observed.glob("*.safetensors"))))
        last = {p.name: p.stat().st_mtime_ns for p in observed.glob("*.safetensors")}
    resumed = start(tmp_path, str(tmp_path / "killed"))
    assert resumed.wait(120) == 0, (tmp_path / "stderr").read_text()
    assert chunks_seen == sorted(chunks_seen), "a chunk that was written is never lost"
    kept = {name: (observed / name).stat().st_mtime_ns for name in last}
    assert kept == last, "and never computed again"
    assert (tmp_path / "whole/scores.parquet").read_bytes() == (
        tmp_path / "killed/scores.parquet"
    ).read_bytes()


def test_examples_are_read_without_the_model(images, vit, tmp_path, monkeypatch):
    calls = []
    hook = vit.register_forward_pre_hook(lambda *a: calls.append(a))
    options = {"batch_size": 4, "chunk_size": 8, "progress": False, "run_model": False}
    try:
        one = observe(vit, images, folder=tmp_path / "read", **options)
    finally:
        hook.remove()
    assert not calls and one.passes == 0 and one.seconds["decoding"] > 0
    both = observe(vit, images, batch_size=4, progress=False)
    assert one.signals.ids.tolist() == both.signals.ids.tolist() and torch.equal(one.rows, both.rows)
    assert torch.equal(one.signals.labels, both.signals.labels) and one.signals.num_classes == 3
    assert one.signals.embeddings is None and one.signals.logits is None

    (tmp_path / "read" / "000002.safetensors").unlink()
    read, seen = Examples.read, []
    monkeypatch.setattr(Examples, "read", lambda self, rows: seen.append(list(rows)) or read(self, rows))
    again = observe(vit, images, folder=tmp_path / "read", **options)
    assert [rows for rows in seen if len(rows) > 1] == [[16, 17, 18, 19], [20, 21, 22, 23]]
    assert again.signals.ids.tolist() == one.signals.ids.tolist()
    with pytest.raises(ValueError, match=r"differs in: run_model"):
        observe(vit, images, folder=tmp_path / "read", **options | {"run_model": True})
    with pytest.raises(ValueError, match=r"run_model=False leaves the scorers dlc nothing"):
        observe(vit, images, [DLC()], **options)


def test_a_folder_of_another_run_is_refused(images, vit, tmp_path):
    scores(vit, images, ("dlc",), out=tmp_path)
    with pytest.raises(ValueError, match=r"differs in: batch_size"):
        scores(vit, images, ("dlc",), out=tmp_path, batch_size=5)
    with pytest.raises(ValueError, match=r"differs in: model"):
        scores(tiny("vit", seed=1), images, ("dlc",), out=tmp_path)
    with pytest.raises(ValueError, match=r"differs in: data"):
        scores(vit, images.select(range(30)), ("dlc",), out=tmp_path)


def test_other_inputs_under_the_same_ids_are_refused(tmp_path, vit):
    x, y = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    first, other = (torch.utils.data.TensorDataset(v, y) for v in (x, x + 1))
    serpette.score(vit, first, "dlc", out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"differs in: data"):
        serpette.score(vit, other, "dlc", out=tmp_path, progress=False)


def test_a_damaged_chunk_is_named(images, vit, tmp_path):
    scores(vit, images, ("dlc",), out=tmp_path)
    chunk = next((tmp_path / "observed").glob("*.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{chunk.name}.*delete that file"):
        scores(vit, images, ("dlc",), out=tmp_path)


def test_a_full_disk_is_named_and_what_was_written_stays(images, vit, tmp_path, monkeypatch):
    import errno

    from serpette import files

    real, written = os.fsync, []

    def full_after_two(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full_after_two)
    monkeypatch.setattr("serpette.data.observe.PILOT", 16)
    with pytest.raises(OSError, match="No space left") as caught:
        serpette.score(vit, images, "dlc", batch_size=4, out=tmp_path, progress=False)
    assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)
    assert len(list((tmp_path / "observed").glob("*.safetensors"))) == 1
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(files.os, "fsync", real)
    serpette.score(vit, images, "dlc", batch_size=4, out=tmp_path, progress=False)


def test_an_image_that_does_not_decode_is_set_aside(tmp_path, vit):
    for i in range(12):
        folder = tmp_path / "train" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i * 20, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "train" / "b" / "4.png").write_bytes(b"not a picture")
    from transformers import ViTImageProcessor

    from serpette.data.sources import open_dataset

    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    data = open_dataset(str(tmp_path / "train"))
    result = serpette.score(
        vit, data, "dlc", processing_class=processor, progress=False, out=tmp_path / "out"
    )
    (name,) = result.set_aside
    assert "4.png" in name and "does not decode" in result.set_aside[name]
    assert len(result.values["dlc"]) == 11 and result.total == 12
    listed = json.loads((tmp_path / "out/result.json").read_text())["set_aside"]
    assert [entry["id"] for entry in listed] == [name]
    pruner = serpette.DataPruner(keep=0.5, select=serpette.selectors.FlexRand(gamma=0.5), progress=False)
    pruner.fit(vit, data, processing_class=processor)
    assert len(pruner.indices_) == 6 and name not in pruner.ids_ and int(pruner.scores_.isnan().sum()) == 1
    plain = data.with_transform(
        lambda rows: {"x": [np.asarray(i) for i in rows["image"]], "label": rows["label"]}
    )
    with pytest.raises(ValueError, match=r"does not decode"):  # the user's own transform decodes
        serpette.score(vit, plain, "dlc", progress=False, on_bad="raise")
    with pytest.raises(ValueError, match=r"4\.png.*set_aside"):
        serpette.score(vit, data, "dlc", processing_class=processor, progress=False, on_bad="raise")
