"""The one place where a model reads examples: one pass serves many scorers.

Each example is decoded once, also for a path of masked models: a chunk of decoded batches is held
while each model of the path runs over it. Chunks go to a store, so a killed run continues; under
torchrun or accelerate the chunks are shared out among the processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..masking import MaskedPath
from ..types import PathSpec, Signals, Task, uniform_of
from .examples import Examples, check_labels
from .features import Features, Reader, accepted_names
from .gradient_pass import GradientPass, only
from .language import LanguageReader, is_causal_lm
from .paths import grow, key_of, on_path, stored_paths
from .processes import broadcast, processes, progress_bar, together
from .store import ChunkStore

PILOT = 1024  # examples on which an adaptive path decides where to stop; they are decoded once, too

Batch = tuple[list[int], dict[str, Tensor], list, dict[str, str]]


@dataclass
class Observation:
    """What `observe` returns.

    Args:
        signals: of the N examples that could be read, in the order of the data set.
        rows: (N,) their row numbers in the data set.
        set_aside: {id: reason} of the examples that could not be read.
        seconds: of decoding, of the unmasked pass and of the other points of all paths; a resumed run
            counts what earlier runs spent on the chunks that it takes over.
        passes: forward passes over the data.
    """

    signals: Signals
    rows: Tensor
    set_aside: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: int = 1


def infer_task(model: nn.Module, reader: Reader) -> Task:
    """`"causal-lm"` for a *ForCausalLM, `"regression"` for a head with one output or a config that says so.

    Else `"classification"`.
    """
    if is_causal_lm(model):
        return "causal-lm"
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return "regression" if problem == "regression" or reader.num_classes == 1 else "classification"


def observe(
    model: nn.Module,
    examples: Any,
    scorers: Sequence[Any] = (),
    *,
    task: Task | None = None,
    features: Features = None,
    batch_size: int = 32,
    chunk_size: int = 512,
    folder: Path | None = None,
    on_bad: str = "set_aside",
    precision: torch.dtype | None = None,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
    run_model: bool = True,
) -> Observation:
    """Embeddings and logits of `examples`, and features along each path that `scorers` ask for.

    Args:
        model: its mode and its weights are as before on the way out.
        examples: an `Examples`, or the data set of one.
        task: found from the model by default.
        features: see `serpette.data.features.Reader`.
        batch_size: examples a forward pass; changes no score beyond rounding.
        chunk_size: decoded examples held at a time. Masks are put in place once a chunk, so larger is
            faster; 512 images of 224 px hold 0.3 GiB.
        folder: where the chunks are kept, shared by all processes; None = in memory.
        on_bad: `"set_aside"` lists an image that does not decode and goes on, `"raise"` stops there.
        precision: autocast to e.g. `torch.bfloat16`.
        run_model: False only reads the examples, to find those that cannot be read: the signals hold ids and
            labels.

    Raises:
        ValueError: bad labels, NaN in an input, no example left, a folder of another run, scorers without a
            run of the model.
    """
    if scorers and not run_model:
        names = ", ".join(scorer.name for scorer in scorers)
        raise ValueError(
            f"run_model=False leaves the scorers {names} nothing to score; leave it out, or give no scorers"
        )
    reader: Any = Reader(model, features)
    task = task or infer_task(model, reader)
    language = task == "causal-lm"
    if language:
        reader = LanguageReader(model, features)
        with evaluating(model):
            reader.check()
    if not isinstance(examples, Examples):
        examples = Examples(examples)
    examples.accepted, examples.task = accepted_names(model), task
    raw = None if language else examples.labels()
    names = None if language else examples.class_names
    outputs = 0 if task == "regression" else reader.num_classes
    if raw is not None:
        check_labels(raw, examples.ids, outputs, task)
    if names and outputs and len(names) > outputs:
        raise ValueError(
            f"the model has {outputs} classes, the data set {len(names)}; "
            f"load it with num_labels={len(names)}"
        )

    by_path = list(dict.fromkeys(scorer.path for scorer in scorers if hasattr(scorer, "path")))
    masked = {spec: MaskedPath(model, spec, reader.head) for spec in by_path}
    plan = _plan(examples, batch_size, chunk_size, pilot=any(spec.adaptive for spec in by_path))
    fingerprint = {}
    if folder is not None:
        fingerprint = {
            "format": 1,
            "model": _of_model(model),
            "data": _of_data(examples, raw),
            "task": task,
            "paths": [repr(spec) for spec in by_path],
            "features": getattr(features, "__qualname__", features),
            "batch_size": batch_size,
            "chunk_size": chunk_size,
            "precision": str(precision),
            "max_length": examples.max_length,
        }
    readings = list(dict.fromkeys(scorer.reading for scorer in scorers if hasattr(scorer, "reading")))
    gradients = GradientPass(reader, readings, task, outputs, precision) if readings else None
    answers = language and any("answer_losses" in scorer.needs for scorer in scorers)
    if folder is not None and answers:
        fingerprint["answers"] = True
    if folder is not None and readings:
        fingerprint["readings"] = [repr(reading) for reading in readings]
    if folder is not None and not run_model:
        fingerprint["run_model"] = False
    store = ChunkStore(folder, fingerprint)
    whole = all(map(store.has, range(len(plan))))
    if gradients is not None and gradients.moving and not whole:
        store.clear()  # moving statistics cannot go on in the middle
    work = _Work(
        reader, examples, store, plan, task, outputs, on_bad, precision, num_workers, gradients, answers,
        run_model,
    )  # fmt: skip

    rank, world = processes()
    lengths: dict[PathSpec, tuple[int, list]] = {}
    with (
        evaluating(model),
        gradients or nullcontext(),
        progress_bar(len(plan), "observing" if run_model else "reading", progress and rank == 0) as advance,
    ):
        with together(world):
            if gradients is not None and not whole:
                gradients.prepare(examples, batch_size, folder, rank, world)
        with together(world):
            lengths = work.pilot(by_path, masked, seed) if rank == 0 else {}
        lengths = broadcast(lengths, world)
        lengths = {spec: lengths[spec] for spec in by_path}  # the order is that of the stored features
        with together(world):
            for number in range(len(plan)):
                if not store.has(number) and number % world == rank:
                    work.chunk(number, masked, lengths)
                advance()
    store.exchange(range(len(plan)), world)
    observation = _gather(store, len(plan), examples, lengths, task, seed, readings)
    if gradients is not None:
        observation.seconds |= gradients.seconds
    if not run_model:
        observation.passes = 0
    return observation


@dataclass
class _Work:
    reader: Any  # Reader or LanguageReader
    examples: Examples
    store: ChunkStore
    plan: list[list[list[int]]]  # chunk -> batch -> rows
    task: Task
    outputs: int  # of the head: every label is below it; 0 = not known
    on_bad: str
    precision: torch.dtype | None
    num_workers: int
    gradients: GradientPass | None = None
    answers: bool = False  # the losses of a causal LM without the prompts, too
    run_model: bool = True

    def decode(self, number: int) -> list[Batch]:
        loader = torch.utils.data.DataLoader(
            self.plan[number],  # type: ignore[arg-type] - any list is a map-style data set
            batch_size=None,
            collate_fn=self.examples.read,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else it draws a seed from the user's
        )
        batches = list(loader)
        bad = {i: reason for batch in batches for i, reason in batch[3].items()}
        if bad and self.on_bad == "raise":
            name, reason = next(iter(bad.items()))
            raise ValueError(f"example {name!r}: {reason}; mend it, or go on without it: on_bad='set_aside'")
        return batches

    def autocast(self) -> Any:
        return torch.autocast(self.reader.device.type, self.precision) if self.precision else nullcontext()

    def forward(self, batches: list[Batch]) -> tuple[Tensor, Tensor | None]:
        """Features (n, D) and logits (n, C) of all batches of a chunk; of a causal LM losses (n, 2)."""
        with torch.inference_mode(), self.autocast():
            outputs = [self.reader(inputs) for _, inputs, _, _ in batches if inputs]
        if not outputs:
            return torch.zeros(0, 1), None
        logits = None if outputs[0][1] is None else torch.cat([z for _, z in outputs if z is not None])
        return torch.cat([h for h, _ in outputs]), logits

    def backward(self, batches: list[Batch]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """As `forward`, and what was read off the backward pass; sets aside whose loss is not finite."""
        assert self.gradients is not None
        shown, readings = [], []
        for number, (rows, inputs, labels, bad) in enumerate(batches):
            while rows:
                output, values, fine_n = self.gradients(inputs, labels, self.examples.ids[rows])
                if output is not None:
                    shown.append(output)
                    readings.append(values)
                    break
                lost = [str(self.examples.ids[r]) for r, ok in zip(rows, fine_n, strict=True) if not ok]
                if self.on_bad == "raise":
                    raise ValueError(
                        f"the loss of the example with id {lost[0]!r} is not finite; "
                        "mend it, or go on without it: on_bad='set_aside'"
                    )
                bad = bad | dict.fromkeys(lost, "its loss is not finite")
                rows, inputs, labels = only(fine_n, rows, inputs, labels)
            batches[number] = rows, inputs, labels, bad
        if not shown:
            return torch.zeros(0, 1), None, {}
        logits = None if shown[0][1] is None else torch.cat([z for _, z in shown])
        held = {
            f"reading:{i}": torch.cat([values[reading] for values in readings])
            for i, reading in enumerate(self.gradients.readings)
        }
        return torch.cat([h for h, _ in shown]), logits, held

    def pilot(self, by_path: list, masked: dict, seed: int) -> dict[PathSpec, tuple[int, list]]:
        """{path: (number of points, curve)}; grows the adaptive ones on the first chunk, and stores it."""
        fixed = {s: (len(s.points), []) for s in by_path if not s.adaptive}
        adaptive = [s for s in by_path if s.adaptive]
        if not adaptive:
            return fixed
        if self.store.has(0):
            meta = self.store.read(0, ())[1]
            return fixed | {s: (meta["points"][i], meta["curves"][i]) for i, s in enumerate(adaptive)}
        tensors, meta, batches = self.unmasked(0)
        ids, labels = self.examples.ids[tensors["rows"].numpy()], tensors.get("labels")
        if not len(ids):
            name, reason = next(iter(meta["set_aside"].items()))
            raise ValueError(f"none of the first examples could be read; {name!r}: {reason}")
        classes = _count_classes(self.examples, labels, self.task)
        signals = Signals(ids, labels, classes, seed=seed, task=self.task)
        grown = {}
        start = time.perf_counter()
        for spec in adaptive:
            grown[spec], stack = grow(
                spec,
                signals,
                on_path(tensors),
                lambda p, spec=spec: self.masked_features(batches, masked[spec], p),
            )
            tensors[key_of(spec, by_path)] = stack[1:]
        for spec in fixed:
            tensors[key_of(spec, by_path)] = self.along(batches, masked[spec], len(spec.points))
        meta["seconds"]["path"] = time.perf_counter() - start
        meta["points"] = [grown[s][0] for s in adaptive]
        meta["curves"] = [grown[s][1] for s in adaptive]
        self.store.write(0, tensors, meta)
        return fixed | grown

    def unmasked(self, number: int) -> tuple[dict[str, Tensor], dict, list[Batch]]:
        start = time.perf_counter()
        batches = self.decode(number)
        decoded = time.perf_counter()
        embeddings, logits, readings = None, None, {}
        if self.gradients is not None:
            embeddings, logits, readings = self.backward(batches)
        elif self.run_model:
            embeddings, logits = self.forward(batches)
        rows = [row for batch in batches for row in batch[0]]
        raw = [label for batch in batches for label in batch[2]]
        tensors = {"rows": torch.tensor(rows, dtype=torch.int64)}
        if embeddings is not None:
            tensors["embeddings"] = embeddings
        if self.task != "causal-lm":
            tensors["labels"] = check_labels(raw, self.examples.ids[rows], self.outputs, self.task)
            if logits is not None:
                tensors["logits"] = logits
        elif self.run_model:
            tensors |= self.losses(batches, rows, logits)
        tensors |= readings
        seconds = {"decoding": decoded - start, "unmasked": time.perf_counter() - decoded, "path": 0.0}
        bad = {i: reason for batch in batches for i, reason in batch[3].items()}
        return tensors, {"seconds": seconds, "set_aside": bad}, batches

    def losses(self, batches: list[Batch], rows: list[int], found_n2: Tensor | None) -> dict[str, Tensor]:
        """Those of the responses of a causal LM, (n,) each."""
        losses_n = torch.zeros(0) if found_n2 is None else found_n2[:, 0].contiguous()
        if not bool(torch.isfinite(losses_n).all()):
            who = str(self.examples.ids[rows[int((~torch.isfinite(losses_n)).nonzero()[0, 0])]])
            raise ValueError(
                f"the loss of the example with id {who!r} is not finite: no score would mean anything; "
                "load the model in float32 or bfloat16, or remove the example"
            )
        tensors = {"response_losses": losses_n}
        if self.answers:
            with torch.inference_mode(), self.autocast():
                alone = [self.reader.answer_losses(inputs) for _, inputs, _, _ in batches if inputs]
            tensors["answer_losses"] = torch.cat(alone) if alone else losses_n
        return tensors

    def masked_features(self, batches: list[Batch], masked: MaskedPath, point: int) -> Tensor:
        with masked.at(point):
            features, logits = self.forward(batches)
        return logits[:, :1] if self.task == "causal-lm" and logits is not None else features

    def along(self, batches: list[Batch], masked: MaskedPath, points: int) -> Tensor:
        """(P - 1, n, D): every point but the unmasked one."""
        features = [self.masked_features(batches, masked, p) for p in range(1, points)]
        return torch.stack(features) if features else torch.zeros(0)

    def chunk(self, number: int, masked: dict, lengths: dict) -> None:
        tensors, meta, batches = self.unmasked(number)
        start = time.perf_counter()
        for spec, path in masked.items():
            tensors[key_of(spec, list(masked))] = self.along(batches, path, lengths[spec][0])
        meta["seconds"]["path"] = time.perf_counter() - start
        self.store.write(number, tensors, meta)


def _plan(examples: Examples, batch_size: int, chunk_size: int, pilot: bool) -> list[list[list[int]]]:
    """Chunk -> batch -> rows. The pilot comes first: the examples with the smallest hash of their id."""
    if batch_size < 1 or chunk_size < 1:
        raise ValueError(f"batch_size={batch_size} and chunk_size={chunk_size} must be at least 1")
    rows = np.arange(len(examples))
    chunks = []
    if pilot:
        order = np.argsort(uniform_of(examples.ids, 0).numpy(), kind="stable")
        chunks.append(np.sort(order[:PILOT]))
        rows = np.sort(order[PILOT:])
    per_chunk = max(1, chunk_size // batch_size) * batch_size
    chunks += [rows[i : i + per_chunk] for i in range(0, len(rows), per_chunk)]
    return [[c[i : i + batch_size].tolist() for i in range(0, len(c), batch_size)] for c in chunks]


def _gather(
    store: ChunkStore,
    chunks: int,
    examples: Examples,
    lengths: dict[PathSpec, tuple[int, list]],
    task: Task,
    seed: int,
    readings: Sequence[Any] = (),
) -> Observation:
    set_aside: dict[str, str] = {}
    seconds = {"decoding": 0.0, "unmasked": 0.0, "path": 0.0}
    found = []
    for number in range(chunks):
        tensors, meta = store.read(number, ("rows",))
        found.append(tensors["rows"].clone())  # a view would keep the whole chunk mapped
        set_aside |= meta["set_aside"]
        for part, value in meta["seconds"].items():
            seconds[part] += value
    rows = torch.cat(found).sort().values
    if not len(rows):
        raise ValueError(
            f"none of the {len(examples)} examples could be read; the first: {next(iter(set_aside.items()))}"
        )
    position = torch.full((len(examples),), -1)
    position[rows] = torch.arange(len(rows))

    def joined(name: str) -> Tensor | None:
        whole = None  # filled chunk by chunk, so that it is held once; joining and sorting holds it thrice
        for number in range(chunks):
            tensors, _ = store.read(number, ("rows", name))
            if len(tensors["rows"]) and name in tensors:
                if whole is None:
                    whole = tensors[name].new_empty(len(rows), *tensors[name].shape[1:])
                whole[position[tensors["rows"]]] = tensors[name]
        return whole

    labels, answer_losses = joined("labels"), joined("answer_losses")
    signals = Signals(
        ids=examples.ids[rows.numpy()],
        labels=labels,
        num_classes=_count_classes(examples, labels, task),
        embeddings=joined("embeddings"),
        logits=joined("logits"),
        response_losses=joined("response_losses"),
        answer_losses=answer_losses,
        paths=stored_paths(store, chunks, lengths, position),
        readings={
            reading: value
            for i, reading in enumerate(readings)
            if (value := joined(f"reading:{i}")) is not None
        },
        seed=seed,
        task=task,
    )
    passes = 1 + (answer_losses is not None) + sum(points - 1 for points, _ in lengths.values())
    return Observation(signals, rows, set_aside, seconds, passes)


def _count_classes(examples: Examples, labels: Tensor | None, task: Task) -> int:
    """C of the data, which the head of a pre-trained model may exceed; 0 where there are no classes."""
    if task != "classification" or labels is None:
        return 0
    return len(examples.class_names or []) or int(labels.max()) + 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _of_model(model: nn.Module) -> str:
    """Of large weights a strided sample is enough to tell two models apart."""
    weights = blake2b(digest_size=16)
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32)
        weights.update(name.encode() + sample.numpy().tobytes())
    return f"{type(model).__name__} {weights.hexdigest()}"


def _of_data(examples: Examples, raw: Sequence | None) -> str:
    """Ids, labels, and what the model would see of three examples: other inputs or processing change it."""
    data = blake2b("\0".join(examples.ids.tolist()).encode(), digest_size=16)
    data.update(repr(raw).encode())
    for row in sorted({0, len(examples) // 2, len(examples) - 1}):
        _, inputs, labels, _ = examples.read([row])
        data.update(repr(labels).encode())
        for name, value in sorted(inputs.items()):
            data.update(name.encode() + value.contiguous().to(torch.float32).numpy().tobytes())
    return f"{len(examples)} examples {data.hexdigest()}"
