"""`run(recipe)`: score the training examples once, tune each arm on what it keeps, compare, report.

Where no arm needs a score or embeddings, the examples are only read, and the model does not run on them.
Finished arms lie in `arms/`, scores in `scores/`; of an unfinished arm its folder there holds the stages that
are done and the last checkpoint of the tuning. A killed run goes on from there. With several seeds each has
such a folder in `seeds/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arms import mean_of_seeds
from ..files import write_atomic, write_json
from ..recipe import Recipe, check, dump, load, to_dict
from .arm import run_arm
from .gallery import gallery
from .job import Job
from .progress import Sayer


def run(recipe: Recipe, *, progress: bool = True) -> Path:
    """Runs `recipe` and writes `result.json` and `report.html`; returns the path of the report.

    Args:
        recipe: see `serpette.recipe`; its `folder` may hold an unfinished run of the same recipe.

    Raises:
        ValueError: bad recipe or data, or the folder holds the run of another recipe.

    Example:
        >>> from serpette.recipe import load
        >>> run(load("recipes/demo.yaml"))  # doctest: +SKIP
    """
    check(recipe)
    say = Sayer(progress)
    folder = recipe.folder
    _claim(folder, recipe)
    if recipe.seeds == 1:
        _run_seed(recipe, folder, say, recipe.seed)
    else:
        parts = []
        for seed in range(recipe.seed, recipe.seed + recipe.seeds):
            part = folder / "seeds" / str(seed)
            done = (part / "result.json").exists()
            say(f"seed {seed}, {len(parts) + 1} of {recipe.seeds}{': done before' if done else ''}")
            if not done:
                _run_seed(replace(recipe, seed=seed, seeds=1), part, say, recipe.seed)
            parts.append(json.loads((part / "result.json").read_text(encoding="utf-8")))
        result = mean_of_seeds(parts) | {"seed": recipe.seed, "recipe": to_dict(recipe)}
        for name in ("scores.parquet", "gallery.json"):  # those of the first seed, for the report
            write_atomic(folder / name, (folder / "seeds" / str(recipe.seed) / name).read_bytes())
        write_json(folder / "result.json", result)
    from ..report import write

    return write(folder)


def _run_seed(recipe: Recipe, folder: Path, say: Sayer, test_seed: int) -> None:
    job = Job(recipe, say, folder, test_seed)
    arms: list[dict[str, Any]] = []
    for number, arm in enumerate(recipe.arms):
        arms.append(run_arm(job, arm, number, arms))
    write_json(folder / "gallery.json", gallery(job))
    write_json(folder / "result.json", job.result(arms))  # last: it says that the seed is done


def _claim(folder: Path, recipe: Recipe) -> None:
    """The folder is for this recipe: begun by it, or without any work in it."""
    path = folder / "recipe.yaml"
    begun = any((folder / name).exists() for name in ("scores", "seeds", "arms", "result.json"))
    if not path.exists() or not begun:
        write_atomic(path, dump(recipe))
    elif path.read_text(encoding="utf-8") != dump(recipe) and not _same(path, recipe):
        raise ValueError(
            f"{folder} holds the run of another recipe; "
            "give another folder with --out, or delete it to start afresh"
        )


def _same(path: Path, recipe: Recipe) -> bool:
    """Whether the recipe at `path`, perhaps written before a key was added, is this one."""
    try:
        return load(path) == recipe
    except ValueError:
        return False
