"""What is installed, what is missing, and the command that gets it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: `fault` is a required dependency that is missing or too old."""

    what: str
    found: str
    state: Literal["ok", "absent", "warning", "fault"] = "ok"
    remedy: str = ""


def version_of(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(as_json: bool = False) -> int:
    """Print the findings, as a table or as JSON. Returns 2 if a required package is missing or too old."""
    findings = [*_packages(), *_machine(), *_torchvision(), *_zoo()]
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        _print_table(findings)
    return 2 if any(f.state == "fault" for f in findings) else 0


def judge(requirement: Requirement, extra: str = "") -> Finding:
    """Whether what is installed meets `requirement`; missing packages of an `extra` are no fault."""
    found = version_of(requirement.name)
    what = f"{requirement.name} (extra {extra})" if extra else requirement.name
    remedy = (
        f"pip install 'serpette[{extra}]'"
        if extra
        else f"pip install '{requirement.name}{requirement.specifier}'"
    )
    if found is None:
        return Finding(what, "not installed", "absent" if extra else "fault", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(what, f"{found}, too old", "warning" if extra else "fault", remedy)
    return Finding(what, found)


def _packages() -> list[Finding]:
    found = [Finding("python", platform.python_version())]
    try:
        lines = metadata.requires("serpette") or []
    except metadata.PackageNotFoundError:
        remedy = "pip install -e . -c constraints.txt"
        return [*found, Finding("serpette", "runs from its source, versions not checked", "warning", remedy)]
    found.append(Finding("serpette", str(version_of("serpette"))))
    for requirement in map(Requirement, lines):
        extra = next(
            (e for e in ("zoo", "timm", "ray", "eval") if f'extra == "{e}"' in _marker(requirement)), ""
        )
        if extra or not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            found.append(judge(requirement, extra))
    return found


def _marker(requirement: Requirement) -> str:
    return str(requirement.marker or "").replace("'", '"')


def _machine() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return [
        Finding("device", ", ".join(devices) or "cpu"),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]


def _torchvision() -> list[Finding]:
    """A torchvision that does not match torch breaks the image models of transformers too."""
    found = version_of("torchvision")
    if found is None:
        return [Finding("torchvision", "not installed (not needed)")]
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever a mismatched binary raises: RuntimeError, OSError, ImportError
        text = f"{found} does not import: {' '.join(str(error).split())[:100]}"
        remedy = f"pip uninstall torchvision, or the one made for torch {version_of('torch')}"
        return [Finding("torchvision", text, "warning", remedy)]
    return [Finding("torchvision", found)]


def _zoo() -> list[Finding]:
    from . import zoo

    found = []
    for name in [*zoo.models(), *zoo.datasets()]:
        held = zoo.is_cached(name)
        what, text = f"zoo {name}", "ready" if held else "not fetched"
        found.append(Finding(what, text) if held else Finding(what, text, "absent", f"serpette fetch {name}"))
    folder = Path(zoo.cache_dir())
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    free = shutil.disk_usage(there).free / 1e9
    state = "ok" if free > 3 else "warning"
    remedy = "" if state == "ok" else "make room, or set SERPETTE_CACHE to another folder"
    return [*found, Finding("cache", f"{folder} ({free:.1f} GB free)", state, remedy)]


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {
        "ok": ("ok", "green"),
        "absent": ("-", "dim"),
        "warning": ("!", "yellow"),
        "fault": ("X", "bold red"),
    }
    table = Table("", "what", "found", "how to get or mend it", box=None)
    for f in findings:
        mark, style = marks[f.state]
        table.add_row(Text(mark, style=style), Text(f.what), Text(f.found), Text(f.remedy))
    Console().print(table)
