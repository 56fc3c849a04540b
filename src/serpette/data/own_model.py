"""Scorers that look through a model of their own, such as a small one: whose signals they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .observe import Observation
from .sources import open_model


def with_own_model(methods: Sequence[Any]) -> list[Any]:
    """Those of `methods` that have one."""
    return [method for method in methods if getattr(method, "model", None) is not None]


def opened(method: Any, beside: nn.Module, processing_class: Any) -> tuple[nn.Module, Any]:
    """(the model of `method`, where `beside` is; its tokenizer, else `processing_class`).

    Raises:
        ValueError: a name that no causal language model has.
    """
    model, own = open_model(method.model, task="causal-lm")
    device = next((p.device for p in beside.parameters()), torch.device("cpu"))
    model = model.to(device)  # type: ignore[arg-type] - transformers' stub of nn.Module.to
    return model, getattr(method, "processing_class", None) or own or processing_class


def described(methods: Sequence[Any]) -> dict[str, str]:
    """{scorer: whose signals it got} of those that can have a model of their own, for the result."""

    def words(model: Any) -> str:
        if model is None:
            return "the scored model"
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        return name if isinstance(model, nn.Module) else str(model)

    return {method.name: words(method.model) for method in methods if hasattr(method, "model")}


def in_common(first: Observation, others: Sequence[Observation]) -> list[Observation]:
    """All of them, cut to the examples that every model could read, in the order of `first`."""
    kept = set(first.signals.ids.tolist()).intersection(*(o.signals.ids.tolist() for o in others))
    ids = [i for i in first.signals.ids.tolist() if i in kept]
    if not ids:
        raise ValueError(
            "no example could be read by all models; see max_length, and that each has its tokenizer"
        )
    cut = []
    for seen in (first, *others):
        position = {i: p for p, i in enumerate(seen.signals.ids.tolist())}
        rows = torch.tensor([position[i] for i in ids])
        cut.append(replace(seen, signals=seen.signals.subset(rows), rows=seen.rows[rows]))
    return cut
