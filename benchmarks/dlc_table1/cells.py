"""One seed of a task: every scorer once, then every arm at each share kept; a cell is (task, keep, seed)."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tasks
import torch
from torch import Tensor

from serpette import scorers as scorer_methods
from serpette import selectors as selector_methods
from serpette.data import budget
from serpette.data.proxy import Probe
from serpette.data.search import describe, search
from serpette.data.selectors import FlexRand
from serpette.evaluate import accuracy_by_class, calibration_error, detection_auc
from serpette.files import write_json
from serpette.scorers import DLC, Herding
from serpette.types import PathSpec, Signals

FASHION, MOVIES = (0.05, 0.1, 0.3, 0.5, 0.7), (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Plan:
    """A task: `size` examples that each seed draws from a set of features; `pool`, `test` shrink the set."""

    name: str
    source: str
    make_up: str
    size: int
    keeps: tuple[float, ...]
    pool: int | None = None
    test: int | None = None


PLANS = (
    Plan("fashion-vit/clean", "fashion-vit", "clean", 4000, FASHION),
    Plan("fashion-vit/wrong_labels", "fashion-vit", "wrong_labels", 4000, FASHION),
    Plan("fashion-vit/long_tail", "fashion-vit", "long_tail", 4000, FASHION),
    Plan("movies/clean", "movies-minilm", "clean", 4000, MOVIES),
    Plan("movies/wrong_labels", "movies-minilm", "wrong_labels", 4000, MOVIES),
    Plan("fashion-effnet/clean", "fashion-effnet", "clean", 1500, (0.1, 0.3)),
    Plan("fashion-effnet/wrong_labels", "fashion-effnet", "wrong_labels", 1500, (0.1, 0.3)),
)
QUICK = (Plan("fashion-vit/wrong_labels", "fashion-vit", "wrong_labels", 300, (0.3,), pool=400, test=200),)
DRAWS = 3  # of each random control: their mean is what a seed's other arms are compared with
CONTROLS = ("random", "stratified_random", "equal_quotas")
GREEDY = (
    "contextual_diversity",
    "herding",
    "herding_compat",
    "k_center",
    "moderate",
    "ssp",
)  # not a difficulty
WIDE = ("dlc", "unmasked_loss", "optimisation_complexity")  # tried with every selector


def all_scorers() -> dict[str, Any]:
    """Every scorer of the library, and the three variants that the comparison needs."""
    made = {name: scorer_methods.registry.make(name) for name in scorer_methods.registry if name != "random"}
    made["dlc"] = DLC(points=tasks.POINTS)
    made["unmasked_loss"] = DLC(points=[0])
    made["dlc_inverse_distance"] = InverseDistance()
    made["herding_compat"] = Herding(compat=True)
    return made


class Gammas(FlexRand):
    """FlexRand with 10 of its 19 candidates: the searches of 11 scorers are most of a cell's time."""

    def candidates(self) -> list[FlexRand]:
        return [FlexRand(i / 20) for i in range(1, 20, 2)]


class InverseDistance(DLC):
    """DLC with the classifier of the authors' scripts, raw features and 1 / distance, on our masks."""

    def __init__(self):
        super().__init__(points=tasks.POINTS, logits="inverse_distance")
        self.variant = "official"  # leaves the features as they are


def arms(make_up: str) -> list[tuple[str, str, bool | str]]:
    """(scorer, selector, split of the budget over the classes) of every arm that is not a control."""
    pairs: list[tuple[str, str, bool | str]] = []
    for scorer in sorted(all_scorers()):
        pairs.append((scorer, "top_hard", True))
        if scorer not in GREEDY:
            pairs.append((scorer, "flex_rand", True))
        if scorer in WIDE:
            pairs += [(scorer, s, True) for s in ("top_easy", "top_flexible", "mixed_flexible", "ccs")]
    pairs += [("learning_confidence", "diverse_easy", True), ("none", "dq", True)]
    if make_up == "long_tail":  # where equal quotas are the control to beat, some methods get them, too
        pairs += [(scorer, "flex_rand", "equal") for scorer in ("dlc", "unmasked_loss", "forgetting")]
        pairs += [("herding", "top_hard", "equal"), ("optimisation_complexity", "top_easy", "equal")]
    return pairs


def arm_name(scorer: str, selector: str, per_class: bool | str) -> str:
    """`dlc+flex_rand`, or `dlc+flex_rand/equal` with the same quota for each class."""
    return f"{scorer}+{selector}" + ("/equal" if per_class == "equal" else "")


@functools.lru_cache(maxsize=2)
def pool_of(source: str, pool: int | None, test: int | None) -> tasks.Pool:
    """The features, once a process."""
    return tasks.features(source, pool, test)


def cell_file(folder: Path, task: str, keep: float, seed: int) -> Path:
    """Where a cell lies: written when it is complete."""
    return folder / task.replace("/", "-") / f"keep{keep:g}-seed{seed}.json"


def run(plan: Plan, seed: int, folder: Path) -> int:
    """Computes the arms that are missing of one seed of a task; the number of cells written."""
    torch.set_num_threads(1)
    files = [cell_file(folder, plan.name, keep, seed) for keep in plan.keeps]
    held = [json.loads(file.read_text()) if file.exists() else None for file in files]
    names = [arm_name(*arm) for arm in arms(plan.make_up)]
    missing = [cell is None or any(name not in cell["arms"] for name in names) for cell in held]
    if any(missing):
        bench = Seed(pool_of(plan.source, plan.pool, plan.test), plan.make_up, seed, plan.size)
        for keep, file, cell in zip(plan.keeps, files, held, strict=True):
            write_json(file, bench.cell(plan.name, keep, cell))
    return sum(missing)


