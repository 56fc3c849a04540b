"""What a run has left on disk, read once, with gaps allowed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("run", "advice", "comparison")  # of result.json that have a page


@dataclass
class Run:
    """A run as the page sees it: `result` is result.json; `scores` maps a column to its values (N,)."""

    result: dict[str, Any]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    gallery: list[dict[str, Any]] = field(default_factory=list)

    @property
    def classification(self) -> bool:
        return self.result.get("task", "classification") == "classification"

    @property
    def metric(self) -> str:
        name = self.result.get("metric") or ("accuracy" if self.classification else "r2")
        return "R²" if name == "r2" else str(name)

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "perplexity"

    @property
    def seeds(self) -> list[int]:
        """Several of them, or none where one seed was run."""
        seeds = self.result.get("seeds")
        return list(seeds) if isinstance(seeds, list) and len(seeds) > 1 else []

    def value(self, arm: dict[str, Any]) -> float | None:
        """The metric of an arm; with several seeds their mean."""
        return number(arm.get("perplexity" if self.lower_is_better else "accuracy"))

    def interval(self, arm: dict[str, Any]) -> tuple[float, float] | None:
        """The 95 % interval of `value` over several seeds; None with one."""
        ends = [number(end) for end in arm.get("interval") or []] if self.seeds else []
        return (ends[0], ends[1]) if len(ends) == 2 and None not in ends else None  # type: ignore[return-value]

    @property
    def arms(self) -> list[dict[str, Any]]:
        return [a for a in self.result.get("arms") or [] if isinstance(a, dict) and a.get("name") is not None]

    @property
    def data(self) -> dict[str, Any]:
        return self.result.get("data") or {}

    @property
    def class_names(self) -> list[str]:
        """(C,) names; numbers where the data has none; empty in a regression."""
        if not self.classification:
            return []
        names = [str(name) for name in self.data.get("classes") or []]
        labels = self.scores.get("label")
        known = max([len(arm.get("kept_by_class") or []) for arm in self.arms] + [len(names)])
        if labels is not None and labels.dtype.kind in "iu" and len(labels):
            known = max(known, int(labels.max()) + 1)
        return names + [f"class {c}" for c in range(len(names), known)]

    @property
    def path_scorers(self) -> list[str]:
        """Scorers with a path: those with columns such as `dlc@0.25`."""
        names = [column[len("score:") :] for column in self.scores if column.startswith("score:")]
        return [n for n in names if any(column.startswith(f"{n}@") for column in self.scores)]

    @property
    def tunings_differ(self) -> bool:
        """Whether arms differ in what trains, or how."""
        return any(arm.get("tune") for arm in self.arms)

    @property
    def pruned(self) -> bool:
        """Whether an arm trains on a part of the data."""
        return any(not keeps_all(arm) for arm in self.arms)

    @property
    def chosen(self) -> bool:
        """Whether the choice of examples is what the run is of, or a part of that."""
        return self.pruned or not (self.tunings_differ or self.cut)

    @property
    def cut(self) -> list[dict[str, Any]]:
        """The arms whose weights were pruned, with what that came to."""
        return [arm for arm in self.arms if arm.get("weights")]

    def trainable_share(self, arm: dict[str, Any]) -> float | None:
        """Parameters that train, as a share of the model's."""
        mine = number(arm.get("trainable_parameters"))
        whole = number((self.result.get("model") or {}).get("parameters"))
        return None if mine is None or not whole else mine / whole

    def arm(self, name: str) -> dict[str, Any] | None:
        return next((arm for arm in self.arms if arm["name"] == name), None)

    def comparison(self, arm: str, to: str) -> dict[str, Any] | None:
        """The paired comparison of two arms, turned round where it was stored the other way."""
        for c in self.result.get("comparisons") or []:
            if number(c.get("difference")) is None:
                continue
            if (c.get("arm"), c.get("to")) == (arm, to):
                return c
            if (c.get("arm"), c.get("to")) == (to, arm):
                low, high = number(c.get("low")), number(c.get("high"))
                ends = {"low": None if high is None else -high, "high": None if low is None else -low}
                return {**c, "arm": arm, "to": to, "difference": -c["difference"], **ends}
        return None


def number(value: Any) -> float | None:
    """A finite float, or None for whatever is missing, NaN or not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def is_noise(comparison: dict[str, Any]) -> bool | None:
    """Whether the interval of a comparison holds zero; None when that was not recorded."""
    if isinstance(comparison.get("within_noise"), bool):
        return comparison["within_noise"]
    low, high = number(comparison.get("low")), number(comparison.get("high"))
    return None if low is None or high is None else low <= 0 <= high


# what an arm's time goes to; evaluation is the same for all arms and no part of its cost
PARTS = ("scoring", "selection", "ranking", "tuning", "pruning")


def parts_of(run: Run) -> list[str]:
    """The `PARTS` that the run has: rows are ranked and weights are pruned in some only."""
    spent = {p: any(number((arm.get("seconds") or {}).get(p)) for arm in run.arms) for p in PARTS}
    return [p for p in PARTS if p == "tuning" or (run.chosen if p in ("scoring", "selection") else spent[p])]


def cost_of(arm: dict[str, Any]) -> float | None:
    """Seconds of scoring, selection, ranking, tuning and pruning; None without those of tuning."""
    seconds = arm.get("seconds") or {}
    if number(seconds.get("tuning")) is None:
        return None
    return sum(number(seconds.get(part)) or 0.0 for part in PARTS)


def keeps_all(arm: dict[str, Any]) -> bool:
    """Whether the arm trains on all of the examples."""
    return number(arm.get("keep")) == 1.0 and not arm.get("scorer")


def load_result(run_dir: str | os.PathLike, kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """Read `result.json`; ValueError when it is missing, or of none of `kinds`."""
    path = Path(run_dir) / "result.json"
    if not path.is_file():
        raise ValueError(
            f"run_dir={str(run_dir)!r} has no result.json; give the folder that `serpette run` has written"
        )
    result = _json(path, dict)
    if result.get("kind", "run") not in kinds:
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds {result['kind']}, not a run; "
            "give the folder that `serpette run` has written"
        )
    return result


def load(run_dir: str | os.PathLike) -> Run:
    """Read the folder of a run; ValueError as `load_result` has it."""
    folder = Path(run_dir)
    gallery = _json(folder / "gallery.json", list) if (folder / "gallery.json").is_file() else []
    found = [g for g in gallery if isinstance(g, dict)]
    return Run(load_result(folder, ("run",)), _scores(folder / "scores.parquet"), found)


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); run `serpette run` again to write it"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not a {kind.__name__}; is it from Serpette?"
        )
    return value


def _scores(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    wanted = [
        name for name in table.column_names if name == "label" or "@" in name or name.startswith("score:")
    ]
    return {name: table.column(name).to_numpy() for name in wanted}
