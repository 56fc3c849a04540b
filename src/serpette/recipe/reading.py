"""YAML as dataclasses, strictly: unknown keys, wrong types and keys given twice are errors with a way out."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any, Literal

import yaml

from ..registry import near


def parse(text: str) -> Any:
    """Mappings, lists and values of `text`, read safely; bad YAML is a yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def check_limits(limits: list[tuple[str, Any, bool, str]], before: str) -> None:
    """Of (key, value, fine, limit) the first that is not fine is a ValueError."""
    for key, value, fine, limit in limits:
        if not fine:
            raise ValueError(f"{before}{key}={value!r} must be {limit}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-4` is one), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A dict; two equal keys are an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} is given twice, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def build(hint: Any, value: Any, key: str, file: str) -> Any:
    """`value` from YAML as the type `hint`; `key` is its dotted place in the file."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _of_dataclass(typing.cast(type, hint), value, key, file)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            if _fits(option, value):
                return build(option, value, key, file)
    elif origin is tuple and isinstance(value, list):
        return tuple(build(args[0], item, f"{key}.{i}", file) for i, item in enumerate(value))
    elif _fits(hint, value):
        return float(value) if hint is float else value
    raise ValueError(f"{file}: {key}={value!r} must be {_words(hint)}")


def _of_dataclass(cls: type, value: Any, key: str, file: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key or 'the recipe'}={value!r} must be a mapping of key: value")
    values = fields_of(cls, value, key, file)
    for f in dataclasses.fields(cls):
        if f.name not in value and f.default is f.default_factory is dataclasses.MISSING:
            hint = typing.get_type_hints(cls)[f.name]
            raise ValueError(f"{file}: key {_join(key, f.name)} is missing; it must be {_words(hint)}")
    return cls(**values)


def fields_of(cls: type, value: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """The fields of `cls` that `value` has, each as its type."""
    hints = typing.get_type_hints(cls)
    for name in value:
        if name not in hints:
            raise ValueError(f"{file}: unknown key {_join(key, name)}{near(name, hints)}")
    return {name: build(hints[name], item, _join(key, name), file) for name, item in value.items()}


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {tuple: list, dict: dict}.get(origin, hint))


def _words(hint: Any) -> str:
    """A type in words, to stand after "must be"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is tuple:
        return "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words[hint]
