"""Importance of a neuron or of a single weight, one method a file: `serpette.importance.Taylor()` or by name.

`neurons` and `weights` are the methods of `registry` that serve the one and the other.
"""

from __future__ import annotations

from typing import Any

from ..registry import Registry

registry = Registry(__name__, "importance")


class _Serving(Registry):
    """The importances that have `method`; the others are refused with the names that work."""

    def __init__(self, method: str, served: str):
        super().__init__(__name__, "importance")
        self.method, self.served = method, served

    def _load(self) -> dict[str, type]:
        return {name: cls for name, cls in registry.items() if self.method in vars(cls)}

    def __getitem__(self, name: str) -> type:
        if name in registry and name not in self:
            raise self._refusal(name)
        return super().__getitem__(name)

    def make(self, method: Any, **options: Any) -> Any:
        made = super().make(method, **options)
        if not hasattr(made, self.method):
            raise self._refusal(getattr(made, "name", made))
        return made

    def _refusal(self, name: Any) -> ValueError:
        able = ", ".join(self)
        return ValueError(f"importance {name!r} does not rank {self.served}; those that do: {able}")


neurons = _Serving("__call__", "neurons")
weights = _Serving("of_weights", "single weights")


def __getattr__(name: str) -> type:
    if not name.startswith("_"):
        for cls in registry.values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["registry", "neurons", "weights", *(cls.__name__ for cls in registry.values())])
