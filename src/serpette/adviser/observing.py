"""The observing pass of an adviser: as many examples as the time allows, their health, heads on them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cost import call
from ..data.examples import Examples
from ..data.observe import Observation, evaluating, observe
from ..data.sources import open_dataset
from ..opening import Opened
from ..types import uniform_of
from .head import cross_fitted
from .health import as_groups, examine, listed

LEAST = 200  # examples: with fewer a probe says nothing


def example_seconds(opened: Opened, rows: list[int]) -> float:
    """Seconds in which one of `rows` is read and goes forward through the model."""
    device = next(opened.model.parameters()).device
    best = float("inf")
    for _ in range(2):  # the first pays for what is set up once
        start = time.perf_counter()
        _, inputs, _, _ = opened.examples.read(rows)
        with evaluating(opened.model), torch.inference_mode():
            output = call(opened.model, {k: v.to(device) for k, v in inputs.items()})
        getattr(output, "logits", output).float().sum().item()  # waits for a GPU
        best = min(best, (time.perf_counter() - start) / len(rows))
    return best


def tokens(examples: Examples, seconds: float, seed: int) -> dict[str, Any]:
    """What reading alone tells of a language model's examples: `rows` that can be read, and their `health`.

    Args:
        seconds: in which as many are read as can be, drawn by `seed`; LEAST at least.

    Raises:
        ValueError: none of them can be read.
    """
    start, rows, bad = time.perf_counter(), [], {}
    by_tokens: dict[bytes, list[int]] = {}
    for place, row in enumerate(uniform_of(examples.ids, seed).argsort().tolist()):
        if place >= LEAST and time.perf_counter() - start > seconds:
            break
        good, inputs, _, aside = examples.read([row])
        bad |= aside
        if good:
            by_tokens.setdefault(inputs["input_ids"].numpy().tobytes(), []).append(len(rows))
            rows.append(row)
    if not rows:
        name, reason = next(iter(bad.items()))
        raise ValueError(f"none of {len(bad)} examples could be read; {name!r}: {reason}")
    health = {"exact_duplicates": listed(as_groups(by_tokens.values()), examples.ids[rows])}
    return {"rows": rows, "health": health | {"set_aside": _set_aside(bad)}}


def _set_aside(bad: dict[str, str]) -> list[dict[str, str]]:
    return [{"id": name, "reason": why} for name, why in bad.items()]


def observed(
    opened: Opened,
    n: int,
    reading: dict[str, Any],
    *,
    batch_size: int,
    folder: Path,
    seed: int,
    progress: bool,
) -> tuple[Observation, Examples]:
    """The pass over `n` examples, drawn by `seed`, class by class; and the examples that were read."""
    dataset = opened.dataset
    if n < len(dataset):
        dataset = open_dataset(dataset, limit=n, seed=seed)
    examples = Examples(dataset, processing_class=opened.processor, task=opened.task, **reading)
    found = observe(
        opened.model,
        examples,
        task=opened.task,
        batch_size=batch_size,
        folder=folder,
        seed=seed,
        progress=progress,
    )
    return found, examples


def health_of(
    found: Observation, examples: Examples, classes: list[str], groups: Tensor, seed: int
) -> dict[str, Any]:
    """Of the observed examples, see `health.examine`; with those that could not be read."""
    signals, rows = found.signals, found.rows.tolist()

    def digest(n: int) -> bytes:
        bits = hashlib.sha256()
        for name, value in sorted(examples.read([rows[n]])[1].items()):
            bits.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            bits.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return bits.digest()

    outputs = None
    if signals.num_classes > 1 and signals.embeddings is not None and signals.labels is not None:
        outputs = cross_fitted(
            signals.embeddings,
            signals.labels,
            signals.num_classes,
            seed=seed,
            ids=signals.ids,
            groups=groups,
        )
    health = examine(signals, outputs, classes, digest)
    return health | {"set_aside": _set_aside(found.set_aside)}


def reader(
    examples: Examples, rows: Tensor, labels: Tensor | None
) -> Callable[[list[int]], dict[str, Tensor]]:
    """What turns positions into inputs of the model, with labels."""

    def read(positions: list[int]) -> dict[str, Tensor]:
        _, inputs, _, _ = examples.read(rows[positions].tolist())
        return inputs if labels is None else {**inputs, "labels": labels[positions]}

    return read
