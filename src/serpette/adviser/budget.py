"""What the user can spend and lose, read from words such as `0.3x`, `600s`, `8GiB`, `1.0`."""

from __future__ import annotations

import re
from dataclasses import dataclass

SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600}
BYTES = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """Limits of a job; None = no limit.

    Args:
        time: a share of tuning with everything (`"0.3x"`), or a time (`"600s"`, `"10min"`, `"2h"`); of
            scoring and tuning together.
        memory: peak of a training step, `"8GiB"`, `"500MB"`.
        latency: of the finished model to the unpruned one, `"0.6x"`, for batches of 1 or of 8, whichever
            gains more.
        max_loss: points of the metric that may be lost to keeping everything (percentage points of accuracy,
            100 R^2; of a causal language model, hundredths of a nat). Without any limit it is 1.0.

    Raises:
        ValueError: a wrong unit, a value out of its range.

    Example:
        >>> Budget(time="0.3x").seconds(100.0), Budget(time="2min").seconds(100.0)
        (30.0, 120.0)
        >>> Budget(memory="8GB").bytes
        8000000000
    """

    time: str | None = None
    memory: str | None = None
    latency: str | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        self.seconds(1.0)
        _ = self.bytes, self.speed
        if self.max_loss is not None and not 0 <= self.max_loss < 100:
            raise ValueError(f"max_loss={self.max_loss} must be in [0, 100), points of the metric, e.g. 1.0")
        if (self.time, self.memory, self.latency, self.max_loss) == (None,) * 4:
            object.__setattr__(self, "max_loss", 1.0)

    def seconds(self, full: float) -> float:
        """The time limit, where tuning with everything takes `full` seconds; infinite without one."""
        if self.time is None:
            return float("inf")
        number, unit = _parsed(
            "time", self.time, ("x", *SECONDS), "a share of the full run such as 0.3x, or 600s, 10min, 2h"
        )
        if unit == "x" and number > 1:
            raise ValueError(
                f"time={self.time!r} is more than the full run takes; give a share in (0, 1], e.g. 0.3x"
            )
        return number * (full if unit == "x" else SECONDS[unit])

    @property
    def bytes(self) -> float:
        """The memory limit; infinite without one."""
        if self.memory is None:
            return float("inf")
        number, unit = _parsed("memory", self.memory, tuple(BYTES), "bytes such as 8GiB or 500MB")
        return round(number * BYTES[unit])

    @property
    def speed(self) -> float:
        """How many times as fast as the unpruned model the finished one must be; 1 without a limit."""
        if self.latency is None:
            return 1.0
        number, _ = _parsed("latency", self.latency, ("x",), "a share of the unpruned model's such as 0.6x")
        if number > 1:
            raise ValueError(
                f"latency={self.latency!r} is slower than the unpruned model; "
                "give a share in (0, 1], e.g. 0.6x"
            )
        return 1 / number

    def as_dict(self, full: float) -> dict[str, object]:
        """For result.json: the limits that were given."""
        found: dict[str, object] = {}
        if self.time is not None:
            found["time"] = {"text": self.time, "seconds": self.seconds(full)}
        if self.memory is not None:
            found["memory"] = {"text": self.memory, "bytes": self.bytes}
        if self.latency is not None:
            found["latency"] = {"text": self.latency, "share": 1 / self.speed}
        if self.max_loss is not None:
            found["max_loss"] = self.max_loss
        return found


def _parsed(name: str, text: str, units: tuple[str, ...], words: str) -> tuple[float, str]:
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(text))
    unit = found[2] if found else ""
    if not found or unit not in units:
        why = f": the unit {unit!r} is not one of {', '.join(units)}" if unit and unit not in units else ""
        raise ValueError(f"{name}={text!r} must be {words}{why}")
    if float(found[1]) <= 0:
        raise ValueError(f"{name}={text!r} must be above 0: {words}")
    return float(found[1]), unit
