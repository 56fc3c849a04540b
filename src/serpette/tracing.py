"""The graph of a model's operations, and which channels meet in it.

torch-pruning (DepGraph, Fang et al. 2023, arXiv 2301.12900) traces the graph. What is connected carries the
same channels; layers begin and end a connection, norms, depthwise convolutions, additions and gates continue
it. torch-pruning's own closure over lists of indices does not end in useful time on attention with rotary
embeddings and grouped KV heads, so the channels that meet are joined here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["rows", "columns"]  # of a weight: outputs and inputs
ATTENTION = re.compile(r"(.*\.)?[^.]*[aA]tt(n|ention)[^.]*(\..*)?")  # names of modules in attention blocks


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Inside: base layers in the place of peft's, eval mode, all parameters require grad."""
    training = [(module, module.training) for module in model.modules()]
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    wrapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            base = getattr(child, "base_layer", None) or getattr(child, "original_module", None)
            if isinstance(base, nn.Module):
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
        for module, before in hooks:  # torch-pruning leaves its own behind when a forward pass fails
            for key in set(module._forward_hooks) - set(before):
                del module._forward_hooks[key]


def trace(model: nn.Module, example_inputs: Any, instead: str = "") -> dict[Any, Any]:
    """{module, parameter or operation: torch-pruning's node} of a forward pass; inside `traceable`.

    Args:
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, on its device.
        instead: what else a user can do, for the error.

    Raises:
        ValueError: torch-pruning is missing, or the model cannot be run or traced.
    """
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
            f"({type(error).__name__}: {error}); give what its forward takes, on its device{instead}"
        ) from error
    return graph.module2node


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
    parts = out.values() if hasattr(out, "values") else out if isinstance(out, (tuple, list)) else ()
    return [tensor for part in parts for tensor in outputs(part)]


def is_depthwise(module: Any) -> bool:
    """Whether it is a convolution of each channel alone."""
    conv = isinstance(module, nn.modules.conv._ConvNd)
    return conv and module.groups == module.in_channels == module.out_channels > 1


def is_layer(module: Any) -> bool:
    """Whether its outputs are other channels than its inputs."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not is_depthwise(module)


def wires(graph: Mapping[Any, Any]) -> list[list[tuple[Any, Side]]]:
    """Who shares channels: lists of (node, side).

    Layers write them ("rows") or read them ("columns"), all else carries them ("rows"; an embedding's
    features are its columns).
    """
    parent: dict[Any, Any] = {}

    def root(port: Any) -> Any:
        while (above := parent.get(port, port)) != port:
            parent[port] = port = parent.get(above, above)
        return port

    for node in graph.values():
        for after in node.outputs:
            parent[root(_ports(after)[-1][0])] = root(_ports(node)[0][0])
    found: dict[Any, list[tuple[Any, Side]]] = defaultdict(list)
    for node in graph.values():
        for port, side in _ports(node):
            found[root(port)].append((node, side))
    return list(found.values())


def _ports(node: Any) -> list[tuple[Any, Side]]:
    """Where channels meet at a node: its outputs and inputs apart for a layer, together for all else."""
    if is_layer(node.module):
        return [((node, "out"), "rows"), ((node, "in"), "columns")]
    return [((node, "both"), "columns" if isinstance(node.module, nn.Embedding) else "rows")]
