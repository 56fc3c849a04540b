"""A folder of methods becomes {name: class}: one file a method, nothing to register by hand."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'dlc'?` or the whole list, to end an error about an unknown name."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(names)


class Registry(Mapping[str, type]):
    """Classes with a `name`, found in the modules of `package` on first use; import errors propagate."""

    def __init__(self, package: str, kind: str):
        self.package, self.kind = package, kind
        self._classes: dict[str, type] | None = None

    def _load(self) -> dict[str, type]:
        if self._classes is None:
            folder = importlib.import_module(self.package)
            found: dict[str, type] = {}
            for module_info in pkgutil.iter_modules(folder.__path__):
                module = importlib.import_module(f"{self.package}.{module_info.name}")
                for cls in vars(module).values():
                    if inspect.isclass(cls) and cls.__module__ == module.__name__:
                        if isinstance(cls.__dict__.get("name"), str):
                            found[cls.__dict__["name"]] = cls
            self._classes = dict(sorted(found.items()))
        return self._classes

    def __getitem__(self, name: str) -> type:
        classes = self._load()
        if name not in classes:
            raise ValueError(f"unknown {self.kind} {name!r}{near(name, classes)}")
        return classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def make(self, method: Any, **options: Any) -> Any:
        """An instance: `method` is a name (made with `options`) or an object, returned as it is."""
        if not isinstance(method, str):
            if inspect.isclass(method):
                return method(**options)
            return method
        cls = self[method]
        known = inspect.signature(cls).parameters
        for option in options:
            if option not in known:
                raise ValueError(f"{self.kind} {method!r} has no option {option!r}{near(option, known)}")
        return cls(**options)
