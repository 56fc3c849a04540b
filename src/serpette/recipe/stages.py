"""What becomes of a tuned or pruned model: made smaller, saved, measured."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from .prune import PruneSpec
from .reading import check_limits
from .tune import ADAPTERS, TuneSpec

Export = Literal["adapter", "safetensors", "packed", "onnx"]
ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ShrinkSpec:
    """Heads and channels that were pruned leave the model, which becomes smaller and dense, not masked."""

    ragged: bool = False
    """Each layer as narrow as it can be, for `serpette.weights.load` alone, not for stock loaders."""


@dataclass(frozen=True)
class EvaluateSpec:
    """What is measured of an arm's model."""

    batch_size: int | None = None
    """Test examples a forward pass; None: the recipe's `batch_size`."""
    latency_batch_sizes: tuple[int, ...] = (1, 8)
    """Batch sizes at which a pruned model is timed beside the unpruned one; empty: none."""
    sensitivity: bool = True
    """Where weights are pruned: the loss with one layer at a time cut, of the first unpruned arm."""


def check_shrink(prune: PruneSpec, shrink: ShrinkSpec | None, key: str) -> None:
    """That whole heads and channels are pruned where they are to leave.

    Raises:
        ValueError: names `key` and the pattern.
    """
    if shrink is not None and prune.pattern != "structured":
        raise ValueError(
            f"{key} means nothing to pattern={prune.pattern!r}: only whole heads and channels leave a model; "
            "use prune.pattern: structured, or in an arm shrink: false"
        )


def check_export(
    export: tuple[Export, ...] | None, tune: TuneSpec, prune: PruneSpec | None, key: str
) -> None:
    """That each format is given once, can be written here, and has something to hold.

    Raises:
        ValueError: names `key`, the format and the way out.
    """
    export = export or ()
    if len({*export}) < len(export):
        raise ValueError(f"{key}={[*export]!r} has a name twice; give each once")
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if "onnx" in export and missing:
        raise ValueError(
            f"{key}=onnx needs {', '.join(missing)}: pip install 'serpette[onnx]', or leave it out"
        )
    if "adapter" in export and prune is not None:
        raise ValueError(f"{key}=adapter: a pruned model is merged and has no adapter; use safetensors")
    if "adapter" in export and tune.method not in ADAPTERS:
        raise ValueError(
            f"{key}=adapter: tune.method={tune.method!r} has no adapter; use safetensors, or give the arm an "
            "export of its own"
        )


def check_evaluate(evaluate: EvaluateSpec | None, key: str) -> None:
    """That sizes are at least 1."""
    if evaluate is not None:
        size, sizes = evaluate.batch_size, evaluate.latency_batch_sizes
        limits = [
            ("batch_size", size, size is None or size >= 1, "at least 1, or null"),
            ("latency_batch_sizes", [*sizes], all(n >= 1 for n in sizes), "at least 1 each"),
        ]
        check_limits(limits, f"{key}.")
