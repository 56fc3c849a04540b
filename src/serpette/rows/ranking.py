"""Which rows and columns train: the most important ones of each layer, or of all layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..importance import neurons
from ..registry import near
from ..types import Importance, NeuronStats
from .dependencies import Group, Side, chosen, group_scores, groups
from .layer import RowLayer, row_layers, update_counts
from .layers import RowLinear
from .neurons import neuron_stats
from .statistics import moved, observe_neurons, parts


def rank_rows(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    importance: str | Importance = "magnitude",
    *,
    adapter: str = "default",
    scope: Literal["layer", "global"] = "layer",
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    num_classes: int | None = None,
    seed: int | None = None,
    reset: bool = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Chooses anew which rows (and columns) of a row adapter train, by their importance in the frozen model.

    To be called before training, and before the optimizer is made: the parameters are new ones. With
    `RowConfig(dependencies=True)` the importance of a row is summed over all that depends on it, rows of one
    layer and columns of the next, and they are chosen together; layers that share nothing are ranked alone.

    Args:
        model: of `get_peft_model(model, RowConfig(...))`; its config's counts are brought up to date.
        loader: batches for an importance that needs data; dicts, or (inputs, labels) with `loss`. A few
            hundred examples, of every class for `"qm_taylor"`.
        loss, num_classes: as in `serpette.rows.statistics.observe_neurons`.
        importance: name or object, see `serpette.importance`. `"taylor"` costs a forward and a backward pass.
        adapter: which one is ranked.
        scope: `"layer"` keeps the number of rows of each layer. `"global"` ranks the neurons of all layers
            together, each layer's importance divided by its mean, since its size follows the layer's scale
            and width; the parameters stay as many as they are (or less than one row fewer), and each layer
            keeps at least one row.
        seed: of `"random"`; default that of the config.
        reset: forget what the adapter has learnt so far.
        progress: a bar on a terminal.

    Returns:
        {module: (n,) importance of its rows}, and {module + ":columns": ...} where columns train.

    Raises:
        ValueError: no such adapter, one that has been trained (without `reset`) or is merged, an importance
            that is unknown or needs data without a loader, dependencies without a loader or with a global
            scope, and what `observe_neurons` and `serpette.rows.dependencies.groups` raise.

    Example:
        >>> from peft import get_peft_model
        >>> from serpette.rows import RowConfig
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = get_peft_model(net, RowConfig(r=2, target_modules=["0"]))
        >>> batches = [(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))]
        >>> scores = rank_rows(model, batches, "taylor", loss=nn.functional.cross_entropy)
        >>> chosen = model.base_model.model[0].rows_index["default"]
        >>> set(chosen.tolist()) == set(scores["0"].topk(2).indices.tolist())
        True
    """
    layers = _layers(model, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r} must be 'layer' or 'global'")
    if importance == "random":
        importance = neurons.make("random", seed=config.seed if seed is None else seed)
    method: Importance = neurons.make(importance)
    if method.needs and loader is None:
        raise ValueError(
            f"importance {method.name!r} needs data; give rank_rows(model, loader, {method.name!r}), or use "
            "'magnitude', which needs none"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r} is merged; call model.unmerge_adapter() first")
        if layer.trained(adapter) and not reset:
            raise ValueError(
                f"adapter {adapter!r} has been trained ({name!r}), and other rows would start from nothing; "
                "rank before training, or give reset=True to forget it"
            )
    together: list[Group] = []
    if config.dependencies:
        if loader is None or scope == "global":
            raise ValueError(
                f"scope={scope!r}, loader={loader!r}: RowConfig(dependencies=True) needs scope='layer' and "
                "a loader, whose first batch is traced; give both, or leave dependencies off"
            )
        together, loader = _groups(model, loader, layers, config.dependencies == "residual")
    with _without_adapters(layers):
        stats = _stats(model, layers, adapter, method, loader, loss, num_classes, progress, bool(together))
        sides = _sides(layers, adapter, stats, method, bool(together))
    if scope == "global":
        _share_out(sides)
    picked = _picked_together(together, sides, config)
    for name, layer in layers.items():
        alone = not {(name, "rows"), (name, "columns")} & set(picked)
        rows, columns = (
            sides[name, side].top() if alone and (name, side) in sides else picked.get((name, side))
            for side in ("rows", "columns")
        )
        layer.choose(adapter, rows, columns)
    config.importance = method.name
    update_counts(model, config, adapter)
    return {name if side == "rows" else f"{name}:columns": s.scores for (name, side), s in sides.items()}


def initial_rows(
    module: nn.Module, count: int, importance: str, seed: int = 0, columns: bool = False, name: str = ""
) -> Tensor:
    """The `count` most important rows, or columns, of a layer without data: sorted positions, int64.

    The lower position is taken of equals; the padding token of an embedding never. `name` makes layers of one
    size differ in `"random"`.
    """
    stats = neuron_stats(name, module, columns)
    side = stats.columns if columns else stats
    assert side is not None
    method = neurons.make(importance, **({"seed": seed} if importance == "random" else {}))
    return top(method(side), count, None if columns else getattr(module, "padding_idx", None))


def top(scores: Tensor, count: int, never: int | None = None) -> Tensor:
    """Sorted positions of the `count` highest scores, the lower position of equals, without `never`.

    >>> top(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2)
    tensor([1, 3])
    """
    return ranked(scores, never)[:count].sort().values


