"""Scores of a data set: in memory, and on disk as a table with what is needed to select from it."""

from __future__ import annotations

import inspect
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import scorers as scorer_methods
from ..cost import versions
from ..files import write_atomic, write_json
from ..registry import near
from ..types import Signals
from .paths import reopened_paths


@dataclass
class Scores:
    """Scores of N examples, with what is needed to select among them.

    Args:
        signals: ids (N,), labels (N,), and what was observed: embeddings (N, D) and whatever else.
        values: {scorer: (N,)}, higher = harder or picked sooner.
        path_values: {scorer: {share of the weights masked: (N,)}} for scorers along a path.
        rows: (N,) row numbers in the data set; examples that could not be read are missing.
        total: examples in the data set.
        cost: seconds by part, forward passes, peak_bytes.
        curves: {scorer: [(points, correlation with one point less)]} of an adaptive path.
        set_aside: {id: reason}.
        methods: {scorer: the object}; those along a path score again for the search of an open
            hyperparameter, without its validation split.
        settings: what else the scores were made with.
    """

    signals: Signals
    values: dict[str, Tensor]
    rows: Tensor
    total: int
    path_values: dict[str, dict[float, Tensor]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, scorer: str | None) -> tuple[str, Tensor]:
        """(name, values) of `scorer`, or of the only one."""
        if scorer is None and len(self.values) == 1:
            scorer = next(iter(self.values))
        if scorer not in self.values:
            raise ValueError(
                f"scorer={scorer!r} is not among the scores held{near(str(scorer), self.values)}"
            )
        return scorer, self.values[scorer]

    def save(self, folder: str | Path) -> Path:
        """`scores.parquet` (id, label, a column a scorer, a column a point) and `result.json` in `folder`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"id": self.signals.ids.tolist()}
        if self.signals.labels is not None:
            columns["label"] = self.signals.labels.numpy()
        for name, values in self.values.items():
            columns[f"score:{name}"] = values.numpy()
            for share, along in self.path_values.get(name, {}).items():
                columns[f"{name}@{share:g}"] = along.numpy()
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        folder = Path(folder)
        write_atomic(folder / "scores.parquet", buffer.getvalue())
        tensors = {"rows": self.rows}
        if self.signals.embeddings is not None:
            tensors["embeddings"] = self.signals.embeddings
        from safetensors.torch import save

        write_atomic(folder / "embeddings.safetensors", save(tensors))
        write_json(
            folder / "result.json",
            {
                "kind": "scores",
                "examples": self.total,
                "num_classes": self.signals.num_classes,
                "task": self.signals.task,
                "scorers": list(self.values),
                "methods": {name: config_of(method) for name, method in self.methods.items()},
                "settings": self.settings,
                "curves": self.curves,
                "cost": self.cost,
                "set_aside": [{"id": i, "reason": reason} for i, reason in self.set_aside.items()],
                "seed": self.signals.seed,
                "versions": versions(),
            },
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Reads what `save` wrote.

        Raises:
            ValueError: `folder` holds no scores.
        """
        import pyarrow.parquet as pq
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "scores.parquet").exists():
            raise ValueError(
                f"{str(folder)!r} holds no scores.parquet; make it with `serpette score --out {folder}`"
            )
        table = pq.read_table(folder / "scores.parquet")
        result = json.loads((folder / "result.json").read_text())
        tensors = load_file(folder / "embeddings.safetensors")
        column = {name: table[name].to_numpy() for name in table.column_names if name != "id"}
        signals = Signals(
            ids=np.array(table["id"].to_pylist()),
            labels=torch.tensor(column["label"]) if "label" in column else None,
            num_classes=result["num_classes"],
            embeddings=tensors.get("embeddings"),
            seed=result["seed"],
            task=result.get("task", ""),
        )
        methods = {name: _made_again(config, name) for name, config in result.get("methods", {}).items()}
        specs = [method.path for method in methods.values() if hasattr(method, "path")]
        signals.paths = reopened_paths(folder / "observed", specs, tensors["rows"])
        methods = {n: m for n, m in methods.items() if getattr(m, "path", None) in signals.paths}
        return cls(
            signals=signals,
            methods=methods,
            settings=result.get("settings", {}),
            values={name: torch.tensor(column[f"score:{name}"]) for name in result["scorers"]},
            rows=tensors["rows"],
            total=result["examples"],
            cost=result["cost"],
            curves=result["curves"],
            set_aside={entry["id"]: entry["reason"] for entry in result["set_aside"]},
        )


def config_of(method: Any) -> dict[str, Any]:
    """`{"name": ..., option: value}` of a scorer or selector: the arguments it was made with."""
    options = {
        k: getattr(method, k) for k in inspect.signature(type(method)).parameters if hasattr(method, k)
    }
    return {"name": type(method).name} | {k: v for k, v in options.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _made_again(config: dict[str, Any], name: str) -> Any:
    options = {k: v for k, v in config.items() if k != "name"}
    method = scorer_methods.registry.make(config["name"], **options)
    method.name = name
    return method
