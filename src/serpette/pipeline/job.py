"""What all arms of a run with one seed share: data, model, scores; and the result made of the arms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__, scoring
from ..arms import METRICS, comparisons
from ..cost import hardware, versions
from ..data.examples import Examples, check_labels
from ..data.features import accepted_names
from ..data.sources import device_of, encode_labels, open_dataset, open_model
from ..data.store import write_atomic
from ..recipe import Recipe, check_task, to_dict
from ..scorers import registry as scorers
from ..types import Task
from .progress import Sayer


class Job:
    """The state of one run with one seed: data, model and scores, made on first use."""

    def __init__(self, recipe: Recipe, say: Sayer, folder: Path, test_seed: int):
        self.recipe, self.say, self.folder = recipe, say, folder
        self.first = recipe.seed == test_seed  # of several seeds
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

    def reader(self, positions: Tensor) -> Callable[[list[int]], dict[str, Tensor]]:
        """The collator of a loader over the scored examples at `positions`."""
        rows, labels = self.scores.rows[positions], self.scores.signals.labels
        kept_labels = None if labels is None else labels[positions]

        def collate(picks: list[int]) -> dict[str, Tensor]:
            _, inputs, _, _ = self.train_examples.read(rows[picks].tolist())
            return inputs if kept_labels is None else {**inputs, "labels": kept_labels[picks]}

        return collate

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
