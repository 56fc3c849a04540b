"""From what was measured to one recommendation: what each option would cost and lose, and which fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from ..data import budget as counting
from .budget import Budget
from .curve import Curve, fit
from .probes import RANDOM, Choice, Measured

NATS = 0.01  # that a point is, where the metric of a causal language model is counted in hundredths of a nat
SURE = 0.7  # how likely a score must be above chance, and the loss within its limit, to be advised


@dataclass(frozen=True)
class Outlook:
    """What one choice at one share is predicted to reach; in points of the metric.

    `value`, `low`, `high`: of a linear head on frozen features, less what a tuning is behind it, with its
    95 % interval on new examples.
    `loss`, `loss_low`, `loss_high`: to keeping everything, with its 95 % interval.
    `to_random`: paired difference to a balanced random choice of the same size with its interval, None for
    those; `beats_random`: the probability that it is above. `scoring`: seconds of it.
    """

    choice: Choice
    keep: float
    examples: int
    value: float
    low: float
    high: float
    loss: float
    loss_low: float
    loss_high: float
    to_random: tuple[float, float, float] | None = None
    beats_random: float = 0.0
    scoring: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Estimated share of wrong labels among C classes, and its standard error.

    Where the labels that judge are noisy and those of the test are not, an accuracy a on the noisy ones means
    (a - e / (C - 1)) / (1 - e C / (C - 1)) on right ones, if the wrong labels are anything but the right one
    with equal chance.
    """

    share: float
    error: float
    classes: int

    @property
    def identified(self) -> bool:
        """Whether the share is known well enough to count with: its 95 % interval is no wider than 30 %."""
        return self.error < 0.3 / 3.92 and self.share + self.error < self._most

    @property
    def _most(self) -> float:
        """With this share of wrong labels nothing can be learned."""
        return (self.classes - 1) / self.classes

    @property
    def scale(self) -> float:
        return 1 / (1 - self.share * self.classes / (self.classes - 1))

    def right(self, accuracy: float) -> float:
        """Points of accuracy on right labels."""
        return min(100.0, (accuracy - 100 * self.share / (self.classes - 1)) * self.scale)

    def uncertainty(self, accuracy: float) -> float:
        """What the error of the share does to `right`, points."""
        ends = [
            replace(self, share=max(0.0, self.share + sign * self.error)).right(accuracy) for sign in (-1, 1)
        ]
        return abs(ends[1] - ends[0]) / 2


@dataclass(frozen=True)
class Behind:
    """How far the tuned model is behind a head that is fitted to the end: `points` at `examples`.

    At n examples it is points x examples / n, as the steps of a tuning grow with them, but no more than what
    the head is above `trivial`; half of that counts as an error, beside `error`, the standard error of the
    points. Where the tuned model was no better than
    `trivial`, what the best constant answer reaches, it had not `learned` anything yet: when it does is not
    known, so a loss may be anything up to half of what there is to learn.
    """

    points: float
    error: float
    examples: int
    trivial: float = 0.0
    learned: bool = True

    def at(self, n: int, head: float) -> float:
        """Points at n examples, where the head reaches `head`; 0 at least."""
        most = max(0.0, head - self.trivial)
        return min(max(0.0, self.points) * self.examples / n, most)

    def uncertainty(self, n: int, head: float) -> float:
        """Standard error of `at(n, head)`."""
        if not self.learned:
            return (100 - self.trivial) / 2 / 1.96
        return float(np.hypot(self.at(n, head) / 2, self.error * self.examples / n))


def curve_of(measured: Measured, reference: Choice, ceiling: float = 100.0) -> Curve | None:
    """The learning curve of a balanced random choice; None where a single share was measured."""
    keeps = [*measured.keeps, 1.0]
    sizes = np.array([counting.count(measured.trained, k) for k in keeps], float)
    values = [measured.values[reference.name, k] for k in measured.keeps] + [measured.whole]
    return fit(sizes, np.stack(values), ceiling) if len(keeps) > 2 else None


def kept_of(keep: float, total: int, listed: int | None = None) -> int:
    """Examples that a recipe keeps of `total` that can be read and `listed` in all."""
    return total if keep == 1 else min(total, counting.count(listed or total, keep))


