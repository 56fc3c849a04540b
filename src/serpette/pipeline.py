"""`run(recipe)`: score the training examples once, tune each arm on what it keeps, compare, report.

Finished arms lie in `arms/`, scores in `scores/`: a killed run goes on with the first unfinished arm.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from .cost import forward_flops, hardware, measure, train_flops, versions
from .data import pruner
from .data.examples import Examples, check_labels, decode_image, is_image
from .data.features import accepted_names, find_head
from .data.mmd import mmd
from .data.observe import evaluating
from .data.proxy import TRAINING_SIGNALS
from .data.search import describe
from .data.selectors import registry as selectors
from .data.sources import device_of, encode_labels, open_dataset, open_model
from .data.store import write_atomic, write_json
from .evaluate import accuracy, accuracy_by_class, paired_difference, r2
from .recipe import ArmSpec, Recipe, check, dump, to_dict
from .scorers import registry as scorers
from .tuning import train, trainable
from .types import uniform_of

GALLERY = 6  # pictures of each class, easiest and hardest
THUMBNAIL = 64  # px
MMD_EXAMPLES = 5000  # the distance costs N^2


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
    job = Job(recipe, say)
    arms = [job.arm(arm, number) for number, arm in enumerate(recipe.arms)]
    result = job.result(arms)
    write_json(folder / "result.json", result)
    write_json(folder / "gallery.json", job.gallery())
    from .report import write

    return write(folder)


class Job:
    """The state of one run: data, model and scores, made on first use."""

    def __init__(self, recipe: Recipe, say: _Sayer):
        self.recipe, self.say, self.folder = recipe, say, recipe.folder
        data = recipe.data
        self.train = open_dataset(data.train, data.train_split, limit=data.train_limit, seed=recipe.seed)
        self.test = open_dataset(
            data.test or data.train, data.test_split, limit=data.test_limit, seed=recipe.seed
        )
        rows = Examples(self.train, label_column=data.label_column)
        if column := rows.label_column:
            self.train = encode_labels(self.train, column)
            rows = Examples(self.train, label_column=data.label_column)
            self.test = encode_labels(self.test, column, rows.class_names)
        self.task, num_classes = rows.target()
        self.classes = rows.class_names or [str(c) for c in range(num_classes)]
        self.model, self.processor = open_model(
            recipe.model.name,
            task=self.task,
            num_labels=num_classes or 1,
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
            Examples(self.train, **reading),
            Examples(self.test, **reading),
        )
        self.train_examples.accepted = self.test_examples.accepted = accepted_names(self.model)
        labels = self.test_examples.labels()
        if labels is None:
            raise ValueError(
                f"data.test={data.test or data.train!r} has no label column; nothing could be measured"
            )
        self.test_labels = check_labels(labels, self.test_examples.ids, len(self.classes), self.task)
        self.methods = self._methods()
        self.say(f"scoring {len(self.train):,} examples: {', '.join(self.methods)}")
        self.scores = pruner.score(
            self.model,
            self.train,
            list(self.methods.values()),
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
        spent = self.scores.cost["seconds"]
        total = spent["decoding"] + spent["unmasked"]
        if arm.scorer is not None:
            method = self.methods[self.scorer_of[arm.name]]
            total += spent[method.name]
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
        tune, seed = self.recipe.tune, self.recipe.seed
        labels = self.scores.signals.labels
        assert labels is not None
        steps = tune.epochs * -(-len(positions) // tune.batch_size)
        self.say(
            f"{arm.name}: tuning on {len(positions):,} of {self.scores.total:,} examples, {steps:,} steps"
        )
        set_seeds(seed)
        rows = self.scores.rows[positions]
        device = next(self.model.parameters()).device
        with measure(device) as cost:
            model = copy.deepcopy(self.model)
            model = trainable(
                model,
                find_head(model),
                tune.method,
                rank=tune.rank,
                alpha=tune.alpha,
                dropout=tune.dropout,
                target_modules=tune.target_modules,
            )
            train(
                model,
                len(rows),
                lambda picks: self.batch(rows[picks], labels[positions][picks]),
                epochs=tune.epochs,
                batch_size=tune.batch_size,
                learning_rate=tune.learning_rate,
                seed=seed,
                weight_decay=tune.weight_decay,
                schedule=tune.schedule,
                warmup=tune.warmup,
                on_step=self.say.step,
            )
        with measure(device) as evaluation:
            outputs, kept, bad = predict(model, self.test_examples, self.recipe.batch_size)
        if bad and self.recipe.on_bad == "raise":
            name, reason = next(iter(bad.items()))
            raise ValueError(
                f"test example {name!r}: {reason}; mend it, or go on without it: on_bad: set_aside"
            )
        truth = self.test_labels[kept]
        seconds |= {"tuning": cost.seconds, "evaluation": evaluation.seconds}
        entry = {
            "name": arm.name,
            "scorer": arm.scorer,
            "select": arm.select,
            "selector": selector,
            "keep": arm.keep,
            "per_class": arm.per_class,
            "gamma": _gamma(selector),
            "examples": len(positions),
            "epochs": tune.epochs,
            "steps": steps,
            "seconds": seconds,
            "flops": self._flops(arm, model, rows, labels[positions]),
            "peak_bytes": cost.peak_bytes,
            "mmd": self._mmd(positions),
            "model": {
                "parameters": sum(p.numel() for p in model.parameters()),
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            },
            "test_set_aside": bad,
            "ids": self.scores.signals.ids[positions.numpy()].tolist(),
        } | self._quality(outputs, truth, labels[positions])
        write_json(path, entry)
        return entry

    def batch(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the Trainer's collator returns for `rows` of the training examples."""
        _, inputs, _, _ = self.train_examples.read(rows.tolist())
        return {**inputs, "labels": labels}

    def _quality(self, outputs: Tensor, truth: Tensor, labels: Tensor) -> dict[str, Any]:
        if self.task == "regression":
            loss = (outputs[:, 0] - truth) ** 2 / truth.var(correction=0)
            return {"accuracy": r2(outputs, truth), "each": (1 - loss).tolist()}
        C = len(self.classes)
        by_class = accuracy_by_class(outputs, truth, C)
        return {
            "accuracy": accuracy(outputs, truth),
            "accuracy_by_class": [None if np.isnan(a) else float(a) for a in by_class],
            "kept_by_class": torch.bincount(labels, minlength=C).tolist(),
            "each": (outputs.argmax(1) == truth).int().tolist(),
        }

    def _mmd(self, positions: Tensor) -> float:
        """To the full set; of that, and of the subset, at most 5,000 examples are looked at."""
        embeddings = self.scores.signals.require("embeddings", "mmd")
        if len(positions) == len(embeddings):
            return 0.0
        order = uniform_of(self.scores.signals.ids, 0).argsort()
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[positions] = True
        return mmd(embeddings[order[:MMD_EXAMPLES]], embeddings[order[chosen[order]][:MMD_EXAMPLES]])

    def _flops(self, arm: ArmSpec, model: nn.Module, rows: Tensor, labels: Tensor) -> dict[str, float]:
        """Counted on one batch and multiplied; the scoring of an arm without a scorer is free."""
        batch = rows[: self.recipe.tune.batch_size]
        _, inputs, _, _ = self.train_examples.read(batch.tolist())
        device = next(model.parameters()).device
        inputs = {k: v.to(device) for k, v in inputs.items()}
        a_row = train_flops(model, {**inputs, "labels": labels[: len(batch)].to(device)}) / len(batch)
        passes = 0
        if arm.scorer is not None:
            method = self.methods[self.scorer_of[arm.name]]
            passes = len(self.scores.signals.paths[method.path].points) if hasattr(method, "path") else 1
        scoring = (
            forward_flops(self.model, inputs) / len(batch) * passes * self.scores.total if passes else 0.0
        )
        return {"scoring": scoring, "tuning": a_row * len(rows) * self.recipe.tune.epochs}

    def result(self, arms: list[dict[str, Any]]) -> dict[str, Any]:
        """`result.json`: everything the report shows."""
        spent = self.scores.cost["seconds"]
        methods = {}
        for name, method in self.methods.items():
            entry: dict[str, Any] = {"seconds": spent[name], "passes": 1}
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
            "metric": "accuracy" if self.task == "classification" else "r2",
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
            "model": {"name": recipe.model.name} | arms[0]["model"],
            "observing": spent | {"peak_bytes": self.scores.cost["peak_bytes"]},
            "scorers": methods,
            "arms": [
                {k: v for k, v in arm.items() if k not in ("each", "ids", "model", "test_set_aside")}
                for arm in arms
            ],
            "comparisons": _comparisons(arms),
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


