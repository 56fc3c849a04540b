"""The commands about finished runs: `serpette report`, `serpette compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction


def report(run_dir: Positional[Path]) -> None:
    """Write the page report.html of a finished run, an advice or a comparison anew and print its path.

    Example: serpette report runs/demo

    Args:
        run_dir: Folder with its result.json.
    """
    from . import report as reports

    if not (run_dir / "result.json").is_file():
        raise FileNotFoundError(
            f"run_dir={str(run_dir)!r} has no result.json; make one: serpette run RECIPE.yaml"
        )
    print(reports.write(run_dir))


def compare(
    runs: Positional[tuple[Path, ...]],
    *,
    baseline: str | None = None,
    arm: UseAppendAction[tuple[str, ...]] = (),
    out: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Set the arms of finished runs side by side: what each reached and cost, and which none beats.

    Example: serpette compare runs/demo runs/minilm_rows --baseline runs/demo:full --out compared

    Differences are paired seed by seed, or over the same test examples; where that cannot be done, it says
    why and gives none. Seconds and latency are compared on one machine only.

    Args:
        runs: Folders of `serpette run` or `serpette prune`; one is enough if it has several arms.
        baseline: RUN or RUN:ARM that the differences are to; RUN is a folder or the name of a run. Default:
            of the first run the arm that keeps everything, else the first arm.
        arm: Show this arm and the baseline alone; give it again for another one. Default: all.
        out: Folder for result.json and report.html.
        as_json: Print the JSON in place of the table.
    """
    from . import report as reports
    from .comparing import compare as compared
    from .files import write_json
    from .report.comparison import show

    result, page = compared(runs, baseline, arm), None
    if out is not None:
        held = out / "result.json"
        if held.is_file() and json.loads(held.read_text(encoding="utf-8")).get("kind") != "comparison":
            raise ValueError(f"out={str(out)!r} holds another result.json than of a comparison; name another")
        write_json(held, result)
        page = reports.write(out)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show(result)
    if page is not None:
        print(page)
