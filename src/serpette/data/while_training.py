"""Score while you train: an epoch of the user's own training scores its examples, later ones keep the best.

Forward and backward passes are those of the training; what is added are hooks that read them, so scoring
costs a fraction of an epoch. Letters: N examples, n of a batch, C classes, T scored epochs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import scorers as scorer_methods
from ..files import write_atomic
from ..lora_gradients import LayerGradients, LoraGradients
from ..types import PerClass, Scorer, Selector, Signals, uniform_of
from . import budget
from . import selectors as selector_methods
from .callback import PassesCallback, known_labels
from .pruner import select as select_examples
from .scores import Scores, config_of
from .search import describe
from .tally import Tally
from .visits import Visit, Watch, loss_scale

SEEN = frozenset({"logits", "labels", "early_logits", "history", "response_losses"})  # in a training step
MISFIT = 0.02  # of the gradient of the logits to that of a plain loss; bfloat16 rounds to 0.004
CHECKED = 4  # batches of which it is looked at: a loss does not change its form


class ScoreWhileTraining(PassesCallback):
    """A Trainer callback that scores during an epoch of training and goes on with the examples it keeps.

    Until then training is as it would be without; after it each epoch holds the kept examples only, and the
    learning rate reaches its end at the last of them. With `max_steps` the number of steps stays. The
    scores see the model while it learns, dropout included, each example at its turn: they depend on the
    order (`serpette.score` and `DataPruner` do not).

    Args:
        scorer: `"tsa"` or `"tsa_joint"` (LoRA models; statistics="running"), or what reads losses and logits
            only: `"loss"`, `"el2n"`, `"least_confidence"`, `"entropy"`, `"margin"`, `"forgetting"`, ...
        at_epoch: the first epoch that scores, from 1. A fresh head knows little in epoch 1; the TSA paper
            finds 2 best, which trains on everything for one epoch more.
        keep: share kept in (0, 1] of all examples.
        select: name or object of `serpette.selectors` that needs no embeddings; top-k as in the paper.
        per_class: True keeps the share in each class, `"equal"` gives equal quotas, False selects over all;
            default: True in a classification.
        epochs: consecutive epochs that score; the mean counts.
        seed: of the order of the examples and of random selectors.
        ids: N ids or a data set with an `id` column, in the order of the training set; default: the `id`
            column if the Trainer leaves it (remove_unused_columns=False), else row numbers.
        out: a folder for `scores.parquet` and `result.json`.
        resume_from: the checkpoint that the Trainer resumes from, if it lies outside output_dir.

    Attributes:
        scores_: (N,) float64, NaN for what was set aside. `losses_`: (N,) mean loss at the scored visits.
        kept_: (k,) rows, sorted. `ids_`: their ids. `set_aside_`: {id: reason}. `result_`: the `Scores`.
        cost_: `seconds` of hooks, selection and the scored epochs; `extra_share`, hooks and selection over
            what the scored epochs took without them.

    Raises:
        ValueError: a bad argument; when training starts: a scorer, selector, loss, order or model that
            cannot work, a subset smaller than a batch; on resume: changed data or settings.

    Example:
        >>> ScoreWhileTraining("loss", at_epoch=2, keep=0.3).at_epoch
        2
    """

    kind = "score-while-training"

    def __init__(
        self,
        scorer: str | Scorer = "tsa",
        at_epoch: int = 1,
        keep: float = 0.5,
        select: str | Selector = "top_hard",
        per_class: PerClass | None = None,
        epochs: int = 1,
        seed: int = 0,
        ids: Any = None,
        out: str | Path | None = None,
        resume_from: str | Path | None = None,
    ):
        super().__init__(seed, ids, resume_from)
        for name, value in (("at_epoch", at_epoch), ("epochs", epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 on")
        budget.count(1, keep)
        if per_class not in (None, True, False, "equal", "proportional"):
            raise ValueError(f"per_class={per_class!r} must be True, False, 'equal', 'proportional' or None")
        options = {"statistics": "running"} if scorer in ("tsa", "tsa_joint") else {}
        self.scorer = scorer_methods.registry.make(scorer, **options)
        self.select = selector_methods.registry.make(select)
        self.at_epoch, self.keep, self.epochs, self.out = at_epoch, keep, epochs, out
        self.per_class: PerClass | None = per_class
        self._hooks: Any = None
        _check_scorer(self.scorer)
        if "embeddings" in self.select.needs:
            raise ValueError(
                f"select={self.select.name!r} needs embeddings, which training does not show; "
                "use another one, e.g. 'top_hard', or DataPruner before training"
            )
        if hasattr(self.select, "candidates") and len(self.select.candidates()) > 1:
            raise ValueError(
                f"select={self.select.name!r} has an open hyperparameter, which a search before training "
                "would set; give it, as in FlexRand(gamma=0.5)"
            )

    @property
    def _reading(self) -> Any:
        return getattr(self.scorer, "reading", None)

    def _settings(self) -> dict[str, Any]:
        return {
            "scorer": config_of(self.scorer),
            "select": config_of(self.select),
            **{name: getattr(self, name) for name in ("at_epoch", "keep", "per_class", "epochs")},
        }

    def _aligned(self) -> int:
        return self.at_epoch - 1 + self.epochs

    def _begin(self, args: Any, model: nn.Module, dataset: Any) -> None:
        loader, aligned = self._loader, self._aligned()
        N = loader.examples
        self._k = budget.count(N, self.keep)
        if self._k < loader.together:
            raise ValueError(
                f"keep={self.keep:g} keeps {self._k} of {N} examples, fewer than one batch of "
                f"{loader.together} ({loader.batch_size} in {loader.processes} process(es)); keep at least "
                f"{math.ceil(1e4 * loader.together / N) / 1e4:g}, or lower per_device_train_batch_size"
            )
        epochs = self._planned / loader.steps if self._passes is None else float(self._passes)
        if epochs <= aligned:
            raise ValueError(
                f"at_epoch={self.at_epoch} with epochs={self.epochs} scores until the end of epoch "
                f"{aligned}, and training has {epochs:g} epochs; nothing would be left for the kept "
                "examples: train longer"
            )
        labels = known_labels(dataset)
        if self.per_class is not False and labels and all(isinstance(label, int) for label in labels):
            number = getattr(getattr(model, "config", None), "num_labels", 2)
            if number > 1 and min(labels) >= 0:  # would there be one example for each class?
                anything, generator = selector_methods.registry.make("random"), torch.Generator()
                how = True if self.per_class is None else self.per_class
                budget.select(
                    anything, torch.zeros(N), self._k, labels=labels, per_class=how, generator=generator
                )
        self._watch, self._selecting = Watch(self._device), Watch(torch.device("cpu"))
        self._before_resume = {"hooks": 0.0, "selection": 0.0, "scored_epochs": 0.0}
        self._epoch_seconds, self._mark = 0.0, time.perf_counter()
        self._kept: Tensor | None = None
        self._task: str | None = None
        wants_logits = bool(self.scorer.needs & {"logits", "early_logits", "history"})
        self._tally = Tally(self.epochs, N, wants_logits, self._device)
        self._fp16, self._checked = bool(args.fp16), 0
        self.set_aside_: dict[str, str] = {}
        if self._reading is not None:
            self._offsets_N = (uniform_of(self._ids, 0) * 2**20).long()
            self._hooks = LoraGradients(model, self._layer)
            arrived = self._hooks._arrived

            def timed(index: int, gradient: Tensor) -> None:
                with self._watch:
                    arrived(index, gradient)

            self._hooks._arrived = timed  # type: ignore[method-assign] - its work counts as ours
            self._reader = self._reading.reader(self._hooks.layers)
            self._hooks.__enter__()

    def _draw(self, number: int) -> tuple[Tensor, Tensor | None]:
        if number < self._aligned():
            return torch.arange(self._loader.examples), None
        assert self._kept is not None, "the choice is made before the next epoch is read"
        return self._kept, None

    def _end(self) -> int | None:
        assert self._passes is not None
        aligned = self._aligned()
        whole = math.ceil(self._passes) - 1 - aligned
        return aligned * self._loader.full_pass + whole * self._k + self._last(self._k)

    def _moment(self, step: int) -> float:
        end = self._end()
        assert end is not None
        return step * self._planned / self._loader.steps_to(end)

    # a batch

    def _turn(self, batch: int) -> int | None:
        """Which of the scored epochs a batch belongs to."""
        turn = batch // self._loader.batches - (self.at_epoch - 1)
        return turn if 0 <= turn < self.epochs else None

    def _before(self, inputs: Mapping) -> None:
        if self._reading is None or self._turn(self._batches) is None:
            return
        self._visit: Visit | None = None
        mask = inputs.get("attention_mask")
        n = len(self._stream.batch(self._batches).rows)
        self._hooks.begin(n, mask if mask is not None and mask.ndim == 2 else None)

    def _after(self, visit: Visit) -> Any:
        turn = self._turn(self._batches)
        if turn is None:
            return None
        with self._watch:
            if self._task is None:
                self._check_task(visit)
            self._visit = visit
            self._tally.add(turn, visit)
            self._fine = torch.isfinite(visit.losses)
            if self._reading is None:
                return None
            self._some_bad = not bool(self._fine.all())
            offsets = self._offsets_N[visit.part.rows]
            self._reader.begin(len(offsets), visit.losses.device, offsets, self._hooks.input_of)
        return self._gradient

    def _gradient(self, gradient: Tensor) -> None:
        """Of the Trainer's loss as the logits: how many times the sum of the examples' losses it is."""
        assert self._visit is not None
        with self._watch:
            self._hooks.loss_scale, misfit = loss_scale(gradient, self._visit, self._fine)
            if self._checked < CHECKED:
                self._checked += 1
                if not float(misfit) <= MISFIT:
                    raise ValueError(
                        "the loss of the training is not the plain loss of its logits (its gradient is off "
                        f"by {float(misfit):.2g}), so {self.scorer.name!r} cannot be read off its backward "
                        "pass; train without class weights and extra terms, or score with DataPruner before"
                    )

    def _layer(self, seen: LayerGradients) -> None:
        if self._visit is None:  # something was wrong with the batch, which its end will tell
            return
        if self._fp16:  # the scaler skips a step that overflows; the scores must not keep it
            self._fine = self._fine & torch.isfinite(seen.raw_nTO).flatten(1).all(1)
        if self._fp16 or self._some_bad:  # out of the moments, too
            fine_n11, T = self._fine[:, None, None], seen.x_nTI.shape[1]
            parts = {name: getattr(seen, name) for name in ("x_nTI", "u_nTr", "raw_nTO", "raw_nTr")}
            parts = {name: value.where(fine_n11, value.new_zeros(())) for name, value in parts.items()}
            fine_nT = self._fine[:, None].expand(-1, T)
            seen = replace(seen, mask_nT=fine_nT if seen.mask_nT is None else seen.mask_nT & fine_nT, **parts)
        with torch.no_grad():
            self._reader.layer(seen)

    def _batch_done(self) -> None:
        if self._turn(self._batches - 1) is None:
            return
        if self._reading is not None:
            assert self._visit is not None
            with self._watch:
                rows = self._visit.part.rows.numpy()
                signals = Signals(
                    self._ids[rows],
                    readings={self._reading: self._reader.batch()},
                    task=self._visit.task,  # type: ignore[arg-type]
                )
                values_n = self.scorer(signals).double()
                self._tally.add_values(values_n.where(self._fine, torch.nan))
                self._hooks.end()
        now = time.perf_counter()
        self._epoch_seconds, self._mark = self._epoch_seconds + now - self._mark, now
        if self._batches == self._aligned() * self._loader.batches:
            self._choose()

    def _idle(self) -> None:
        if self._hooks is not None:
            self._hooks.end()

    def _check_task(self, visit: Visit) -> None:
        task, name = visit.task, self.scorer.name
        if task not in self.scorer.tasks:
            able = ", ".join(n for n in _readable() if task in scorer_methods.registry[n].tasks)
            raise ValueError(f"scorer {name!r} has no meaning in a {task}; those that have: {able}")
        if task == "regression" and visit.losses.numel() != visit.labels.numel():
            raise ValueError(f"scorer {name!r} has no meaning in a regression of several outputs")
        if self.per_class and task != "classification":
            raise ValueError(
                f"per_class={self.per_class!r} needs classes, and this is a {task}; give per_class=False"
            )
        self._task = task

    # the choice

    def _choose(self) -> None:
        tally = self._tally
        with self._selecting:
            tally.flush()
            if self._loader.processes > 1:
                tally.merge()
            assert bool(tally.seen_TN.all()), "a full pass sees every example"
            N = self._loader.examples
            fine_N = torch.isfinite(tally.losses_TN).all(0)
            if self._reading is not None:
                fine_N &= torch.isfinite(tally.values_TN).all(0)
            bad = (~fine_N).nonzero()[:, 0].tolist()
            self.set_aside_ = {str(self._ids[row]): self._fault(row) for row in bad}
            rows = fine_N.nonzero()[:, 0]
            if len(rows) < self._k:
                raise ValueError(
                    f"keep={self.keep:g} asks for {self._k} examples, but only {len(rows)} of {N} had a "
                    f"finite score (the first without: {next(iter(self.set_aside_.items()))}); the training "
                    "diverges: lower learning_rate, or mend the examples"
                )
            signals = self._signals(rows)
            values = self._score(signals, rows)
            self.scores_ = torch.full((N,), torch.nan, dtype=torch.float64)
            self.scores_[rows] = values
            result = self._result(signals, rows)
            chosen = select_examples(result, self.select, self.keep, per_class=self.per_class, seed=self.seed)
            self._kept = chosen.rows
            tally.logits_TNC = None
        self._finish(signals, rows)
        if self.out is not None and self._loader.rank == 0:
            self.save(self.out)
        self._mark = time.perf_counter()

    def _result(self, signals: Signals, rows: Tensor) -> Scores:
        name = self.scorer.name
        return Scores(
            signals=signals,
            values={name: self.scores_[rows]},
            rows=rows,
            total=self._loader.examples,
            set_aside=self.set_aside_,
            methods={name: self.scorer} if name in scorer_methods.registry else {},
            settings={"while_training": self._settings(), "batch_size": self._loader.together},
        )

    def _finish(self, signals: Signals, rows: Tensor) -> None:
        """What users see, from what was chosen."""
        assert self._kept is not None
        self.kept_, self.ids_ = self._kept, self._ids[self._kept.numpy()]
        self.losses_ = self._tally.losses_TN.mean(0)
        seconds = self._spent()
        plain = seconds["scored_epochs"] - seconds["hooks"]
        share = (seconds["hooks"] + seconds["selection"]) / max(plain, 1e-9)
        self.cost_ = {"seconds": seconds, "extra_share": share}
        self.result_ = self._result(signals, rows)
        self.result_.cost = {**self.cost_, "passes": 0}  # of its own

    def _fault(self, row: int) -> str:
        if bool(torch.isfinite(self._tally.losses_TN[:, row]).all()):
            return "its gradient is not finite"
        return "no response token" if self._task == "causal-lm" else "its loss is not finite"

    def _signals(self, rows: Tensor) -> Signals:
        labels, logits, classes = self._tally.labels_N, self._tally.logits_TNC, 0
        if labels is not None:
            labels = labels[rows].long() if self._task == "classification" else labels[rows].float()
            if self._task == "classification":
                classes = int(labels.max()) + 1 if logits is None else logits.shape[2]
        z_TnC = None if logits is None else logits[:, rows]
        return Signals(
            ids=self._ids[rows.numpy()],
            labels=labels,
            num_classes=classes,
            logits=None if z_TnC is None else z_TnC[-1],
            early_logits=z_TnC,
            history=z_TnC,
            response_losses=self._tally.losses_TN.mean(0)[rows] if self._task == "causal-lm" else None,
            seed=self.seed,
            task=self._task,  # type: ignore[arg-type] - "multi-label" was refused
        )

    def _score(self, signals: Signals, rows: Tensor) -> Tensor:
        """(n,) float64, the mean over the scored epochs."""
        if self._reading is not None:
            return self._tally.values_TN[:, rows].mean(0)
        if "logits" not in self.scorer.needs or signals.history is None:
            return self.scorer(signals).double()
        each = [self.scorer(replace(signals, logits=z_nC)).double() for z_nC in signals.history]
        return torch.stack(each).mean(0)

    def save(self, folder: str | Path) -> Path:
        """`scores.parquet`, `result.json` and `kept.txt`, the ids kept, one a line, in `folder`.

        Raises:
            ValueError: nothing has been scored yet.
        """
        if not hasattr(self, "result_"):
            raise ValueError("ScoreWhileTraining holds no scores yet; they are there after the scored epoch")
        write_atomic(Path(folder) / "kept.txt", "".join(f"{i}\n" for i in self.ids_))
        return self.result_.save(folder)

    # resume

    def _spent(self) -> dict[str, float]:
        now = {
            "hooks": self._watch.seconds,
            "selection": self._selecting.seconds,
            "scored_epochs": self._epoch_seconds,
        }
        return {part: self._before_resume[part] + seconds for part, seconds in now.items()}

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        facts = {"seconds": self._spent(), "task": self._task, "set_aside": self.set_aside_}
        if self._task is None:
            return {}, facts
        tensors = self._tally.state()
        if self._kept is not None:
            return tensors | {"kept": self._kept, "scores": self.scores_}, facts
        if self._reading is not None:
            tensors |= {f"reader/{name}": value for name, value in self._reader.state().items()}
        return tensors, facts

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self._before_resume, self._task = facts["seconds"], facts["task"]
        self.set_aside_ = facts["set_aside"]
        if not tensors:
            return
        self._tally.load(tensors)
        start = "reader/"
        reader = {k[len(start) :]: v.to(self._device) for k, v in tensors.items() if k.startswith(start)}
        if reader:
            self._reader.load(reader)
        if "kept" in tensors:
            self._kept, self.scores_ = tensors["kept"], tensors["scores"]
            rows = torch.isfinite(self.scores_).nonzero()[:, 0]
            self._finish(self._signals(rows), rows)

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    def on_evaluate(self, args, state, control, **kwargs):
        """Evaluation is no part of the epoch's seconds."""
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        """Writes what a resumed run needs into the checkpoint."""
        super().on_save(args, state, control, **kwargs)
        self._mark = time.perf_counter()

    def __repr__(self) -> str:
        return (
            f"ScoreWhileTraining({self.scorer.name!r}, at_epoch={self.at_epoch}, keep={self.keep}, "
            f"select={describe(self.select)!r})"
        )


