"""The table and the bar chart of `serpette memory`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .svg import THEME, figure, inline, plain, style

GIB = 2**30
PARTS = {"weights": "hist", "training": "tuning", "activations": "scoring"}
NAMES = {
    "weights": "frozen weights",
    "training": "trained, gradients, optimiser",
    "activations": "activations",
}
COLUMNS = {
    "weights": "weights", "trainable": "trained", "gradients": "gradients", "states": "states",
    "activations": "activations", "forward_peak": "forward", "backward_peak": "backward", "step_peak": "step",
    "peak": "peak", "over_inference": "over M", "lower_bound": "bound",
}  # fmt: skip
# What the page defines, for a picture that stands alone.
ALONE = (
    "<style>svg{--ink:#1c1c1c;--soft:#555;--line:#ddd;--page:#fff;--hist:#a9b4be;--scoring:#c0562f;"
    "--tuning:#0b6e4f;font-family:sans-serif}</style>"
)


def show(result: dict[str, Any]) -> None:
    """Prints what `serpette.memory.compare` found, in GiB."""
    measured = any("measured" in row for row in result["rows"])
    table = Table(box=None, title=_title(result), title_justify="left", caption=_caption(measured))
    table.caption_justify = "left"
    table.add_column("")
    table.add_column("trains, M", justify="right")
    for head in [*COLUMNS.values(), *(["measured"] if measured else [])]:
        table.add_column(head, justify="right")
    for row in result["rows"]:
        cells = [gib(row[key]) for key in COLUMNS]
        if measured:
            cells.append(gib(row["measured"]["peak"]))
        table.add_row(Text(row["name"]), f"{row['parameters'] / 1e6:.4g}", *cells)
    console = Console()
    if console.width < 132 and not console.is_terminal:
        console = Console(width=160)  # a file has no width to keep to
    console.print(table)


def _title(result: dict[str, Any]) -> str:
    shapes = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in result["batch"].items())
    return (
        f"{plain(result['model'])}, {result['dtype']}, {shapes}, attention {result['attention']}: GiB; "
        f"M (evaluation, no gradients) {gib(result['inference'])}"
    )


def _caption(measured: bool) -> str:
    text = (
        "forward, backward, step: most alive in that part, all counted. bound: weights, trained, gradients, "
    )
    text += "states and the activations of the frozen model."
    return text + (" measured: the peak of real steps." if measured else "")


def gib(value: int | None) -> str:
    """Bytes as GiB, with as many digits as say something."""
    if value is None:
        return "-"
    amount = value / GIB
    return f"{amount:.2f}" if amount >= 1 or not value else f"{amount:.3g}"


def chart(result: dict[str, Any], alone: bool = True) -> str:
    """Peak memory as SVG: one bar a setup, of weights, what training adds, and activations.

    Args:
        alone: a file of its own; else to be put into a page that defines the colours.
    """
    from matplotlib.patches import Patch

    rows = result["rows"]
    with style():
        fig, ax = figure(80 + 42 * len(rows))
        widest = max(max(row["peak"], row.get("measured", row)["peak"]) for row in rows) / GIB
        for place, row in enumerate(rows):
            left = 0.0
            for part, color in PARTS.items():
                width = row["at_peak"][part] / GIB
                ax.barh(place, width, 0.36, left=left, color=THEME[color], linewidth=0)
                left += width
            if "measured" in row:
                ax.plot(row["measured"]["peak"] / GIB, place, "|", color=THEME["ink"], ms=13, mew=1.6)
            if row["lower_bound"]:
                ax.plot(row["lower_bound"] / GIB, place, "d", color=THEME["ink"], ms=4)
            text = f"{plain(row['name'], 44)}: {gib(row['peak'])}"
            ax.text(0, place - 0.36, text, color=THEME["ink"], fontsize=10.5, va="center")
        ax.set_ylim(len(rows) - 0.5, -0.75)
        ax.set_xlim(0, widest * 1.05 or 1)
        ax.set_yticks([])
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", visible=True)
        ax.set_xlabel("peak of a training step, GiB  (diamond: lower bound)")
        fig.legend(
            handles=[Patch(facecolor=THEME[color], label=NAMES[part]) for part, color in PARTS.items()],
            loc="outside upper left", ncols=3, columnspacing=0.9, handlelength=1.1, handletextpad=0.4,
            borderpad=0, borderaxespad=0, labelcolor=THEME["soft"],
        )  # fmt: skip
        said = "; ".join(f"{plain(row['name'])} {gib(row['peak'])} GiB" for row in rows)
        svg = inline(fig, "memory", f"Peak memory of a training step. {said}")
    return svg.replace(">", f">{ALONE}", 1) if alone else svg
