"""One self-contained HTML page of a run, an advice or a comparison: what pruning saves and what it loses."""

from __future__ import annotations

import os
from pathlib import Path


def write(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` beside the `result.json` of a run, an advice or a comparison, and return its path.

    Reads `result.json` and, where they exist, `scores.parquet` and `gallery.json`. Parts that the folder does
    not have are left out. The page asks for nothing from outside itself; all text that comes from data is
    escaped. It is written to a neighbouring file first, then moved in place.

    Args:
        run_dir: the folder that `serpette run`, `serpette advise` or `serpette compare --out` has written.

    Raises:
        ValueError: when there is no readable `result.json`.

    Example:
        >>> write("runs/nothing")
        Traceback (most recent call last):
        ...
        ValueError: run_dir='runs/nothing' has no result.json; give the folder that `serpette run` has written
    """
    from ..files import write_atomic
    from .advice import render_advice
    from .comparison import render as render_comparison
    from .page import render
    from .run import load, load_result

    path, result = Path(run_dir) / "report.html", load_result(run_dir)
    pages = {"advice": render_advice, "comparison": render_comparison}
    page = pages.get(result.get("kind", "run"))
    text = page(result) if page else render(load(run_dir))
    write_atomic(path, text.encode("utf-8", errors="replace"))  # a lone surrogate in a name becomes "?"
    return path