def outlooks(
    measured: Measured,
    total: int,
    *,
    listed: int | None = None,
    noise: Noise | None = None,
    behind: Behind | None = None,
    test_examples: int | None = None,
) -> list[Outlook]:
    """Of each choice at each share, and of keeping everything (last).

    The trials saw fewer examples than the full run has: each value moves along the learning curve of the
    balanced random choice from the size of the trials to the size that is meant, and half of that move counts
    as an error; with `behind`, what a tuning misses is taken off. The interval holds the spread of the trials
    and, with `test_examples`, the noise of a test set of that size.

    Args:
        total: examples that can be read.
        listed: with those that cannot, of which a share to keep is counted; default: `total`. Shares that are
            not less than all that can be read are left out.
    """

    def kept(keep: float) -> int:
        return kept_of(keep, total, listed)

    curve = curve_of(measured, RANDOM)
    J = len(measured.whole)
    t = float(student.ppf(0.975, max(1, J - 1)))
    scale = noise.scale if noise else 1.0

    def moved(keep: float) -> float:
        if curve is None:
            return 0.0
        n = counting.count(measured.trained, keep)
        return curve(kept(keep)) - curve(n)

    def error(values: np.ndarray) -> float:
        fresh = values.var(ddof=1) * measured.held / test_examples if test_examples else 0.0
        return float(np.sqrt(measured.standard_error(values) ** 2 + fresh))

    found = []
    chance = [c for c in measured.choices if c.by_chance]
    for keep in (*(k for k in measured.keeps if kept(k) < total), 1.0):
        best = max(chance, key=lambda c: measured.values[c.name, keep].mean()) if keep < 1 else RANDOM
        for choice in measured.choices if keep < 1 else [RANDOM]:
            values = measured.values[choice.name, keep] + moved(keep)
            mean, spread = values.mean(), np.hypot(error(values), moved(keep) / 2)
            value = noise.right(mean) if noise else float(mean)
            spread = np.hypot(scale * spread, noise.uncertainty(mean) if noise else 0.0)
            lost = scale * (measured.whole + moved(1.0) - values)
            lost_error = (
                float(np.hypot(error(lost), scale * (moved(1.0) - moved(keep)) / 2)) if keep < 1 else 0.0
            )
            to_random, beats = None, 0.0
            if not choice.by_chance:
                gain = scale * (values - measured.values[best.name, keep] - moved(keep))
                to_random = measured.interval(gain)
                beats = float(
                    student.cdf(gain.mean() / max(measured.standard_error(gain), 1e-9), max(1, J - 1))
                )
            loss = float(lost.mean())
            if behind is not None:
                n = kept(keep)
                less, unsure = (scale * f(n, float(mean)) for f in (behind.at, behind.uncertainty))
                value -= less
                spread = np.hypot(spread, unsure)
                if keep < 1:
                    loss += less - scale * behind.at(total, float(measured.whole.mean() + moved(1.0)))
                    lost_error = float(np.hypot(lost_error, unsure))
            found.append(
                Outlook(
                    choice, keep, kept(keep),
                    value, value - t * float(spread), value + t * float(spread),
                    loss, loss - t * lost_error, loss + t * lost_error, to_random, beats,
                )
            )  # fmt: skip
    return found


def best_of(same: Sequence[Outlook]) -> list[Outlook]:
    """The choices of one share that can be advised: the best by chance, and a score likely above it."""
    chance = max((o for o in same if o.choice.by_chance), key=lambda o: o.value)
    sure = [o for o in same if o.beats_random >= SURE and o.value > chance.value]
    return [chance, *([max(sure, key=lambda o: o.value)] if sure else [])]


