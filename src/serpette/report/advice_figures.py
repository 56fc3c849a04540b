"""The figures of an advice, each a function of it that returns an SVG, or None without its data."""

from __future__ import annotations

from typing import Any

from .advice import Advice, Entry, is_control
from .answer import count, seconds
from .figures import SMALL, TEXT, few_ticks, mark
from .memory import GIB, gib
from .run import number
from .svg import ARMS, THEME, figure, inline, plain
from .weights import sensitivity_figure
from .weights import share as share_of

LINES = 5  # choices with a colour of their own; the others are thin lines
DASHED = (0, (4, 3))


def _points(entries: list[Entry], x: str) -> list[tuple[float, float, float, float]]:
    """`(x, value, low, high)` where x and value are numbers, from left to right; no interval: no height."""
    found = []
    for entry in entries:
        at, value = number(entry.get(x)), number(entry.get("value"))
        if at is not None and value is not None:
            ends = number(entry.get("low")), number(entry.get("high"))
            found.append((at, value, *(value if end is None else end for end in ends)))
    return sorted(found)


def choices(advice: Advice) -> str | None:
    """The predicted value against the share kept: a line a choice, keeping everything as a band."""
    by_name: dict[str, list[Entry]] = {}
    for entry in advice.entries("choices"):
        if (number(entry.get("keep")) or 1.0) < 1:
            by_name.setdefault(str(entry.get("name")), []).append(entry)
    points = {name: _points(entries, "keep") for name, entries in by_name.items()}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    controls = [name for name in points if is_control(by_name[name][0])]
    balanced = [name for name in controls if by_name[name][0].get("per_class")]
    reference = next(iter(balanced or controls), None)
    advised = (advice.part("recommendation").get("choice") or {}).get("name")
    sign = 1 if advice.nats else -1
    means = {name: sign * sum(p[1] for p in found) / len(found) for name, found in points.items()}
    others = sorted((n for n in points if n != reference), key=lambda n: (n != advised, means[n]))
    fig, ax = figure(330)
    _full_band(ax, advice)
    for name in others[LINES:]:
        ax.plot([100 * p[0] for p in points[name]], [p[1] for p in points[name]], color=THEME["line"], lw=1.2)
    named = [*([reference] if reference else []), *others[:LINES]]
    shares = sorted({p[0] for found in points.values() for p in found})
    gap = min((b - a for a, b in zip(shares, shares[1:], strict=False)), default=0.1)
    for place, name in enumerate(named):
        control = name == reference
        color, marker = mark(1 if control else 2 + place - bool(reference))
        shift = 100 * gap * 0.045 * (place - (len(named) - 1) / 2)  # bars beside, not on, each other
        xs = [100 * p[0] + shift for p in points[name]]
        ax.vlines(xs, [p[2] for p in points[name]], [p[3] for p in points[name]], color=color, lw=1.4)
        ax.plot(xs, [p[1] for p in points[name]], color=color, marker=marker, ms=5.5,
                lw=2.4 if control else 1.5, ls=DASHED if control else "-", label=plain(name, 26),
                zorder=4 if control else 3)  # fmt: skip
    ax.set_xlabel("kept, % of the examples")
    ax.set_title(plain(advice.axis), loc="left", color=THEME["soft"])
    ax.xaxis.set_major_locator(few_ticks(6))
    fig.legend(loc="outside upper left", ncols=2, handlelength=2.2, columnspacing=1.2, borderpad=0,
               borderaxespad=0, labelcolor=THEME["soft"])  # fmt: skip
    said = "; ".join(
        f"{plain(n)} " + ", ".join(f"{advice.value(p[1])} at {share_of(p[0])}" for p in points[n])
        for n in named
    )
    return inline(fig, "choices", f"Predicted {plain(advice.axis)} by the share kept. {said}")