class Seed:
    """One seed of one task, with the scores of its training examples."""

    def __init__(self, pool: tasks.Pool, make_up: str, seed: int, size: int):
        self.seed, self.make_up, self.scorers = seed, make_up, all_scorers()
        self.unpruned: dict[str, Any] | None = None
        paths: list[PathSpec] = [s.path for s in self.scorers.values() if hasattr(s, "path")]
        self.task = tasks.draw(pool, make_up, seed, paths, size)
        share = len(self.task.rows) / len(pool.labels)
        self.seconds = {part: value * share for part, value in pool.seconds.items()}
        start = time.perf_counter()
        self.signals = Probe().train(self.task.signals)
        self.seconds["proxy"] = time.perf_counter() - start
        self.scores: dict[str, Tensor] = {"none": torch.zeros(len(self.signals))}
        for name, scorer in self.scorers.items():
            start = time.perf_counter()
            self.scores[name] = scorer(self.signals)
            self.seconds[name] = time.perf_counter() - start
        self.rescored = {name: _once(scorer) for name, scorer in self.scorers.items()}
        self.fitted: dict[tuple[float, bytes], dict] = {}

    def cell(self, name: str, keep: float, cell: dict | None) -> dict[str, Any]:
        """Every arm at one share kept; those that `cell` holds are not run again."""
        self.fitted = {}
        full, k = torch.arange(len(self.signals)), budget.count(len(self.signals), keep)
        if cell is None:
            penalty = tasks.choose_penalty(self.task, k, self.seed)
            outcome: dict[str, Any] = {}
            for control, per_class in zip(CONTROLS, (False, True, "equal"), strict=True):
                draws = [
                    self.pick(self.named("random"), "none", k, per_class, f"{control}{i}")
                    for i in range(DRAWS)
                ]
                outcome[control] = _mean([self.outcome(picks, penalty) for picks in draws])
            if self.unpruned is None:
                self.unpruned = self.outcome(full, tasks.choose_penalty(self.task, len(full), self.seed))
            outcome["no_pruning"] = self.unpruned
            cell = {
                "task": name,
                "keep": keep,
                "seed": self.seed,
                "kept": k,
                "penalty": penalty,
                "arms": outcome,
                "searched": {},
                "detection_auc": self.detection(),
                "seconds": {**self.seconds, "searches": 0.0},
            }
        for scorer, selector_name, per_class in arms(self.make_up):
            arm = arm_name(scorer, selector_name, per_class)
            if arm in cell["arms"]:
                continue
            start = time.perf_counter()
            selector = self.searched(scorer, selector_name, keep, per_class)
            if hasattr(selector, "candidates"):
                cell["seconds"]["searches"] += time.perf_counter() - start
                cell["searched"][arm] = describe(selector)
            cell["arms"][arm] = self.outcome(self.pick(selector, scorer, k, per_class, arm), cell["penalty"])
        return cell

    def detection(self) -> dict[str, float]:
        """Of wrong labels, by the raw scores."""
        if not self.task.wrong.any():
            return {}
        return {n: detection_auc(s, self.task.wrong) for n, s in self.scores.items() if n != "none"}

    def searched(self, scorer: str, name: str, keep: float, per_class: bool | str = True) -> Any:
        """The selector, its open hyperparameter chosen on a split of the training examples."""
        selector = self.named(name)
        if not hasattr(selector, "candidates"):
            return selector
        scores_of = self.rescored[scorer]
        return search(
            selector, self.signals, scores_of, keep, per_class, seed=self.seed, repeats=2, limit=1250
        )[0]

    @staticmethod
    def named(name: str) -> Any:
        return Gammas() if name == "flex_rand" else selector_methods.registry.make(name)

    def pick(self, selector: Any, scorer: str, k: int, per_class: bool | str, arm: str) -> Tensor:
        key = blake2b(f"{self.seed}/{k}/{arm}".encode(), digest_size=7).digest()
        return budget.select(
            selector,
            self.scores[scorer],
            k,
            labels=self.signals.labels,
            per_class=per_class,
            generator=torch.Generator().manual_seed(int.from_bytes(key, "big")),
            embeddings=self.signals.embeddings,
        )

    def outcome(self, picks: Tensor, penalty: float) -> dict[str, Any]:
        """Of a head fitted on `picks`; the same subset is fitted once."""
        key = penalty, picks.numpy().tobytes()
        if key not in self.fitted:
            signals, task = self.signals, self.task
            W, b = tasks.fit_head(
                signals.embeddings[picks], signals.labels[picks], signals.num_classes, penalty
            )
            logits = task.test @ W + b
            by_class = accuracy_by_class(logits, task.test_labels, signals.num_classes)
            kept = torch.bincount(signals.labels[picks], minlength=signals.num_classes)
            size = torch.bincount(signals.labels, minlength=signals.num_classes)
            self.fitted[key] = {
                "accuracy": float((logits.argmax(1) == task.test_labels).double().mean()),
                "worst_class": float(by_class.min()),
                "calibration_error": calibration_error(logits, task.test_labels),
                "kept_by_class": (kept / size).tolist(),
                "wrong_kept": float(task.wrong[picks].double().mean()),
            }
        return self.fitted[key]


def _once(scorer: Callable[[Signals], Tensor]) -> Callable[[Signals], Tensor]:
    """The search asks for the scores of the same part of the examples at every share kept."""
    held: dict[bytes, Tensor] = {}

    def call(part: Signals) -> Tensor:
        key = part.ids.tobytes()
        if key not in held:
            held[key] = scorer(part)
        return held[key]

    return call


def _mean(outcomes: list[dict]) -> dict[str, Any]:
    """Of several draws of a control, number by number."""
    return {
        name: torch.tensor([o[name] for o in outcomes], dtype=torch.float64).mean(0).tolist()
        for name in outcomes[0]
    }
