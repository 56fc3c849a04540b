"""The table, the page and the verdict of `serpette compare`, made of its result.json and nothing else."""

from __future__ import annotations

from typing import Any

from . import figures, svg
from .answer import SAVED, count, file_size, keep_units, seconds, shown, signed, size
from .run import Run, number
from .svg import ARMS, THEME, figure, inline, plain
from .template import fill, hardware_rows

Row = dict[str, Any]
AGAINST = {"seconds": "time", "peak_bytes": "peak memory", "latency": "latency", "file_bytes": "file size"}
TO = "\u00a0to\u00a0"  # an interval stays on one line
LOG_FROM = 20  # a largest cost so many times the smallest has a logarithmic axis


def verdict(result: dict[str, Any]) -> tuple[str, str]:
    """The first line: the cheapest arm that was not measured worse than the baseline, and the fronts."""
    run, names = Run(result), short_names(result)
    base, paired = _baseline(result), [row for row in result["arms"] if _is_paired(row)]
    name, first = names[base["name"]], _reached(run, base, names[base["name"]])
    held = [row for row in paired if row["difference"]["within_noise"] or _is_better(run, row)]
    best = min((row for row in held if _is_cheaper(row, base)), key=lambda r: r["seconds"], default=None)
    if not paired:
        said = f"No arm could be paired with {name}, so no loss is known:"
    elif base["seconds"] is None:
        said = "Which arm is the cheapest is unknown, as the cost of the baseline is:"
    elif best is None:
        said = f"No arm that was cheaper held the {run.metric} of {name}:"
        cheaper = [row for row in paired if _is_cheaper(row, base)]
        if cheaper:
            sign = -1 if run.lower_is_better else 1
            closest = max(cheaper, key=lambda row: sign * row["difference"]["difference"])
            first += f"; closest came {names[closest['name']]}: it {_lost(run, closest)}"
    else:
        said = f"{names[best['name']]} was the cheapest arm that was not measured worse than {name}:"
        share = 100 * best["seconds"] / base["seconds"]
        first = (
            f"it cost {seconds(best['seconds'])}, against {seconds(base['seconds'])} ({share:.0f} %), "
            f"and {_lost(run, best)}"
        )
    sentences = [first, *_front_words(result, run, names)]
    if paired:
        chance = ": about one in twenty leaves the noise by chance" if len(paired) > 1 else ""
        sentences.append(f"{_many(len(paired), 'paired difference')} at 95 %{chance}")
    alone = len(result["arms"]) - 1 - len(paired)
    if alone and paired:
        sentences.append(f"{_many(alone, 'arm')} could not be paired")
    return said, " ".join(f"{sentence}." for sentence in sentences)


def _is_cheaper(row: Row, base: Row) -> bool:
    mine, its = row["seconds"], base["seconds"]
    if mine is None or its is None or "seconds" in row["not_compared"]:
        return False
    return mine < SAVED * its


def _reached(run: Run, row: Row, name: str) -> str:
    cost = "" if row["seconds"] is None else f" and cost {seconds(row['seconds'])}"
    known = "unknown" if row["value"] is None else shown(run, row["value"])
    return f"{name} has {run.metric} {known}{cost}"


def _lost(run: Run, row: Row) -> str:
    d = row["difference"]
    noise = f"within the noise of {_over(d)}" if d["within_noise"] else f"beyond the noise of {_over(d)}"
    amount = size(run, d["difference"])
    if not float(amount.split()[0]):
        moved = "reached the same"
    elif run.lower_is_better:
        moved = f"was {'better' if _is_better(run, row) else 'worse'} by {amount}"
    else:
        moved = f"{'gained' if _is_better(run, row) else 'lost'} {amount}"
    return f"{moved} ({signed(run, d['low'])} to {signed(run, d['high'])}), {noise}"


def _over(difference: dict[str, Any]) -> str:
    return f"{difference['count']:,} {difference['paired_over']}"


