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
from ..data.selectors import registry as selectors
from ..data.sources import device_of, encode_labels, open_dataset, open_model
from ..files import write_atomic
from ..opening import labelled
from ..recipe import Recipe, check_task, to_dict
from ..report.histograms import histogram_of
from ..scorers import registry as scorers
from ..types import Task
from .progress import Sayer
from .reading import read


class Job:
    """The state of one run with one seed: data, model and scores, made on first use."""

    def __init__(self, recipe: Recipe, say: Sayer, folder: Path, test_seed: int):
        self.recipe, self.say, self.folder = recipe, say, folder
        self.first = recipe.seed == test_seed  # of several seeds
        data = recipe.data
        self.train = open_dataset(data.train, data.train_split, limit=data.train_limit, seed=recipe.seed)
        self.test = self.test_examples = None
        if recipe.evaluated:
            self.test = open_dataset(  # the same for all seeds
                data.test or data.train, data.test_split, limit=data.test_limit, seed=test_seed
            )
        self._find_task()
        check_task(recipe, self.task)
        self.opened: dict[str, Any] = {  # how, for the model card
            "task": self.task,
            "num_labels": None if self.task == "causal-lm" else len(self.classes) or 1,
            **({"seed": recipe.seed} | recipe.model.options),
        }
        self.model, self.processor = open_model(recipe.model.name, **self.opened)
        device = device_of(recipe.device)
        self.model.to(device)  # type: ignore[arg-type] - transformers' stub of nn.Module.to
        reading = {
            "processing_class": self.processor,
            "label_column": data.label_column,
            "max_length": data.max_length,
        }
        self.train_examples = Examples(self.train, **reading, task=self.task)
        self.train_examples.accepted = accepted_names(self.model)
        if self.test is not None:
            self.test_examples = Examples(self.test, **reading, task=self.task)
            self.test_examples.accepted = self.train_examples.accepted
        self.test_labels = self._read_test_labels()
        self.methods = self._methods()
        tune = recipe.tune
        self.lora = {"rank": tune.rank, "alpha": tune.alpha, "target_modules": tune.target_modules}
        options: dict[str, Any] = {
            **reading,
            "task": self.task,
            "batch_size": recipe.batch_size,
            "seed": recipe.seed,
            "out": self.folder / "scores",
            "on_bad": recipe.on_bad,
            "progress": say.shown,
        }
        self.observes = self._observes()
        if self.observes:
            self.say(f"scoring {len(self.train):,} examples: {', '.join(self.methods)}")
            methods = list(self.methods.values())
            self.scores = scoring.score(
                self.model, self.train, methods, lora=self.lora, proxy=recipe.proxy, **options
            )
        else:
            self.say(f"reading {len(self.train):,} examples")
            self.scores = read(self.model, self.train, **options)
        table = self.folder / "scores" / "scores.parquet"
        write_atomic(self.folder / table.name, table.read_bytes())  # beside the report

    def _find_task(self) -> None:
        """Sets the task and the class names, and the labels of both data sets to their numbers."""
        column = self.recipe.data.label_column
        self.train, task, self.classes = labelled(self.train, self.recipe.task, column)
        self.task: Task = task or "causal-lm"
        if self.test is not None and self.classes:
            found = Examples(self.train, label_column=column)
            if found.label_column:
                self.test = encode_labels(self.test, found.label_column, found.class_names)

    def _read_test_labels(self) -> Tensor | None:
        if self.test_examples is None:
            return None
        if self.task == "causal-lm":
            self.test_examples.read([0])  # columns without a response are an error now, not after the tuning
            return None
        labels = self.test_examples.labels()
        if labels is None:
            raise ValueError(
                f"data.test={self.recipe.data.test or self.recipe.data.train!r} has no label column; "
                "nothing could be measured"
            )
        labels = check_labels(labels, self.test_examples.ids, len(self.classes), self.task)
        if self.task == "regression" and bool((labels == labels[0]).all()):
            data = self.recipe.data
            raise ValueError(
                f"data.test={data.test or data.train!r} has {len(labels)} targets in {data.test_split!r}, "
                f"all of them {float(labels[0]):g}; r2 needs targets that differ: give another test set, "
                "or a larger data.test_limit"
            )
        return labels

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

    def _observes(self) -> bool:
        """Whether an arm needs what the model makes of the training examples: a score, or embeddings."""
        made = [selectors.make(arm.select, **arm.select_options) for arm in self.recipe.arms if arm.select]
        return bool(self.scorer_of) or any(map(needs_embeddings, made))

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
            entry: dict[str, Any] = {"seconds": spent[name], "passes": int(self.observes)}
            if hasattr(method, "reading"):
                entry |= {"warmup_seconds": spent["warmup"], "moments_seconds": spent["moments"]}
                entry["settings"] = {k: str(v) for k, v in vars(method).items() if k != "reading"}
            if hasattr(method, "path"):
                points = self.scores.signals.paths[method.path].points
                entry |= {"points": [float(p) for p in points], "passes": len(points)}
                entry |= {"curve": self.scores.curves.get(name, []), "tolerance": method.path.tolerance}
                entry["settings"] = {k: str(v) for k, v in vars(method).items() if k != "path"}
                labels = self.scores.signals.labels if self.classes else None
                entry["histogram"] = histogram_of(
                    self.scores.values[name].numpy(), None if labels is None else labels.numpy(), self.classes
                )
            methods[name] = entry
        recipe, data = self.recipe, self.recipe.data
        measured = next((arm for arm in arms if "each" in arm), {"each": [], "test_set_aside": {}})
        test = f"{data.test or data.train}[{data.test_split}]"
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
                "test": None if self.test is None else test,
                "train_examples": self.scores.total,
                "test_examples": len(measured["each"]),
                "classes": self.classes,
                "set_aside": [
                    {"id": i, "reason": why}
                    for i, why in (self.scores.set_aside | measured["test_set_aside"]).items()
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
            "comparisons": comparisons([arm for arm in arms if "each" in arm], self.task),
        }


def needs_embeddings(selector: Any) -> bool:
    """Whether it looks at embeddings itself, or an open option of it is searched by a probe on them."""
    return "embeddings" in selector.needs or len(getattr(selector, "candidates", list)()) > 1
