"""What a row adapter trains: the configuration that peft's own functions take, save and load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from peft import PeftConfig

Mode = Literal["rows", "columns", "both"]


class RowsType(str, Enum):
    """The name under which peft knows the method; its own enum is closed, its tables take any such value."""

    ROWS = "ROWS"


@dataclass
class RowConfig(PeftConfig):
    """Trains the most important rows (output neurons) of each layer; everything else stays frozen.

    Source: "Memory-efficient fine-tuning via structured neural network pruning" (SPSFT), Section 3.

    Args:
        r: rows that train in each layer; with columns, columns too.
        fraction: the same as a share of each layer's rows, in (0, 1]; exactly one of the two is given. The
            paper trains 5 %, or 2.5 % with dependencies.
        target_modules: names, a regular expression, `"all-linear"` (every linear layer but the head, as peft
            understands it) or `"all-layers"` (convolutions and norms too).
        exclude_modules: names or a regular expression of modules to leave out.
        freeze_attention: leave out everything inside attention blocks: a step of Llama-2-7B then holds 9 %
            less over the weights (`benchmarks/spsft_memory`), with about the same accuracy in Table 9.
        modes: `"rows"` (the paper), `"columns"` (inputs instead of outputs: saves only the selected inputs
            for the backward pass) or `"both"`; or {pattern: mode}, where the first pattern that matches
            the end of a module's name counts and the others train rows.
        importance: `"magnitude"` or `"random"`, which need no data, choose the rows at once; others through
            `serpette.rank_rows(model, loader, "taylor")` afterwards.
        dependencies: `rank_rows` scores and chooses rows of one layer and columns of the next together.
            `"residual"`: the residual stream, which spans all layers, is such a group, too.
        train_bias: the bias of a selected row trains too. Off: the paper's count of parameters has none.
        kernel: `"additive"` adds the trained rows' part to the frozen layer's output: any base, several
            adapters. `"live"` writes them into the weight: one matrix product, but a single adapter and no
            quantised base.
        running_statistics: of a BatchNorm that is a target: `"frozen"` normalises with the pre-trained
            statistics, as small batches want; `"update"` with the batch's, and moves the running ones.
        modules_to_save: modules that train whole and are saved with the adapter, such as a new head.
        seed: of importance `"random"`.
        counts: {module: [rows that train, columns that train, rows, columns]}, filled in when the rows are
            chosen and read when the adapter is loaded; not to be given.

    Weight decay acts on the change of a row, so it pulls towards the pre-trained row, with either kernel.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from serpette import RowConfig
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = get_peft_model(net, RowConfig(r=2, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        16
    """

    r: int | None = None
    fraction: float | None = None
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    freeze_attention: bool = False
    modes: Mode | dict[str, Mode] = "rows"
    importance: str = "magnitude"
    dependencies: bool | Literal["residual"] = False
    train_bias: bool = False
    kernel: Literal["additive", "live"] = "additive"
    running_statistics: Literal["frozen", "update"] = "frozen"
    modules_to_save: list[str] | None = None
    seed: int = 0
    counts: dict[str, list[int]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RowsType.ROWS  # type: ignore[assignment] - see RowsType
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, (set, tuple)):
            self.exclude_modules = sorted(self.exclude_modules)
        if (self.r is None) == (self.fraction is None):
            raise ValueError(
                f"r={self.r} and fraction={self.fraction}: give exactly one of them, "
                "such as fraction=0.05 (the paper's) or r=128"
            )
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"r={self.r!r} must be a whole number of rows, at least 1")
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        if self.fraction is not None and not (number and 0 < self.fraction <= 1):
            hint = f"; did you mean {self.fraction / 100:g}?" if number and 1 < self.fraction <= 100 else ""
            raise ValueError(f"fraction={self.fraction!r} must be in (0, 1]{hint}")
        modes = self.modes.values() if isinstance(self.modes, Mapping) else (self.modes,)
        _one_of("modes", modes, ("rows", "columns", "both"))
        if self.dependencies not in (True, False, "residual"):
            raise ValueError(f"dependencies={self.dependencies!r} must be True, False or 'residual'")
        for argument in ("modes", "target_modules", "exclude_modules"):
            value = getattr(self, argument)
            for pattern in value if isinstance(value, Mapping) else [value] if isinstance(value, str) else ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{argument}: {pattern!r} is not a regular expression: {error}"
                    ) from None
        _one_of("kernel", [self.kernel], ("additive", "live"))
        _one_of("running_statistics", [self.running_statistics], ("frozen", "update"))

    def mode_of(self, module: str) -> Mode:
        """What trains in the module of that name."""
        if not isinstance(self.modes, Mapping):
            return self.modes
        for pattern, mode in self.modes.items():
            if ends_with(module, pattern):
                return mode
        return "rows"

    def count(self, size: int, module: str) -> int:
        """Of `size` rows or columns of a module, how many train."""
        if self.r is None:
            assert self.fraction is not None
            return max(1, round(self.fraction * size))
        if self.r > size:
            raise ValueError(
                f"r={self.r} is more than the {size} that {module!r} has; "
                "lower it, exclude the module, or give a fraction"
            )
        return self.r


def ends_with(module: str, pattern: str) -> bool:
    """Whether the regular expression matches a module's name or the end of it after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _one_of(argument: str, values: object, known: tuple[str, ...]) -> None:
    from ..registry import near

    for value in values:  # type: ignore[attr-defined] - any iterable
        if value not in known:
            raise ValueError(f"{argument}={value!r} is not known{near(str(value), known)}")