def _front_words(result: dict[str, Any], run: Run, names: dict[str, str]) -> list[str]:
    """Of memory nothing is said on a CPU, where it is that of the whole process."""
    on_cpu = any((about["hardware"] or {}).get("device") == "cpu" for about in result["runs"])
    parts = [
        f"{AGAINST[against]}: {', '.join(names[name] for name in front['front'])}"
        for against, front in result["fronts"].items()
        if not (on_cpu and against == "peak_bytes")
    ]
    return [f"On the Pareto front of {run.metric} against {'; against '.join(parts)}"] if parts else []


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _is_paired(row: Row) -> bool:
    return "difference" in (row["difference"] or {})


def _is_better(run: Run, row: Row) -> bool:
    return row["difference"]["difference"] != 0 and (
        (row["difference"]["difference"] < 0) == run.lower_is_better
    )


def _baseline(result: dict[str, Any]) -> Row:
    return next(row for row in result["arms"] if row["name"] == result["baseline"])


def short_names(result: dict[str, Any]) -> dict[str, str]:
    """{name of a row: its arm, or `run: arm` where another run has an arm of that name}."""
    arms = [row["arm"] for row in result["arms"]]
    return {row["name"]: row["arm"] if arms.count(row["arm"]) == 1 else row["name"] for row in result["arms"]}


