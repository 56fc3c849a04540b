"""`run(recipe)`: score the training examples once, tune each arm on what it keeps, compare, report.

Finished arms lie in `arms/`, scores in `scores/`: a killed run goes on with the first unfinished arm. With
several seeds each has such a folder in `seeds/`.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, scoring
from .arms import METRICS, comparisons, mean_of_seeds, predict, quality
from .cost import forward_flops, hardware, measure, train_flops, versions
from .data import pruner
from .data.budget import split
from .data.examples import Examples, check_labels, decode_image, is_image
from .data.features import accepted_names
from .data.gradient_pass import WARMUP_BATCH, WARMUP_STEPS
from .data.mmd import mmd
from .data.proxy import TRAINING_SIGNALS
from .data.search import describe
from .data.selectors import registry as selectors
from .data.sources import device_of, encode_labels, open_dataset, open_model
from .data.store import write_atomic, write_json
from .recipe import ArmSpec, Recipe, TuneSpec, check, check_task, dump, load, to_dict
from .scorers import registry as scorers
from .tuning import rank, set_seeds, train, trainable
from .types import Task, uniform_of

GALLERY = 6  # pictures of each class, easiest and hardest
THUMBNAIL = 64  # px
MMD_EXAMPLES = 5000  # the distance costs N^2
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "warmup")


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
    say = _Sayer(progress)
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
    from .report import write

    return write(folder)


def _run_seed(recipe: Recipe, folder: Path, say: _Sayer, test_seed: int) -> None:
    job = Job(recipe, say, folder, test_seed)
    arms = [job.arm(arm, number) for number, arm in enumerate(recipe.arms)]
    write_json(folder / "gallery.json", job.gallery())
    write_json(folder / "result.json", job.result(arms))  # last: it says that the seed is done


class Job:
    """The state of one run with one seed: data, model and scores, made on first use."""

    def __init__(self, recipe: Recipe, say: _Sayer, folder: Path, test_seed: int):
        self.recipe, self.say, self.folder = recipe, say, folder
        data = recipe.data
        self.train = open_dataset(data.train, data.train_split, limit=data.train_limit, seed=recipe.seed)
        self.test = open_dataset(  # the same for all seeds
            data.test or data.train, data.test_split, limit=data.test_limit, seed=test_seed
        )
        num_classes = self._find_task()
        check_task(recipe, self.task)
        self.model, self.processor = open_model(
            recipe.model.name,
            task=self.task,
            num_labels=None if self.task == "causal-lm" else num_classes or 1,
            **({"seed": recipe.seed} | recipe.model.options),
        )
        device = device_of(recipe.device)
        self.model.to(device)  # type: ignore[arg-type] - transformers' stub of nn.Module.to
        reading = {
            "processing_class": self.processor,
            "label_column": data.label_column,
            "max_length": data.max_length,
        }
        self.train_examples, self.test_examples = (
            Examples(self.train, **reading, task=self.task),
            Examples(self.test, **reading, task=self.task),
        )
        self.train_examples.accepted = self.test_examples.accepted = accepted_names(self.model)
        self.test_labels = self._read_test_labels()
        self.methods = self._methods()
        self.say(f"scoring {len(self.train):,} examples: {', '.join(self.methods)}")
        tune = recipe.tune
        self.scores = scoring.score(
            self.model,
            self.train,
            list(self.methods.values()),
            lora={"rank": tune.rank, "alpha": tune.alpha, "target_modules": tune.target_modules},
            **reading,
            task=self.task,
            proxy=recipe.proxy,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            out=self.folder / "scores",
            on_bad=recipe.on_bad,
            progress=say.shown,
        )
        table = self.folder / "scores" / "scores.parquet"
        write_atomic(self.folder / table.name, table.read_bytes())  # beside the report

    def _find_task(self) -> int:
        """Sets the task and the class names; returns how many classes there are, or 0."""
        data, self.classes = self.recipe.data, []
        rows = Examples(self.train, label_column=data.label_column)
        if self.recipe.task == "causal-lm" or (self.recipe.task is None and rows.has_instructions):
            self.task: Task = "causal-lm"
            return 0
        column = rows.label_column
        if column and self.recipe.task != "regression":
            self.train = encode_labels(self.train, column)
            rows = Examples(self.train, label_column=data.label_column)
            self.test = encode_labels(self.test, column, rows.class_names)
        found, num_classes = rows.target()
        self.task = self.recipe.task or found
        if self.task == "regression":
            return 0
        self.classes = rows.class_names or [str(c) for c in range(num_classes)]
        return len(self.classes)

    def _read_test_labels(self) -> Tensor | None:
        if self.task == "causal-lm":
            self.test_examples.read([0])  # columns without a response are an error now, not after the tuning
            return None
        labels = self.test_examples.labels()
        if labels is None:
            raise ValueError(
                f"data.test={self.recipe.data.test or self.recipe.data.train!r} has no label column; "
                "nothing could be measured"
            )
        return check_labels(labels, self.test_examples.ids, len(self.classes), self.task)

    def _methods(self) -> dict[str, Any]:
        """{name: scorer}; two arms that use one scorer with other options get a score of their own."""
        methods: dict[str, Any] = {}
        self.scorer_of: dict[str, str] = {}
        made: dict[str, str] = {}
        for arm in self.recipe.arms:
            if arm.scorer is None:
                continue
            key = json.dumps([arm.scorer, arm.scorer_options], sort_keys=True)
            if key not in made:
                method = scorers.make(arm.scorer, **arm.scorer_options)
                if method.name in methods:
                    method.name = f"{method.name}:{arm.name}"
                made[key] = method.name
                methods[method.name] = method
            self.scorer_of[arm.name] = made[key]
        return methods or {"random": scorers.make("random")}

    def select(self, arm: ArmSpec) -> tuple[Tensor, str | None, dict[str, float]]:
        """(positions among the scored examples, selector with its options, seconds)."""
        everything = torch.arange(len(self.scores.rows))
        if arm.select is None:
            return everything, None, {"scoring": 0.0, "selection": 0.0}
        selector = selectors.make(arm.select, **arm.select_options)
        scores = self.scores
        if arm.scorer is None:
            scores = copy.copy(scores)
            scores.values = {"random": scorers.make("random")(scores.signals)}
            scores.methods = {}
        scorer = self.scorer_of.get(arm.name, "random")
        selection = pruner.select(
            scores, selector, arm.keep, scorer=scorer, per_class=arm.per_class, seed=self.recipe.seed
        )
        seconds = {
            "scoring": self._scoring_seconds(arm, selector),
            "selection": sum(selection.seconds.values()),
        }
        return selection.positions, describe(selection.selector), seconds

    def _scoring_seconds(self, arm: ArmSpec, selector: Any) -> float:
        """What this arm alone would have paid: the shared pass counts in full for each arm that needs it."""
        if arm.scorer is None and "embeddings" not in selector.needs:
            return 0.0
        method = None if arm.scorer is None else self.methods[self.scorer_of[arm.name]]
        cost = self.scores.cost
        spent = cost.get("lora" if hasattr(method, "reading") else "plain", cost)["seconds"]
        total = spent["decoding"] + spent["unmasked"]
        if method is not None:
            if f"model of {method.name}" in spent:  # a pass of its own, and none of the scored model
                return spent[f"model of {method.name}"] + spent[method.name]
            total += spent[method.name] + spent.get("warmup", 0.0) + spent.get("moments", 0.0)
            total += spent["path"] if hasattr(method, "path") else 0.0
            total += spent["proxy"] if method.needs & TRAINING_SIGNALS else 0.0
        return total

    def arm(self, arm: ArmSpec, number: int) -> dict[str, Any]:
        """The arm's entry in `result.json`; read from disk if an earlier run finished it."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", arm.name)
        path = self.folder / "arms" / f"{number:02d}-{name}.json"
        if path.exists():
            self.say(f"{arm.name}: done before")
            return json.loads(path.read_text())
        positions, selector, seconds = self.select(arm)
        tune, seed = self.recipe.tune_of(arm), self.recipe.seed
        labels = self.scores.signals.labels
        kept_labels = None if labels is None else labels[positions]
        steps = tune.epochs * -(-len(positions) // tune.batch_size)
        self.say(
            f"{arm.name}: tuning on {len(positions):,} of {self.scores.total:,} examples, {steps:,} steps"
        )
        set_seeds(seed)
        device = next(self.model.parameters()).device
        with measure(device) as cost:
            model = copy.deepcopy(self.model)
            model = trainable(model, scoring.tuned_head(model), **tune.adapter(seed))
            ranking = self._rank(model, tune, positions)
            train(
                model,
                len(positions),
                self.reader(positions),
                seed=seed,
                on_step=self.say.step,
                **{name: getattr(tune, name) for name in TRAINING},
            )
        with measure(device) as evaluation:
            outputs, kept, bad = predict(model, self.test_examples, self.recipe.batch_size)
        if bad and self.recipe.on_bad == "raise":
            name, reason = next(iter(bad.items()))
            raise ValueError(
                f"test example {name!r}: {reason}; mend it, or go on without it: on_bad: set_aside"
            )
        truth = None if self.test_labels is None else self.test_labels[kept]
        seconds |= {"ranking": ranking, "tuning": cost.seconds - ranking, "evaluation": evaluation.seconds}
        entry = {
            "name": arm.name,
            "scorer": arm.scorer,
            "select": arm.select,
            "selector": selector,
            "keep": arm.keep,
            "per_class": arm.per_class,
            "method": tune.method,
            "tune": tune.differing(self.recipe.tune),
            "gamma": _gamma(selector),
            "examples": len(positions),
            "epochs": tune.epochs,
            "steps": steps,
            "seconds": seconds,
            "flops": self._flops(arm, tune, model, positions),
            "peak_bytes": cost.peak_bytes,
            "mmd": self._mmd(positions),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "test_set_aside": bad,
            "ids": self.scores.signals.ids[positions.numpy()].tolist(),
        } | quality(self.task, outputs, truth, kept_labels, len(self.classes))
        write_json(path, entry)
        return entry

    def reader(self, positions: Tensor) -> Callable[[list[int]], dict[str, Tensor]]:
        """The collator of a loader over the scored examples at `positions`."""
        rows, labels = self.scores.rows[positions], self.scores.signals.labels
        kept_labels = None if labels is None else labels[positions]

        def collate(picks: list[int]) -> dict[str, Tensor]:
            _, inputs, _, _ = self.train_examples.read(rows[picks].tolist())
            return inputs if kept_labels is None else {**inputs, "labels": kept_labels[picks]}

        return collate

    def _rank(self, model: nn.Module, tune: TuneSpec, positions: Tensor) -> float:
        """Seconds in which the rows were chosen; 0 where a layer's own weights have told them already."""
        if tune.method != "rows" or not (tune.needs or tune.dependencies or tune.scope == "global"):
            return 0.0
        start, seen = time.perf_counter(), self._seen(tune, positions)
        rank(
            model, len(seen), self.reader(seen), tune.importance, tune.scope, tune.batch_size, self.say.shown
        )
        return time.perf_counter() - start

    def _seen(self, tune: TuneSpec, positions: Tensor) -> Tensor:
        """The examples that an importance looks at, drawn by the seed; of each class its share."""
        signals = self.scores.signals

        def shuffled(places: Tensor) -> Tensor:
            return places[uniform_of(signals.ids[places.numpy()], self.recipe.seed).argsort()]

        order, count = shuffled(positions), min(tune.importance_examples, len(positions))
        if self.task != "classification":
            return order[:count]
        assert signals.labels is not None
        labels = signals.labels[order]
        shares = split(labels, count)
        return shuffled(torch.cat([order[labels == c][:share] for c, share in shares.items()]))

    def _mmd(self, positions: Tensor) -> float:
        """To the full set; of that, and of the subset, at most 5,000 examples are looked at."""
        embeddings = self.scores.signals.require("embeddings", "mmd")
        if len(positions) == len(embeddings):
            return 0.0
        order = uniform_of(self.scores.signals.ids, 0).argsort()
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[positions] = True
        return mmd(embeddings[order[:MMD_EXAMPLES]], embeddings[order[chosen[order]][:MMD_EXAMPLES]])

    def _flops(self, arm: ArmSpec, tune: TuneSpec, model: nn.Module, positions: Tensor) -> dict[str, float]:
        """Counted on one batch and multiplied; the scoring of an arm without a scorer is free."""
        size = min(tune.batch_size, len(positions))
        device = next(model.parameters()).device
        inputs = {k: v.to(device) for k, v in self.reader(positions)(list(range(size))).items()}
        trained, forward = train_flops(model, inputs) / size, forward_flops(self.model, inputs) / size
        spent = 0.0
        if arm.scorer is not None:
            method, total = self.methods[self.scorer_of[arm.name]], self.scores.total
            if hasattr(method, "reading"):
                # forward and backward: of all, of those for moments, of the warm-up
                reading = method.reading
                sample = getattr(reading, "sample", getattr(reading, "target_limit", 0))
                steps = WARMUP_STEPS if reading.warmup_steps is None else reading.warmup_steps
                seen = total * reading.epochs + min(sample or total, total) + steps * WARMUP_BATCH
                spent = trained * seen
            else:
                passes = len(self.scores.signals.paths[method.path].points) if hasattr(method, "path") else 1
                spent = forward * passes * total
        # forward, backward to the activations, backward to the weights
        passes = bool(tune.needs) + bool(tune.needs - {"input_norms"}) + ("elementwise" in tune.needs)
        ranking = forward * passes * min(tune.importance_examples, len(positions))
        return {"scoring": spent, "ranking": ranking, "tuning": trained * len(positions) * tune.epochs}

    def result(self, arms: list[dict[str, Any]]) -> dict[str, Any]:
        """`result.json`: everything the report shows."""
        spent = self.scores.cost["seconds"]
        methods = {}
        for name, method in self.methods.items():
            entry: dict[str, Any] = {"seconds": spent[name], "passes": 1}
            if hasattr(method, "reading"):
                entry |= {"warmup_seconds": spent["warmup"], "moments_seconds": spent["moments"]}
                entry["settings"] = {k: str(v) for k, v in vars(method).items() if k != "reading"}
            if hasattr(method, "path"):
                points = self.scores.signals.paths[method.path].points
                entry |= {"points": [float(p) for p in points], "passes": len(points)}
                entry |= {"curve": self.scores.curves.get(name, []), "tolerance": method.path.tolerance}
                entry["settings"] = {k: str(v) for k, v in vars(method).items() if k != "path"}
            methods[name] = entry
        recipe, data = self.recipe, self.recipe.data
        return {
            "kind": "run",
            "name": recipe.name,
            "serpette": __version__,
            "seed": recipe.seed,
            "task": self.task,
            "metric": METRICS[self.task],
            "finished": True,
            "recipe": to_dict(recipe),
            "versions": versions(),
            "hardware": hardware(next(self.model.parameters()).device),
            "data": {
                "train": f"{data.train}[{data.train_split}]",
                "test": f"{data.test or data.train}[{data.test_split}]",
                "train_examples": self.scores.total,
                "test_examples": len(arms[0]["each"]),
                "classes": self.classes,
                "set_aside": [
                    {"id": i, "reason": why}
                    for i, why in (self.scores.set_aside | arms[0]["test_set_aside"]).items()
                ],
            },
            "model": {
                "name": recipe.model.name,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trainable_parameters": arms[0]["trainable_parameters"],
            },
            "observing": spent | {"peak_bytes": self.scores.cost["peak_bytes"]},
            "scorers": methods,
            "arms": [
                {k: v for k, v in arm.items() if k not in ("each", "ids", "test_set_aside")} for arm in arms
            ],
            "comparisons": comparisons(arms, self.task),
        }

    def gallery(self) -> list[dict[str, Any]]:
        """The easiest and the hardest examples of each class, by the first scorer along a path."""
        name = next((n for n, m in self.methods.items() if hasattr(m, "path")), None)
        if name is None or self.task != "classification":
            return []
        values, signals = self.scores.values[name], self.scores.signals
        assert signals.labels is not None
        entries = []
        for c in range(len(self.classes)):
            mine = (signals.labels == c).nonzero()[:, 0]
            order = mine[values[mine].argsort()]
            for kind, picks in (("easiest", order[:GALLERY]), ("hardest", order.flip(0)[:GALLERY])):
                for i in picks.tolist():
                    shown = self._show(int(self.scores.rows[i]))
                    if shown:
                        entries.append(
                            {"class": c, "kind": kind, "id": str(signals.ids[i]), "score": float(values[i])}
                            | shown
                        )
        return entries

    def _show(self, row: int) -> dict[str, str]:
        item = self.train[row]
        for value in item.values() if isinstance(item, dict) else ():
            if is_image(value):
                picture = decode_image(value)
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                return {"png": base64.b64encode(buffer.getvalue()).decode()}
        text = item.get("text") if isinstance(item, dict) else None
        return {"text": text[:300]} if text else {}


def _gamma(selector: str | None) -> float | None:
    found = re.search(r"gamma=([\d.]+)", selector or "")
    return float(found[1]) if found else None


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


class _Sayer:
    """One line a stage, and a bar for the steps of the running arm."""

    def __init__(self, shown: bool):
        from rich.console import Console

        self.shown = shown
        self._terminal = Console().is_terminal
        self._bar: Any = None

    def __call__(self, line: str) -> None:
        if self.shown:
            print(f"==> {line}", flush=True)

    def step(self, step: int, total: int) -> None:
        if not (self.shown and self._terminal):
            return
        if self._bar is None:
            from rich.progress import Progress

            self._bar = Progress(transient=True)
            self._bar.start()
            self._task = self._bar.add_task("tuning", total=total)
        self._bar.update(self._task, completed=step)
        if step >= total:
            self._bar.stop()
            self._bar = None
