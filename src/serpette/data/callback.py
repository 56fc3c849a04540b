"""What callbacks that choose the examples of each pass share: setting up, counting, ending, resuming.

A callback writes what it knows beside the Trainer's checkpoint, one file a process, so that a resumed run
goes on with the same bits. On other data or with another configuration it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback

from ..files import write_atomic
from .examples import ID_COLUMN, Examples
from .passes import Loader, Stream, drive, read_loader, rows_in, wanted_passes
from .visits import Visit, Visits

FORMAT = 1
SAMPLED_ROWS = 64  # of which the fingerprint of a data set holds the content


class PassesCallback(TrainerCallback):
    """Gives the Trainer a `Stream` in place of its order. Abstract: see what raises NotImplementedError."""

    kind = ""

    def __init__(self, seed: int, ids: Any, resume_from: str | Path | None):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be a whole number")
        self.seed, self._given_ids, self.resume_from = seed, ids, resume_from
        self._visits: Visits | None = None
        self._driven: tuple[Any, list] | None = None

    # what a callback decides

    def _settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must share."""
        raise NotImplementedError

    def _aligned(self) -> int:
        """Passes over everything that come first, one in each Trainer epoch."""
        raise NotImplementedError

    def _begin(self, args: Any, model: nn.Module, dataset: Any) -> None:
        """Before the first step, also of a resumed run; raises ValueError for what cannot work."""
        raise NotImplementedError

    def _draw(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Rows, sorted, and weights of a pass."""
        raise NotImplementedError

    def _end(self) -> int | None:
        """Position of the stream at which training ends; None where that is not known yet."""
        raise NotImplementedError

    def _moment(self, step: int) -> float:
        """Step of the schedule as it was planned, `_planned` steps long, that stands for this one."""
        raise NotImplementedError

    def _before(self, inputs: Mapping) -> None:
        """Before a batch's forward pass."""

    def _after(self, visit: Visit) -> Any:
        """After it; see `Visits`."""

    def _idle(self) -> None:
        """The model runs, or ran, what is no batch of this training."""

    def _unhook(self) -> None:
        """Takes off hooks of its own."""

    def _batch_done(self) -> None:
        """After the backward pass of a batch; `_batches` counts it already."""

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs: tensors, and plain facts."""
        raise NotImplementedError

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        raise NotImplementedError

    # events of the Trainer

    def on_train_begin(
        self, args, state, control, model=None, lr_scheduler=None, train_dataloader=None, **kwargs
    ):
        """Replaces the order, and the pace of the learning rate."""
        assert model is not None
        self._close()
        who = type(self).__name__
        loader, owner = read_loader(args, train_dataloader, who)
        self._loader = Loader(**{**vars(loader), "aligned": self._aligned()})
        dataset = getattr(train_dataloader, "dataset", None)
        self._ids = ids_of(self._given_ids, dataset, who)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._planned, self._passes = state.max_steps, wanted_passes(args)
        self._batches = self._loader.batches_after(state.global_step)
        self._stream = Stream(self._loader, self.seed, self._draw)
        try:
            self._set_up(args, state, model, dataset)
        except BaseException:
            self._close()
            raise
        if self._passes is not None:
            old = drive(lr_scheduler, self._moment, who)
            self._driven = None if old is None else (lr_scheduler, old)
            self._set_end(state)
            state.compute_steps(args, state.max_steps)
        owner.sampler = self._stream

    def _set_up(self, args: Any, state: Any, model: nn.Module, dataset: Any) -> None:
        who = type(self).__name__
        self._begin(args, model, dataset)
        self._fingerprint = {
            **self._settings(),
            "seed": self.seed,
            "data": fingerprint(dataset, self._ids),
            **{k: v for k, v in vars(self._loader).items() if k not in ("rank", "aligned")},
        }
        if state.global_step:
            if args.ignore_data_skip:
                raise ValueError(f"{who} cannot resume with ignore_data_skip=True: it must find its place")
            self._load(args, state)
        self._visits = Visits(
            model,
            who,
            lambda: self._stream.batch(self._batches),
            self._before,
            self._after,
            self._idle,
        )
        self._visits.closed = self._unhook

    def on_epoch_begin(self, args, state, control, **kwargs):
        """A Trainer epoch is a unit of the stream."""
        unit = state.global_step // self._loader.steps
        self._stream.unit = unit
        self._stream.forget(self._loader.start_of(unit))

    def on_step_begin(self, args, state, control, **kwargs):
        """Announces the first batch, and says when the end comes."""
        assert self._visits is not None
        self._visits.begin()
        if self._passes is not None:
            self._set_end(state)

    def on_substep_end(self, args, state, control, **kwargs):
        """A batch within an accumulation."""
        self._one_more()
        assert self._visits is not None
        self._visits.begin()

    def on_step_end(self, args, state, control, **kwargs):
        """The last batch of a step; a pass may have ended."""
        before = self._loader.position_after(self._loader.batches_after(state.global_step - 1))
        self._one_more()
        now = self._loader.position_after(self._batches)
        number, share = self._stream.progress(now)
        state.epoch = float(min(number + share, self._passes or math.inf))
        if any(n >= self._loader.aligned for n in self._stream.ends_within(before, now)):
            _by_epoch(args, state, control, True)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        """What happens at the end of an epoch happens at the end of a pass."""
        if -(-state.global_step // self._loader.steps) > self._loader.aligned:
            _by_epoch(args, state, control, False)
        if control.should_training_stop:
            state.max_steps = self._planned  # the Trainer's samples a second count on it
        return control

    def on_save(self, args, state, control, **kwargs):
        """Writes what a resumed run needs into the checkpoint."""
        tensors, facts = self._tensors()
        meta = {"fingerprint": self._fingerprint, "facts": facts, "format": FORMAT, "step": state.global_step}
        held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        write_atomic(folder / self._file(), save(held, {"meta": json.dumps(meta)}))

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the hooks off."""
        self._close()

    # the rest

    def _one_more(self) -> None:
        assert self._visits is not None
        self._visits.check()
        if self._visits.open:
            raise ValueError(
                f"{type(self).__name__} did not see the model in a training batch; the Trainer's model must "
                "be the one that runs, in training mode"
            )
        self._batches += 1
        self._batch_done()

    def _set_end(self, state: Any) -> None:
        end = self._end()
        if end is not None:
            state.max_steps = self._loader.steps_to(end)

    def _last(self, length: int) -> int:
        """Rows of the last pass that are still wanted, of `length`."""
        assert self._passes is not None
        return rows_in(self._passes - (math.ceil(self._passes) - 1), length)

    def _close(self) -> None:
        if self._visits is not None:
            self._visits.close()
            self._visits = None
        self._unhook()
        if self._driven is not None:
            scheduler, old = self._driven
            scheduler.lr_lambdas, self._driven = old, None

    def _file(self) -> str:
        return f"serpette-{self.kind}-{self._loader.rank}.safetensors"

    def _load(self, args: Any, state: Any) -> None:
        folder = Path(self.resume_from or Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")
        path, who = folder / self._file(), type(self).__name__
        if not path.exists():
            raise ValueError(
                f"{str(folder)!r} holds no {path.name}: it was saved without {who}, killed while it was "
                "saved, or lies elsewhere; resume from an earlier one, or name the folder with resume_from="
            )
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["meta"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); resume from an earlier checkpoint") from error
        found, mine = meta["fingerprint"], json.loads(json.dumps(self._fingerprint))
        if found.get("data") != mine["data"]:
            raise ValueError(
                f"the training data changed since {str(folder)!r} was saved ({found.get('data')}, now "
                f"{mine['data']}); resume with the same examples in the same order, or start afresh"
            )
        changed = sorted(k for k in {*found, *mine} if found.get(k) != mine.get(k))
        if changed:
            what = ", ".join(f"{k}: {found.get(k)!r} -> {mine.get(k)!r}" for k in changed)
            raise ValueError(f"{str(folder)!r} was saved with another {who} ({what}); resume with the same")
        if meta["step"] != state.global_step:
            raise ValueError(
                f"{str(folder)!r} is of step {meta['step']}, the Trainer resumes from step "
                f"{state.global_step}; name the checkpoint that it resumes from with resume_from="
            )
        self._restore(tensors, meta["facts"])


def _by_epoch(args: Any, state: Any, control: Any, value: bool) -> None:
    """Sets what is done once an epoch."""
    if args.logging_strategy == "epoch":
        control.should_log = value
    if args.eval_strategy == "epoch" and args.eval_delay <= state.epoch:
        control.should_evaluate = value
    if args.save_strategy == "epoch":
        control.should_save = value


def ids_of(given: Any, dataset: Any, who: str) -> np.ndarray:
    """(N,) ids: as given, of the `id` column, or row numbers.

    Raises:
        ValueError: not unique, or not as many as rows.
    """
    if given is None or hasattr(given, "column_names"):
        ids = Examples(dataset if given is None else given).ids
    elif isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str):
        ids = np.array([str(i) for i in given])
    else:
        raise ValueError(f"ids={type(given).__name__} must be a list of ids or a data set with an id column")
    if len(ids) != len(dataset):
        raise ValueError(f"ids has {len(ids)} entries, the training set {len(dataset)} rows")
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"ids of {who} must be unique")
    return ids


def known_labels(dataset: Any) -> list | None:
    """Labels that can be had without decoding an example and are one number each, else None."""
    labels = Examples(dataset).labels()
    return labels if labels and all(isinstance(label, (int, float)) for label in labels) else None


def fingerprint(dataset: Any, ids: np.ndarray) -> str:
    """Length, ids, labels, and of a `datasets.Dataset` the content of 64 rows but their images."""
    digest = blake2b("\0".join(ids.tolist()).encode(), digest_size=16)
    digest.update(repr(known_labels(dataset)).encode())
    if isinstance(dataset, datasets.Dataset):
        plain = dataset.with_format(None)
        media = (datasets.Image, datasets.Audio)
        names = [n for n, f in plain.features.items() if not isinstance(f, media) and n != ID_COLUMN]
        if names:
            rows = range(0, len(plain), max(1, len(plain) // SAMPLED_ROWS))
            digest.update(repr(plain.select_columns(sorted(names)).select(rows)[:]).encode())
    return f"{len(dataset)} examples {digest.hexdigest()}"


def moment_of(done: Fraction, passes: Fraction, planned: int) -> float:
    """The planned step at which so many of the passes would have been done."""
    return float(min(done, passes) * planned / passes)
