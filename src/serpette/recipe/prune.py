"""How the weights of an arm are pruned while it is tuned, and what becomes of the result."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .tune import TuneSpec

if TYPE_CHECKING:
    from ..weights import PruneConfig


@dataclass(frozen=True)
class PruneSpec:
    """Weights cut while LoRA (or every weight) trains; then merged, made smaller if asked, and exported."""

    importance: str = "lora_prune"
    """By what they are chosen, of `serpette.importance.weights`; `lora_prune_seq` is of a sequential LoRA."""
    importance_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the importance."""
    sparsity: float = 0.5
    """Share of the weights that is removed, in [0, 1); 0: none, for an arm that is not pruned."""
    pattern: str = "unstructured"
    """`unstructured`, `n:m` such as `2:4`, or `structured`: whole attention heads and channels."""
    schedule: str = "cubic"
    """Course of the sparsity, a name of `serpette.weights.schedules`."""
    scope: Literal["layer", "global"] = "layer"
    """The same share of each layer, or the least important of all: then structured widths differ by layer."""
    targets: Literal["both", "attention", "ffn"] = "both"
    """Which layers are pruned; embeddings, head, norms and biases never."""
    exclude: tuple[str, ...] = ()
    """Modules that stay whole: names, parts of names or patterns."""
    mask_grad: Literal["ste", "exact", "cv"] = "ste"
    """Gradients through the mask: almost free, true ones, or ste with a correction from some tokens."""
    start: float = 0.1
    """Share of the steps before the first cut, in [0, 1)."""
    end: float = 0.3
    """Share of the steps after the last cut, in [0, 1), in which what is left recovers."""
    every_k: int | None = None
    """Steps from one scoring and cut to the next; None: by the length of the training."""
    average: float = 0.9
    """How much of the importance so far stays at each step, in [0, 1)."""
    round_to: int = 8
    """Structured: widths are multiples of it, as kernels like them."""
    shrink: bool = False
    """Structured: the result is smaller and dense, not masked."""
    ragged: bool = False
    """Of shrink: each layer as narrow as it can be, for `serpette.weights.load` alone, not stock loaders."""
    export: tuple[Literal["safetensors", "onnx", "packed"], ...] = ("safetensors",)
    """What is saved: for `from_pretrained`, for onnxruntime, bitmask and values alone; empty: nothing."""


CONFIG = (  # what `serpette.weights.PruneConfig` knows by the same name
    "sparsity", "pattern", "schedule", "scope", "targets", "exclude", "mask_grad", "start", "end", "every_k",
    "average", "round_to",
)  # fmt: skip
ONNX = ("onnx", "onnxscript", "onnxruntime")
STRUCTURED = ("round_to", "shrink", "ragged")


def config_of(prune: PruneSpec, seed: int = 0) -> PruneConfig:
    """What the Pruner is told."""
    from ..weights import PruneConfig

    settings = {name: getattr(prune, name) for name in CONFIG}
    return PruneConfig(prune.importance, options=prune.importance_options, seed=seed, **settings)


def check_prune(prune: PruneSpec, tune: TuneSpec, given: list[str], key: str) -> None:
    """Ranges, names, and that the tuning and the pattern have a use for the settings that are `given`.

    Raises:
        ValueError: names `key`, the setting, its value and the limit.
    """
    try:
        method = config_of(prune).method()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from None
    pattern = prune.pattern
    for name in STRUCTURED if pattern != "structured" else ():
        if name in given:
            raise ValueError(
                f"{key}.{name}={getattr(prune, name)!r} means nothing to pattern={pattern!r}; it is of "
                "'structured'"
            )
    if "hessian" in method.weight_needs:
        raise ValueError(
            f"{key}.importance={prune.importance!r} prunes in one shot, not while the model is tuned; use "
            "another, or serpette.weights.prune"
        )
    if len({*prune.export}) < len(prune.export):
        raise ValueError(f"{key}.export={prune.export!r} has a name twice; give each once")
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if "onnx" in prune.export and missing:
        raise ValueError(
            f"{key}.export=onnx needs {', '.join(missing)}: pip install 'serpette[onnx]', or leave it out"
        )
    if prune.ragged and not prune.shrink:
        raise ValueError(f"{key}.ragged=True needs shrink: true; a masked model keeps its widths")
    _check_tuning(prune, tune, method, key)


def _check_tuning(prune: PruneSpec, tune: TuneSpec, method: Any, key: str) -> None:
    if tune.method not in ("lora", "full"):
        raise ValueError(
            f"{key}: weights are not pruned while tune.method={tune.method!r} trains; use 'lora', or 'full' "
            "with importance: magnitude"
        )
    if tune.method == "lora" and tune.dropout > 0:
        raise ValueError(
            f"{key}: tune.dropout={tune.dropout} must be 0, as a masked LoRA is computed from the merged "
            "weight, which has no dropout"
        )
    if tune.method == "full" and "lora" in method.weight_needs:
        raise ValueError(
            f"{key}.importance={prune.importance!r} reads the gradients of a LoRA, and tune.method='full' "
            "has none; use tune.method: lora, or importance: magnitude"
        )
