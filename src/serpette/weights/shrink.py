"""A dense smaller model instead of zeros: heads and channels that nothing reads any more are taken out.

    y = W_down f(W_up x): where column k of W_down is zero, row k of W_up and column k of W_down can go.

`shrink` makes the smaller copy, `slice_` cuts a model in place while it trains. By default all layers keep
the same width, the greatest that one of them needs, so that a stock configuration describes the result
(uniform widths as in LLM-Pruner, Ma et al. 2023, arXiv 2305.11627, which saves a pickle instead).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Group, Side, base_layer, find_groups

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
HEAD_COUNTS = ("num_attention_heads", "num_heads", "num_key_value_heads", "all_head_size")
SIZES = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features")


def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    ragged: bool = False,
    round_to: int = 8,
    example_inputs: Any = None,
) -> nn.Module:
    """A smaller copy of `model` that computes the same; the given model is left as it is.

    A head or channel goes if all weights that read it are zero. The copy's configuration is updated, and its
    attribute `shrunk` says whether the stock class can load it: `{"stock": bool, "reason": str}`. Save it
    with `save_pretrained` if it can, with `serpette.weights.load.save_shrunk` in any case.

    Args:
        model: without adapters (after `merge_and_unload()`), of a family that `find_groups` knows, or any
            module together with `example_inputs`.
        masks: {module name: bool (O, I), True where it stays}, applied to the copy first; a convolution's is
            (O, I k k). None: the zeros of the weights count.
        ragged: each layer keeps its own width, for which the result needs our `load`. By default all layers
            keep the same one, rounded up to what the configuration can say (Llama: a number of heads that
            divides the hidden size; Dinov2: a multiple of the hidden size). Traced layers keep
            their own in any case.
        round_to: widths of FFN and convolutions are rounded up to a multiple, for the speed of the matrix
            products; 1: not at all.
        example_inputs: see `find_groups`.

    Raises:
        ValueError: adapters are not merged, a mask does not fit, a weight to be cut is shared with another
            module, or nothing can be removed.

    Example:
        >>> model = nn.Sequential(nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 2)}))
        >>> keep = torch.ones(2, 6, dtype=torch.bool)
        >>> keep[:, [1, 4]] = False
        >>> shrink(model, {"0.fc2": keep}, round_to=1)[0].fc1
        Linear(in_features=4, out_features=4, bias=True)
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to={round_to!r} must be a whole number of at least 1; 1 does not round")
    if any(hasattr(module, "base_layer") or hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError("the model still has adapters; shrink(model.merge_and_unload(), masks) instead")
    small = copy.deepcopy(model)
    _apply(small, masks or {})
    groups = find_groups(small, example_inputs=example_inputs)
    needed = {group.name: needed_units(small, group) for group in groups}
    kept = {}
    for alike in _alike(groups, ragged):
        most = max(int(needed[group.name].sum()) for group in alike)
        for group in alike:
            width = next(n for n in possible_units(small, group, round_to, ragged) if n >= most)
            kept[group.name] = _first(needed[group.name], width)
    if all(bool(keep.all()) for keep in kept.values()):
        raise ValueError(
            "no head or channel can be removed: in some layer all are still read"
            + ("" if ragged else ", or fewer than round_to and a uniform width leave over; try ragged=True")
            + "; unstructured zeros do not make a model smaller, prune with pattern='structured'"
        )
    slice_(small, groups, kept)
    small.shrunk = update_config(small, groups, kept)  # type: ignore[assignment]
    return small


def slice_(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Cut the units that are not kept out of `model`, in place, also while it trains.

    The Parameter objects stay the same, so that an optimizer goes on with them; its state tensors are cut
    along, gradients are dropped. LoRA layers are cut with their base layer: A's columns, B's rows. Call it
    between `optimizer.step()` and the next forward; the groups do not fit the model afterwards:
    `find_groups` again. A DistributedDataParallel around the model has to be built anew.

    Args:
        model: in which the groups were found.
        groups: of which those named in `kept` are cut.
        kept: {group name: bool (units,), True where the unit stays}.
        optimizer: whose state holds, for each parameter to be cut, tensors of its shape or of one element.

    Raises:
        ValueError: nothing of a group is kept, a shape does not fit, a weight is shared with another module,
            or the optimizer's state is of another shape (factored, quantised); nothing has been cut then.

    Example:
        >>> model = nn.Sequential(nn.ModuleDict({"fc1": nn.Linear(4, 3), "fc2": nn.Linear(3, 2)}))
        >>> slice_(model, find_groups(model), {"0.channels": torch.tensor([True, False, True])})
        >>> model[0].fc2.weight.shape
        torch.Size([2, 2])
    """
    chosen = [group for group in groups if group.name in kept]
    for group in chosen:
        keep = kept[group.name]
        if keep.dtype != torch.bool or keep.shape != (group.units,) or not keep.any():
            raise ValueError(
                f"kept[{group.name!r}] must be a bool tensor ({group.units},) with at least one True, got "
                f"{keep.dtype} {tuple(keep.shape)} with {int(keep.sum())}"
            )
    cuts: list[tuple[nn.Module, Side, Tensor]] = [
        (
            model.get_submodule(member.module),
            member.side,
            member.index[kept[group.name].cpu()].flatten(),
        )
        for group in chosen
        if not kept[group.name].all()
        for member in group.members
    ]
    _check_shared(model, [(layer, side) for layer, side, _ in cuts])
    state = optimizer.state if optimizer is not None else {}
    for layer, side, _ in cuts:
        for parameter, _ in _parameters(layer, side):
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimizer's {key!r} has shape {tuple(value.shape)} for a weight of shape "
                        f"{tuple(parameter.shape)} and cannot be cut with it; use AdamW or SGD of torch, or "
                        "cut without optimizer and make a new one"
                    )
    with torch.no_grad():
        for layer, side, index in cuts:
            _cut(layer, side, index, state)
    for group in chosen:
        if group.kind == "heads" and not kept[group.name].all():
            attention = model.get_submodule(group.members[0].module.rpartition(".")[0])
            for name in HEAD_COUNTS:
                if isinstance(count := getattr(attention, name, None), int):
                    setattr(attention, name, count * int(kept[group.name].sum()) // group.units)


def needed_units(model: nn.Module, group: Group) -> Tensor:
    """Bool (units,), True where a weight that reads the unit is not zero."""
    needed = torch.zeros(group.units, dtype=torch.bool)
    for member in group.members:
        if member.side == "columns":
            weight: Any = base_layer(model.get_submodule(member.module)).weight
            read = weight.detach().ne(0).transpose(0, 1).flatten(1).any(1).cpu()  # (I,)
            needed |= read[member.index].any(1)
    return needed


def possible_units(model: nn.Module, group: Group, round_to: int = 8, ragged: bool = False) -> list[int]:
    """How many units of `group` may be kept, ascending: what a stock configuration can say if not `ragged`.

    Example:
        >>> mlp = nn.ModuleDict({"fc1": nn.Linear(4, 20), "fc2": nn.Linear(20, 2)})
        >>> possible_units(mlp, find_groups(mlp)[0])
        [8, 16, 20]
    """
    config = None if ragged else _config(model, group)
    if group.kind == "heads":
        counts = [n for n in range(1, group.units) if _accepts(config, _head_changes(model, group, n))]
    elif (ratio := getattr(config, "mlp_ratio", None)) and not hasattr(config, "intermediate_size"):
        counts = [n for r in range(1, int(ratio)) if (n := _width_of_ratio(config, r)) < group.units]
    else:
        counts = list(range(round_to, group.units, round_to))
    return [*counts, group.units]


def update_config(
    model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Write the widths into the model's configuration where one number does for all layers.

    Args:
        model: already cut.
        groups: found before the cut (with `kept`) or after it.
        kept: what `slice_` was given.

    Returns:
        `{"stock": bool, "reason": str}`: whether the stock class, built from this configuration, has the
        model's shapes.
    """
    widths: dict[Any, list[tuple[Group, int]]] = defaultdict(list)
    for group in groups:
        if (config := _config(model, group)) is not None:
            units = int(kept[group.name].sum()) if kept and group.name in kept else group.units
            widths[id(config), group.kind].append((group, units))
    for alike in widths.values():
        if len({units for _, units in alike}) == 1:
            group, units = alike[0]
            config: Any = _config(model, group)
            if group.kind == "heads":
                changes = _head_changes(model, group, None)
                if changes.get("num_attention_heads") == getattr(config, "num_attention_heads", None):
                    changes = {}
            elif hasattr(config, "intermediate_size"):
                changes = {"intermediate_size": units}
            elif ratio := getattr(config, "mlp_ratio", None):
                fits = [r for r in range(1, int(ratio) + 1) if _width_of_ratio(config, r) == units]
                changes = {"mlp_ratio": fits[0]} if fits else {}
            else:
                changes = {}
            if _accepts(config, changes):
                before = dict(vars(config))
                for name, value in changes.items():
                    setattr(config, name, value)
                if not _says(model, group):
                    for name in changes:
                        setattr(config, name, before[name]) if name in before else delattr(config, name)
    if not hasattr(model, "config"):
        return {"stock": False, "reason": f"{type(model).__name__} is not built from a configuration"}
    different = list(unlike_stock(model))
    if not different:
        return {"stock": True, "reason": ""}
    return {
        "stock": False,
        "reason": f"the configuration of {type(model).__name__} cannot say the width of {different[0]}"
        + (f" and {len(different) - 1} more modules" if different[1:] else "")
        + "; save with save_shrunk, load with serpette.weights.load.load",
    }


def unlike_stock(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Modules of which shapes or sizes are not what their class makes of the configuration.

    Returns:
        {module name: {"shapes": {parameter or buffer: [...]}, "sizes": {attribute: int}}}, of the live model.
    """
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(model.config))
    before, after = layout(stock), layout(model)
    return {name: found for name, found in after.items() if found != before.get(name)}


def layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{module name: {"shapes": {parameter or buffer: [...]}, "sizes": {attribute: int}}} of all modules."""
    found = {}
    for name, module in model.named_modules():
        unsaved = module._non_persistent_buffers_set
        tensors = {**module._parameters, **module._buffers}
        shapes = {own: list(t.shape) for own, t in tensors.items() if t is not None and own not in unsaved}
        sizes = {own: n for own in (*HEAD_COUNTS, *SIZES) if isinstance(n := getattr(module, own, None), int)}
        if shapes or sizes:
            found[name] = {"shapes": shapes, "sizes": sizes}
    return found


def _apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        weight: Any = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"masks[{name!r}]: the model has no such layer with a weight")
        if mask.dtype != torch.bool or mask.shape != weight.flatten(1).shape:
            raise ValueError(
                f"masks[{name!r}] must be bool {tuple(weight.flatten(1).shape)}, True where the weight "
                f"stays, got {mask.dtype} {tuple(mask.shape)}"
            )
        weight.data.masked_fill_(~mask.to(weight.device).view_as(weight), 0)


def _alike(groups: Sequence[Group], ragged: bool) -> list[list[Group]]:
    """Groups that are to keep the same width."""
    together: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        traced = group.owner == group.members[0].module
        shape = (group.kind, group.units, len(group.members[0].index[0]))
        together[group.name if ragged or traced else shape].append(group)
    return list(together.values())


def _first(needed: Tensor, width: int) -> Tensor:
    """The needed units and the first of the others, `width` in all."""
    spare = ~needed
    return needed | (spare & (spare.cumsum(0) <= width - needed.sum()))


def _config(model: nn.Module, group: Group) -> Any:
    """The configuration from which the group's owner was built: of the nearest module that has one."""
    if group.owner == group.members[0].module:
        return None
    path = group.owner
    while True:
        if hasattr(config := getattr(model.get_submodule(path), "config", None), "to_dict"):
            return config
        if not path:
            return None
        path = path.rpartition(".")[0]


def _head_changes(model: nn.Module, group: Group, units: int | None) -> dict[str, int]:
    """What the configuration says of `units` KV heads; None: of those that the live layers have."""
    query, key = (model.get_submodule(member.module) for member in group.members[:2])
    rows, kv_rows = (base_layer(layer).out_features for layer in (query, key))
    attention: Any = model.get_submodule(group.members[0].module.rpartition(".")[0])
    if not (width := getattr(attention, "head_dim", None)):
        return {}  # BERT: the head width follows from hidden size and heads, no other number of heads fits
    kv_heads = kv_rows // width if units is None else units
    changes = {"num_attention_heads": kv_heads * rows // kv_rows, "head_dim": width}
    return (
        {**changes, "num_key_value_heads": kv_heads}
        if hasattr(attention, "num_key_value_groups")
        else changes
    )


def _accepts(config: Any, changes: Mapping[str, int]) -> bool:
    if config is None or not changes:
        return True
    try:
        type(config).from_dict({**config.to_dict(), **changes})
    except Exception:  # each version of transformers has its own errors for a configuration that is not valid
        return False
    return True


def _says(model: nn.Module, group: Group) -> bool:
    """Whether the model's class makes of the configuration the widths that the group's members have."""
    try:
        different = unlike_stock(model)
    except Exception:  # what a class says to widths that do not fit together is its own affair
        return False
    return not any(member.module in different for member in group.members)


def _width_of_ratio(config: Any, ratio: int) -> int:
    width = config.hidden_size * ratio
    return (int(width * 2 / 3) + 7) // 8 * 8 if getattr(config, "use_swiglu_ffn", False) else width


def _parameters(layer: nn.Module, side: Side) -> list[tuple[nn.Parameter, int]]:
    """The parameters that a cut of this side touches, and along which dimension."""
    base: Any = base_layer(layer)
    dim = 0 if side == "rows" else 1
    found = [(base.weight, dim)]
    if side == "rows":
        found.append((base.bias, 0))
    if base is not layer:
        if getattr(layer, "lora_magnitude_vector", None) or not hasattr(layer, "lora_A"):
            raise ValueError(f"{type(layer).__name__} cannot be cut: only plain LoRA around a layer can")
        for factor, along in _factors(layer, side):
            found += [(factor.weight, along), (factor.bias if along == 0 else None, 0)]
    return [(parameter, dim) for parameter, dim in found if parameter is not None]


def _factors(layer: Any, side: Side) -> list[tuple[Any, int]]:
    """LoRA factors that a cut of this side touches, and along which dimension.

    B's rows are outputs of the layer, but inputs in a sequential LoRA, which stands before the layer.
    """
    if getattr(layer, "sequential", False):
        both = [*((A, 1) for A in layer.lora_A.values()), *((B, 0) for B in layer.lora_B.values())]
        return both if side == "columns" else []
    return (
        [(B, 0) for B in layer.lora_B.values()] if side == "rows" else [(A, 1) for A in layer.lora_A.values()]
    )


def _cut(layer: nn.Module, side: Side, index: Tensor, state: Mapping[Any, Any]) -> None:
    for parameter, dim in _parameters(layer, side):
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.numel() > 1:
                state[parameter][key] = value.index_select(dim, index.to(value.device))
        parameter.grad = None
        data = parameter.data.index_select(dim, index.to(parameter.device))
        # While a loss of before is held, its graph is, too, and with it the shape of the gradient that
        # autograd expects for this parameter; another type makes autograd forget it.
        parameter.data = data.to(torch.float16 if data.dtype != torch.float16 else torch.float32)
        parameter.data = data
    base: Any = base_layer(layer)
    if isinstance(base, BATCH_NORMS):
        for name in ("running_mean", "running_var"):
            if (buffer := getattr(base, name)) is not None:
                setattr(base, name, buffer[index.to(buffer.device)])
        base.num_features = len(index)
        return
    resized = [(base, dim := 0 if side == "rows" else 1)]
    if base is not layer:
        resized += [(layer, dim), *_factors(layer, side)]
    for module, along in resized:
        for name in ("out_features", "out_channels") if along == 0 else ("in_features", "in_channels"):
            if hasattr(module, name):
                setattr(module, name, len(index))
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        base.in_channels = base.groups = len(index)


def _check_shared(model: nn.Module, cuts: Sequence[tuple[nn.Module, Side]]) -> None:
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append(f"{name}.{own}")
    for layer, side in cuts:
        for parameter, _ in _parameters(layer, side):
            if len(owners[parameter]) > 1:
                raise ValueError(
                    f"{' and '.join(owners[parameter])} are one tensor: cutting one would break the other; "
                    "clone the weight first, or exclude the layer from pruning"
                )
