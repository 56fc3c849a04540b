"""What the adviser predicted of an arm, beside what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answer import file_size, find_full, seconds
from .figures import SMALL, TEXT, arm_index, few_ticks, mark
from .run import Run, cost_of, number
from .svg import THEME, figure, inline, plain

Arm = dict[str, Any]


@dataclass
class Forecast:
    """One predicted figure of one arm; `word` writes it, with its unit."""

    what: str
    predicted: float
    low: float | None
    high: float | None
    actual: float | None
    word: Callable[[float], str]
    unit: str = ""

    @property
    def held(self) -> bool | None:
        """Whether the actual lies within the interval; None where one of the two is missing."""
        if self.low is None or self.high is None or self.actual is None:
            return None
        return self.low <= self.actual <= self.high

    @property
    def ends(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"({self.word(self.low)} to {self.word(self.high)})"


def forecasts(run: Run, arm: Arm) -> list[Forecast]:
    """What was predicted of `arm`, in the adviser's units: points of accuracy or of R², nats of a loss."""
    said = arm.get("predicted") or {}
    unit, points = ("nats", _nats) if run.lower_is_better else (f"points of {run.metric}", _points)
    rise = "rise of the loss" if run.lower_is_better else "loss"
    rows = [
        ("loss" if run.lower_is_better else run.metric, "value", _value(run, arm), points, unit),
        (f"{rise} to the full set", "loss", _loss(run, arm), points, unit),
        ("cost", "seconds", cost_of(arm), seconds, ""),
        ("peak memory", "peak_bytes", number(arm.get("peak_bytes")), file_size, ""),
        ("speed-up", "speedup", _speedup(arm), "{:.2f} times".format, ""),
    ]
    found = []
    for what, key, actual, word, unit in rows:
        if (predicted := number(said.get(key))) is not None:
            names = ("low", "high") if key == "value" else (f"{key}_low", f"{key}_high")
            low, high = (number(said.get(name)) for name in names)
            found.append(Forecast(what, predicted, low, high, actual, word, unit))
    return found


def _value(run: Run, arm: Arm) -> float | None:
    if run.lower_is_better:
        return number(arm.get("loss"))
    value = run.value(arm)
    return None if value is None else 100 * value


def _loss(run: Run, arm: Arm) -> float | None:
    full = find_full(run, arm)
    mine, whole = _value(run, arm), _value(run, full) if full else None
    if mine is None or whole is None:
        return None
    return mine - whole if run.lower_is_better else whole - mine


def _speedup(arm: Arm) -> float | None:
    timings = (arm.get("weights") or {}).get("timings") or []
    return max((ratio for t in timings if (ratio := number(t.get("speedup")))), default=None)


def _points(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _nats(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def predicted_arms(run: Run) -> list[tuple[Arm, list[Forecast]]]:
    """The arms of which something was predicted."""
    found = [(arm, forecasts(run, arm)) for arm in run.arms if isinstance(arm.get("predicted"), dict)]
    return [pair for pair in found if pair[1]]


def predicted_rows(run: Run) -> list[dict[str, Any]]:
    """One row a predicted figure, each cell as text."""
    index, rows = arm_index(run), []
    for arm, found in predicted_arms(run):
        for i, f in enumerate(found):
            verdict = {True: "within", False: "outside", None: ""}[f.held]
            if f.low is None and f.actual is not None and f.predicted > 0:
                verdict = f"{f.actual / f.predicted:.2f} times"
            rows.append({
                "arm": arm["name"] if i == 0 else "",
                "index": index[arm["name"]],
                "what": ", ".join(filter(None, (f.what, f.unit.partition(" of ")[0]))),
                "predicted": f.word(f.predicted),
                "ends": f.ends,
                "actual": "not measured" if f.actual is None else f.word(f.actual),
                "verdict": verdict,
                "out": f.held is False,
            })  # fmt: skip
    return rows


def predicted_words(run: Run, subject: Arm | None) -> str:
    """A sentence of what was foretold of `subject`, else of the first such arm, and whether it came true."""
    arms = predicted_arms(run)
    pairs = [pair for pair in arms if pair[0] is subject] or arms
    if not pairs:
        return ""
    arm, found = pairs[0]
    main = next((f for f in found if "to the full set" in f.what), found[0])
    unit = f" {main.unit}" if main.unit and main.unit != f"points of {main.what}" else ""
    text = f"Foretold for {arm['name']}: {main.what} of {main.word(main.predicted)}{unit}"
    text += f" {main.ends}" if main.ends else ""
    if main.actual is None:
        return f"{text}; what came of it was not measured."
    word = main.word(main.actual)
    if main.held is None:
        return f"{text}; it came to {word}."
    return f"{text}; {'it came true' if main.held else 'it did not come true'}, with {word}."


def predicted_chart(run: Run) -> str | None:
    """Bars from the low to the high end of each prediction with an interval, the actual as a dot."""
    pairs = [
        (arm, f) for arm, found in predicted_arms(run) for f in found
        if "to the full set" in f.what and f.low is not None and f.high is not None
    ]  # fmt: skip
    if not pairs:
        return None
    index = arm_index(run)
    fig, ax = figure(70 + 44 * len(pairs))
    for row, (arm, f) in enumerate(pairs):
        color, marker = mark(index[arm["name"]])
        ax.barh(row, f.high - f.low, 0.3, left=f.low, color=THEME["tuning"], linewidth=0)  # type: ignore[operator]
        ax.plot([f.predicted] * 2, [row - 0.15, row + 0.15], color=THEME["ink"], lw=1.4)
        ax.text(
            0.0, row - 0.34, plain(arm["name"], 44), transform=ax.get_yaxis_transform(), va="center", **TEXT
        )
        if f.actual is not None:
            ax.plot(f.actual, row, marker, ms=9, color=color, mec=THEME["page"], mew=1.2, zorder=3)
    ax.set_ylim(len(pairs) - 0.6, -0.62)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(False)
    ends = [v for _, f in pairs for v in (f.low, f.high, f.actual) if v is not None]
    if min(ends) <= 0 <= max(ends):
        ax.axvline(0, color=THEME["line"], lw=1, zorder=0)
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(few_ticks())
    what = pairs[0][1]
    ax.set_xlabel(f"{what.what}, {what.unit}", color=SMALL["color"])
    said = "; ".join(
        f"{plain(arm['name'])} predicted {f.word(f.predicted)} {f.ends}, "
        + ("not measured" if f.actual is None else f"actual {f.word(f.actual)}")
        for arm, f in pairs
    )
    return inline(fig, "predicted", f"Predicted and actual {what.what}. {said}")
