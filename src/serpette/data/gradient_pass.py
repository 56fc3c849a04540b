"""The backward pass of `observe`: LoRA gradients of each example for the scorers with a `reading`.

One forward and one backward pass a batch serve all of them. Before the first batch the adapter is warmed up
where a reading asks for it, and the moments that a reading wants are gathered; both are kept beside the
chunks, so that a killed run goes on with the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..files import write_atomic
from ..lora_gradients import LayerGradients, LoraGradients
from ..registry import near
from ..types import Task, uniform_of
from .examples import Examples, check_labels

WARMUP_STEPS = 32  # of a fresh LoRA: the head has left chance and every B is away from 0
WARMUP_BATCH = 16
FILE = "gradients.safetensors"


@dataclass
class _State:
    """The model at one moment of its training: values of what trains (None: as given), and readers."""

    values: dict[str, Tensor] | None
    readers: dict[Hashable, Any] = field(default_factory=dict)


class GradientPass:
    """Runs batches forward and backward; a context manager that leaves the model as it was.

    Args:
        reader: a `Reader` or `LanguageReader` of the model, which has a LoRA that trains.
        readings: of the scorers, see `serpette.types.Reading`.
        precision: autocast, e.g. to `torch.bfloat16`; the readings are float32 all the same.

    Raises:
        ValueError: no LoRA that trains, see `serpette.lora_gradients.lora_layers`.
    """

    def __init__(
        self,
        reader: Any,
        readings: Sequence[Any],
        task: Task,
        outputs: int,
        precision: torch.dtype | None = None,
    ):
        self.reader, self.outputs, self.precision = reader, outputs, precision
        self.task: Task = task
        self.readings = list(dict.fromkeys(readings))
        self.hooks = LoraGradients(reader.model, self._visit)
        self.trained = {n: p for n, p in reader.model.named_parameters() if p.requires_grad}
        self.states: list[_State] = []
        self.seconds = {"warmup": 0.0, "moments": 0.0}
        self.moving = any(getattr(r, "statistics", "") in ("running", "paper") for r in self.readings)

    def __enter__(self) -> GradientPass:
        self._given = {name: p.detach().clone() for name, p in self.trained.items()}
        self._gradients = {name: p.grad for name, p in self.trained.items()}
        self._checkpointed = [
            (m, m._gradient_checkpointing_func) for m in self.reader.model.modules() if _is_checkpointed(m)
        ]
        for module, checkpoint in self._checkpointed:
            module._gradient_checkpointing_func = _in_evaluation_mode(module, checkpoint)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self._put(None)
        for module, checkpoint in self._checkpointed:
            module._gradient_checkpointing_func = checkpoint
        for name, parameter in self.trained.items():
            parameter.grad = self._gradients[name]

    def prepare(
        self,
        examples: Examples,
        batch_size: int,
        folder: Path | None,
        rank: int,
        world: int,
    ) -> None:
        """Warm-up and moments, or what an earlier run left of them in `folder`.

        Raises:
            ValueError: statistics that depend on the order, in more than one process; zero gradients.
        """
        if self.moving and world > 1:
            raise ValueError(
                "statistics='running' and 'paper' depend on the order of the examples and need one process; "
                "use statistics='sampled' in several"
            )
        file = None if folder is None or self.moving else folder / FILE
        if file is not None and file.exists():
            self._load(file)
            return
        start = time.perf_counter()
        self._make_states(examples)
        self.seconds["warmup"] = time.perf_counter() - start
        start = time.perf_counter()
        for state in self.states:
            self._gather_moments(state, examples, batch_size, rank, world)
            self._read_targets(state, examples, batch_size, rank, world)
        self.seconds["moments"] = time.perf_counter() - start
        if file is not None and rank == 0:
            self._save(file)

    def __call__(
        self, inputs: dict[str, Tensor], labels: Sequence, ids: np.ndarray
    ) -> tuple[tuple[Tensor, Tensor | None] | None, dict[Hashable, Tensor], Tensor]:
        """((features, logits) of the given model, {reading: (n, ...)}, (n,) whether the loss is finite).

        If one is not, nothing was read: call again without those examples.
        """
        shown = None
        sums: dict[Hashable, Tensor] = {}
        for state in self.states:
            output, fine_n = self._backward(state, inputs, labels, ids)
            if not bool(fine_n.all()):
                return None, {}, fine_n
            shown = output if state.values is None else shown
            for reading, reader in state.readers.items():
                value = reader.batch().cpu()
                sums[reading] = sums[reading] + value if reading in sums else value
        self._put(None)
        if shown is None:
            with torch.inference_mode(), self._autocast():
                shown = self.reader(inputs)
        shares = {reading: sum(reading in s.readers for s in self.states) for reading in sums}
        return shown, {reading: value / shares[reading] for reading, value in sums.items()}, fine_n

    def _autocast(self) -> Any:
        return torch.autocast(self.reader.device.type, self.precision) if self.precision else nullcontext()

    def _backward(
        self, state: _State, inputs: dict[str, Tensor], labels: Sequence, ids: np.ndarray
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """One forward and backward pass with `state` in place; no backward pass if a loss is not finite."""
        self._put(state.values)
        self._reading = list(state.readers.values())
        mask = inputs.get("attention_mask")
        self.hooks.begin(len(ids), None if mask is None else mask.to(self.reader.device))
        for parameter in self.trained.values():
            parameter.grad = None
        with torch.enable_grad():
            features, logits = self._forward(inputs)
            losses_n = losses_of(logits, labels, ids, self.outputs, self.task)
            fine_n = torch.isfinite(losses_n.detach())
            if bool(fine_n.all()):
                offsets = (uniform_of(ids, 0) * 2**20).long()
                for reader in self._reading:
                    reader.begin(len(ids), self.reader.device, offsets, self.hooks.input_of)
                losses_n.sum().backward()  # a sum: a mean would make the gradient depend on the batch
        self.hooks.end()
        return (features.detach(), None if logits is None else logits.detach()), fine_n.cpu()

    def _forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features and logits with their graph, in a model that checkpoints if it was told to."""
        for module, _ in self._checkpointed:  # transformers does so in training mode only
            module.training = True
        try:
            with self._autocast():
                return self.reader(inputs)
        finally:
            for module, _ in self._checkpointed:
                module.training = False

    def _visit(self, seen: LayerGradients) -> None:
        with torch.no_grad():
            for reader in self._reading:
                reader.layer(seen)

    def _put(self, values: dict[str, Tensor] | None) -> None:
        for name, value in (self._given if values is None else values).items():
            self.trained[name].data.copy_(value)

    def _make_states(self, examples: Examples) -> None:
        """One state for each scoring epoch; readings with the same warm-up share theirs."""
        by_schedule: dict[tuple, list] = {}
        for reading in self.readings:
            steps = reading.warmup_steps
            if steps is None:
                steps = (
                    0 if any(bool(layer.factors[1].any()) for layer in self.hooks.layers) else WARMUP_STEPS
                )
            by_schedule.setdefault((steps, reading.warmup_learning_rate, reading.epochs), []).append(reading)
        for (steps, learning_rate, epochs), readings in by_schedule.items():
            self._put(None)
            optimizer = torch.optim.AdamW(self.trained.values(), learning_rate, weight_decay=0.0)
            for epoch in range(epochs):
                wanted = steps if epoch == 0 else -(-len(examples) // WARMUP_BATCH)
                self._train(optimizer, examples, wanted, epoch)
                values = {n: p.detach().clone() for n, p in self.trained.items()} if wanted or epoch else None
                state = _State(values)
                state.readers = {reading: reading.reader(self.hooks.layers) for reading in readings}
                self.states.append(state)
            self._put(None)

    def _train(self, optimizer: torch.optim.Optimizer, examples: Examples, steps: int, epoch: int) -> None:
        """AdamW on the mean loss, in an order by ids."""
        order = np.argsort(uniform_of(examples.ids, epoch + 1).numpy(), kind="stable")
        parts = [order[i : i + WARMUP_BATCH] for i in range(0, len(order), WARMUP_BATCH)]
        for step in range(steps):
            rows, inputs, labels, _ = examples.read(parts[step % len(parts)].tolist())
            while rows:
                optimizer.zero_grad()
                with torch.enable_grad():
                    _, logits = self._forward(inputs)
                    losses_n = losses_of(logits, labels, examples.ids[rows], self.outputs, self.task)
                fine_n = torch.isfinite(losses_n.detach()).cpu()
                if bool(fine_n.all()):
                    losses_n.mean().backward()
                    optimizer.step()
                    break
                rows, inputs, labels = only(fine_n, rows, inputs, labels)  # 0 times NaN is NaN

    def _gather_moments(
        self,
        state: _State,
        examples: Examples,
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        wanted = {reading: reader.sample for reading, reader in state.readers.items()}
        order = np.argsort(uniform_of(examples.ids, 0).numpy(), kind="stable")
        readers = state.readers
        for number in sorted({n if n is not None else len(order) for n in wanted.values()} - {0}):
            state.readers = {
                r: readers[r] for r, n in wanted.items() if (len(order) if n is None else n) == number
            }
            rows = np.sort(order[:number])
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            mine, reduce = _share(parts, rank, world)
            for _ in self._batches(state, examples, mine):
                pass
            for reader in state.readers.values():
                reader.finish(reduce)
        state.readers = readers

    def _read_targets(
        self, state: _State, examples: Examples, batch_size: int, rank: int, world: int
    ) -> None:
        """The examples that the others are to be like, for the readers that have some."""
        readers = state.readers
        for reading, reader in readers.items():
            if getattr(reader, "target", None) is None:
                continue
            of, rows = targets_of(reading, examples)
            state.readers = {reading: reader}
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            mine, reduce = _share(parts, rank, world)
            for _ in self._batches(state, of, mine):
                reader.count_targets()
            reader.finish_targets(reduce)
        state.readers = readers

    def _batches(self, state: _State, examples: Examples, parts: Sequence[Any]) -> Iterator[None]:
        """Reads `parts` of the rows, without examples whose loss is not finite; stops after each batch."""
        for part in parts:
            good, inputs, labels, _ = examples.read([int(row) for row in part])
            while good:
                _, fine_n = self._backward(state, inputs, labels, examples.ids[good])
                if bool(fine_n.all()):
                    yield
                    break
                good, inputs, labels = only(fine_n, good, inputs, labels)

    def _save(self, file: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, state in enumerate(self.states):
            for name, value in (state.values or {}).items():
                tensors[f"{i}/value/{name}"] = value.contiguous()
            for reading, reader in state.readers.items():
                for key, value in reader.state().items():
                    tensors[f"{i}/{self.readings.index(reading)}/{key}"] = value.contiguous()
        about = [
            {"given": s.values is None, "readings": [self.readings.index(r) for r in s.readers]}
            for s in self.states
        ]
        meta = {"states": json.dumps(about), "seconds": json.dumps(self.seconds)}
        write_atomic(file, save(tensors, meta))

    def _load(self, file: Path) -> None:
        with safe_open(file, "pt", device=str(self.reader.device)) as held:
            meta = held.metadata()
            self.seconds = json.loads(meta["seconds"])
            self.states = []
            for i, about in enumerate(json.loads(meta["states"])):
                start = f"{i}/value/"
                names = [k for k in held.keys() if k.startswith(start)]  # noqa: SIM118 - not a dict
                values = {k[len(start) :]: held.get_tensor(k) for k in names}
                state = _State(None if about["given"] else values)
                for number in about["readings"]:
                    start = f"{i}/{number}/"
                    names = [k for k in held.keys() if k.startswith(start)]  # noqa: SIM118
                    reader = self.readings[number].reader(self.hooks.layers)
                    reader.load({k[len(start) :]: held.get_tensor(k) for k in names})
                    state.readers[self.readings[number]] = reader
                self.states.append(state)


def losses_of(logits: Tensor | None, labels: Sequence, ids: np.ndarray, outputs: int, task: Task) -> Tensor:
    """(n,) loss of each example: cross-entropy, squared error, or the sum over the response tokens.

    The `logits` (n, 2) of a causal LM are the mean loss of the response tokens and their number.
    """
    assert logits is not None, "a model with LoRA and no head has no loss"
    if task == "causal-lm":
        return logits.float().prod(1)
    y = check_labels(labels, ids, outputs, task).to(logits.device)
    if task == "regression":
        return (logits.float().squeeze(-1) - y).square()
    return cross_entropy(logits.float(), y, reduction="none")


def only(
    keep_n: Tensor, rows: list[int], inputs: dict[str, Tensor], labels: list
) -> tuple[list[int], dict[str, Tensor], list]:
    """The examples of a batch that `keep_n` (n,) says."""
    kept = keep_n.tolist()
    return (
        [row for row, fine in zip(rows, kept, strict=True) if fine],
        {name: value[keep_n] for name, value in inputs.items()},
        [label for label, fine in zip(labels, kept, strict=True) if fine],
    )


def targets_of(reading: Any, examples: Examples) -> tuple[Examples, list[int]]:
    """Where the targets of a reading are: the examples themselves or another data set, and the rows.

    Raises:
        ValueError: an id that is not among the examples, a data set that cannot be opened.
    """
    if isinstance(reading.target, str):
        from .sources import open_dataset

        data = open_dataset(
            reading.target, reading.target_split, limit=reading.target_limit, seed=reading.seed
        )
        of = Examples(
            data,
            processing_class=examples.processing_class,
            data_collator=examples.data_collator,
            label_column=None if examples.task == "causal-lm" else examples.label_column,
            max_length=examples.max_length,
            task=examples.task,  # type: ignore[arg-type] - set by `observe`
        )
        of.accepted = examples.accepted
        return of, list(range(len(of)))
    row_of = {str(name): row for row, name in enumerate(examples.ids)}
    strange = [name for name in reading.target if name not in row_of]
    if strange:
        raise ValueError(
            f"target id {strange[0]!r} is not among the examples{near(strange[0], row_of)}"
            if len(row_of) < 1000
            else f"target id {strange[0]!r} is not among the {len(row_of)} examples"
        )
    return examples, [row_of[name] for name in reading.target]


def _share(parts: list, rank: int, world: int) -> tuple[list, Callable[[Tensor], Tensor] | None]:
    """The parts of this process, and how to sum over processes; too few parts for all: each does them all."""
    if world == 1 or len(parts) < world:
        return parts, None
    return parts[rank::world], _summed


def _is_checkpointed(module: Any) -> bool:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return "GradientCheckpointingLayer" in kinds and module.gradient_checkpointing


def _in_evaluation_mode(module: Any, checkpoint: Callable) -> Callable:
    """`checkpoint` that runs the module in evaluation mode: some layers drop out by their own mode."""

    def run(function: Callable, *arguments: Any, **options: Any) -> Any:
        def evaluated(*given: Any, **named: Any) -> Any:
            mode, module.training = module.training, False
            try:
                return function(*given, **named)
            finally:
                module.training = mode

        return checkpoint(evaluated, *arguments, **options)

    return run


def _summed(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value
