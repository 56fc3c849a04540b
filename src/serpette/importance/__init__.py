"""Importance of a neuron, one method a file: `serpette.importance.Taylor(per_class=False)` or by name."""

from __future__ import annotations

from ..registry import Registry

registry = Registry(__name__, "importance")


def __getattr__(name: str) -> type:
    if not name.startswith("_"):
        for cls in registry.values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["registry", *(cls.__name__ for cls in registry.values())])
