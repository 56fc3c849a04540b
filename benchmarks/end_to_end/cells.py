"""One task and seed: the advice at each budget, and one run of all that was advised beside everything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from serpette.adviser import advise
from serpette.files import write_json
from serpette.pipeline import run as run_recipe
from serpette.recipe import EvaluateSpec, Recipe, TuneSpec

BUDGETS: dict[str, dict[str, Any]] = {
    "at most 1 point": {"max_loss": 1.0},
    "a quarter of the time": {"time": "0.25x"},
    "0.6 of the latency": {"latency": "0.6x"},
}
LORA = TuneSpec("lora", epochs=3, learning_rate=1e-3, batch_size=16, rank=8, alpha=16)


@dataclass(frozen=True)
class Task:
    """A model and data, cut down so that all seeds end within the hour."""

    name: str
    model: str
    data: str
    train: int
    test: int
    options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    tune: TuneSpec = LORA
    budgets: tuple[str, ...] = tuple(BUDGETS)


VIT = {"layers": 8, "image_size": 56}
TASKS = {
    task.name: task
    for task in (
        Task(
            "ViT, digits",
            "vit-s",
            "digits",
            400,
            353,
            VIT,
            budgets=("at most 1 point", "a quarter of the time"),
        ),
        Task(
            "ViT, all digits",
            "vit-s",
            "digits",
            1444,
            353,
            VIT,
            tune=replace(LORA, epochs=5),
            budgets=("at most 1 point", "a quarter of the time"),
        ),
        Task("ViT, Fashion-MNIST", "vit-s", "fashion-mnist", 500, 400, VIT),
        Task("MiniLM, movie snippets", "minilm-l6", "movie-snippets", 500, 400, max_length=64),
        Task(
            "SmolLM2, MMLU explanations",
            "smollm2-135m",
            "mmlu-cot",
            120,
            40,
            max_length=128,
            tune=replace(LORA, epochs=1, batch_size=4),
            budgets=("at most 1 point", "a quarter of the time"),
        ),
    )
}


def cell_file(folder: Path, name: str, seed: int) -> Path:
    """Where the figures of one seed lie."""
    return folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"


def run(task: Task, seed: int, folder: Path) -> None:
    """Advice and run; both go on where they stopped."""
    file = cell_file(folder, task.name, seed)
    if file.exists():
        return
    torch.set_num_threads(1)
    home, recipes, refused, advising = folder / file.stem, {}, {}, 0.0
    for name in task.budgets:
        try:
            advice = advise(
                task.model,
                task.data,
                tune=task.tune,
                limit=task.train,
                test_limit=task.test,
                options=task.options,
                max_length=task.max_length,
                out=home / "advice.yaml",
                seed=seed,
                progress=False,
                **BUDGETS[name],
            )
        except ValueError as error:
            refused[name] = str(error)
            continue
        recipes[name] = advice.recipe
        advising = advice.result["advising"]["seconds"]
    first = next(iter(recipes.values()))
    arms = [
        replace(
            first.arms[0],
            name="everything",
            scorer=None,
            select=None,
            keep=1.0,
            per_class=None,
            select_options={},
            predicted={},
            prune={"sparsity": 0.0},
        )
    ]
    arms += [_named(recipe, name) for name, recipe in recipes.items() if not _keeps_all(recipe)]
    cut = next((r for r in recipes.values() if r.prune is not None), None)
    if cut is None:
        arms[0] = replace(arms[0], prune=None)
    joined = replace(
        first,
        name="end_to_end",
        arms=tuple(arms),
        prune=cut.prune if cut else None,
        shrink=cut.shrink if cut else None,
        export=(),
        evaluate=EvaluateSpec(sensitivity=False),
        out=str(home / "run"),
    )
    run_recipe(joined, progress=False)
    result = json.loads((home / "run" / "result.json").read_text())
    figures = {arm["name"]: _figures(arm) for arm in result["arms"]}
    for name, recipe in recipes.items():  # "keep everything" is the full run, which is trained once
        told, point = recipe.arms[0].predicted, 100 if result["metric"] == "perplexity" else 1
        figures[name] = (figures[name] if name in figures else figures["everything"]) | {
            "predicted": {k: v * (point if k.startswith("loss") else 1) for k, v in told.items()}
        }
    write_json(
        file,
        {
            "task": task.name,
            "seed": seed,
            "metric": result["metric"],
            "examples": result["data"]["train_examples"],
            "test_examples": result["data"]["test_examples"],
            "advising_seconds": sum(advising.values()),
            "refused": refused,
            "arms": figures,
        },
    )


def _keeps_all(recipe: Recipe) -> bool:
    return recipe.arms[0].keep == 1 and recipe.prune is None


def _named(recipe: Recipe, name: str) -> Any:
    (arm,) = recipe.arms
    return replace(arm, name=name, prune=None if recipe.prune else {"sparsity": 0.0})


def _figures(arm: dict[str, Any]) -> dict[str, Any]:
    quality = -100 * arm["loss"] if "loss" in arm else 100 * arm["accuracy"]
    spent = arm["seconds"]
    weights = arm.get("weights")
    batch = weights["timings"][-1] if weights else None
    return {
        "quality": quality,  # points; of a language model minus hundredths of a nat
        "seconds": sum(spent[k] for k in spent if k != "evaluation"),
        "peak_bytes": arm["peak_bytes"],
        "keep": arm["keep"],
        "choice": arm["scorer"] or ("random" if arm["select"] else "everything"),
        "speedup": batch["speedup"] if batch else 1.0,
        "file": weights["after"]["file_bytes"] / weights["before"]["file_bytes"] if weights else 1.0,
        "parameters": weights["after"]["parameters"] / weights["before"]["parameters"] if weights else 1.0,
    }
