"""Scores by any mix of scorers: those that read a LoRA's gradients get a LoRA, the others the model as it is.

Used by recipes and by `serpette score`. In Python, give `serpette.score` the peft model that you tune.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import pruner
from .data.features import find_head
from .data.language import is_causal_lm
from .data.scores import Scores
from .tuning import trainable


def score(
    model: nn.Module,
    dataset: Any,
    methods: Sequence[Any],
    *,
    lora: Mapping[str, Any],
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Scores:
    """The scores of all `methods`, as one `Scores`.

    If both kinds are among them, each has a pass of its own: `cost["seconds"]` holds the sums,
    `cost["plain"]` and `cost["lora"]` what each has spent, and examples that one of them could not read are
    set aside.

    Args:
        model: without a LoRA; not changed.
        methods: scorers (objects with different names).
        lora: of the LoRA that is put on a copy of the model, as for `serpette.tuning.trainable`: `rank`,
            `alpha`, `target_modules`. It is fresh: the scorers warm it up.
        seed: of the LoRA, too.
        out: folder of the scores. That of a pass with a LoRA beside another one is `lora` in it.
        **options: of `serpette.score`.

    Raises:
        ValueError: as `serpette.score`.

    Example:
        >>> import torch
        >>> from serpette import scorers
        >>> from serpette.zoo import tiny
        >>> rows = [{"pixel_values": torch.rand(3, 32, 32), "label": i % 3} for i in range(6)]
        >>> methods = [scorers.registry.make(name) for name in ("dlc", "tsa")]
        >>> scores = score(tiny("vit"), rows, methods, lora={"rank": 2}, progress=False)
        >>> sorted(scores.values), scores.cost["lora"]["seconds"]["warmup"] > 0
        (['dlc', 'tsa'], True)
    """
    adapted = [method for method in methods if hasattr(method, "reading")]
    plain = [method for method in methods if not hasattr(method, "reading")]
    if not adapted:
        return pruner.score(model, dataset, plain, seed=seed, out=out, **options)
    first = pruner.score(model, dataset, plain, seed=seed, out=out, **options) if plain else None
    apart = out if out is None or first is None else Path(out) / "lora"
    second = pruner.score(with_lora(model, lora, seed), dataset, adapted, seed=seed, out=apart, **options)
    second.settings["lora"] = dict(lora)
    scores = second if first is None else _joined(first, second, [method.name for method in methods])
    if out is not None:
        scores.save(out)
    return scores


def with_lora(model: nn.Module, lora: Mapping[str, Any], seed: int) -> nn.Module:
    """A copy of `model` with a fresh LoRA, whose weights follow from `seed`."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = copy.deepcopy(model)
        return trainable(model, tuned_head(model), "lora", **lora)


def tuned_head(model: nn.Module) -> nn.Linear | None:
    """The head that trains beside a LoRA; None in a causal language model."""
    return None if is_causal_lm(model) else find_head(model)


def _joined(plain: Scores, adapted: Scores, names: list[str]) -> Scores:
    read = set(adapted.signals.ids.tolist())
    ids = [i for i in plain.signals.ids.tolist() if i in read]
    if not ids:
        raise ValueError(
            "no example could be read by all scorers; see the reasons, or score with each by itself"
        )
    parts = _cut(plain, ids), _cut(adapted, ids)
    seconds = [part.cost["seconds"] for part in parts]
    values = parts[0].values | parts[1].values
    methods = parts[0].methods | parts[1].methods
    return replace(
        parts[0],
        values={name: values[name] for name in names},
        methods={name: methods[name] for name in names},
        set_aside=plain.set_aside | adapted.set_aside,
        settings=parts[0].settings | {"lora": adapted.settings["lora"]},
        cost={
            "seconds": {k: sum(s.get(k, 0.0) for s in seconds) for k in {**seconds[0], **seconds[1]}},
            "passes": sum(part.cost["passes"] for part in parts),
            "peak_bytes": max(part.cost["peak_bytes"] for part in parts),
            "plain": parts[0].cost,
            "lora": parts[1].cost,
        },
    )


def _cut(scores: Scores, ids: list[str]) -> Scores:
    position = {name: place for place, name in enumerate(scores.signals.ids.tolist())}
    rows = torch.tensor([position[i] for i in ids])
    return replace(
        scores,
        signals=scores.signals.subset(rows),
        values={name: value[rows] for name, value in scores.values.items()},
        path_values={
            name: {share: value[rows] for share, value in along.items()}
            for name, along in scores.path_values.items()
        },
        rows=scores.rows[rows],
    )
