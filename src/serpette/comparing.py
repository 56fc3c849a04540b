"""Runs side by side: what each arm reached and cost, how sure the differences are, and the Pareto fronts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .cost import versions
from .evaluate import paired_difference, paired_over_seeds
from .registry import near
from .report.comparison import verdict
from .report.run import Run, cost_of, keeps_all, number
from .report.svg import plain

MACHINE = ("cpu", "cores", "threads", "device", "gpu")  # of the hardware, what seconds depend on
ENGINES = ("torch", "transformers", "peft")  # of the versions
AGAINST = ("seconds", "peak_bytes", "latency", "file_bytes")  # what the metric is set against
BATCH = 8  # whose latency is set against the metric, where it was measured


@dataclass
class Source:
    """A run folder that was read; `label` is its name in the comparison, unlike that of any other."""

    folder: Path
    run: Run
    label: str = ""

    @property
    def machine(self) -> dict[str, Any]:
        hardware = self.run.result.get("hardware") or {}
        return {key: hardware[key] for key in MACHINE if key in hardware}

    @property
    def drawn(self) -> int | None:
        """The seed that drew the test examples; None where all of them were taken."""
        limit = ((self.run.result.get("recipe") or {}).get("data") or {}).get("test_limit")
        there = (self.run.data.get("test_examples") or 0) + self._test_set_aside
        return None if limit is None or limit > there else self.run.result.get("seed")

    @cached_property
    def _test_set_aside(self) -> int:
        """How many test examples could not be read, at most where the files of the arms are gone."""
        for path in sorted(self.folder.glob("seeds/*/arms/*.json" if self.run.seeds else "arms/*.json")):
            aside = _read(path).get("test_set_aside")
            if aside is not None:  # the test examples of all seeds are the same
                return len(aside)
        return len(self.run.data.get("set_aside") or [])

    def by_seed(self, arm: dict[str, Any]) -> dict[int, float]:
        """{seed: what differences are of}: the metric, or of a language model the mean loss."""
        key = "loss" if self.run.lower_is_better else "accuracy"
        ones = arm.get("by_seed") or [] if self.run.seeds else [{"seed": self.run.result.get("seed"), **arm}]
        return {one["seed"]: value for one in ones if (value := number(one.get(key))) is not None}

    def each(self, arm: dict[str, Any], seeds: Sequence[int]) -> tuple[np.ndarray, set[str]] | None:
        """(N,) of the test examples, mean over `seeds`, and the ids set aside; None where it is not kept."""
        place, found, aside = self.run.arms.index(arm), [], set()
        for seed in seeds:
            folder = self.folder / "seeds" / str(seed) if self.run.seeds else self.folder
            path = next((folder / "arms").glob(f"{place:02d}-*.json"), None)
            entry = {} if path is None else _read(path)
            if entry.get("name") != arm["name"] or not entry.get("each"):
                return None
            found.append(entry["each"])
            aside |= set(entry.get("test_set_aside") or {})
        return (np.mean(found, axis=0), aside) if found else None


@dataclass
class Entry:
    """An arm of a run."""

    source: Source
    arm: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.source.label}: {self.arm['name']}"

    def is_called(self, text: str) -> bool:
        """Whether `text` is RUN:ARM of this arm; RUN is the run's name or its folder."""
        runs = (self.source.label, str(self.source.folder))
        return text in [f"{run}:{gap}{self.arm['name']}" for run in runs for gap in ("", " ")]


