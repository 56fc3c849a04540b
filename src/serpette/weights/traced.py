"""Channels that go together in a model of no known family: found by tracing, proven by trying.

The graph of operations is torch-pruning's, see `serpette.tracing`. Half of the channels of each group are
masked in one copy of the model and cut out of another: only groups where both copies still agree are kept.
That leaves out whatever mixes channels in between: layer norms, softmax, concatenations, a model's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..tracing import Side, is_depthwise, is_layer, outputs, run, trace, traceable, wires
from .groups import Group, Member
from .shrink import BATCH_NORMS, slice_


def traced_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """Groups of channels of linear layers, 2-d convolutions and batch norms; the model is left as it was.

    Args:
        model: differentiable by autograd in eval mode.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, on its device.

    Raises:
        ValueError: torch-pruning is missing, or the model cannot be run or traced.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
        >>> [(m.module, m.index.shape) for m in traced_groups(model, torch.zeros(1, 1, 5, 5))[0].members]
        [('0', torch.Size([4, 1])), ('1', torch.Size([4, 1])), ('3', torch.Size([4, 9]))]
    """
    with traceable(model):
        graph = trace(model, example_inputs)
        order = {module: i for i, module in enumerate(model.modules())}
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        found = [group for ends in wires(graph) if (group := _group(ends, names, order))]
        found.sort(key=lambda group: list(names.values()).index(group.owner))
        if found and not _agrees(model, found, example_inputs):
            found = [group for group in found if _agrees(model, [group], example_inputs)]
    return found


def _group(ends: Sequence[tuple[Any, Side]], names: dict[Any, str], order: dict[Any, int]) -> Group | None:
    """The group of a connection, if it is made of what `slice_` can cut."""
    members = []
    writers = [node.module for node, side in ends if side == "rows" and is_layer(node.module)]
    if not writers or any(side == "rows" and not node.outputs for node, side in ends):
        return None  # an input or an output of the model
    units = writers[0].weight.shape[0]
    for node, side in sorted(ends, key=lambda end: (order.get(end[0].module, -1), end[1] == "columns")):
        module = node.module
        if isinstance(module, nn.Parameter):
            return None
        if next(module.parameters(recurse=False), None) is None:
            continue  # an operation
        if not isinstance(module, (nn.Linear, nn.Conv2d, *BATCH_NORMS)) or module not in names:
            return None
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            return None
        size = module.weight.shape[0 if side == "rows" else 1]
        flattened = side == "columns" and isinstance(module, nn.Linear) and size % units == 0
        if size != units and not flattened:
            return None
        members.append(Member(names[module], side, torch.arange(size).view(units, -1)))
    members.sort(key=lambda member: member.side == "columns")
    if members[-1].side == "rows":
        return None
    first = members[0].module
    return Group(f"{first}.channels", "channels", units, tuple(members), first)


def _agrees(model: nn.Module, groups: Sequence[Group], example_inputs: Any) -> bool:
    """Whether every other channel can be cut as well as masked, in a model with other weights."""
    masked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    keep = {group.name: torch.arange(group.units) % 2 == 0 for group in groups}
    with torch.no_grad():
        for parameter in masked.parameters():  # zeros at the start of a training would hide a difference
            if parameter.is_floating_point():
                noise = (
                    torch.randn(parameter.shape, generator=generator) * parameter.detach().float().std().cpu()
                )
                parameter += (0.1 + noise.nan_to_num()).to(parameter) * 0.1
        for group in groups:
            for member in group.members:
                if member.side == "columns":
                    weight: Any = masked.get_submodule(member.module).weight
                    weight[:, member.index[~keep[group.name]].flatten()] = 0
        cut = copy.deepcopy(masked)
        try:
            slice_(cut, groups, keep)
            pairs = zip(outputs(run(masked, example_inputs)), outputs(run(cut, example_inputs)), strict=True)
            return all(
                a.shape == b.shape
                and float((a - b).abs().max()) <= 1e3 * torch.finfo(a.dtype).eps * float(a.abs().max())
                for a, b in pairs
            )
        except (RuntimeError, ValueError, IndexError):
            return False