def ranked(scores: Tensor, never: int | None = None) -> Tensor:
    """Positions from the highest score to the lowest, the lower position first of equals, without `never`."""
    order = scores.argsort(descending=True, stable=True)
    return order if never is None else order[order != never]


@dataclass
class _Side:
    """Rows or columns of a layer, of which `count` train at `cost` weights each."""

    scores: Tensor
    count: int
    cost: int
    never: int | None

    def top(self) -> Tensor | None:
        return top(self.scores, self.count, self.never) if self.count else None


def _share_out(sides: Mapping[Any, _Side]) -> None:
    """Sets the counts to those of the best neurons of all layers that cost no more weights than before."""
    relative, costs, owner = [], [], []
    budget = 0
    for number, side in enumerate(sides.values()):
        scores = side.scores.double()[ranked(side.scores, side.never)]
        mean = scores.mean()
        relative.append((scores / mean if mean > 0 else scores)[1:])  # the first one is certain
        costs.append(torch.full((len(scores) - 1,), side.cost))
        owner.append(torch.full((len(scores) - 1,), number))
        budget += (side.count - 1) * side.cost
    ranking = torch.cat(relative).argsort(descending=True, stable=True)
    taken = torch.cat(owner)[ranking][torch.cat(costs)[ranking].cumsum(0) <= budget]
    counts = 1 + torch.bincount(taken, minlength=len(sides))
    for side, count in zip(sides.values(), counts.tolist(), strict=True):
        side.count = count


def _layers(model: nn.Module, adapter: str) -> dict[str, RowLayer]:
    layers = dict(row_layers(model))
    held = {name: layer for name, layer in layers.items() if adapter in layer._get_available_adapters()}
    if held:
        return held
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no row adapter; make one with get_peft_model(model, RowConfig(...))"
        )
    known = {a for layer in layers.values() for a in layer._get_available_adapters()}
    raise ValueError(f"adapter={adapter!r} is none of the model's row adapters{near(adapter, known)}")


@contextmanager
def _without_adapters(layers: Mapping[str, RowLayer]) -> Iterator[None]:
    """The row layers as if frozen; `model.disable_adapter()` would leave out a trained head as well."""
    flags = {name: layer._disable_adapters for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer._disable_adapters = True
            if isinstance(layer, RowLinear):
                layer.restore()  # of kernel="live", whose rows are in the weight
        yield
    finally:
        for name, layer in layers.items():
            layer._disable_adapters = flags[name]


def _stats(
    model: nn.Module,
    layers: Mapping[str, RowLayer],
    adapter: str,
    method: Importance,
    loader: Iterable[Any] | None,
    loss: Callable[[Any, Tensor], Tensor] | None,
    num_classes: int | None,
    progress: bool,
    all_columns: bool,
) -> dict[str, NeuronStats]:
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    columns = {
        name
        for name, layer in layers.items()
        if adapter in layer.rows_column_index or (all_columns and not layer.no_columns)
    }
    if not method.needs or loader is None:
        return {name: neuron_stats(name, base, name in columns) for name, base in bases.items()}
    return observe_neurons(
        model, loader, bases, method.needs,
        columns=columns, loss=loss, num_classes=num_classes, progress=progress,
    )  # fmt: skip


def _sides(
    layers: Mapping[str, RowLayer],
    adapter: str,
    stats: Mapping[str, NeuronStats],
    method: Importance,
    all_sides: bool,
) -> dict[tuple[str, Side], _Side]:
    """The scores of the rows and columns that train, or of all; and how many those are."""
    sides: dict[tuple[str, Side], _Side] = {}
    for name, layer in layers.items():
        padding = getattr(layer.get_base_layer(), "padding_idx", None)
        held: tuple[tuple[Side, Any, Any, int | None], ...] = (
            ("rows", stats[name], layer.rows_weight, padding),
            ("columns", stats[name].columns, layer.rows_columns, None),
        )
        for side, seen, parameters, never in held:
            if seen is None or not (all_sides or adapter in parameters):
                continue
            scores = method(seen).detach().cpu()
            if not bool(scores.isfinite().all()):
                raise ValueError(
                    f"importance {method.name!r} of the {side} of {name!r} is not finite; look at its weights"
                )
            count = cost = 0
            if adapter in parameters:
                count = parameters[adapter].shape[0 if side == "rows" else 1]
                cost = parameters[adapter].numel() // count
            sides[name, side] = _Side(scores, count, cost, never)
    return sides


def _groups(
    model: Any, loader: Iterable[Any], layers: Mapping[str, RowLayer], residual: bool
) -> tuple[list[Group], Iterable[Any]]:
    """The dependency groups of the layers, traced with the first batch, and a loader that has it still."""
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws a seed
        batches = iter(loader)
        first = next(batches, None)
    if first is None:
        raise ValueError("loader is empty: no dependency can be traced without an example; give it batches")
    inputs = moved(parts(first)[0], next(model.parameters()).device)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = groups(inner, inputs, modules=set(layers), residual=residual)
    return found, chain([first], batches) if batches is loader else loader


def _picked_together(
    together: Sequence[Group], sides: Mapping[tuple[str, Side], _Side], config: Any
) -> dict[tuple[str, Side], Tensor]:
    """The channels of the groups' best neurons."""
    totals = group_scores(together, {key: side.scores for key, side in sides.items()})
    picks = [
        top(total, config.count(len(total), group.members[0].module))
        for total, group in zip(totals, together, strict=True)
    ]
    return {key: index for key, index in chosen(together, picks).items() if key in sides}
