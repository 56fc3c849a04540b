"""The figures of the report, each a function of the run that returns an SVG, or None without its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..evaluate import proportion_interval
from .answer import find_full, is_random, percent, seconds
from .run import Run, cost_of, keeps_all, number, parts_of
from .svg import ARMS, THEME, figure, inline, plain

MARKERS = "osD^vPXh"
TEXT = {"color": THEME["ink"], "fontsize": 11}
SMALL = {"color": THEME["soft"], "fontsize": 10.5}


def arm_index(run: Run) -> dict[str, int]:
    """Colour and marker of each arm, the same everywhere: 0 full, 1 a random choice, 2 and on the scorers."""
    full, index, free = find_full(run), {}, 2
    chance = next((arm for arm in run.arms if is_random(arm)), None)
    for arm in run.arms:
        if arm is full:
            index[arm["name"]] = 0
        elif arm is chance:
            index[arm["name"]] = 1
        else:
            index[arm["name"]] = 2 + (free - 2) % (len(ARMS) - 2)
            free += 1
    return index


def accuracy_against_cost(run: Run) -> str | None:
    """One point an arm, with the 95 % interval of its metric over the seeds, else of its accuracy."""
    costs = [cost_of(arm) for arm in run.arms]
    unit, per = time_unit(max((cost for cost in costs if cost is not None), default=0))
    label = f"{' + '.join(parts_of(run))}, {unit}"
    scaled = [None if cost is None else cost / per for cost in costs]
    return _scatter(run, scaled, label, "cost", lambda x: seconds(x * per))


def accuracy_against_parameters(run: Run) -> str | None:
    """The same against the share of the model's parameters that train; None where all arms train alike."""
    shares = [run.trainable_share(arm) or None for arm in run.arms]
    if not run.tunings_differ or len({share for share in shares if share}) < 2:
        return None
    label = "parameters that train, % of the model's"
    scaled = [100 * share if share else None for share in shares]
    return _scatter(run, scaled, label, "parameters", lambda x: percent(x / 100), log=True)


def _scatter(
    run: Run,
    xs: list[float | None],
    label: str,
    what: str,
    said_of: Callable[[float], str],
    log: bool = False,
) -> str | None:
    found = [(arm, x, run.value(arm)) for arm, x in zip(run.arms, xs, strict=True)]
    points = [(arm, x, y) for arm, x, y in found if x is not None and y is not None]
    if not points:
        return None
    scale = 100 if run.classification else 1
    n = run.data.get("test_examples") or 0
    fig, ax = figure(300)
    index, dots, spans = arm_index(run), [], []
    for arm, x, y in points:
        low, high = proportion_interval(y, n) if run.classification and n and 0 <= y <= 1 else (y, y)
        low, high = run.interval(arm) or ((y, y) if run.seeds else (low, high))
        color, marker = mark(index[arm["name"]])
        ax.plot([x] * 2, [low * scale, high * scale], color=color, lw=1.6, solid_capstyle="round")
        ax.plot(x, y * scale, marker, ms=8, color=color, mec=THEME["page"], mew=1.2, zorder=3)
        dots.append((x, y * scale))
        spans.append((x, low * scale, high * scale))
    if log:
        ax.set_xscale("log")
        ax.set_xlim(min(x for x, _ in dots) / 2, max(x for x, _ in dots) * 2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(lambda x, _: "")
    else:
        ax.set_xlim(0, max(x for x, _ in dots) * 1.16 or 1)
    bottom, top = min(s[1] for s in spans), max(s[2] for s in spans)
    pad = 0.14 * (top - bottom) or 0.05 * abs(top) or 0.05
    ax.set_ylim(bottom - pad, top + pad)
    ax.set_xlabel(label)
    ax.set_title(f"{plain(run.metric)}{', %' if run.classification else ''}", loc="left", color=THEME["soft"])
    names = [plain(arm["name"], 24) for arm, _, _ in points]
    place_labels(fig, ax, dots, spans, names, [mark(index[arm["name"]])[0] for arm, _, _ in points])
    said = "; ".join(f"{plain(a['name'])} {y * scale:.3g} at {said_of(x)}" for a, x, y in points)
    return inline(fig, f"{what}-accuracy", f"{plain(run.metric)} against {what}. {said}")


def place_labels(fig, ax, dots, spans, names: list[str], colors: list[str]) -> None:
    """Puts each name near its point where it covers nothing; a coloured line leads to those farther off."""
    fig.canvas.draw()
    fig.set_layout_engine("none")  # the layout stays as it was drawn, so that sizes in pixels are known
    to_px, renderer = ax.transData.transform, fig.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in map(to_px, dots)]
    for x, low, high in spans:
        (px, y0), (_, y1) = to_px((x, low)), to_px((x, high))
        taken.append((px - 3, y0, px + 3, y1))
    for dot, name, color in zip(dots, names, colors, strict=True):
        text = ax.text(0, 0, name, **TEXT)
        box = text.get_window_extent(renderer)
        w, h = box.width, box.height
        px, py = to_px(dot)
        best, best_bad = None, float("inf")
        for reach in (11, 24, 40, 60, 84):
            for dx, dy, side in ((1, 0, 0), (-1, 0, 1), (0.7, 0.8, 0), (0.7, -0.8, 0), (-0.7, 0.8, 1),
                                 (-0.7, -0.8, 1), (0, 1, 0.5), (0, -1, 0.5)):  # fmt: skip
                x0, y0 = px + dx * reach - side * w, py + dy * reach - h / 2
                place = (x0, y0, x0 + w, y0 + h)
                bad = sum(_overlap(place, other) for other in taken) + 0.01 * reach
                bad += 50 * (_area(place) - _overlap(place, (frame.x0, frame.y0, frame.x1, frame.y1)))
                if bad < best_bad:
                    best, best_bad, best_reach = place, bad, reach
        assert best is not None
        taken.append(best)
        x0, y0 = ax.transData.inverted().transform((best[0], (best[1] + best[3]) / 2))
        text.set_position((x0, y0))
        text.set_va("center_baseline")
        if best_reach > 12:
            near = (min(max(px, best[0]), best[2]), (best[1] + best[3]) / 2)
            end = ax.transData.inverted().transform(near)
            ax.plot([dot[0], end[0]], [dot[1], end[1]], color=color, lw=0.9, zorder=1)


