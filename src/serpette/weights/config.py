"""What is pruned, by what, how much and when: one object for the callback, the plain loop and one shot."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from ..importance import weights as importances
from ..types import WeightImportance
from .groups import Targets
from .masked import MASK_GRADS, MaskGrad
from .patterns import pattern_of
from .schedules import sparsity_at


@dataclass(frozen=True)
class PruneConfig:
    """How weights are pruned.

    Args:
        importance: by what they are ranked: a name (`serpette list importances`) or an object such as
            `serpette.importance.PST(rank=4)`.
        options: of an importance that is named, such as `{"cross": False}`.
        sparsity: share of the weights, or of the heads and channels, that is removed in the end, in [0, 1).
        pattern: `"unstructured"`: any weights; `"2:4"` and the like: n of each m inputs stay;
            `"structured"`: whole attention heads (KV groups) and channels, which makes a smaller model.
        schedule: how the sparsity grows between `start` and `end`: `"cubic"`, `"linear"`, `"one_shot"`.
        scope: the sparsity holds in each `"layer"`, or over all of them (`"global"`); structured and global
            leaves layers of different widths.
        targets: `"attention"`, `"ffn"` or `"both"`.
        exclude: names, parts of names or patterns of modules that are left alone.
        mask_grad: gradient of LoRA through the mask: `"ste"` as cheap as LoRA, `"exact"` up to 1.5 times a
            step, `"cv"` between them. Only unstructured and n:m masks and linear layers know a difference.
        every_k: weights are scored and cut at each k-th step; None: a hundredth of the steps, from 1 to 10:
            a training has a hundred of them, and a long one does not pay for more than each tenth.
        average: decay of the running average of the scores at each step, in [0, 1); 0.9 remembers some
            10 steps. Only where an importance is averaged.
        start, end: shares of the steps before the first and after the last cut. LoRAPrune, Section 4.1.
        round_to: channels that stay are a multiple of it, which kernels are fast with.
        shrink: structured only: units that are cut leave the model during training, which makes the steps
            faster; their values are gone, and a checkpoint cannot be resumed.
        steps: optimizer steps of the schedule; None: of the whole training.
        seed: of `"random"` and of the tokens that `"cv"` looks at.

    Raises:
        ValueError: an argument outside its limits, or a combination without a meaning.

    Example:
        >>> PruneConfig("magnitude", 0.5).pattern
        'unstructured'
        >>> PruneConfig("magnitude", 50)
        Traceback (most recent call last):
        ValueError: sparsity=50 must be in [0, 1), the share that is removed; did you mean 0.5?
    """

    importance: str | WeightImportance = "lora_prune"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    schedule: str = "cubic"
    scope: Literal["layer", "global"] = "layer"
    targets: Targets = "both"
    exclude: Sequence[str] = field(default_factory=tuple)
    mask_grad: MaskGrad = "ste"
    every_k: int | None = None
    average: float = 0.9
    start: float = 0.1
    end: float = 0.3
    round_to: int = 8
    shrink: bool = False
    steps: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        percent = f"; did you mean {self.sparsity / 100:g}?" if 1 <= self.sparsity <= 100 else ""
        limits = [
            ("sparsity", 0 <= self.sparsity < 1, f"in [0, 1), the share that is removed{percent}"),
            ("scope", self.scope in ("layer", "global"), "'layer' or 'global'"),
            ("targets", self.targets in ("both", "attention", "ffn"), "'both', 'attention' or 'ffn'"),
            ("mask_grad", self.mask_grad in MASK_GRADS, "'ste', 'exact' or 'cv'"),
            ("every_k", self.every_k is None or self.every_k >= 1, "at least 1, or None"),
            ("average", 0 <= self.average < 1, "in [0, 1)"),
            ("round_to", self.round_to >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or None"),
        ]
        for name, fine, limit in limits:
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {limit}")
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        sparsity_at(0, 100, self.sparsity, self.start, self.end, self.schedule)
        if self.pattern != "structured":
            pattern_of(self.pattern, self.scope).check(self.sparsity, {})
            if self.shrink:
                raise ValueError(
                    f"shrink=True needs pattern='structured', not {self.pattern!r}: only whole units leave"
                )
        self.method()

    def method(self) -> Any:
        """The importance, made from its name and options; a `seed` that it takes is this one."""
        if not isinstance(self.importance, str):
            return importances.make(self.importance, **self.options)
        takes = inspect.signature(importances[self.importance]).parameters
        seed = {"seed": self.seed} if "seed" in takes else {}
        return importances.make(self.importance, **seed | self.options)

    def interval(self, steps: int) -> int:
        """Steps from one scoring to the next in a training of `steps`."""
        return self.every_k or max(1, min(10, (self.steps or steps) // 100))

    def plan(self, steps: int) -> tuple[list[int], list[int]]:
        """Of `steps` optimizer steps, numbered from 1: those that score, and those of them that cut.

        Scoring begins three time constants of the average before the first cut. The last cut reaches the
        final sparsity.
        """
        steps = self.steps or steps
        k, last = self.interval(steps), max(1, math.ceil((1 - Fraction(str(float(self.end)))) * steps))
        cuts = [t for t in range(1, last + 1) if (t % k == 0 or t == last) and self.at(t, steps) > 0]
        memory = 3 / (1 - self.average) if getattr(self.method(), "averaged", True) else 0
        first = (cuts[0] if cuts else 1) - memory
        learns = hasattr(self.method(), "update")
        scores = [t for t in range(1, last + 1) if (t % k == 0 or t == last) and (learns or t >= first)]
        return scores, cuts

    def at(self, step: int, steps: int) -> float:
        """Sparsity that is due at `step`."""
        return sparsity_at(step, self.steps or steps, self.sparsity, self.start, self.end, self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them."""
        method = self.method()
        options = {k: str(v) for k, v in vars(method).items()}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return plain | {"importance": method.name, "options": options}