def _full_band(ax, advice: Advice) -> None:
    full = advice.part("full")
    value, low, high = (number(full.get(key)) for key in ("value", "low", "high"))
    if low is not None and high is not None:
        ax.axhspan(low, high, color=ARMS[0], alpha=0.16, lw=0, zorder=0)
    if value is not None:
        ax.axhline(value, color=ARMS[0], lw=1.3, zorder=1)
        ax.annotate("keep everything", (0, value), xycoords=("axes fraction", "data"), xytext=(4, 3),
                    textcoords="offset points", va="bottom", **SMALL)  # fmt: skip


def curve(advice: Advice) -> str | None:
    """The learning curve: what was observed, what was fitted, dashed where it is extrapolated."""
    found = _points(advice.entries("curve", "points"), "examples")
    fitted = _points(advice.entries("curve", "fitted"), "examples")
    if not found and not fitted:
        return None
    fig, ax = figure(290)
    color = ARMS[2]
    last = max((p[0] for p in found), default=0.0)
    if fitted:
        xs, values, lows, highs = zip(*fitted, strict=True)
        ax.fill_between(xs, lows, highs, color=color, alpha=0.16, lw=0)
        inside = [p for p in fitted if p[0] <= last]
        beyond = [*inside[-1:], *(p for p in fitted if p[0] > last)]
        for part, dashes in ((inside, "-"), (beyond, DASHED)):
            ax.plot([p[0] for p in part], [p[1] for p in part], color=color, lw=1.8, ls=dashes)
    if found:
        xs, values, lows, highs = zip(*found, strict=True)
        ax.vlines(xs, lows, highs, color=THEME["ink"], lw=1.4)
        ax.plot(xs, values, "o", color=THEME["ink"], ms=6, mec=THEME["page"], mew=1.2, zorder=3)
    data = advice.part("data")
    total = number(data.get("readable", data.get("examples")))
    if total:
        ax.axvline(total, color=THEME["soft"], lw=1.1, ls=DASHED)
        ax.annotate("all", (total, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2), ha="right",
                    va="top", textcoords="offset points", **SMALL)  # fmt: skip
    every = [p[0] for p in (*found, *fitted)]
    if min(every) > 0 and max(every) / min(every) > 8:
        from matplotlib.ticker import LogLocator

        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(lambda x, _: "")
    else:
        ax.xaxis.set_major_locator(few_ticks(6))
    ax.xaxis.set_major_formatter(lambda x, _: count(round(x)))
    ax.set_xlabel("training examples")
    ax.set_title(plain(advice.axis), loc="left", color=THEME["soft"])
    said = "; ".join(f"{advice.value(p[1])} at {p[0]:,.0f}" for p in found)
    end = f" Extrapolated: {advice.value(fitted[-1][1])} at {fitted[-1][0]:,.0f}." if fitted else ""
    return inline(fig, "curve", f"Learning curve of {plain(advice.axis)}. Observed: {said}.{end}")


def tunings(advice: Advice) -> str | None:
    """Bars of the peak memory of a step by tuning, with its seconds; outlined where it is predicted."""
    rows = [(e, peak) for e in advice.entries("tunings") if (peak := number(e.get("peak_bytes")))]
    if not rows:
        return None
    limit = number((advice.part("budget").get("memory") or {}).get("bytes"))
    advised = (advice.part("recommendation").get("tuning") or {}).get("name")
    fig, ax = figure(70 + 42 * len(rows))
    for row, (entry, peak) in enumerate(rows):
        chosen = advised is not None and entry.get("name") == advised
        color = ARMS[2] if chosen else THEME["tuning"]
        filled = color if entry.get("measured") else "none"
        ax.barh(row, peak / GIB, 0.34, facecolor=filled, edgecolor=color, linewidth=1.2)
        step = number(entry.get("step_seconds"))
        told = f"{gib(int(peak))} GiB" + ("" if step is None else f", {seconds(step)} a step")
        told += "" if entry.get("measured") else ", predicted"
        ax.text(0, row - 0.36, f"{plain(entry.get('name'), 30)}: {told}", va="center", **TEXT)
    widest = max(peak for _, peak in rows) / GIB
    if limit is not None:
        ax.axvline(limit / GIB, color=THEME["pruning"], lw=1.4, ls=DASHED)
        ax.annotate("budget", (limit / GIB, 0), xycoords=("data", "axes fraction"), xytext=(-4, 3),
                    ha="right", textcoords="offset points", **SMALL)  # fmt: skip
        widest = max(widest, limit / GIB)
    ax.set_xlim(0, widest * 1.06)
    ax.set_ylim(len(rows) - 0.5, -0.75)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(False)
    ax.xaxis.set_major_locator(few_ticks())
    ax.set_xlabel("peak memory of a step, GiB")
    said = "; ".join(f"{plain(e.get('name'))} {gib(int(peak))} GiB" for e, peak in rows)
    return inline(fig, "tunings", f"Peak memory of a training step by tuning. {said}")