def _area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def cost_split(run: Run) -> str | None:
    """One bar an arm, in its parts; evaluation is no part of the cost and hatched below."""
    from matplotlib.patches import Patch

    arms = [(arm, cost_of(arm)) for arm in run.arms if cost_of(arm) is not None]
    if not arms:
        return None
    times = [{k: number(v) or 0.0 for k, v in (arm["seconds"]).items()} for arm, _ in arms]
    unit, per = time_unit(
        max(max(c or 0, t.get("evaluation", 0)) for (_, c), t in zip(arms, times, strict=True))
    )
    fig, ax = figure(76 + 50 * len(arms))
    index, widest = arm_index(run), 0.0
    for row, ((arm, cost), time) in enumerate(zip(arms, times, strict=True)):
        left = 0.0
        for part in parts_of(run):
            width = time.get(part, 0.0) / per
            ax.barh(row, width, 0.34, left=left, color=THEME[part], linewidth=0)
            left += width
        spent = time.get("evaluation", 0.0) / per
        if spent:
            ax.barh(row + 0.26, spent, 0.12, facecolor="none", edgecolor=THEME["soft"], hatch="/////", lw=0.8)
        _bar_text(ax, row, left, arm["name"], seconds(cost), index[arm["name"]])
        widest = max(widest, left, spent)
    _bar_axes(ax, len(arms), widest)
    ax.set_xlabel(f"time, {unit}")
    handles = [Patch(facecolor=THEME[p], label=p) for p in parts_of(run)]
    hatched = Patch(
        facecolor="none", edgecolor=THEME["soft"], hatch="/////", label="evaluation, apart", lw=0.8
    )
    fig.legend(
        handles=[*handles, hatched], loc="outside upper left", ncols=4, columnspacing=0.9, handlelength=1.1,
        handletextpad=0.4, borderpad=0, borderaxespad=0, labelcolor=THEME["soft"],
    )  # fmt: skip
    said = "; ".join(f"{plain(arm['name'])} {seconds(cost)}" for arm, cost in arms)
    return inline(fig, "cost-split", f"Split of the cost by arm. {said}")


