"""`Example:` and bare `>>>` lines of our docstrings -> the section that mkdocstrings shows as code."""

import re
from textwrap import indent
from typing import Any

from griffe import Extension

EXAMPLE = re.compile(r"^Example:[ ]?(.*)$", re.MULTILINE)
BARE = re.compile(r"(?<=\n\n)>>> (?:.+\n?)+")


def sectioned(docstring: str) -> str:
    """The docstring with its examples under `Examples:`."""
    titled = EXAMPLE.sub(lambda found: "Examples:" + (f"\n    {found[1]}\n" if found[1] else ""), docstring)
    return BARE.sub(lambda found: "Examples:\n" + indent(found[0], "    "), titled)


class ExamplesInDocstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = sectioned(obj.docstring.value)
