"""Data pruning in scikit-learn's manners: `DataPruner.fit`, `transform`; and the same as functions.

score -> Scores (on disk if you like) -> select -> a smaller data set
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import scorers as scorer_methods
from ..cost import measure
from ..registry import near
from ..types import PerClass, Scorer, Selector, Signals, Task
from . import budget
from . import selectors as selector_methods
from .bounds import bounded
from .examples import Examples
from .features import Features, Reader
from .observe import Observation, infer_task, observe
from .own_model import described, in_common, opened, with_own_model
from .proxy import TRAINING_SIGNALS, FineTune, Probe
from .scores import Scores
from .search import describe, search

PROXIES = ("probe", "finetune", "model")


def score(
    model: nn.Module,
    dataset: Any,
    scorers: str | Scorer | Sequence[str | Scorer] = "dlc",
    *,
    data_collator: Any = None,
    processing_class: Any = None,
    task: Task | None = None,
    proxy: str | Probe | FineTune = "probe",
    features: Features = None,
    batch_size: int = 32,
    seed: int = 0,
    out: str | Path | None = None,
    on_bad: str = "set_aside",
    label_column: str | None = None,
    id_column: str | None = None,
    max_length: int | None = None,
    precision: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Scores:
    """Scores of every example of `dataset`, all scorers in one pass of the model.

    Args:
        model: a transformers model, or any module; not changed.
        dataset: what a Trainer takes, rows with an image or a text, or a torch Dataset of (x, y). For a
            causal language model: chats, instructions or text, see `serpette.data.instructions`.
        scorers: names or objects of `serpette.scorers`.
        data_collator, processing_class: as for a Trainer.
        task: "classification", "regression" or "causal-lm"; found from the model.
        proxy: where training signals come from, for the scorers that need them: `"probe"` a linear head on
            frozen features (default: costs seconds), `"finetune"` a run of the Trainer (what the papers do),
            `"model"` the model's own logits as it is, e.g. after tuning; or a `Probe` or `FineTune`.
        max_length: tokens a text is cut to; default: 128, a few sentences, and 1024 in a causal language
            model, a page and a half.
        out: a folder for `scores.parquet`; written in pieces, and a killed run goes on from them.

    Raises:
        ValueError: bad labels or inputs, a scorer that has no meaning for the task, an unknown name.

    Example:
        >>> import serpette, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
        >>> serpette.score(model, data, ["dlc", "el2n"]).values["dlc"].shape
        torch.Size([20])
    """
    several = scorers if isinstance(scorers, (list, tuple)) else [scorers]
    methods = [scorer_methods.registry.make(s) for s in several]
    names = [m.name for m in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"scorers={names} must have different names; give an object another `name`")
    if isinstance(proxy, str) and proxy not in PROXIES:
        raise ValueError(f"proxy={proxy!r} is unknown{near(proxy, PROXIES)}")
    if on_bad not in ("set_aside", "raise"):
        raise ValueError(f"on_bad={on_bad!r} must be 'set_aside' or 'raise'")
    apart, collated = with_own_model(methods), processing_class
    if len(apart) == len(methods) == 1:  # the model that was given need not run
        model, processing_class = opened(apart.pop(), model, processing_class)

    def examples_for(tokenizer: Any) -> Examples:
        return Examples(
            dataset,
            processing_class=tokenizer,
            data_collator=data_collator if tokenizer is collated else None,
            label_column=label_column,
            id_column=id_column,
            max_length=max_length,
        )

    def observed(model: nn.Module, examples: Examples, methods: list, folder: str) -> Observation:
        return observe(
            model,
            examples,
            methods,
            task=task,
            features=features,
            batch_size=batch_size,
            folder=Path(out) / folder if out is not None else None,
            on_bad=on_bad,
            precision=precision,
            num_workers=num_workers,
            seed=seed,
            progress=progress,
        )

    examples = examples_for(processing_class)
    _check_task(methods, model, task, features)
    _check_proxy(methods, proxy)
    with measure(next((p.device for p in model.parameters()), "cpu")) as cost:
        observation = observed(model, examples, [m for m in methods if m not in apart], "observed")
        seconds, passes, signals_of = dict(observation.seconds), observation.passes, {}
        if apart:
            others = []
            for method in apart:
                start = time.perf_counter()
                own, tokenizer = opened(method, model, processing_class)
                others.append(observed(own, examples_for(tokenizer), [method], f"observed-{method.name}"))
                seconds[f"model of {method.name}"] = time.perf_counter() - start
                passes += others[-1].passes
                observation.set_aside |= others[-1].set_aside
            observation, *others = in_common(observation, others)
            signals_of = {m.name: other.signals for m, other in zip(apart, others, strict=True)}
        signals = observation.signals
        start = time.perf_counter()
        signals = _training_signals(signals, methods, proxy, model, examples, observation)
        seconds["proxy"] = time.perf_counter() - start
        scores = Scores(
            signals=signals,
            values={},
            rows=observation.rows,
            total=len(examples),
            set_aside=observation.set_aside,
            methods=dict(zip(names, methods, strict=True)),
            settings={
                "model": getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
                "proxy": proxy if isinstance(proxy, str) else repr(proxy),
                "features": features if isinstance(features, (str, type(None))) else "a function",
                "batch_size": batch_size,
                "max_length": examples.max_length,
                "precision": str(precision or torch.float32),
                **({"models": models} if (models := described(methods)) else {}),
            },
        )
        for method in methods:
            start = time.perf_counter()
            if hasattr(method, "along_path"):
                path = signals.paths[method.path]
                along = method.along_path(signals)
                scores.path_values[method.name] = {
                    float(p): v for p, v in zip(path.points, along, strict=True)
                }
                scores.values[method.name] = along.mean(0)
                if path.curve:
                    scores.curves[method.name] = path.curve
            else:
                scores.values[method.name] = method(signals_of.get(method.name, signals))
            seconds[method.name] = time.perf_counter() - start
    scores.cost = {"seconds": seconds, "passes": passes, "peak_bytes": cost.peak_bytes}
    if out is not None:
        scores.save(out)
    return scores


def select(
    scores: Scores,
    select: str | Selector = "flex_rand",
    keep: float = 0.3,
    *,
    scorer: str | None = None,
    per_class: PerClass | None = None,
    seed: int = 0,
) -> Selection:
    """Which examples stay: `keep` of all of the data set, exactly.

    Args:
        select: a name or object of `serpette.selectors`; an open hyperparameter is searched by a probe.
        keep: share of the data set kept, in (0, 1].
        scorer: which of the scores; needed if there are several.
        per_class: True splits the budget over the classes in proportion, `"equal"` in equal quotas,
            False selects over all; default: True in a classification.

    Raises:
        ValueError: keep outside (0, 1], or too small for one example of each class.
    """
    selector = selector_methods.registry.make(select)
    name, values = scores.of(scorer)
    signals = scores.signals
    if per_class is None:
        per_class = signals.num_classes > 0
    if per_class and not signals.num_classes:
        raise ValueError(
            f"per_class={per_class!r} needs classes, and this is a {signals.task}; give per_class=False"
        )
    k = budget.count(scores.total, keep)
    if k > len(signals):
        raise ValueError(
            f"keep={keep} asks for {k} examples, but only {len(signals)} of {scores.total} could be read; "
            "lower it"
        )
    start, table = time.perf_counter(), []
    if hasattr(selector, "candidates") and (candidates := selector.candidates()) and len(candidates) > 1:
        method = scores.methods.get(name)
        known = dict(zip(signals.ids.tolist(), values.tolist(), strict=True))

        def rescored(part: Signals) -> Tensor:  # a path's prototypes must not hold the validation split
            if method is not None and hasattr(method, "path"):
                return method(part)
            return torch.tensor([known[i] for i in part.ids])

        selector, table = search(selector, signals, rescored, keep, per_class, seed=seed)
    searched = time.perf_counter() - start

    start = time.perf_counter()
    order = torch.from_numpy(
        np.argsort(signals.ids, kind="stable")
    )  # picks do not depend on the order of the rows
    labels = signals.labels[order] if signals.num_classes and signals.labels is not None else None
    picks = budget.select(
        selector,
        values[order],
        k,
        labels=labels,
        per_class=per_class,
        generator=torch.Generator().manual_seed(seed),
        embeddings=signals.embeddings[order] if signals.embeddings is not None else None,
    )
    positions = order[picks].sort().values
    return Selection(
        positions=positions,
        rows=scores.rows[positions],
        ids=signals.ids[positions.numpy()],
        selector=selector,
        searched=table,
        seconds={"search": searched, "selection": time.perf_counter() - start},
    )


@dataclass
class Selection:
    """The examples that stay: (k,) positions among the scores, rows of the data set, ids."""

    positions: Tensor
    rows: Tensor
    ids: np.ndarray
    selector: Selector
    searched: list[tuple[str, float]]
    seconds: dict[str, float]


class DataPruner:
    """Keeps the training examples that matter: `fit` scores them, `transform` cuts the data set.

    Args:
        scorer: name or object of `serpette.scorers`.
        select: name or object of `serpette.selectors`.
        keep: share kept, in (0, 1]; the total is met exactly.
        per_class: True (default in a classification) keeps the share in each class, `"equal"` gives
            each class the same quota, False selects over all.
        seed: of every random choice; the same seed, ids and model give the same subset.
        batch_size: examples a forward pass; changes no score.
        **options: of `serpette.score`: task, proxy, features, out, on_bad, label_column, ...

    Attributes:
        scores_: (N,) score of each row of the data set, NaN where it could not be read.
        indices_: (k,) rows kept, sorted. `ids_`: their ids.
        selector_: the selector with what was searched for, e.g. gamma. `searched_`: its table.
        cost_: seconds by part, passes, peak_bytes. `set_aside_`: {id: reason}. `result_`: the `Scores`.

    Example:
        >>> import torch, serpette
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
        >>> pruner = serpette.DataPruner("dlc", select="flex_rand", keep=0.3)
        >>> len(pruner.fit(model, data).transform(data))
        6
    """

    def __init__(
        self,
        scorer: str | Scorer = "dlc",
        select: str | Selector = "flex_rand",
        keep: float = 0.3,
        per_class: PerClass | None = None,
        seed: int = 0,
        batch_size: int = 32,
        **options: Any,
    ):
        self.scorer, self.select, self.keep = scorer, select, keep
        self.per_class: PerClass | None = per_class
        self.seed, self.batch_size, self.options = seed, batch_size, options
        known = [k for k in inspect.signature(score).parameters if k not in ("model", "dataset", "scorers")]
        for option in options:
            if option not in known:
                raise ValueError(f"DataPruner has no option {option!r}{near(option, known)}")

    def fit(
        self, model: nn.Module, dataset: Any, data_collator: Any = None, processing_class: Any = None
    ) -> DataPruner:
        """Scores `dataset` with `model` and selects; see `serpette.score` for what both may be."""
        selector_methods.registry.make(self.select)
        self._check_budget(model, dataset)  # before any work
        scores = score(
            model,
            dataset,
            bounded(self.scorer, self.select, budget.count(len(dataset), self.keep), self.per_class),
            data_collator=data_collator,
            processing_class=processing_class,
            seed=self.seed,
            batch_size=self.batch_size,
            **self.options,
        )
        selection = select(scores, self.select, self.keep, per_class=self.per_class, seed=self.seed)
        self.result_ = scores
        self.scores_ = torch.full((scores.total,), torch.nan, dtype=torch.float64)
        self.scores_[scores.rows] = scores.of(None)[1].double()
        self.indices_, self.ids_ = selection.rows, selection.ids
        self.selector_, self.searched_ = selection.selector, selection.searched
        self.cost_ = {**scores.cost, "seconds": {**scores.cost["seconds"], **selection.seconds}}
        self.set_aside_ = scores.set_aside
        return self

    def _check_budget(self, model: nn.Module, dataset: Any) -> None:
        examples = Examples(dataset, label_column=self.options.get("label_column"))
        k = budget.count(len(examples), self.keep)
        task = self.options.get("task") or infer_task(model, Reader(model, self.options.get("features")))
        if task != "classification" and self.per_class:
            raise ValueError(
                f"per_class={self.per_class!r} needs classes, and this is a {task}; give per_class=False"
            )
        raw = examples.labels() if task == "classification" else None
        if task == "classification" and self.per_class is not False and raw and all(map(_is_whole, raw)):
            labels, generator = torch.tensor(raw), torch.Generator().manual_seed(0)
            anything = selector_methods.registry.make("random")
            budget.select(anything, torch.zeros(len(labels)), k, labels=labels, generator=generator)

    def transform(self, dataset: Any) -> Any:
        """The examples of `ids_`: `select` of a `datasets.Dataset`, else a torch `Subset`.

        Raises:
            ValueError: not fitted, or `dataset` is not the one that was.
        """
        if not hasattr(self, "indices_"):
            raise ValueError("DataPruner is not fitted; call fit(model, dataset) first")
        if len(dataset) != len(self.scores_):
            raise ValueError(f"dataset has {len(dataset)} rows, the fitted one had {len(self.scores_)}")
        ids = Examples(dataset, id_column=self.options.get("id_column")).ids
        row_of = {str(i): row for row, i in enumerate(ids)}
        missing = [str(i) for i in self.ids_ if str(i) not in row_of]
        if missing:
            raise ValueError(
                f"dataset lacks the example with id {missing[0]!r}; it is not the one that was fitted"
            )
        rows = sorted(row_of[str(i)] for i in self.ids_)
        return dataset.select(rows) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, rows)

    def fit_transform(
        self, model: nn.Module, dataset: Any, data_collator: Any = None, processing_class: Any = None
    ):
        """`fit`, then `transform` of the same data set."""
        return self.fit(model, dataset, data_collator, processing_class).transform(dataset)

    def __repr__(self) -> str:
        selector = self.select if isinstance(self.select, str) else describe(self.select)
        scorer = self.scorer if isinstance(self.scorer, str) else self.scorer.name
        return f"DataPruner({scorer!r}, select={selector!r}, keep={self.keep}, seed={self.seed})"


def _check_task(methods: list, model: nn.Module, task: Task | None, features: Features) -> None:
    task = task or infer_task(model, Reader(model, features))
    for method in methods:
        if task not in method.tasks:
            able = [n for n, cls in scorer_methods.registry.items() if task in cls.tasks]
            raise ValueError(
                f"scorer {method.name!r} has no meaning in a {task}; those that have: {', '.join(able)}"
            )


def _is_whole(label: Any) -> bool:
    return isinstance(label, int) and label >= 0


def _check_proxy(methods: list, proxy: str | Probe | FineTune) -> None:
    more = frozenset().union(*(m.needs for m in methods)) & (TRAINING_SIGNALS - {"logits"})
    if proxy == "model" and more:
        raise ValueError(
            f"proxy='model' gives logits only, but {', '.join(sorted(more))} are needed; "
            "use proxy='probe' or proxy='finetune'"
        )


def _training_signals(
    signals: Signals,
    methods: list,
    proxy: str | Probe | FineTune,
    model: nn.Module,
    examples: Examples,
    observation: Observation,
) -> Signals:
    needed = frozenset().union(*(m.needs for m in methods)) & TRAINING_SIGNALS
    if proxy == "model" or not needed or signals.task == "causal-lm":  # which is scored as it is
        return signals
    if proxy == "finetune" or isinstance(proxy, FineTune):
        run = proxy if isinstance(proxy, FineTune) else FineTune()
        return run.train(signals, model, examples, observation.rows)
    return (proxy if isinstance(proxy, Probe) else Probe()).train(signals)
