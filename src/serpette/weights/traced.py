"""Channels that go together in a model of no known family: found by tracing, proven by trying.

What is connected carries the same channels; layers and convolutions begin and end a connection, batch norms,
depthwise convolutions, additions and gates (squeeze-and-excitation) continue it. The graph of operations is
torch-pruning's (DepGraph, Fang et al. 2023, arXiv 2301.12900). Then half of the channels of each group are
masked in one copy of the model and cut out of another: only groups where both copies still agree are kept.
That leaves out whatever mixes channels in between: layer norms, softmax, concatenations, a model's outputs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Group, Member, Side
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
    with _traceable(model):
        nodes = _trace(model, example_inputs)
        order = {module: i for i, module in enumerate(model.modules())}
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        found = [group for ends in _wires(nodes) if (group := _group(ends, names, order))]
        found.sort(key=lambda group: list(names.values()).index(group.owner))
        if found and not _agrees(model, found, example_inputs):
            found = [group for group in found if _agrees(model, [group], example_inputs)]
    return found


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's answer to `example_inputs`, given as it takes them."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if hasattr(inputs, "items"):
        return model(**{name: value for name, value in inputs.items() if name != "labels"})
    return model(*inputs)


def outputs(out: Any) -> list[Tensor]:
    """The floating-point tensors of a model's answer."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    parts = out.values() if hasattr(out, "values") else out if isinstance(out, tuple | list) else ()
    return [tensor for part in parts for tensor in outputs(part)]


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Inside: base layers in the place of LoRA layers, eval mode, all parameters require grad."""
    training = [(module, module.training) for module in model.modules()]
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    wrapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(base := getattr(child, "base_layer", None), nn.Module):
                wrapped.append((parent, name, child))
                parent._modules[name] = base
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in training:
            module.training = mode
        for module, before in hooks:  # torch-pruning leaves its own behind when a forward fails
            for key in set(module._forward_hooks) - set(before):
                del module._forward_hooks[key]


def _trace(model: nn.Module, example_inputs: Any) -> list[Any]:
    try:
        import torch_pruning
    except ImportError as error:
        raise ValueError("tracing needs torch-pruning: pip install 'serpette[prune]'") from error
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs,
            run,
            lambda out: [tensor for tensor in outputs(out) if tensor.grad_fn is not None],
            verbose=False,
        )
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced with these example_inputs "
            f"({type(error).__name__}: {error}); give what its forward takes, on its device"
        ) from error
    return list(graph.module2node.values())


def _is_layer(module: Any) -> bool:
    """Whether its outputs are other channels than its inputs."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not _is_depthwise(module)


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _wires(nodes: Sequence[Any]) -> list[list[tuple[Any, Side]]]:
    """The ends of each connection: nodes that write to it or carry it ("rows") and layers that read it."""
    parent: dict[Any, Any] = {}

    def root(port):
        while (above := parent.get(port, port)) != port:
            parent[port] = port = parent.get(above, above)
        return port

    def entry(node):
        return (node, "columns" if _is_layer(node.module) else "rows")

    for node in nodes:
        for after in node.outputs:
            parent[root(entry(after))] = root((node, "rows"))
    wires = defaultdict(list)
    for node in nodes:
        for port in {entry(node), (node, "rows")}:
            wires[root(port)].append(port)
    return list(wires.values())


def _group(ends: Sequence[tuple[Any, Side]], names: dict[Any, str], order: dict[Any, int]) -> Group | None:
    """The group of a connection, if it is made of what `slice_` can cut."""
    members = []
    writers = [node.module for node, side in ends if side == "rows" and _is_layer(node.module)]
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
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not _is_depthwise(module):
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
