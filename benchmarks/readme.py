"""Tables that a benchmark writes into its README, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(file: Path, **parts: str) -> None:
    """Puts each part between its marks, where the file has them."""
    text = file.read_text(encoding="utf-8")
    for name, part in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    file.write_text(text, encoding="utf-8")


def interval(found: Sequence[float] | None) -> str:
    """`+1.2 [0.3, 2.1]` of (mean, low, high)."""
    return "" if found is None else f"{found[0]:+.1f} [{found[1]:.1f}, {found[2]:.1f}]"