def predict(
    model: nn.Module, examples: Examples, batch_size: int
) -> tuple[Tensor, list[int], dict[str, str]]:
    """Outputs (N, C) float32 on the CPU, the rows that could be read, {id: reason} of the others."""
    device = next(model.parameters()).device
    outputs, kept, set_aside = [], [], {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            good, inputs, _, bad = examples.read(range(start, min(start + batch_size, len(examples))))
            set_aside |= bad
            if good:
                outputs.append(model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu())
                kept += good
    if not outputs:
        raise ValueError(f"none of the {len(examples)} test examples could be read")
    return torch.cat(outputs), kept, set_aside


def set_seeds(seed: int) -> None:
    """Every generator that a Trainer or a new weight draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _comparisons(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pruned arm against the arm that keeps all, and against the random choice; same test examples."""
    full = next((a for a in arms if a["select"] is None), None)
    control = next((a for a in arms if a["scorer"] is None and a["select"] is not None), None)
    comparisons = []
    for arm in arms:
        for other in (full, control):
            if other is None or other is arm or arm is full:
                continue
            difference, low, high = paired_difference(arm["each"], other["each"])
            comparisons.append(
                {
                    "arm": arm["name"],
                    "to": other["name"],
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "within_noise": low <= 0 <= high,
                }
            )
    return comparisons


def _gamma(selector: str | None) -> float | None:
    found = re.search(r"gamma=([\d.]+)", selector or "")
    return float(found[1]) if found else None


def _claim(folder: Path, recipe: Recipe) -> None:
    """The folder is for this recipe: begun by it, or empty."""
    path = folder / "recipe.yaml"
    text = dump(recipe)
    if not path.exists():
        write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{folder} holds the run of another recipe; "
            "give another folder with --out, or delete it to start afresh"
        )


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
