"""One self-contained HTML page about a run or an advice: what pruning saves, what it loses, what is noise."""

from __future__ import annotations

import os
from pathlib import Path


def write(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` beside the `result.json` of a run or of an advice, and return its path.

    Reads `result.json` and, where they exist, `scores.parquet` and `gallery.json`. Parts that the folder does
    not have are left out. The page asks for nothing from outside itself; all text that comes from data is
    escaped. It is written to a neighbouring file first, then moved in place.

    Args:
        run_dir: the folder that `serpette run` or `serpette advise` has written.

    Raises:
        ValueError: when there is no readable `result.json`.

    Example:
        >>> write("runs/nothing")
        Traceback (most recent call last):
        ...
        ValueError: run_dir='runs/nothing' has no result.json; give the folder that `serpette run` has written
    """
    from .advice import render_advice
    from .page import render
    from .run import load, load_result

    path, result = Path(run_dir) / "report.html", load_result(run_dir)
    text = render_advice(result) if result.get("kind") == "advice" else render(load(run_dir))
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