def sparsities(advice: Advice) -> str | None:
    """Above the predicted loss at each sparsity, below the speed-up that was measured."""
    entries = [e for e in advice.entries("weights", "sparsities") if number(e.get("sparsity")) is not None]
    entries.sort(key=lambda e: e["sparsity"])
    losses = _points([{**e, "value": e.get("loss")} for e in entries], "sparsity")
    speeds: dict[str, list[Any]] = {}
    for entry in entries:
        for timing in entry.get("timings") or []:
            speeds.setdefault(str(timing.get("batch_size")), []).append(
                {**timing, "value": timing.get("speedup"), "sparsity": entry["sparsity"]}
            )
    quick = {size: found for size, timings in speeds.items() if (found := _points(timings, "sparsity"))}
    if not losses and not quick:
        return None
    rows = bool(losses) + bool(quick)
    fig, axes = figure(40 + 165 * rows, rows, 1, sharex=True, squeeze=False)
    panels = list(axes[:, 0])
    if losses:
        ax = panels[0]
        xs, values, lows, highs = zip(*((100 * x, *rest) for x, *rest in losses), strict=True)
        ax.fill_between(xs, lows, highs, color=THEME["pruning"], alpha=0.18, lw=0)
        ax.plot(xs, values, "o-", color=THEME["pruning"], lw=1.8, ms=5.5)
        ax.set_title(plain(f"{advice.loss_name}, {advice.unit}"), loc="left", color=THEME["soft"])
    if quick:
        ax = panels[-1]
        for place, (size, found) in enumerate(quick.items()):
            color, marker = mark(2 + place % (len(ARMS) - 2))
            xs = [100 * p[0] for p in found]
            ax.vlines(xs, [p[2] for p in found], [p[3] for p in found], color=color, lw=1.2)
            ax.plot(xs, [p[1] for p in found], color=color, marker=marker, ms=5.5, lw=1.6,
                    label=f"batch of {plain(size, 8)}")  # fmt: skip
        ax.axhline(1, color=THEME["ink"], lw=1.1, ls=DASHED)
        ax.set_title("speed-up, times", loc="left", color=THEME["soft"])
        ax.legend(loc="upper left", borderpad=0, labelcolor=THEME["soft"])
    panels[-1].set_xlabel("sparsity, %")
    panels[-1].xaxis.set_major_locator(few_ticks(6))
    said = "; ".join(f"{advice.value(p[1])} lost at {share_of(p[0])}" for p in losses)
    fast = "; ".join(
        f"batch of {plain(s)} {f[-1][1]:.2f} times at {share_of(f[-1][0])}" for s, f in quick.items()
    )
    return inline(fig, "sparsities", f"Predicted loss and measured speed-up by sparsity. {said}. {fast}")


def layers(advice: Advice) -> str | None:
    """What changes with one layer cut, a curve a layer."""
    entries = [e for e in advice.entries("weights", "layers") if isinstance(e.get("losses"), dict)]
    shares = sorted({key for e in entries for key in e["losses"]}, key=float)
    curves = [(e.get("name"), [number(e["losses"].get(share)) for share in shares]) for e in entries]
    whole = [{"name": name, "losses": losses} for name, losses in curves if losses and None not in losses]
    if not whole:
        return None
    what = "rise of the loss, nats" if advice.nats else "share of the features' variance that changes"
    return sensitivity_figure({"sparsities": shares, "layers": whole}, "layers", what)