def compare(
    runs: Sequence[str | os.PathLike], baseline: str | None = None, arms: Sequence[str] = ()
) -> dict[str, Any]:
    """The arms of finished runs side by side, with paired differences to one of them.

    Differences are paired seed by seed where both arms have two seeds or more in common, else over the same
    test examples; where neither can be done, they are not given but why not. Seconds and latency are
    compared on one machine only, memory on one kind of device. An unpruned arm has the size and latency
    that the pruned arms of its run were measured against: those of a model of its shapes.

    Args:
        runs: folders that `serpette run` or `serpette prune` has written.
        baseline: `RUN` or `RUN:ARM` that the differences are to, a run by its name or folder. Default: of the
            first run the first arm that keeps all examples and weights, else the first arm.
        arms: names of the arms to show beside the baseline; none: all.

    Returns:
        what result.json of kind "comparison" holds. `arms` has a row each; a row's `not_compared` names what
        another machine forbids to compare with the baseline. `fronts` has, for each cost that two arms or
        more know, `arms` and those on the Pareto `front`: none is both better and cheaper. `difference` is of
        the metric, in its own unit; of a perplexity it is of the mean loss, in nats.

    Raises:
        ValueError: no finished run; other tasks, metrics or test sets; an unknown arm; fewer than two arms.

    Example:
        >>> result = compare(["docs/demo"], arms=["random", "dlc"])
        >>> result["baseline"], [arm["arm"] for arm in result["arms"]]
        ('demo: random', ['random', 'dlc'])
    """
    sources = _open([Path(run) for run in runs])
    known = [Entry(source, arm) for source in sources for arm in source.run.arms]
    for name in arms:
        if not any(entry.arm["name"] == name or entry.is_called(name) for entry in known):
            names = {entry.arm["name"] for entry in known}
            raise ValueError(f"arm={name!r} is in none of the runs{near(name, names)}")
    entries = [e for e in known if not arms or any(e.arm["name"] == a or e.is_called(a) for a in arms)]
    base = _find_baseline(baseline, known, entries)
    entries = [entry for entry in known if entry in entries or entry is base]
    if len(entries) < 2 or base is None:
        raise ValueError(
            f"there is {len(entries) or 'no'} arm to compare; give two or more, of one run or of several"
        )
    rows = [_row(entry, base) for entry in entries]
    first = sources[0].run
    result = {
        "kind": "comparison",
        "name": " and ".join(source.label for source in sources),
        "task": first.result.get("task", "classification"),
        "metric": first.result.get("metric") or first.metric,
        "test": first.data.get("test"),
        "test_examples": first.data.get("test_examples"),
        "runs": [_about(source) for source in sources],
        "baseline": base.name,
        "arms": rows,
        "latency_batch": _latency_batch(rows),
        "notes": _notes(sources, base.source),
        "versions": versions(),
    }
    result["fronts"] = _fronts(result, first.lower_is_better)
    return result | {"verdict": " ".join(verdict(result))}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); run `serpette run` again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; is it of a run?")
    return value


def _open(folders: list[Path]) -> list[Source]:
    sources = []
    for folder in folders:
        path = folder / "result.json"
        begun = any((folder / name).exists() for name in ("seeds", "arms", "scores"))
        if not path.is_file() and begun and (folder / "recipe.yaml").is_file():
            raise ValueError(
                f"the run in {str(folder)!r} is not finished; "
                f"go on with it: serpette run {folder / 'recipe.yaml'} --out {folder}"
            )
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} has no result.json; make one: serpette run RECIPE.yaml --out {folder}"
            )
        result = _read(path)
        if result.get("kind", "run") != "run":
            raise ValueError(
                f"{str(folder)!r} holds a {result['kind']}, not a run; "
                "give a folder that `serpette run` or `serpette prune` has written"
            )
        if any(folder.samefile(other.folder) for other in sources):
            raise ValueError(f"{str(folder)!r} is given twice; give each run once")
        sources.append(Source(folder, Run(result)))
    names = [str(source.run.result.get("name") or source.folder.name) for source in sources]
    for labels in (names, [s.folder.resolve().name for s in sources], [str(s.folder) for s in sources]):
        if len(set(labels)) == len(sources):
            break
    for source, label in zip(sources, labels if sources else [], strict=True):
        source.label = label
    for other in sources[1:]:
        _check_alike(sources[0], other)
    return sources


def _check_alike(one: Source, other: Source) -> None:
    a, b = one.run, other.run
    way = "run both recipes with the same data.test, data.test_split and data.test_limit"
    for what, mine, its, way_out in (
        ("tasks", a.result.get("task"), b.result.get("task"), "compare runs of one task"),
        ("metrics", a.metric, b.metric, "compare runs of one metric"),
        ("test sets", a.data.get("test"), b.data.get("test"), way),
        ("numbers of test examples", a.data.get("test_examples"), b.data.get("test_examples"), way),
        ("classes", a.data.get("classes"), b.data.get("classes"), "compare runs of the same classes"),
    ):
        if mine != its:
            raise ValueError(
                f"{one.label!r} and {other.label!r} differ in {what}: "
                f"{plain(mine)} and {plain(its)}; {way_out}"
            )