def subset_distance(run: Run) -> str | None:
    """Bars of the maximum mean discrepancy between each arm's subset and the full set."""
    full = find_full(run)
    arms = [(arm, number(arm.get("mmd"))) for arm in run.arms if not (arm is full or keeps_all(arm))]
    arms = [(arm, value) for arm, value in arms if value is not None]
    if not arms:
        return None
    fig, ax = figure(44 + 44 * len(arms))
    index, largest = arm_index(run), max(abs(value) for _, value in arms)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    for row, (arm, value) in enumerate(arms):
        ax.barh(row, value, 0.34, color=mark(index[arm["name"]])[0], linewidth=0)
        _bar_text(ax, row, max(value, 0), arm["name"], f"{value:.{decimals}f}", index[arm["name"]])
    values = [value for _, value in arms]
    _bar_axes(ax, len(arms), max(values), min(values))
    ax.set_xlabel("MMD to the full set (0: as the full set)")
    said = "; ".join(f"{plain(arm['name'])} {value:.3g}" for arm, value in arms)
    return inline(fig, "mmd", f"Distance of each subset to the full set (MMD). {said}")


def _bar_text(ax, row: int, end: float, name: object, value: str, index: int) -> None:
    color, marker = mark(index)
    ax.plot(0.011, row - 0.35, marker, ms=7, color=color, transform=ax.get_yaxis_transform(), clip_on=False)
    ax.text(
        0.038, row - 0.35, plain(name, 40), transform=ax.get_yaxis_transform(), va="center_baseline", **TEXT
    )
    ax.annotate(value, (end, row), xytext=(5, 0), textcoords="offset points", va="center_baseline", **SMALL)


def _bar_axes(ax, rows: int, widest: float, lowest: float = 0.0) -> None:
    lowest = min(lowest, 0.0) * 1.2  # an unbiased MMD can fall below 0
    ax.set_xlim(lowest, widest * 1.2 if widest > 0 else -lowest / 4 or 1)
    ax.set_ylim(rows - 0.45, -0.62)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(False)
    ax.xaxis.set_major_locator(few_ticks())


def stopping_curves(run: Run) -> list[tuple[str, str]]:
    """`(scorer, svg)` for each adaptive path: agreement of the ranking from point to point, and its limit."""
    found = []
    for i, (scorer, entry) in enumerate((run.result.get("scorers") or {}).items()):
        curve = [(p, number(v)) for p, v in (entry or {}).get("curve") or []]
        curve = [(p, v) for p, v in curve if v is not None]
        if not curve:
            continue
        arm = next((arm for arm in run.arms if arm.get("scorer") == scorer), None)
        color, marker = mark(arm_index(run)[arm["name"]] if arm else 2)
        tolerance = number(entry.get("tolerance"))
        points, values = zip(*curve, strict=True)
        fig, ax = figure(240)
        ax.plot(points, values, "-", color=color, lw=2)
        ax.plot(points, values, marker, color=color, ms=7, mec=THEME["page"], mew=1.2)
        if tolerance is not None:
            ax.axhline(tolerance, color=THEME["ink"], lw=1.1, ls=(0, (4, 3)))
            ax.annotate(
                f"tolerance {tolerance:g}", (0, tolerance), xycoords=("axes fraction", "data"), va="bottom",
                xytext=(4, 4), textcoords="offset points", **SMALL,
            )  # fmt: skip
        shown = [*values, *([tolerance] if tolerance is not None else [])]
        pad = 0.16 * (max(shown) - min(shown)) or 0.01
        ax.set_ylim(min(shown) - pad, max(shown) + 1.4 * pad)
        ax.set_xlim(min(points) - 0.5, max(points) + 0.5)
        ax.xaxis.set_major_locator(few_ticks(8, integer=True))
        ax.set_xlabel("points in the path")
        ax.set_title("rank correlation with one point less", loc="left", color=THEME["soft"])
        said = ", ".join(f"{v:.3f} at {p}" for p, v in curve)
        found.append((scorer, inline(fig, f"stop{i}", f"Stopping curve of {plain(scorer)}: {said}")))
    return found


def mark(index: int) -> tuple[str, str]:
    """Colour and marker of an arm."""
    return ARMS[index], MARKERS[index]


def few_ticks(count: int = 5, integer: bool = False) -> Any:
    """About `count` round ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10] if not integer else [1, 2, 5, 10])


def time_unit(largest: float) -> tuple[str, float]:
    """The unit that suits seconds up to `largest`, and how many seconds it is."""
    if largest < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if largest < 4 * 3600 else ("hours", 3600.0)
