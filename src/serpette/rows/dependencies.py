"""Which rows of some layers and which columns of others belong together: SPSFT's parameter dependencies.

    h = W^b x,  y = W^a h:  row i of b makes what column i of a reads: scored and trained together.

"An Efficient Row-Based Sparse Fine-Tuning", Section 4.3 and Appendix B. The graph is torch-pruning's
(`serpette.tracing`); the indices of channels that meet follow from the sizes. Differs: norms are members, and
a group's score counts them. The residual stream is left out unless asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing import Side, is_layer, trace, traceable, wires

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Member:
    """What one module gives to a group: neuron k owns the channels `index[k]` of that side.

    Args:
        module: name in the model, of the outer module where a peft layer wraps it.
        side: `"rows"` are outputs (of a norm or a depthwise convolution: channels), `"columns"` inputs (of an
            embedding: its features, since its rows are tokens).
        index: (k, m) int64; m > 1 where one neuron has several channels of the module.
    """

    module: str
    side: Side
    index: Tensor


@dataclass(frozen=True)
class Group:
    """k neurons, each of which reaches through all `members`."""

    members: list[Member]

    def __len__(self) -> int:
        return len(self.members[0].index)


def groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    modules: Collection[str] | None = None,
    residual: bool = False,
    heads: bool = False,
) -> list[Group]:
    """The dependency groups of `model`, in the order of its layers; the model is left as it was.

    A layer whose output nothing else shares (a classifier) is a group of its own. peft layers are traced
    without their adapters. Norms that heads share, and lone parameters, are no members.

    Args:
        model: any module of linear, convolution, embedding and norm layers; in eval mode it must be
            differentiable by autograd.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, on the model's
            device; one small example is enough.
        modules: names of the modules that count, e.g. those that have an adapter; None: all.
        residual: also the group of the residual stream, which spans all blocks.
        heads: one neuron of an attention is a whole KV head with all its query heads. By default it is a
            channel of a KV head with the same channel of its query heads, so that a small share can be
            chosen.

    Raises:
        ValueError: torch-pruning is missing, the model cannot be run or traced, or the channels of a layer
            cannot be told apart (fused projections, concatenated channels).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> [[(m.module, m.side) for m in group.members] for group in groups(model, torch.zeros(1, 4))]
        [[('0', 'rows'), ('2', 'columns')], [('2', 'rows')]]
    """
    with traceable(model):
        graph, names = _trace(model, example_inputs)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        found = []
        for ends in wires(graph):
            named: list[tuple[str, Any, Side]] = [
                (names[node.module], node, side) for node, side in ends if node.module in names
            ]
            named.sort(key=lambda end: (order[end[0]], end[2] == "columns"))
            wanted = any(modules is None or name in modules for name, _, _ in named)
            if not wanted or all(side == "columns" for _, _, side in named):
                continue  # columns alone read the input of the model
            if residual or not _feeds_itself(ends):
                concatenated = any(type(node.module).__name__ == "_ConcatOp" for node, _ in ends)
                members = _members(model, named, heads, concatenated)
                found.append(Group([m for m in members if modules is None or m.module in modules]))
    found = [group for group in found if group.members]
    return sorted(found, key=lambda group: order[group.members[0].module])


def group_scores(groups: Sequence[Group], scores: Mapping[tuple[str, Side], Tensor]) -> list[Tensor]:
    """Importance (k,) of each group's neurons: the sum over its members and their channels.

    `scores[module, side]` (n,) are the importances of all channels of a side; a member that has none counts
    nothing.

    Example:
        >>> index = torch.tensor([[0], [1]])
        >>> group = Group([Member("up", "rows", index), Member("down", "columns", index)])
        >>> group_scores([group], {("up", "rows"): torch.tensor([1.0, 5.0])})
        [tensor([1., 5.])]
    """
    totals = []
    for group in groups:
        total = torch.zeros(len(group))
        for m in group.members:
            if (score := scores.get((m.module, m.side))) is not None:
                total = total.to(score) + score[m.index.to(score.device)].sum(1)
        totals.append(total)
    return totals


def chosen(groups: Sequence[Group], picks: Sequence[Tensor]) -> dict[tuple[str, Side], Tensor]:
    """The channels of each module's side that the picked neurons own, sorted; `picks[i]` are of `groups[i]`.

    Example:
        >>> group = Group([Member("q", "rows", torch.tensor([[0, 2], [1, 3]]))])
        >>> chosen([group], [torch.tensor([1])])
        {('q', 'rows'): tensor([1, 3])}
    """
    found: dict[tuple[str, Side], list[Tensor]] = defaultdict(list)
    for group, pick in zip(groups, picks, strict=True):
        for m in group.members:
            found[m.module, m.side].append(m.index[pick.cpu()].flatten())
    return {key: torch.cat(parts).unique() for key, parts in found.items()}


def _trace(model: nn.Module, example_inputs: Any) -> tuple[dict[Any, Any], dict[Any, str]]:
    """torch-pruning's nodes of each module or operation, and the names of those that can be members."""
    graph = trace(model, example_inputs, ", or rank without dependencies")
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if p in graph and p.dim() >= 2 and _is_multiplied(graph[p]):
            raise ValueError(
                f"{name!r} multiplies as a weight, but its module is no linear or convolution layer that "
                "torch-pruning knows, so its rows and columns cannot be traced; rank without dependencies"
            )
        if p.dim() == 1 and leaf == "weight":  # of an RMSNorm
            names[p] = owner
    return graph, names


