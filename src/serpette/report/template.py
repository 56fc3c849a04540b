"""What every page shares: the style of `base.html.j2`, and its last lines on versions and hardware."""

from __future__ import annotations

from typing import Any

from .answer import file_size
from .run import number


def fill(template: str, result: dict[str, Any], drawn: dict[str, Any], **values: Any) -> str:
    """The page as text.

    Args:
        template: a file beside this one, which extends `base.html.j2`.
        result: the `result.json` that the page is about.
        drawn: SVG by name: text, None, or a list of tuples whose last entry is SVG. ElementTree has escaped
            its text; nothing else is marked as safe.
        values: the other names of the template; all text in them is escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    safe: dict[str, Any] = {}
    for name, value in drawn.items():
        listed = isinstance(value, list)
        safe[name] = [(*words, Markup(v)) for *words, v in value] if listed else value and Markup(value)
    environment = Environment(
        loader=PackageLoader("serpette", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    kind = result.get("kind") or "run"
    shared = {
        "kind": kind,
        "name": result.get("name") or kind,
        "versions": result.get("versions") or {},
        "hardware": hardware_rows(result),
        "seed": result.get("seed"),
        "seeds": [],
    }
    return environment.get_template(template).render(**(shared | values), **safe)


def hardware_rows(result: dict[str, Any]) -> dict[str, str]:
    """The machine, with bytes made readable."""
    machine = result.get("hardware") or {}
    return {k.removesuffix("_bytes"): file_size(v) if k.endswith("_bytes") and number(v) else str(v)
            for k, v in machine.items()}  # fmt: skip
