"""What pays on your data: `advise` measures it in a fraction of one fine-tuning run and writes the recipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.budget import count
from ..data.callback import fingerprint
from ..data.sources import open_dataset
from ..files import write_atomic, write_json
from ..opening import Opened, opened
from ..pipeline.progress import Sayer
from ..recipe import ArmSpec, DataSpec, ModelSpec, Recipe, TuneSpec, check, dump, to_dict
from ..report import write as write_page
from ..types import Task
from .budget import Budget
from .probes import KEEPS, SCORED, Choice
from .recommend import Option, best_of, recommend, sentence
from .work import WAYS, Work
from .writing import recipe_of

CUT_WITH = ("lora", "full")  # methods of tuning that weights can be pruned with
# of a tuning, what would change its time, memory or course, and is not measured
UNMEASURED = ("target_modules", "freeze_attention", "fraction", "modes", "checkpointing")

__all__ = ["Advice", "Budget", "Choice", "advise"]


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        result: as in `result.json`.
        recipe: what is advised, for `serpette.run`.
        folder: of `result.json` and `report.html`.
    """

    result: dict[str, Any]
    recipe: Recipe
    folder: Path

    @property
    def sentence(self) -> str:
        """The recommendation."""
        return self.result["recommendation"]["sentence"]


def advise(
    model: Any,
    dataset: Any,
    *,
    time: str | None = None,
    memory: str | None = None,
    latency: str | None = None,
    max_loss: float | None = None,
    tune: TuneSpec | None = None,
    split: str = "train",
    limit: int | None = None,
    test: str | None = None,
    test_split: str = "test",
    test_limit: int | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    task: Task | None = None,
    options: dict[str, Any] | None = None,
    choices: Sequence[Choice] = SCORED,
    keeps: Sequence[float] = KEEPS,
    metric: Literal["accuracy", "balanced_accuracy"] = "accuracy",
    clean_test: bool = False,
    compare: bool = False,
    out: str | Path = "advice.yaml",
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Advice:
    """Which examples, what way to tune and how many weights to cut: measured on the user's data and model.

    Takes at most a fifth of the fine-tune that it advises on, unless that is very short. Everything is kept
    on disk as it is found, and a stopped call goes on from there.

    Args:
        model, dataset: names or paths, see `serpette.data.sources`: the recipe names them.
        time, memory, latency, max_loss: the budget, see `Budget`.
        tune: the fine-tune that is advised on; `method` lora, rows or full. Default: LoRA, 3 epochs.
        split, limit, test, test_split, test_limit, label_column, max_length, task, options: of the data and
            of the model, as in a recipe.
        choices: ways to choose examples beside the balanced random ones.
        keeps: shares that are tried, in (0, 1).
        metric: `"balanced_accuracy"` where each class counts the same on the test examples, whatever its
            share of the training examples.
        clean_test: the labels of the test examples are right even if some of the training examples' are not;
            by default they are as noisy.
        compare: the recipe also trains on everything and on a random choice, to see whether it came true.
        out: file for the recipe; what was found goes to a folder of that name beside it.
        batch_size: examples a forward pass.
        seed: of everything random.

    Raises:
        ValueError: a wrong or impossible budget; bad data.

    Example:
        >>> advise("minilm-l6", "movie-snippets", max_loss=0.5)  # doctest: +SKIP
    """
    limits, tune = Budget(time, memory, latency, max_loss), tune or TuneSpec()
    _check_tune(tune, limits)
    if metric not in ("accuracy", "balanced_accuracy"):
        raise ValueError(f"metric={metric!r} must be 'accuracy' or 'balanced_accuracy'")
    for keep in keeps:
        count(100, keep)
    for name, given in (("model", model), ("dataset", dataset)):
        if not isinstance(given, (str, os.PathLike)):
            raise ValueError(
                f"{name}={type(given).__name__} must be a name or a path, since a recipe is written that "
                "names it; save it first: save_pretrained, save_to_disk"
            )
    folder, out = places(out)
    data = DataSpec(str(dataset), test, split, test_split, limit, test_limit, label_column, max_length)
    skeleton = Recipe(
        name=_name(folder), model=ModelSpec(str(model), options or {}), data=data, arms=(ArmSpec("advised"),),
        tune=tune, task=task, seed=seed, device=device, batch_size=batch_size,
    )  # fmt: skip
    check(skeleton, str(out))
    test_examples = _test_examples(data, seed)
    say = Sayer(progress)
    say(f"opening {model} and {dataset}")
    reading = {"label_column": label_column, "max_length": max_length}
    job = opened(
        model,
        dataset,
        split=split,
        limit=limit,
        task=task,
        device=device,
        seed=seed,
        options=options,
        **reading,
    )
    _check_labels(job)
    settings = {
        "model": str(model),
        "dataset": str(dataset),
        "split": split,
        "limit": limit,
        "tune": asdict(tune),
        "task": job.task,
        "options": options or {},
        "metric": metric,
        "seed": seed,
        "keeps": list(keeps),
        "choices": [asdict(c) for c in choices],
        "batch_size": batch_size,
        "device": str(next(job.model.parameters()).device),
        "data": fingerprint(job.dataset, job.examples.ids),
        **reading,
    }
    _claim(folder, out, settings)
    work = Work(job, folder, say, tune, reading, batch_size, seed, limits)
    probed = job.task != "causal-lm"
    if not probed:
        work.read()
    work.step()
    if probed:
        work.observe()
        judged = metric if job.task == "classification" else "r2"
        work.probe(choices, keeps, judged)
        work.pilot(judged)
    else:
        work.pilots()
    work.ways()
    work.weights()
    found, curve = work.outlooks(keeps, clean_test, test_examples)
    result = work.result(found, curve, {"train": f"{dataset}[{split}]", "model": str(model)}, metric)
    ways = [t for t in work.tunings if t.name.removesuffix(", checkpointing") == WAYS[tune.method]]
    if all(t.peak_bytes > limits.bytes for t in ways):
        ways = work.tunings
    by_share = [[o for o in found if o.keep == keep] for keep in sorted({o.keep for o in found})]
    picks = [pick for same in by_share for pick in best_of(same)]
    cutting = work.cuts if limits.speed > 1 else []
    choosable = [
        Option(o, way, cut, o.scoring + work.tuning_seconds(way, o.examples))
        for o in picks
        for way in ways
        for cut in [None, *(cutting if way.method in CUT_WITH else [])]
    ]
    write_json(folder / "result.json", result)  # what was found stays, whatever the budget says
    try:
        if limits.speed > 1 and not cutting:
            raise ValueError(f"latency={latency!r} cannot be kept: {work.why_not_cut}; leave it out")
        ranked = recommend(choosable, limits, work.full_seconds, work.causal)
    except ValueError:
        out.unlink(missing_ok=True)  # the recipe of an earlier call does not answer this one
        write_page(folder)
        raise
    best = ranked[0]
    runners_up: list[Option] = []
    for option in ranked[1:]:
        if all(_differs(option, o) for o in (best, *runners_up)) and len(runners_up) < 2:
            runners_up.append(option)
    random = max(
        (o for o in found if o.keep == best.outlook.keep and o.choice.by_chance), key=lambda o: o.value
    )
    first, *others = (
        {"sentence": sentence(o, work.full_seconds, work.causal)} | o.as_dict(work.causal)
        for o in (best, *runners_up)
    )
    result |= {"recommendation": first, "runners_up": others}
    if test_examples is None:
        result["notes"].append(
            f"No test examples were found ({dataset}[{test_split}]); the recipe evaluates nothing."
        )
    recipe = recipe_of(
        best,
        skeleton,
        causal=work.causal,
        on_gpu=job.on_gpu,
        controls=random.choice if compare else None,
        same_metric=metric == "accuracy",
        evaluate=test_examples is not None,
    )
    check(recipe, str(out))
    result["recipe"] = to_dict(recipe)
    write_json(folder / "result.json", result)
    write_atomic(out, dump(recipe))
    write_page(folder)
    return Advice(result, recipe, folder)


def _differs(option: Option, other: Option) -> bool:
    return (option.outlook.keep, option.sparsity) != (other.outlook.keep, other.sparsity)


def places(out: str | Path) -> tuple[Path, Path]:
    """(folder of what is found, file of the recipe): `advice.yaml` and `advice`, or both in a folder."""
    out = Path(out)
    if out.suffix in (".yaml", ".yml"):
        return out.with_suffix(""), out
    return out, out / "recipe.yaml"


def _name(folder: Path) -> str:
    """Of the recipe: its runs do not go where the advice lies, by default."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", folder.name).lstrip("._-") or "advised"
    return f"{name}-run" if (Path("runs") / name).resolve() == folder.resolve() else name


def _check_tune(tune: TuneSpec, limits: Budget) -> None:
    """Only what is measured is advised on."""
    if tune.method not in WAYS:
        raise ValueError(f"tune.method={tune.method!r} is not advised on; give one of {', '.join(WAYS)}")
    plain = TuneSpec()
    changed = [name for name in UNMEASURED if getattr(tune, name) != getattr(plain, name)]
    if changed:
        raise ValueError(
            f"tune.{changed[0]}={getattr(tune, changed[0])!r} is not advised on; leave it at "
            f"{getattr(plain, changed[0])!r}, and set it in the recipe"
        )
    if limits.speed > 1 and (tune.method not in CUT_WITH or tune.dropout):
        what = "tune.dropout" if tune.dropout else "tune.method"
        raise ValueError(
            f"latency={limits.latency!r} is kept by cutting weights, which {what}="
            f"{getattr(tune, what[5:])!r} does not allow; give method lora or full without dropout"
        )


def _check_labels(job: Opened) -> None:
    """There is something to learn."""
    if job.task == "classification" and len(job.classes) < 2:
        raise ValueError(f"the examples have one class, {job.classes[0]!r}; two are needed to learn anything")
    if job.task == "regression" and len(set(job.examples.labels() or [])) < 2:
        raise ValueError("all targets are the same; there is nothing to learn")


def _test_examples(data: DataSpec, seed: int) -> int | None:
    """How many the recipe evaluates on; None where none were named and the data set has none."""
    try:
        return len(open_dataset(data.test or data.train, data.test_split, limit=data.test_limit, seed=seed))
    except (ValueError, FileNotFoundError):
        if data.test is not None:
            raise
        return None


def _claim(folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """The folder is for these settings: begun with them, or empty of work."""
    path = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True, default=list)
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{folder} holds the advice on something else, or on data that have changed; give another "
                "--out, or delete it"
            )
    elif out.exists() or (folder / "result.json").exists():
        there = out if out.exists() else folder / "result.json"
        raise ValueError(f"out={str(out)!r}: {there} exists and is no advice's; give another --out")
    write_atomic(path, text)