def _find_baseline(text: str | None, known: list[Entry], shown: list[Entry]) -> Entry | None:
    if text is None:
        of_first = [entry for entry in shown if entry.source is known[0].source]
        return next((entry for entry in of_first if _is_whole(entry.arm)), next(iter(shown), None))
    of_run = [e for e in known if text.rstrip("/") in (e.source.label, str(e.source.folder))]
    called = [entry for entry in known if entry.is_called(text)]
    found = called or [entry for entry in of_run if _is_whole(entry.arm)] or of_run
    if not found:
        raise ValueError(
            f"baseline={text!r} is no RUN or RUN:ARM of these{near(text, {entry.name for entry in known})}"
        )
    return found[0]


def _is_whole(arm: dict[str, Any]) -> bool:
    return keeps_all(arm) and not arm.get("weights")


def _row(entry: Entry, base: Entry) -> dict[str, Any]:
    source, arm = entry.source, entry.arm
    run, weights = source.run, arm.get("weights") or {}
    cut = [weights] if weights else [other["weights"] for other in run.cut]
    side = "after" if weights else "before"
    sizes = (cut[0].get(side) if cut else None) or {}
    whole = (run.result.get("model") or {}).get("parameters")
    seeds, interval = source.by_seed(arm), run.interval(arm)
    return {
        "name": entry.name,
        "run": source.label,
        "arm": arm["name"],
        "value": run.value(arm),
        "interval": None if interval is None else list(interval),
        "seeds": list(seeds),
        "examples": number(arm.get("examples")),
        "trainable_parameters": number(arm.get("trainable_parameters")),
        "parameters": number(sizes.get("parameters")) or (None if weights else number(whole)),
        "seconds": cost_of(arm),
        "peak_bytes": number(arm.get("peak_bytes")),
        "timings": _timings(cut, side),
        "file_bytes": number(sizes.get("file_bytes")),
        "packed_bytes": number(sizes.get("packed_bytes")) if weights else None,
        "not_compared": _not_compared(source, base.source),
        "difference": None if entry is base else _difference(entry, base),
    }


