"""One self-contained HTML page about a run: what pruning saved, what it lost, and where that is noise."""

from __future__ import annotations

import os
from pathlib import Path


def write(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` beside the `result.json` of a run, and return its path.

    Reads `result.json` and, where they exist, `scores.parquet` and `gallery.json`. Parts that the run does
    not have are left out. The page asks for nothing from outside itself; all text that comes from data is
    escaped. It is written to a neighbouring file first, then moved in place.

    Args:
        run_dir: the folder that `serpette run` has written.

    Raises:
        ValueError: when there is no readable `result.json`.

    Example:
        >>> write("runs/nothing")
        Traceback (most recent call last):
        ...
        ValueError: run_dir='runs/nothing' has no result.json; give the folder that `serpette run` has written
    """
    from .page import render
    from .run import load

    path = Path(run_dir) / "report.html"
    text = render(load(run_dir))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(text.encode("utf-8", errors="replace"))  # a lone surrogate in a name becomes "?"
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