def table(result: dict[str, Any]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Heads of the columns, and of each arm a `(value, smaller words)` a column; the unknown are left out."""
    run, base = Run(result), _baseline(result)
    rows = result["arms"]
    sizes = sorted({timing["batch_size"] for row in rows for timing in row["timings"]})
    columns: dict[str, list[tuple[str, str]]] = {
        run.metric: [(shown(run, row["value"]), _ends(run, row)) for row in rows],
        f"to {short_names(result)[base['name']]}": [_against(run, row) for row in rows],
        "kept": [("–" if row["examples"] is None else f"{row['examples']:,.0f}", "") for row in rows],
        "trains": [(_or_dash(row["trainable_parameters"], count), "") for row in rows],
        "parameters": [_cell(row, base, "parameters", count) for row in rows],
        "cost": [_cell(row, base, "seconds", seconds) for row in rows],
        "peak memory": [_cell(row, base, "peak_bytes", file_size) for row in rows],
    }
    for batch in sizes:
        flat = [row | {"latency": _latency(row, batch)} for row in rows]
        its = base | {"latency": _latency(base, batch)}
        columns[f"latency, batch of {batch}"] = [_cell(row, its, "latency", _ms) for row in flat]
    columns["file"] = [_file_cell(row, base) for row in rows]
    columns = {head: cells for head, cells in columns.items() if any(value != "–" for value, _ in cells)}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _ends(run: Run, row: Row) -> str:
    low, high = map(number, row["interval"] or (None, None))
    if low is None or high is None:
        return ""
    return TO.join(shown(run, end).removesuffix(" %").replace("-", "−") for end in (low, high))


def _against(run: Run, row: Row) -> tuple[str, str]:
    found = row["difference"]
    if found is None:
        return "baseline", ""
    if not _is_paired(row):
        return "not paired", ""
    ends = TO.join((signed(run, found["low"]), signed(run, found["high"])))
    return signed(run, found["difference"]), ends + (", noise" if found["within_noise"] else "")


def _cell(row: Row, base: Row, key: str, word: Any) -> tuple[str, str]:
    value, whole = row[key], base[key]
    if value is None:
        return "–", ""
    if key in row["not_compared"]:
        return word(value), "elsewhere"
    told = whole and row is not base and value != whole
    return word(value), f"{100 * value / whole:.{0 if value > whole / 10 else 2}f}\u00a0%" if told else ""


def _file_cell(row: Row, base: Row) -> tuple[str, str]:
    value, share = _cell(row, base, "file_bytes", file_size)
    packed = row["packed_bytes"]
    extra = (
        f"packed {file_size(packed)}".replace(" ", "\u00a0")
        if packed and packed < SAVED * (row["file_bytes"] or 0)
        else ""
    )
    return value, ", ".join(word for word in (share, extra) if word)


def _latency(row: Row, batch: int) -> float | None:
    return next((t["seconds"] for t in row["timings"] if t["batch_size"] == batch), None)


def _ms(value: float) -> str:
    return f"{1000 * value:.3g} ms"


def _or_dash(value: float | None, word: Any) -> str:
    return "–" if value is None else word(value)


def words_of_table(result: dict[str, Any]) -> str:
    """What the columns mean."""
    run = Run(result)
    paired = sorted({row["difference"]["paired_over"] for row in result["arms"] if _is_paired(row)})
    unit = "points" if run.classification else "nats of the mean loss" if run.lower_is_better else run.metric
    text = "Cost is the seconds of scoring, selection, ranking, tuning and pruning; evaluation is left out."
    if any(row["interval"] for row in result["arms"]):
        text += " Under a value: its 95 % interval over the seeds."
    if paired:
        over = " or ".join("seed by seed" if kind == "seeds" else f"over the {kind}" for kind in paired)
        text += f" Differences in {unit}, with 95 % intervals paired {over}."
        text += " “noise” marks those whose interval holds zero."
    return text + " Percentages are of the baseline."


def notes(result: dict[str, Any]) -> list[str]:
    """How arms were paired where that differs from the rest, or why not, and the notes of the comparison."""
    names, base, groups = short_names(result), _baseline(result), {}
    for row in result["arms"]:
        found = row["difference"]
        if found and not _is_paired(row):
            groups.setdefault(f"Not paired ({found['not_paired']})", []).append(names[row["name"]])
        elif found and found["paired_over"] == "test examples" and len({*row["seeds"], *base["seeds"]}) > 1:
            common = ", ".join(map(str, found["common_seeds"]))
            of = f"seed {common}, the one in common" if common else "the means over the seeds, none in common"
            groups.setdefault(f"Paired over the test examples, of {of}", []).append(names[row["name"]])
    return [*(f"{how}: {', '.join(arms)}." for how, arms in groups.items()), *result["notes"]]


def show(result: dict[str, Any]) -> None:
    """Prints the verdict, the table and the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads, rows = table(result)
    grid = Table(box=None, pad_edge=False)
    for head in ["", *heads]:
        grid.add_column(Text(head), justify="right" if head else "left", overflow="fold")
    for row, cells in zip(result["arms"], rows, strict=True):
        grid.add_row(Text(row["name"]), *(Text("\n".join(part for part in cell if part)) for cell in cells))
    console = Console()
    if console.width < 132 and not console.is_terminal:
        console = Console(width=160)  # a file has no width to keep to
    said, figures_of_it = verdict(result)
    console.print(Text(said, style="bold"), Text(figures_of_it))
    console.print()
    console.print(grid)
    console.print()
    for note in [words_of_table(result), *notes(result)]:
        console.print(Text(note))


def render(result: dict[str, Any]) -> str:
    """The whole page as text."""
    run, (said, figures_of_it), (heads, cells) = Run(result), verdict(result), table(result)
    several, index = len(result["runs"]) > 1, _index(result)
    with svg.style():
        panels = [(_title(result, against), _panel(result, against)) for against in result["fronts"]]
    return fill(
        "comparison.html.j2",
        result,
        {"panels": panels},
        verdict=said,
        answer=keep_units(figures_of_it),
        facts=_facts(result),
        words=words_of_table(result),
        columns=heads,
        rows=[
            {"arm": row["arm"], "run": row["run"] * several, "index": index[row["name"]], "cells": its}
            for row, its in zip(result["arms"], cells, strict=True)
        ],
        notes=notes(result),
        metric=run.metric,
        lower_is_better=run.lower_is_better,
        runs=[(about["name"], _about(about)) for about in result["runs"]],
    )


def _facts(result: dict[str, Any]) -> list[str]:
    facts = [f"{len(result['arms'])} arms of {_many(len(result['runs']), 'run')}"]
    if result["test"]:
        facts.append(str(result["test"]))
    if number(result["test_examples"]):
        facts.append(f"{result['test_examples']:,} test examples")
    return [*facts, f"baseline {result['baseline']}"]


def _about(about: dict[str, Any]) -> dict[str, str]:
    found = {
        "folder": about["folder"],
        "model": about["model"],
        "training data": about["train"],
        "training examples": about["train_examples"],
        "seeds": ", ".join(map(str, about["seeds"])),
    }
    return {k: str(v) for k, v in (found | hardware_rows(about) | about["versions"]).items() if v is not None}


def _index(result: dict[str, Any]) -> dict[str, int]:
    """Colour and marker of each arm: 0 the baseline."""
    others = [row["name"] for row in result["arms"] if row["name"] != result["baseline"]]
    return {result["baseline"]: 0} | {name: 1 + i % (len(ARMS) - 1) for i, name in enumerate(others)}


def _title(result: dict[str, Any], against: str) -> str:
    batch = f", batch of {result['latency_batch']}" if against == "latency" else ""
    return f"{AGAINST[against].capitalize()}{batch}"


def _panel(result: dict[str, Any], against: str) -> str:
    """One point an arm, filled on the Pareto front, which is drawn as a line of steps."""
    run, names, index = Run(result), short_names(result), _index(result)
    front = result["fronts"][against]
    points, scale = front["points"], 100 if run.classification else 1
    unit, per = _unit(against, max(point["cost"] for point in points))
    fig, ax = figure(250)
    dots = [(point["cost"] / per, point["value"] * scale) for point in points]
    xs, ys = zip(*dots, strict=True)
    if max(xs) > LOG_FROM * min(xs) > 0:
        ax.set_xscale("log")
        ax.set_xlim(min(xs) / 1.6, max(xs) * 1.6)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(lambda x, _: "")
    else:
        ax.set_xlim(0, max(xs) * 1.2 or 1)
        ax.xaxis.set_major_locator(figures.few_ticks())
    pad = 0.2 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 0.05
    ax.set_ylim(min(ys) - pad, max(ys) + pad)
    on = sorted(dot for dot, point in zip(dots, points, strict=True) if point["name"] in front["front"])
    ax.plot(*zip(*on, strict=True), drawstyle="steps-post", color=THEME["soft"], lw=1, zorder=1)
    for dot, point in zip(dots, points, strict=True):
        color, marker = figures.mark(index[point["name"]])
        filled = point["name"] in front["front"]
        fill = {"mfc": color, "mec": THEME["page"]} if filled else {"mfc": THEME["page"], "mec": color}
        ax.plot(*dot, marker, ms=8, mew=0.8 if filled else 1.6, zorder=3, **fill)
    ax.set_xlabel(f"{AGAINST[against]}, {unit}")
    ax.set_title(f"{plain(run.metric)}{', %' if run.classification else ''}", loc="left", color=THEME["soft"])
    labels = [plain(names[point["name"]], 24) for point in points]
    colors = [figures.mark(index[point["name"]])[0] for point in points]
    figures.place_labels(fig, ax, dots, _along(on, ax.get_ylim()), labels, colors)
    on_it = ", ".join(plain(names[name]) for name in front["front"])
    said = "; ".join(f"{label} {y:.3g} at {x:.3g}" for label, (x, y) in zip(labels, dots, strict=True))
    alt = f"{plain(run.metric)} against {AGAINST[against]}, {unit}. {said}. On the front: {on_it}"
    return inline(fig, f"front-{against}", alt)


def _along(front: list[tuple[float, float]], ends: tuple[float, float]) -> list[tuple[float, float, float]]:
    """The line of the front as short upright strokes (x, low, high), which labels keep clear of."""
    half, strokes = 0.01 * (ends[1] - ends[0]), []
    for (x, y), (next_x, next_y) in zip(front, front[1:], strict=False):
        strokes += [(x + (next_x - x) * i / 60, y - half, y + half) for i in range(1, 60)]
        strokes.append((next_x, min(y, next_y), max(y, next_y)))
    return strokes


def _unit(against: str, largest: float) -> tuple[str, float]:
    if against == "seconds":
        return figures.time_unit(largest)
    if against == "latency":
        return "ms", 1e-3
    return ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
