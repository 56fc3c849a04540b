"""A matplotlib figure as SVG that lives inside a page: themed by CSS, unique ids, text kept as text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

WIDTH = 400  # px; about the width of a phone, so that 11 px text stays 10 px there
SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"

# Colours that stand for CSS variables; matplotlib writes them out, `inline` puts the variables in.
THEME = {
    "ink": "#010a01", "soft": "#010a02", "line": "#010a03", "page": "#010a04", "hist": "#010a05",
    "scoring": "#010a06", "selection": "#010a07", "tuning": "#010a08", "ranking": "#010a09",
    "pruning": "#010a0a",
}  # fmt: skip
ARMS = [f"#010b{i:02x}" for i in range(8)]
VARIABLES = {hex_: f"var(--{name})" for name, hex_ in THEME.items()}
VARIABLES |= {hex_: f"var(--arm{i})" for i, hex_ in enumerate(ARMS)}

RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "serpette", "text.parse_math": False, "text.usetex": False,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "hatch.linewidth": 0.8,
    "axes.titlesize": 10.5, "axes.labelsize": 11, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": THEME["line"],
    "axes.labelcolor": THEME["soft"], "text.color": THEME["ink"], "axes.linewidth": 1,
    "axes.facecolor": "none",
    "xtick.color": THEME["line"], "ytick.color": THEME["line"], "xtick.labelcolor": THEME["soft"],
    "ytick.labelcolor": THEME["soft"], "xtick.major.size": 3, "ytick.major.size": 0, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": THEME["line"], "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 10.5, "figure.dpi": 72, "axes.unicode_minus": True,
    "figure.facecolor": "none", "savefig.facecolor": "none", "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure; matplotlib's settings are put back afterwards."""
    import matplotlib

    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # the page's own font shows what matplotlib's measuring font lacks
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def figure(height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Any, Any]:
    """`(figure, axes)` of WIDTH x height px; a Figure object of its own, no pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    FigureCanvasAgg(fig)  # measures text
    fig.get_layout_engine().set(w_pad=3 / 72, h_pad=3 / 72)  # type: ignore[union-attr]
    return fig, fig.subplots(rows, columns, **options)


def inline(fig, name: str, label: str) -> str:
    """`<svg>` to put into a page; ids start with `name`, `label` describes it to those who cannot see it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # metadata holds foreign addresses; <style> would reach out of the figure into the whole page
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _theme(element, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": "figure"}
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _theme(element: ElementTree.Element, name: str) -> None:
    attributes = element.attrib
    if "id" in attributes:
        attributes["id"] = f"{name}-{attributes['id']}"
    if LINK in attributes:
        attributes["href"] = re.sub("^#", f"#{name}-", attributes.pop(LINK))
    for key in ("style", "clip-path", "fill"):
        if key in attributes:
            attributes[key] = re.sub(r"url\(#", f"url(#{name}-", attributes[key])
    if "style" in attributes:
        text = re.sub(r"#[0-9a-f]{6}", lambda m: VARIABLES.get(m[0], m[0]), attributes["style"])
        text = re.sub(r"font: ((?:[\w-]+ )*)([\d.]+)px [^;]*", _font, text)
        attributes["style"] = text


def _font(match: re.Match) -> str:
    weight = next((w for w in match[1].split() if w in ("bold", "600", "700")), None)
    return f"font-size: {match[2]}px" + (f"; font-weight: {weight}" if weight else "")


def plain(text: object, limit: int = 60) -> str:
    """Text for a figure: one line, no control characters (XML has none), not longer than `limit`."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()
    if len(line) <= limit:
        return line
    tail = limit // 3  # names often differ in their ends
    return f"{line[: limit - 1 - tail].rstrip()}…{line[-tail:].lstrip()}"