@dataclass(frozen=True)
class Option:
    """Examples, a way to tune and a share of weights to cut, with what they would cost and lose."""

    outlook: Outlook
    tuning: Any  # a Tuning
    cut: dict[str, Any] | None  # of result.json's weights.sparsities
    seconds: float

    @property
    def sparsity(self) -> float:
        return self.cut["sparsity"] if self.cut else 0.0

    @property
    def speedup(self) -> float | None:
        """Of the finished model, at the batch size that gains most."""
        return max(t["speedup"] for t in self.cut["timings"]) if self.cut else None

    @property
    def loss(self) -> float:
        return self.outlook.loss + (self.cut["loss"] if self.cut else 0.0)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the loss."""
        o, cut = self.outlook, self.cut or {"loss": 0.0, "low": 0.0, "high": 0.0}
        below = np.hypot(o.loss - o.loss_low, cut["loss"] - cut["low"])
        above = np.hypot(o.loss_high - o.loss, cut["high"] - cut["loss"])
        return float(self.loss - below), float(self.loss + above)

    @property
    def likely_loss(self) -> float:
        """What the loss is at most, seven times in ten: an unsure option is no good one."""
        return float(self.loss + norm.ppf(SURE) * (self.interval[1] - self.loss) / 1.96)

    def as_dict(self, causal: bool = False) -> dict[str, Any]:
        """For result.json."""
        point = NATS if causal else 1.0
        low, high = self.interval
        return {
            "choice": choice_dict(self.outlook, causal),
            "tuning": asdict(self.tuning),
            "sparsity": self.sparsity,
            "loss": point * self.loss,
            "low": point * low,
            "high": point * high,
            "seconds": self.seconds,
            "peak_bytes": self.tuning.peak_bytes,
            "speedup": self.speedup,
        }


def choice_dict(o: Outlook, causal: bool = False) -> dict[str, Any]:
    """An outlook for result.json; of a causal language model in nats, of which less is better."""
    chosen = {
        "name": o.choice.name,
        "scorer": o.choice.scorer,
        "select": o.choice.select,
        "per_class": o.choice.per_class,
    }
    if o.keep == 1:
        chosen = {"name": "everything", "scorer": None, "select": None, "per_class": None}
    numbers = {
        k: getattr(o, k)
        for k in ("keep", "examples", "value", "low", "high", "loss", "loss_low", "loss_high", "to_random")
    }
    if causal:
        numbers |= {k: NATS * numbers[k] for k in ("loss", "loss_low", "loss_high")}
        numbers |= {"value": -NATS * o.value, "low": -NATS * o.high, "high": -NATS * o.low}
    return chosen | {"select_options": o.choice.select_options if o.keep < 1 else {}} | numbers


def recommend(
    options: Sequence[Option], limits: Budget, full_seconds: float, causal: bool = False
) -> list[Option]:
    """The options that fit, best first: the least time where the loss alone is limited, else the least loss.

    A loss is what it is at most seven times in ten: of two that are alike the surer one comes first.

    Raises:
        ValueError: none fits; it names the limit that none keeps, what comes nearest, and the way out.
    """
    time, memory, speed = limits.seconds(full_seconds), limits.bytes, limits.speed
    tests = {
        "memory": lambda o: o.tuning.peak_bytes <= memory,
        "latency": lambda o: speed <= 1 or (o.speedup or 1.0) >= speed,
        "time": lambda o: o.seconds <= time,
        "max_loss": lambda o: limits.max_loss is None or o.likely_loss <= limits.max_loss,
    }
    left = list(options)
    for name, fits in tests.items():
        kept = [o for o in left if fits(o)]
        if not kept:
            raise ValueError(_impossible(name, left, limits, full_seconds, causal))
        left = kept
    if limits.max_loss is not None and limits.time is None:
        return sorted(left, key=lambda o: (o.seconds, o.loss))
    return sorted(left, key=lambda o: (round(o.likely_loss, 1), o.seconds))


def _impossible(name: str, left: Sequence[Option], limits: Budget, full_seconds: float, causal: bool) -> str:
    before = [k for k in ("memory", "latency", "time") if getattr(limits, k) is not None and k != name]
    with_them = (
        f" with {' and '.join(f'{k}={getattr(limits, k)}' for k in before)}"
        if before and name == "max_loss"
        else ""
    )
    if name == "memory":
        least = min(left, key=lambda o: o.tuning.peak_bytes)
        return (
            f"memory={limits.memory!r} is too little for every way to tune: the least is "
            f"{least.tuning.peak_bytes / 2**30:.2f}GiB ({least.tuning.name}); "
            "give more, a smaller batch_size or shorter texts"
        )
    if name == "latency":
        best = max(left, key=lambda o: o.speedup or 1.0)
        return (
            f"latency={limits.latency!r} is not reached: the fastest model measured is "
            f"{1 / (best.speedup or 1.0):.2f}x of the unpruned one; give more, or a smaller model"
        )
    if name == "time":
        least = min(left, key=lambda o: o.seconds)
        return (
            f"time={limits.time!r} is too little: the cheapest option takes {least.seconds:.3g} s, "
            f"{least.seconds / full_seconds:.2f}x of the full run; give more time"
        )
    least = min(left, key=lambda o: o.interval[1])
    return (
        f"max_loss={limits.max_loss} cannot be promised{with_them}: the best option is predicted to lose "
        f"{loss_words(least, causal)}; "
        "give more time, or a larger max_loss"
    )


def loss_words(option: Option, causal: bool) -> str:
    """`2.1 points (0.3 to 3.9)`, or `0.136 nats (0.020 to 0.250)`."""
    point, digits, unit = (NATS, 3, "nats") if causal else (1.0, 1, "points")
    loss, low, high = (f"{point * x:.{digits}f}" for x in (option.loss, *option.interval))
    return f"{loss} {unit} ({low} to {high})"


def sentence(option: Option, full_seconds: float, causal: bool) -> str:
    """What an option means, in one sentence."""
    o = option.outlook
    cost = f"{seconds_words(option.seconds)}, {option.seconds / full_seconds:.2f} of the full run"
    way = option.tuning.name
    cut = f", and cut {option.sparsity:.0%} of the heads and channels" if option.cut else ""
    if o.keep == 1 and not option.cut:
        return (
            f"Keep everything and tune {way} on all {o.examples:,} examples ({cost}): no less is as likely "
            "to stay within the limits."
        )
    if o.keep == 1:
        start = f"Tune {way} on all {o.examples:,} examples"
    elif o.choice.by_chance:
        kind = {"equal": "random with equal quotas", True: "balanced random"}.get(
            o.choice.per_class, "random"
        )
        start = f"Tune {way} on a {kind} {o.keep:.0%}, {o.examples:,} examples"
        if not causal:
            start += ", which no score tried here beats for sure"
    else:
        assert o.to_random is not None
        start = (
            f"Tune {way} on the {o.keep:.0%}, {o.examples:,} examples, that {o.choice.name} chooses "
            f"({o.to_random[0]:+.1f} points to a balanced random choice)"
        )
    return f"{start}{cut}: predicted to lose {loss_words(option, causal)} in {cost}."


def seconds_words(seconds: float) -> str:
    """`35 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
