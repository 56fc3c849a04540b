"""How the weights of an arm are pruned: while it is tuned, or at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .tune import TuneSpec

if TYPE_CHECKING:
    from ..weights import PruneConfig


@dataclass(frozen=True)
class PruneSpec:
    """Weights cut while LoRA (or every weight) trains, or in one shot where nothing trains; then merged."""

    importance: str = "lora_prune"
    """By what they are chosen, of `serpette.importance.weights`; `lora_prune_seq` is of a sequential LoRA."""
    importance_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the importance."""
    importance_examples: int = 128
    """Of one shot: so many kept training examples an importance looks at that needs data."""
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


ONE_SHOT = ("sparsity", "pattern", "scope", "targets", "exclude", "round_to")
WHILE_TUNING = ("schedule", "mask_grad", "start", "end", "every_k", "average")


def config_of(prune: PruneSpec, seed: int = 0) -> PruneConfig:
    """What the Pruner is told."""
    from ..weights import PruneConfig

    settings = {name: getattr(prune, name) for name in (*ONE_SHOT, *WHILE_TUNING)}
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
    if "round_to" in given and prune.pattern != "structured":
        raise ValueError(
            f"{key}.round_to={prune.round_to!r} means nothing to pattern={prune.pattern!r}; it is of "
            "'structured'"
        )
    if prune.importance_examples < 1:
        raise ValueError(f"{key}.importance_examples={prune.importance_examples} must be at least 1")
    once = tune.method == "none"
    idle = [name for name in (WHILE_TUNING if once else ("importance_examples",)) if name in given]
    if idle:
        when = "while a model is tuned" if once else "where nothing trains, with tune.method: none"
        raise ValueError(
            f"{key}.{idle[0]}={getattr(prune, idle[0])!r} means nothing to tune.method={tune.method!r}; "
            f"it is of pruning {when}"
        )
    if "hessian" in method.weight_needs and not once:
        raise ValueError(
            f"{key}.importance={prune.importance!r} prunes in one shot, not while the model is tuned; use "
            "another, or tune.method: none"
        )
    if "hessian" in method.weight_needs and (prune.pattern == "structured" or prune.scope != "layer"):
        raise ValueError(
            f"{key}.importance={prune.importance!r} prunes single weights layer by layer; leave pattern and "
            "scope alone, or use another"
        )
    if tune.method not in ("lora", "full", "none"):
        raise ValueError(
            f"{key}: weights are not pruned while tune.method={tune.method!r} trains; use 'lora', 'full' "
            "with importance: magnitude, or 'none' to prune in one shot"
        )
    if tune.method == "lora" and tune.dropout > 0:
        raise ValueError(
            f"{key}: tune.dropout={tune.dropout} must be 0, as a masked LoRA is computed from the merged "
            "weight, which has no dropout"
        )
    if tune.method != "lora" and "lora" in method.weight_needs:
        raise ValueError(
            f"{key}.importance={prune.importance!r} reads the gradients of a LoRA, and tune.method="
            f"{tune.method!r} has none; use tune.method: lora, or importance: magnitude"
        )