def _readable() -> list[str]:
    """Names of the scorers that a training step can serve."""
    own = ("along_path", "model")
    found = scorer_methods.registry.items()
    return [n for n, cls in found if cls.needs <= SEEN and not any(hasattr(cls, a) for a in own)]


def _check_scorer(scorer: Any) -> None:
    """Refuses what a training step does not show."""
    missing = sorted(scorer.needs - SEEN) + (["features along a path"] if hasattr(scorer, "path") else [])
    missing += ["a model of its own"] if getattr(scorer, "model", None) is not None else []
    if missing:
        raise ValueError(
            f"scorer {scorer.name!r} needs {', '.join(missing)}, which training does not show; score before "
            f"training with DataPruner, or use one of {', '.join(_readable())}"
        )
    reading = getattr(scorer, "reading", None)
    if reading is None:
        return
    if getattr(reading, "statistics", "running") not in ("running", "paper"):
        raise ValueError(
            f"statistics={reading.statistics!r} wants moments before the scores; while training use "
            "TSA(statistics='running'), or score before training with DataPruner"
        )
    for option, usual in (("epochs", 1), ("warmup_steps", None)):
        if getattr(reading, option, usual) not in (usual, 0):
            raise ValueError(
                f"{option}={getattr(reading, option)!r} of the scorer has no meaning while training; "
                "give epochs= and at_epoch= to ScoreWhileTraining"
            )
