"""Features along a path of masked models: where it stops, and how its chunks lie in the store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate import class_averaged_spearman, spearman
from ..scorers.dlc import DLC
from ..types import PathFeatures, PathSpec, Signals
from .store import ChunkStore


def grow(
    spec: PathSpec, signals: Signals, unmasked: Tensor, features_at: Callable[[int], Tensor]
) -> tuple[tuple[int, list[tuple[int, float]]], Tensor]:
    """((points, curve), features (P, n, D)): adds points until the ranking by the mean loss stands still.

    The loss is DLC's with its defaults, whichever scorers share the path: none depends on the others.
    """
    judge = DLC()
    judge.path = spec
    stack, curve = [unmasked], []
    previous = None
    for k in range(1, len(spec.points) + 1):
        if k > 1:
            stack.append(features_at(k - 1))
        path = PathFeatures(spec.points[:k], [(torch.arange(len(unmasked)), torch.stack(stack))])
        signals.paths = {spec: path}
        mean = judge.along_path(signals).mean(0)
        if previous is not None:
            if signals.task == "classification":
                agreement = class_averaged_spearman(mean, previous, signals.labels)
            else:
                agreement = spearman(mean, previous)
            # undefined where every class has one example: then there is no ranking to change
            curve.append((k, 1.0 if math.isnan(agreement) else agreement))
        previous = mean
        calm = len(curve) >= 2 and all(r >= spec.tolerance for _, r in curve[-2:])
        if k >= spec.min_points and calm:
            break
    return (len(stack), curve), torch.stack(stack)


def stored_paths(
    store: ChunkStore, chunks: int, lengths: dict[PathSpec, tuple[int, list]], position: Tensor
) -> dict[PathSpec, PathFeatures]:
    """The paths of `lengths`, in the order in which they were observed, read from the store when asked."""

    def read(key: str, points: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(chunks):
            tensors, _ = store.read(number, ("rows", "embeddings", "response_losses", key))
            if len(tensors["rows"]):
                unmasked = on_path(tensors)[None]
                features = torch.cat([unmasked, tensors[key]]) if points > 1 else unmasked
                yield position[tensors["rows"]], features

    return {
        spec: PathFeatures(spec.points[:points], partial(read, key_of(spec, list(lengths)), points), curve)
        for spec, (points, curve) in lengths.items()
    }


def reopened_paths(folder: Path, specs: Sequence[PathSpec], rows: Tensor) -> dict[PathSpec, PathFeatures]:
    """Those of `specs` whose features an earlier `observe` left in `folder`; `rows` (N,) of its examples."""
    if not (folder / "manifest.json").exists():
        return {}
    observed = json.loads((folder / "manifest.json").read_text())["paths"]
    by_name = {repr(spec): spec for spec in specs}
    if any(name not in by_name for name in observed):
        return {}
    store = ChunkStore(folder)
    meta = store.read(0, ())[1]
    ends = iter(zip(meta.get("points", []), meta.get("curves", []), strict=True))
    lengths = {
        by_name[n]: next(ends) if by_name[n].adaptive else (len(by_name[n].points), []) for n in observed
    }
    position = torch.full((int(rows.max()) + 1,), -1)
    position[rows] = torch.arange(len(rows))
    return stored_paths(store, len(list(folder.glob("*[0-9].safetensors"))), lengths, position)


def on_path(tensors: dict[str, Tensor]) -> Tensor:
    """What a path starts from: the features (n, D), in a causal LM the response losses (n, 1)."""
    losses = tensors.get("response_losses")
    return tensors["embeddings"] if losses is None else losses[:, None]


def key_of(spec: PathSpec, specs: list) -> str:
    """The name under which a chunk holds the features along `spec`, one of `specs`."""
    return f"path:{specs.index(spec)}"