def _is_multiplied(node: Any) -> bool:
    following = [
        *node.outputs,
        *(after for n in node.outputs for after in n.outputs if _operation(n) in "TView"),
    ]
    return any(_operation(n) in ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution") for n in following)


def _operation(node: Any) -> str:
    return node.grad_fn.name().removesuffix("0").removesuffix("Backward") if node.grad_fn is not None else ""


def _feeds_itself(ends: Sequence[tuple[Any, Side]]) -> bool:
    """Whether a layer that reads these channels leads to one that writes them: a residual stream."""
    writers = {node for node, side in ends if side == "rows" and is_layer(node.module)}
    waiting = [
        after for node, side in ends if side == "columns" and is_layer(node.module) for after in node.outputs
    ]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in writers:
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.outputs
    return False


def _size(module: Any, side: Side) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features if side == "rows" else module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if side == "rows" else module.in_channels
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.Parameter):
        return len(module)
    return 0 if (weight := getattr(module, "weight", None)) is None else len(weight)


def _members(
    model: nn.Module, ends: Sequence[tuple[str, Any, Side]], heads: bool, concatenated: bool
) -> list[Member]:
    """Indices from the sizes: the widest rows, KV heads, feature maps in a row, or copies end to end."""
    layers: list[tuple[str, Any, Side]] = [
        (name, node.module, side) for name, node, side in ends if _counts(node.module)
    ]
    if not layers:
        return []
    writers = [(name, module) for name, module, side in layers if is_layer(module) and side == "rows"]
    width = (
        max(_size(module, "rows") for _, module in writers) if writers else _size(layers[0][1], layers[0][2])
    )
    head = _head_width(model, [name for name, _ in writers])
    narrow = min((_size(module, "rows") for _, module in writers), default=width)
    if narrow != width and (not head or width % narrow or narrow % head):
        raise ValueError(_mismatch(layers, width))
    repeats = width // narrow
    wide = torch.arange(width)[:, None]
    slim = torch.arange(narrow)[:, None]
    if repeats > 1:  # (KV heads, repeats, head) -> (KV heads x head, repeats)
        wide = wide.view(-1, repeats, head).mT.reshape(narrow, repeats)
    if heads and head:
        wide, slim = wide.view(narrow // head, -1), slim.view(narrow // head, -1)
        wide = wide.sort().values
    members = []
    for name, module, side in layers:
        size = _size(module, side)
        if size == width:
            index = wide
        elif size == narrow:
            index = slim
        elif size < width and not is_layer(module) and not isinstance(module, nn.Embedding):
            continue  # a norm that heads share
        elif side == "columns" and size % width == 0 and concatenated != _flattens(ends):
            part = torch.arange(size // width)
            many = wide[..., None] + width * part if concatenated else wide[..., None] * len(part) + part
            index = many.flatten(1).sort().values
        else:
            raise ValueError(_mismatch(layers, width))
        members.append(Member(name, side, index))
    return members


def _counts(module: Any) -> bool:
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Parameter, *NORMS)
    return isinstance(module, known) and _size(module, "rows") > 0


def _head_width(model: nn.Module, writers: Sequence[str]) -> int:
    """Channels of one attention head, where all that write the group belong to one attention; else 0."""
    parents = {name.rpartition(".")[0] for name in writers}
    if len(parents) != 1 or len(writers) < 2:
        return 0
    attention = model.get_submodule(parents.pop())
    return getattr(attention, "head_dim", 0) or getattr(attention, "attention_head_size", 0)


def _flattens(ends: Sequence[tuple[str, Any, Side]]) -> bool:
    """All that writes is a convolution, so that the columns are (channels, pixels)."""
    return all(
        isinstance(n.module, nn.modules.conv._ConvNd)
        for _, n, s in ends
        if s == "rows" and is_layer(n.module)
    )


def _mismatch(layers: Sequence[tuple[str, Any, Side]], width: int) -> str:
    sizes = ", ".join(f"{name} {side} {_size(module, side)}" for name, module, side in layers[:6])
    return (
        f"channels that belong together have different numbers ({sizes}; expected {width}), as fused "
        "projections, concatenated channels and KV heads of unknown width have; such a model cannot be "
        "traced: rank without dependencies"
    )
