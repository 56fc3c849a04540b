"""How an arm is fine-tuned: the settings, and what each method has a use for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..registry import near
from .reading import check_limits


@dataclass(frozen=True)
class TuneSpec:
    """How each arm is fine-tuned, with the stock Trainer and AdamW."""

    method: Literal["lora", "dora", "shira", "rows", "full", "head", "none"] = "lora"
    """What trains: an adapter (of rows: `serpette.RowConfig`) and the head, all weights, the head, none."""
    epochs: int = 3
    """Passes over what an arm keeps: the same for every arm, so a smaller arm takes fewer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate; 1e-3 suits adapters and a head, full tuning wants about 1e-5."""
    batch_size: int = 16
    """Examples a step."""
    rank: int = 8
    """Rank of LoRA and DoRA; SHiRA trains as many weights; of rows the number a layer, without `fraction`."""
    alpha: float = 16
    """LoRA scale is alpha / rank."""
    dropout: float = 0.0
    """LoRA dropout, a share in [0, 1)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get the adapter, as peft names them; rows know "all-layers", too."""
    freeze_attention: bool = False
    """No adapter inside attention blocks."""
    fraction: float | None = None
    """Of rows: the share of each layer's that trains, in (0, 1]; None: `rank` of them."""
    modes: Literal["rows", "columns", "both"] | dict[str, str] = "rows"
    """Of rows: what trains, also by layer as {pattern: mode}; columns hold less for the backward pass."""
    importance: str = "magnitude"
    """Of rows: by what they are chosen, a method of `serpette.importance`."""
    importance_examples: int = 256
    """Of rows: so many kept training examples an importance looks at that needs data."""
    scope: Literal["layer", "global"] = "layer"
    """Of rows: the same number or share in each layer, or the best of all layers."""
    dependencies: bool = False
    """Of rows: those of a layer and the columns of the next that read them are chosen together."""
    kernel: Literal["additive", "live"] = "additive"
    """Of rows: added to the layer's output, or written into its weight, which is faster."""
    train_bias: bool = False
    """Of rows: their biases train, too."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate, as the Trainer names it."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises, in [0, 1]."""
    checkpointing: bool = False
    """Gradient checkpointing: blocks are computed again in the backward pass: less memory, more time."""

    @property
    def needs(self) -> frozenset[str]:
        """What the importance of the rows must observe of examples; empty: nothing."""
        from ..importance import neurons as importances

        return importances.make(self.importance).needs if self.method == "rows" else frozenset()

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `serpette.tuning.train`."""
        names = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "warmup")
        return {name: getattr(self, name) for name in names}

    def adapter(self, seed: int) -> dict[str, Any]:
        """Arguments of `serpette.tuning.trainable`; an importance that needs data ranks afterwards."""
        names = {"method", *SETTINGS[self.method]} - {"importance_examples", "scope"}
        names |= {"checkpointing"}
        rows = {"importance": "magnitude" if self.needs else self.importance, "seed": seed}
        return {k: getattr(self, k) for k in names} | (rows if self.method == "rows" else {})

    def differing(self, other: TuneSpec) -> dict[str, Any]:
        """The settings that mean something here and are not those of `other`."""
        ignored = {name for names in SETTINGS.values() for name in names} - {*SETTINGS[self.method]}
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        changed = {k: v for k, v in mine.items() if v != its[k] and k not in ignored}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}  # as JSON has it


ROWS = (
    "fraction", "modes", "importance", "importance_examples", "scope", "dependencies", "kernel", "train_bias",
)  # fmt: skip
SHARED = ("rank", "target_modules", "freeze_attention")
# what a method looks at, beside the training that is the same for all
SETTINGS: dict[str, tuple[str, ...]] = {
    "lora": (*SHARED, "alpha", "dropout"),
    "dora": (*SHARED, "alpha", "dropout"),
    "shira": SHARED,
    "rows": (*SHARED, *ROWS),
    "full": (),
    "head": (),
    "none": (),
}
ADAPTERS = ("lora", "dora", "shira", "rows")


def check_tune(tune: TuneSpec, given: list[str], key: str) -> None:
    """Ranges, names, and that `method` has a use for the settings that are `given`."""
    from ..importance import neurons as importances

    infinite, fraction, seen = float("inf"), tune.fraction, tune.importance_examples
    percent = f"; did you mean {fraction / 100:g}?" if fraction and 1 < fraction <= 100 else ""
    limits = [
        ("epochs", tune.epochs, tune.epochs >= 1, "at least 1"),
        ("learning_rate", tune.learning_rate, 0 < tune.learning_rate < infinite, "above 0"),
        ("batch_size", tune.batch_size, tune.batch_size >= 1, "at least 1"),
        ("rank", tune.rank, tune.rank >= 1, "at least 1"),
        ("alpha", tune.alpha, 0 < tune.alpha < infinite, "above 0"),
        ("dropout", tune.dropout, 0 <= tune.dropout < 1, "in [0, 1)"),
        ("weight_decay", tune.weight_decay, 0 <= tune.weight_decay < infinite, "0 or more"),
        ("warmup", tune.warmup, 0 <= tune.warmup <= 1, "a share in [0, 1]"),
        ("fraction", fraction, fraction is None or 0 < fraction <= 1, f"a share in (0, 1]{percent}"),
        ("importance_examples", seen, seen >= 1, "at least 1"),
        ("scope", tune.scope, not tune.dependencies or tune.scope == "layer", "'layer' if dependencies"),
        (
            "checkpointing",
            tune.checkpointing,
            not (tune.checkpointing and tune.method == "none"),
            "false where nothing trains, with method: none",
        ),
    ]
    check_limits(limits, f"{key}.")
    for name in given:
        able = [method for method, names in SETTINGS.items() if name in names]
        if able and tune.method not in able:
            raise ValueError(
                f"{key}.{name}={getattr(tune, name)!r} means nothing to method={tune.method!r}; it is of "
                f"{' or '.join(map(repr, able))}"
            )
    for pattern, mode in tune.modes.items() if isinstance(tune.modes, dict) else ():
        if mode not in ("rows", "columns", "both"):
            raise ValueError(f"{key}.modes[{pattern!r}]={mode!r} must be 'rows', 'columns' or 'both'")
    if tune.importance not in importances:
        known = near(tune.importance, importances)
        raise ValueError(f"{key}.importance={tune.importance!r} is unknown{known}")


def check_tune_task(tune: TuneSpec, task: str, key: str) -> None:
    """That what trains has a meaning in the `task`."""
    if task == "causal-lm" and tune.method == "head":
        raise ValueError(
            f"{key}.method='head' has no meaning in a causal-lm, whose head is that of the vocabulary; "
            "use 'lora', 'rows' or 'full'"
        )
    if "labels" in tune.needs and task != "classification":
        raise ValueError(f"{key}.importance={tune.importance!r} needs classes; in a {task} use 'taylor'")