def _timings(cut: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """Seconds of a batch by its size; of an unpruned arm the median over the pruned ones timed beside it."""
    found: dict[int, list[float]] = {}
    for timing in (timing for weights in cut for timing in weights.get("timings") or []):
        value = number(timing.get(side))
        if value is not None:
            found.setdefault(int(timing["batch_size"]), []).append(value)
    return [{"batch_size": size, "seconds": median(found[size])} for size in sorted(found)]


def _not_compared(source: Source, base: Source) -> list[str]:
    if source is base:
        return []
    same = bool(source.machine) and source.machine == base.machine
    kinds = [str(s.machine.get("device", "")).partition(":")[0] for s in (source, base)]
    return ([] if same else ["seconds", "latency"]) + ([] if kinds[0] == kinds[1] != "" else ["peak_bytes"])


def _difference(entry: Entry, base: Entry) -> dict[str, Any]:
    mine, its, run = entry.source, base.source, entry.source.run
    if mine.drawn != its.drawn:
        draws = [
            f"{s.label} {'took all' if s.drawn is None else f'drew by seed {s.drawn}'}" for s in (mine, its)
        ]
        return {"not_paired": f"other test examples: {', '.join(draws)}"}
    a, b = mine.by_seed(entry.arm), its.by_seed(base.arm)
    common = [seed for seed in a if seed in b]
    if len(common) > 1:
        found = paired_over_seeds([a[s] for s in common], [b[s] for s in common])
        return _found(found, "seeds", len(common), common)
    each = mine.each(entry.arm, common or list(a)), its.each(base.arm, common or list(b))
    if each[0] and each[1]:
        if each[0][1] != each[1][1] or len(each[0][0]) != len(each[1][0]):
            return {"not_paired": "other test examples could not be read"}
        return _found(paired_difference(each[0][0], each[1][0]), "test examples", len(each[0][0]), common)
    stored = run.comparison(entry.arm["name"], base.arm["name"]) if mine is its else None
    if stored and number(stored.get("low")) is not None and number(stored.get("high")) is not None:
        count = len(run.seeds) or run.data.get("test_examples")
        kind = "seeds" if run.seeds else "test examples"
        return _found((stored["difference"], stored["low"], stored["high"]), kind, count, list(a))
    gone = ", ".join(dict.fromkeys(s.label for s, e in ((mine, each[0]), (its, each[1])) if not e))
    return {"not_paired": f"no two seeds in common, and no results by test example (arms/*.json) of {gone}"}


def _found(
    found: tuple[float, float, float], paired_over: str, count: Any, common_seeds: list[int]
) -> dict[str, Any]:
    difference, low, high = found
    noise = low <= 0 <= high
    return {
        "difference": difference, "low": low, "high": high, "within_noise": noise,
        "paired_over": paired_over, "count": count, "common_seeds": common_seeds,
    }  # fmt: skip


def _about(source: Source) -> dict[str, Any]:
    result = source.run.result
    return {
        "name": source.label,
        "folder": str(source.folder),
        "seeds": source.run.seeds or [result.get("seed")],
        "model": (result.get("model") or {}).get("name"),
        "train": source.run.data.get("train"),
        "train_examples": source.run.data.get("train_examples"),
        "hardware": result.get("hardware") or {},
        "versions": result.get("versions") or {},
    }


def _notes(sources: list[Source], base: Source) -> list[str]:
    notes = []
    for source in sources:
        kept = _not_compared(source, base)
        if "seconds" in kept:
            what = "seconds, latency and memory" if "peak_bytes" in kept else "seconds and latency"
            notes.append(
                f"{source.label} ran on {_machine_words(source)}, {base.label} on {_machine_words(base)}: "
                f"their {what} are not compared."
            )
        theirs = _settings(base)
        for what, mine in _settings(source).items():
            if mine != theirs[what]:
                notes.append(f"{source.label} has {what} {mine}, {base.label} {theirs[what]}.")
    if any("seconds" not in _not_compared(source, base) for source in sources if source is not base):
        notes.append("Runs were timed one after the other: what else the machine did then counts in.")
    if any(str(source.machine.get("device")) == "cpu" for source in sources):
        notes.append(
            "Peak memory on a CPU is that of the whole process, with what earlier arms have left in it."
        )
    if any(source.run.cut and len(source.run.cut) < len(source.run.arms) for source in sources):
        notes.append(
            "An unpruned arm has the latency and file size that pruned arms of its run were measured against."
        )
    return notes


def _settings(source: Source) -> dict[str, Any]:
    """Whose differences a reader should know of."""
    result, data = source.run.result, source.run.data
    return {
        "the model": (result.get("model") or {}).get("name"),
        "the training data": data.get("train"),
        "training examples:": data.get("train_examples"),
    } | {name: (result.get("versions") or {}).get(name) for name in ENGINES}


def _machine_words(source: Source) -> str:
    machine = source.machine
    if not machine:
        return "an unknown machine"
    cpu = [machine.get("cpu"), *(f"{machine[key]} {key}" for key in ("cores", "threads") if key in machine)]
    return str(machine.get("gpu") or ", ".join(str(word) for word in cpu))


def _latency_batch(rows: list[dict[str, Any]]) -> int | None:
    """The batch size that most arms were timed at; among equals `BATCH`, then the smallest."""
    sizes = [t["batch_size"] for row in rows for t in row["timings"] if "latency" not in row["not_compared"]]
    return min(set(sizes), key=lambda size: (-sizes.count(size), size != BATCH, size), default=None)


def cost_in(row: dict[str, Any], against: str, batch: int | None) -> float | None:
    """What `row` costs in one of `AGAINST`; None where that is unknown, or not to be compared."""
    if against in row["not_compared"]:
        return None
    if against != "latency":
        return row[against]
    return next((t["seconds"] for t in row["timings"] if t["batch_size"] == batch), None)


def _fronts(result: dict[str, Any], lower_is_better: bool) -> dict[str, Any]:
    fronts, sign = {}, -1 if lower_is_better else 1
    for against in AGAINST:
        points = [
            {"name": row["name"], "cost": cost, "value": row["value"]}
            for row in result["arms"]
            if (cost := cost_in(row, against, result["latency_batch"])) is not None
            and row["value"] is not None
        ]
        if len(points) > 1:
            on = pareto_front([p["cost"] for p in points], [sign * p["value"] for p in points])
            front = sorted((p["cost"], p["name"]) for p, is_on in zip(points, on, strict=True) if is_on)
            fronts[against] = {"points": points, "front": [name for _, name in front]}
    return fronts


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """(N,) whether no other point costs no more and is worth no less, one of the two strictly.

    Args:
        costs: (N,), lower is better.
        values: (N,), higher is better.

    >>> pareto_front([1, 2, 3, 3], [5, 4, 6, 6])
    [True, False, True, True]
    """
    on, best = [False] * len(costs), (float("inf"), -float("inf"))
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if values[i] > best[1] or (costs[i], values[i]) == best:
            on[i], best = True, (costs[i], values[i])
    return on
