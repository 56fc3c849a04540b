import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from serpette import zoo
from serpette.zoo import cache
from serpette.zoo.cache import Entry, ZooError, ensure, fault


@dataclass(frozen=True)
class Writes:
    """A source that writes `text` into weights.bin and counts its calls in a file."""

    text: str = "w" * 100
    log: Path | None = None
    name: str = "writes"

    def __str__(self):
        return self.name

    def fetch(self, folder):
        if self.log is not None:
            with open(self.log, "a") as log:
                log.write("fetched\n")
        (folder / "weights.bin").write_text(self.text)


@dataclass(frozen=True)
class Fails:
    error: Exception
    name: str = "fails"

    def __str__(self):
        return self.name

    def fetch(self, folder):
        (folder / "half").write_text("half")
        raise self.error


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPETTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SERPETTE_OFFLINE", raising=False)
    return tmp_path / "cache"


def entry(*sources, **fields):
    return Entry("thing", "model", "a thing", "MIT", 100, sources=sources, **fields)


def left_overs(folder):
    return [p.name for p in folder.iterdir() if ".tmp-" in p.name]


def test_where_the_cache_is(monkeypatch):
    assert zoo.cache_dir().name == "cache"
    monkeypatch.delenv("SERPETTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert zoo.cache_dir() == Path("/x/serpette")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zoo.cache_dir() == Path.home() / ".cache" / "serpette"


def test_fetches_once(own_cache, tmp_path):
    thing = entry(Writes(log=tmp_path / "log"))
    folder = ensure(thing, progress=False)
    assert folder == own_cache / "thing" and (folder / "weights.bin").read_text() == "w" * 100
    ensure(thing, progress=False)
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert left_overs(own_cache) == []
    assert json.loads((folder / "manifest.json").read_text())["source"] == "writes"


def test_sources_are_tried_in_order(own_cache):
    folder = ensure(entry(Fails(ValueError("no")), Writes("second"), Writes("third")), progress=False)
    assert (folder / "weights.bin").read_text() == "second"
    assert not (folder / "half").exists()  # nothing of the failed source is kept


def test_the_error_has_a_line_for_each_source(own_cache):
    thing = entry(Fails(ValueError("wrong\nhash"), "first"), Fails(OSError("no route"), "second"))
    with pytest.raises(ZooError) as caught:
        ensure(thing, progress=False)
    text = str(caught.value)
    assert "  - first: wrong hash\n" in text and "  - second: no route\n" in text
    assert "serpette fetch thing" in text and "SERPETTE_CACHE" in text
    assert left_overs(own_cache) == []


def test_offline_and_not_cached(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("SERPETTE_OFFLINE", "1")
    with pytest.raises(ZooError, match="(?s)SERPETTE_OFFLINE is set.*serpette fetch thing"):
        ensure(entry(Writes(log=tmp_path / "log")), progress=False)
    assert not (tmp_path / "log").exists()


def test_offline_and_cached(own_cache, monkeypatch):
    folder = ensure(entry(Writes()), progress=False)
    monkeypatch.setenv("SERPETTE_OFFLINE", "1")
    assert ensure(entry(Writes()), progress=False) == folder


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_damage_is_found_and_fetched_again(own_cache, damage):
    folder = ensure(entry(Writes()), progress=False)
    weights = folder / "weights.bin"
    if damage == "flip":
        weights.write_text("v" + "w" * 99)
    elif damage == "cut":
        weights.write_text("w" * 99)
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert fault(folder) is not None
    ensure(entry(Writes()), progress=False)
    assert fault(folder) is None and weights.read_text() == "w" * 100


def test_damage_offline_keeps_the_folder(own_cache, monkeypatch):
    folder = ensure(entry(Writes()), progress=False)
    (folder / "weights.bin").write_text("cut")
    monkeypatch.setenv("SERPETTE_OFFLINE", "1")
    with pytest.raises(ZooError, match="weights.bin has 3 bytes, not 100"):
        ensure(entry(Writes()), progress=False)
    assert (folder / "weights.bin").exists()


def test_a_damaged_folder_stays_until_the_new_one_is_there(own_cache):
    folder = ensure(entry(Writes()), progress=False)
    (folder / "weights.bin").write_text("cut")
    with pytest.raises(ZooError):
        ensure(entry(Fails(ValueError("no network"))), progress=False)
    assert (folder / "weights.bin").read_text() == "cut"


def test_a_folder_that_is_not_ours_is_left_alone(own_cache):
    (own_cache / "thing").mkdir(parents=True)
    (own_cache / "thing" / "mine.txt").write_text("mine")
    with pytest.raises(ZooError, match="not a folder of the zoo"):
        ensure(entry(Writes()), progress=False)
    assert (own_cache / "thing" / "mine.txt").read_text() == "mine"


def test_conversion_is_part_of_the_fetch(own_cache):
    def convert(folder):
        (folder / "weights.bin").rename(folder / "model.bin")

    folder = ensure(entry(Writes(), convert=convert), progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "model.bin"]

    def broken(folder):
        raise KeyError("embeddings")

    with pytest.raises(ZooError, match="embeddings"):
        ensure(Entry("other", "model", "", "MIT", 1, sources=(Writes(),), convert=broken), progress=False)


def test_a_full_disk_is_named(own_cache):
    full = Fails(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ZooError, match="No space left on device; it needs about"):
        ensure(entry(full, Writes()), progress=False)
    assert left_overs(own_cache) == []


def test_ctrl_c_leaves_nothing(own_cache):
    class Interrupted(Fails):
        def fetch(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(entry(Interrupted(ValueError())), progress=False)
    assert left_overs(own_cache) == [] and not (own_cache / "thing").exists()


CHILD = """
import sys, time
from pathlib import Path
from serpette.zoo.cache import Entry, ensure
class Slow:
    def __str__(self): return "slow"
    def fetch(self, folder):
        open({log!r}, "a").write("fetched\\n")
        (folder / "weights.bin").write_text("half")
        print("half", flush=True)
        time.sleep({seconds})
        (folder / "weights.bin").write_text("whole")
ensure(Entry("thing", "model", "", "MIT", 1, sources=(Slow(),)), progress=False)
"""


def child(tmp_path, seconds):
    code = textwrap.dedent(CHILD.format(log=str(tmp_path / "log"), seconds=seconds))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_a_killed_fetch_starts_afresh(own_cache, tmp_path):
    process = child(tmp_path, seconds=600)
    try:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(left_overs(own_cache)) == 1 and not (own_cache / "thing").exists()
    folder = ensure(entry(Writes()), progress=False)
    assert left_overs(own_cache) == [] and fault(folder) is None


def test_two_processes_fetch_once(own_cache, tmp_path):
    processes = [child(tmp_path, seconds=0.5) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [p.returncode for p in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert (own_cache / "thing" / "weights.bin").read_text() == "whole"


def test_progress_goes_to_stderr(own_cache, capfd):
    ensure(entry(Writes()), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "thing from writes" in err


def test_large_files_are_hashed_at_the_fetch_only(own_cache, monkeypatch):
    folder = ensure(entry(Writes()), progress=False)
    (folder / "weights.bin").write_text("v" * 100)
    monkeypatch.setattr(cache, "SMALL", 50)
    assert fault(folder) is None
    monkeypatch.setattr(cache, "SMALL", 100)
    assert fault(folder) == "weights.bin has another SHA-256"
