"""Fetch once, check by SHA-256, keep: the cache of the zoo.

An entry of the catalogue becomes the folder `cache_dir()/NAME`. It is built in a temporary folder beside
it and moved into place in one step, under a lock, so a killed fetch leaves nothing but a temporary folder,
which the next fetch removes. `manifest.json` in the folder holds the size and SHA-256 of each file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

SMALL = 64 * 2**20  # files up to this many bytes are hashed at each load, larger ones only at the fetch
FORMAT = 1  # raise it when a conversion changes: older folders are then fetched again


class ZooError(RuntimeError):
    """A model or data set of the zoo cannot be had; the message says why and what to run."""


class Source(Protocol):
    """A place to fetch from: `fetch(folder)` puts the files of the entry into an empty folder."""

    def fetch(self, folder: Path) -> None: ...
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Entry:
    """One model or data set of the zoo.

    Args:
        name: what `load_model` or `load_dataset` is called with.
        kind: `"model"` or `"dataset"`.
        description: one line for `serpette list`.
        licence: SPDX name, or a phrase where there is none.
        fetch_bytes: size of the download in bytes; 0 for what scikit-learn brings along.
        sources: tried in order until one gives files with the right SHA-256.
        options: what the loader accepts, with the default values.
        variant: the option that `NAME:VALUE` sets.
        convert: called once after the fetch with the folder; turns the files into what is loaded.
    """

    name: str
    kind: str
    description: str
    licence: str
    fetch_bytes: int
    sources: tuple[Source, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    variant: str | None = None
    convert: Callable[[Path], None] | None = None


def cache_dir() -> Path:
    """Where the zoo is kept: `SERPETTE_CACHE`, else `serpette` in `XDG_CACHE_HOME` or in `~/.cache`."""
    if chosen := os.environ.get("SERPETTE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "serpette"


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def offline() -> bool:
    """Whether `SERPETTE_OFFLINE` forbids every fetch."""
    return os.environ.get("SERPETTE_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def fault(folder: Path) -> str | None:
    """What is wrong with a cached folder in one phrase, or None when it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        return "not cached"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not readable"
    if manifest.get("format") != FORMAT:
        return "made by another version"
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {file['bytes']}"
        if file["bytes"] <= SMALL and sha256_of(path) != file["sha256"]:
            return f"{name} has another SHA-256"
    return None


def has_manifest(entry: Entry) -> bool:
    """A quick look, without reading the files."""
    return not entry.sources or (cache_dir() / entry.name / "manifest.json").is_file()


def ensure(entry: Entry, progress: bool = True) -> Path:
    """The folder of `entry`, fetched first if it is not there or not whole; see `serpette.zoo.fetch`."""
    folder = cache_dir() / entry.name
    if not entry.sources:
        return folder
    if fault(folder) is None:
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        from filelock import FileLock

        with FileLock(cache_dir() / f".{entry.name}.lock"):
            broken = fault(folder)  # another process may have fetched it while we waited
            if broken is not None:
                _fetch(entry, folder, broken, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        raise ZooError(
            f"cannot write {entry.name!r} into {cache_dir()}: {error.strerror}; it needs about "
            f"{3 * entry.fetch_bytes / 1e6:.0f} MB there; make room or set SERPETTE_CACHE to another folder"
        ) from error
    return folder


def _fetch(entry: Entry, folder: Path, broken: str, progress: bool) -> None:
    prefix = f".{entry.name}.tmp-"
    for left_over in cache_dir().glob(prefix + "*"):
        shutil.rmtree(left_over, ignore_errors=True)
    if folder.exists():
        if not (folder / "manifest.json").exists():
            raise ZooError(
                f"{folder} exists but is not a folder of the zoo; move it away or set SERPETTE_CACHE"
            )
        if offline():
            raise ZooError(
                f"the cached {entry.name!r} is damaged ({broken}) and SERPETTE_OFFLINE is set; "
                f"unset it and run `serpette fetch {entry.name}`"
            )
    said = ["offline: SERPETTE_OFFLINE is set"] if offline() else []
    for source in () if offline() else entry.sources:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=cache_dir()))
        try:
            with _shown(f"{entry.name} from {source}", entry.fetch_bytes, temporary, progress):
                source.fetch(temporary)
                if entry.convert is not None:
                    entry.convert(temporary)
            _finish(temporary, folder, str(source))
            return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            said.append(f"{source}: {_one_line(error)}")
        except Exception as error:  # whatever a source throws, the next one may do
            said.append(f"{source}: {_one_line(error)}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise ZooError(
        f"{entry.name!r} is not in the cache {cache_dir()} and could not be fetched:\n"
        + "".join(f"  - {line}\n" for line in said)
        + f"Run `serpette fetch {entry.name}` on a machine with a network, then copy the folder "
        f"{folder} here (SERPETTE_CACHE names another cache)."
    )


def _finish(temporary: Path, folder: Path, source: str) -> None:
    paths = sorted(p for p in temporary.rglob("*") if p.is_file())
    files = {
        p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in paths
    }
    manifest = {"format": FORMAT, "source": source, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if folder.exists():  # damaged; a rename cannot replace a folder that is not empty
        shutil.rmtree(folder)
    temporary.chmod(0o755)  # mkdtemp and some writers are private; a cache may be shared
    for path in [*paths, temporary / "manifest.json"]:
        path.chmod(0o644)
    os.replace(temporary, folder)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__


@contextmanager
def _shown(what: str, total: int, folder: Path, progress: bool) -> Iterator[None]:
    """A progress bar that follows the growth of `folder`."""
    if not progress:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"fetching {what} ({total / 1e6:.0f} MB)", highlight=False, soft_wrap=True)
        yield
        return
    columns = TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    stop = threading.Event()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)

        def watch() -> None:
            while not stop.wait(0.2):
                grown = 0
                for path in folder.rglob("*"):
                    try:
                        grown += path.stat().st_size if path.is_file() else 0
                    except OSError:
                        continue  # gone since it was listed
                bar.update(task, completed=min(grown, total))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
