"""Passes over a changing part of the training set, inside the loop of the stock transformers Trainer.

The Trainer fixes the length of its epochs before the first step and finds its place after a resume by it.
So its epochs stay as long as they are and become units of one stream of passes: the first units are one full
pass each, `aligned` of them, the later ones go on wherever the pass before them ended. A pass may be of any
length; training ends when as many passes are done as epochs were asked for. The learning rate, evaluation,
saving and logging "by epoch" follow the passes.

Letters: N examples, B batch size of a process, L batches of a process in a Trainer epoch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler


@dataclass(frozen=True)
class Loader:
    """The numbers of the Trainer's data loader. A batch is one process's micro-batch."""

    examples: int
    batch_size: int
    batches: int
    accumulation: int
    processes: int
    rank: int
    shuffle: bool
    aligned: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of a Trainer epoch."""
        return -(-self.batches // self.accumulation)

    @property
    def together(self) -> int:
        """Rows that all processes read at once."""
        return self.batch_size * self.processes

    @property
    def full_pass(self) -> int:
        """Rows of an aligned pass; several processes repeat some, so that all batches are whole."""
        return self.examples if self.processes == 1 else self.batches * self.together

    def start_of(self, unit: int) -> int:
        """Position in the stream at which a Trainer epoch starts."""
        full = min(unit, self.aligned)
        return full * self.full_pass + (unit - full) * self.batches * self.together

    def batches_after(self, steps: int) -> int:
        """Batches of one process in so many steps."""
        unit, step = divmod(steps, self.steps)
        return unit * self.batches + step * self.accumulation

    def position_after(self, batches: int) -> int:
        """Position in the stream after so many batches of each process."""
        unit, batch = divmod(batches, self.batches)
        return min(self.start_of(unit) + batch * self.together, self.start_of(unit + 1))

    def steps_to(self, position: int) -> int:
        """Steps until `position` of the stream has been read."""
        unit = position // (self.batches * self.together)
        while self.start_of(unit + 1) < position:
            unit += 1
        batches = -(-(position - self.start_of(unit)) // self.together)
        return unit * self.steps + min(-(-batches // self.accumulation), self.steps)


def read_loader(args: Any, loader: Any, who: str) -> tuple[Loader, BatchSampler]:
    """The numbers of the Trainer's loader, and the sampler whose order `who` is going to decide.

    Raises:
        ValueError: an order that is not the Trainer's own, with what to change.
    """
    from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher

    def refuse(what: str, way_out: str) -> ValueError:
        return ValueError(f"{who} decides the order of the examples, but {what}; {way_out}")

    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise refuse(
            f"the training set ({type(dataset).__name__}) is a stream without rows",
            "give a data set with a length, e.g. datasets.Dataset.from_list(list(stream))",
        )
    if isinstance(loader, DataLoaderDispatcher):
        raise refuse("batches are dispatched by one process", "set dispatch_batches=False")
    inner = loader.batch_sampler
    if isinstance(inner, BatchSamplerShard):
        if inner.split_batches or not inner.even_batches:
            raise refuse("batches are split or uneven", "set split_batches=False and even_batches=True")
        inner = inner.batch_sampler
    sampler = getattr(inner, "sampler", None)
    plain = isinstance(sampler, (RandomSampler, SequentialSampler)) and type(inner) is BatchSampler
    if plain and isinstance(sampler, RandomSampler):
        plain = not sampler.replacement and sampler.num_samples == len(dataset)  # type: ignore[arg-type]
    if not plain or not isinstance(inner, BatchSampler):
        raise refuse(
            f"the Trainer uses a {type(sampler if type(inner) is BatchSampler else inner).__name__}",
            "leave train_sampling_strategy (group_by_length) at its default and get_train_dataloader alone",
        )
    if inner.drop_last:
        raise refuse("dataloader_drop_last leaves examples out", "set dataloader_drop_last=False")
    for option in ("deepspeed", "fsdp", "torch_compile"):
        if getattr(args, option, None):
            raise ValueError(f"{who} hooks the model, which {option} replaces; train without {option}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{who} does not work with torch's DataParallel over {args.n_gpu} devices; "
            "start one process a device with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    numbers = Loader(
        examples=len(dataset),  # type: ignore[arg-type] - it has a length, see above
        batch_size=inner.batch_size,
        batches=len(loader),
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        rank=args.process_index,
        shuffle=not isinstance(sampler, SequentialSampler),
    )
    return numbers, inner


@dataclass(frozen=True)
class Pass:
    """One pass: its rows in the order in which they are visited, from position `start` of the stream on."""

    number: int
    start: int
    rows: Tensor  # (m,) int64
    weights: Tensor | None  # (m,) float32
    fresh: int  # of these rows; the others are repeats that make the batches of several processes even

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


@dataclass(frozen=True)
class Part:
    """One batch: rows (n,) int64, weights (n,) or None, and which of them are no repeats (n,) bool."""

    rows: Tensor
    weights: Tensor | None
    fresh: Tensor


class Stream(Sampler[int]):
    """Pass after pass, without end; as a sampler it yields the rows of one Trainer epoch, `unit`.

    Args:
        loader: the numbers of the Trainer's loader.
        seed: of the order; each pass has its own.
        draw: `(number) -> (rows (m,) sorted, weights (m,) or None)`, asked when the first row of a pass
            is needed.

    Example:
        >>> loader = Loader(5, 2, 3, 1, 1, 0, shuffle=False, aligned=1)
        >>> rows = [torch.arange(5), *[torch.tensor([1, 3])] * 9]
        >>> stream = Stream(loader, 0, lambda number: (rows[number], None))
        >>> list(stream)
        [0, 1, 2, 3, 4]
        >>> stream.unit = 1
        >>> list(stream)
        [1, 3, 1, 3, 1, 3]
    """

    def __init__(self, loader: Loader, seed: int, draw: Callable[[int], tuple[Tensor, Tensor | None]]):
        self.loader, self.seed, self.draw = loader, seed, draw
        self.unit = 0
        self.passes: dict[int, Pass] = {}

    def __len__(self) -> int:
        return self.loader.examples  # so that the loader keeps its length

    def __iter__(self) -> Iterator[int]:
        at, stop = self.loader.start_of(self.unit), self.loader.start_of(self.unit + 1)
        while at < stop:
            held = self.at(at)
            until = min(stop, held.end)
            yield from held.rows[at - held.start : until - held.start].tolist()
            at = until

    def at(self, position: int) -> Pass:
        """The pass that holds `position`; drawn now if it was not yet."""
        for held in self.passes.values():
            if held.start <= position < held.end:
                return held
        last = max(self.passes, default=-1)
        number, start = (last + 1, self.passes[last].end) if self.passes else (0, 0)
        assert position >= start, "passes that were forgotten are not asked for"
        held = self.put(number, start, *self.draw(number))
        return held if position < held.end else self.at(position)

    def put(self, number: int, start: int, rows: Tensor, weights: Tensor | None) -> Pass:
        """Adds a pass over `rows`, in the order of its own seed."""
        if not len(rows):
            raise ValueError("a pass over no example would never end; keep more examples")
        order = torch.arange(len(rows))
        if self.loader.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = torch.randperm(len(rows), generator=generator)
        length = self.loader.full_pass if number < self.loader.aligned else len(order)
        fresh = len(order)
        order = order.repeat(-(-length // fresh))[:length]
        rows, weights = rows[order], None if weights is None else weights[order]
        self.passes[number] = Pass(number, start, rows, weights, fresh)
        return self.passes[number]

    def forget(self, position: int) -> None:
        """Lets go of the passes that end before `position`, all but the last."""
        last = max(self.passes, default=-1)
        for number in [n for n, p in self.passes.items() if p.end <= position and n != last]:
            del self.passes[number]

    def batch(self, number: int, rank: int | None = None) -> Part:
        """What this process, or that of `rank`, reads in its batch `number`, counted from the first step."""
        loader = self.loader
        unit, batch = divmod(number, loader.batches)
        at = (
            loader.start_of(unit)
            + (batch * loader.processes + (loader.rank if rank is None else rank)) * loader.batch_size
        )
        return self.rows(at, min(at + loader.batch_size, loader.start_of(unit + 1)))

    def rows(self, at: int, stop: int) -> Part:
        """The positions `at` to `stop` of the stream."""
        rows, weights, fresh = [], [], []
        while at < stop:
            held = self.at(at)
            piece = slice(at - held.start, min(stop, held.end) - held.start)
            rows.append(held.rows[piece])
            weights.append(torch.ones(len(rows[-1])) if held.weights is None else held.weights[piece])
            fresh.append(torch.arange(piece.start, piece.stop) < held.fresh)
            at = held.start + piece.stop
        return Part(torch.cat(rows), torch.cat(weights), torch.cat(fresh))

    def progress(self, position: int) -> tuple[int, Fraction]:
        """(number of the pass, share of it that is done) after the rows before `position`."""
        if position == 0:
            return 0, Fraction(0)
        held = self.at(position - 1)
        return held.number, Fraction(position - held.start, held.end - held.start)

    def ends_within(self, before: int, now: int) -> list[int]:
        """Numbers of the passes whose last row lies in the positions (before, now]."""
        return [n for n, p in self.passes.items() if before < p.end <= now]


def drive(scheduler: Any, moment: Callable[[int], float], who: str) -> list | None:
    """Makes a LambdaLR ask for `moment(step)` instead of the step; the old lambdas, to set them back.

    A schedule of another kind is left as it is, with a warning where it counts steps.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            warnings.warn(
                f"{who} makes training shorter, but the schedule {type(scheduler).__name__} counts steps and "
                "will not reach its end; use a schedule of transformers (lr_scheduler_type) or a LambdaLR",
                stacklevel=2,
            )
        return None
    old = list(scheduler.lr_lambdas)
    # plain functions: the scheduler's state_dict leaves them out
    scheduler.lr_lambdas = [lambda step, f=f: f(moment(step)) for f in old]  # type: ignore[misc]
    return old


def wanted_passes(args: Any) -> Fraction | None:
    """Passes asked for, `num_train_epochs`; None where `max_steps` says when to end."""
    return None if args.max_steps > 0 else Fraction(str(args.num_train_epochs))


def rows_in(share: Fraction, length: int) -> int:
    """Rows of a share of a pass, rounded up."""
    return math.ceil(share * length)
