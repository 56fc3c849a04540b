"""Which rows and columns of a model go together: attention heads, FFN channels, channels of convolutions.

    h = f(W_up x),  y = W_down h:  without unit k, rows k of W_up and columns k of W_down are gone.

The known families are told by the names and shapes of their layers, not by their class:

| heads | queries, keys, values -> output |
|---|---|
| Llama, Mistral, Qwen2, ViT, Dinov2 | `q_proj`, `k_proj`, `v_proj` -> `o_proj` (`out_proj` in CLIP, OPT) |
| BERT and its kin | `self.query`, `self.key`, `self.value` -> `output.dense` |

| channels | in -> out |
|---|---|
| Llama, Mistral, Qwen2, Dinov2 giant | `gate_proj`, `up_proj` -> `down_proj` |
| ViT, Dinov2, CLIP | `fc1` -> `fc2` |
| BERT and its kin | `intermediate.dense` -> `output.dense` |

Under grouped-query attention a unit is a KV head with all its query heads (Ainslie et al. 2023,
arXiv 2305.13245). Left out are layers with more weights between than these, fused projections (GPT-2's
`c_attn`, timm's `qkv`) and quantised weights. Any other model is traced: see `serpette.weights.traced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..tracing import Side

Kind = Literal["heads", "channels"]
Targets = Literal["both", "attention", "ffn"]

ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
)
FFN = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("intermediate.dense", "output.dense"),
)


class Member(NamedTuple):
    """What a module gives to a group: unit k owns the channels `index[k]` of that side.

    Args:
        module: name in `model.named_modules()`, of the LoRA layer where peft wraps one.
        side: `"rows"` are outputs (of a norm or a depthwise convolution: channels), `"columns"` inputs.
        index: (units, width) int64.
    """

    module: str
    side: Side
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Units each of which can be removed from all `members` at once; no other layer changes its shape.

    Args:
        name: of the owner and the kind, as `model.layers.0.mlp.channels`; unique in the model.
        kind: `"heads"` of an attention (KV heads with their query heads) or `"channels"`.
        units: how many there are.
        members: those that write the units (`"rows"`) before those that read them (`"columns"`).
        owner: name of the module that holds them all: the attention, the MLP, or the layer of a BERT; of a
            traced group, its first member.
    """

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]
    owner: str


def find_groups(model: nn.Module, targets: Targets = "both", example_inputs: Any = None) -> list[Group]:
    """The groups of `model` in the order of its modules; it sees through peft's LoRA layers.

    Args:
        model: of a known family (see above), or any module of linear layers, 2-d convolutions and batch norms
            together with `example_inputs`.
        targets: `"attention"`: heads, `"ffn"`: channels, also of convolutions, `"both"`.
        example_inputs: for a model of no known family: a tensor, a tuple of arguments or a mapping of keyword
            arguments with which it can be run; needs the extra `prune`.

    Raises:
        ValueError: nothing was found, or the model cannot be traced.

    Example:
        >>> mlp = nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 2)})
        >>> [(g.name, g.units, [m[:2] for m in g.members]) for g in find_groups(nn.Sequential(mlp))]
        [('0.channels', 6, [('0.fc1', 'rows'), ('0.fc2', 'columns')])]
    """
    if targets not in ("both", "attention", "ffn"):
        raise ValueError(f"targets={targets!r} must be 'both', 'attention' or 'ffn'")
    found = [
        g for name, module in model.named_modules() for g in (_heads(name, module), _ffn(name, module)) if g
    ]
    if not found and example_inputs is not None:
        from .traced import traced_groups

        found = traced_groups(model, example_inputs)
    wanted = {"both": ("heads", "channels"), "attention": ("heads",), "ffn": ("channels",)}[targets]
    groups = [group for group in found if group.kind in wanted]
    if not groups:
        looked = " (fused projections such as GPT-2's c_attn, and quantised weights, are left out)"
        hint = (
            "" if found or example_inputs is not None else "; give example_inputs, so that it can be traced"
        )
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(wanted)} that can be removed whole{looked}{hint}"
        )
    return groups


def base_layer(module: nn.Module) -> Any:
    """The layer itself, or the one that a peft LoRA layer wraps."""
    return getattr(module, "base_layer", module)


def _heads(name: str, owner: nn.Module) -> Group | None:
    for paths in ATTENTION:
        if (layers := _linears(owner, paths)) is None:
            continue
        query, key, value, output = layers
        inner = owner.get_submodule(paths[0].rpartition(".")[0])
        width = getattr(inner, "head_dim", None) or getattr(inner, "attention_head_size", None)
        rows, kv_rows = query.out_features, key.out_features
        if not width or kv_rows % width or rows % kv_rows:
            continue
        if value.out_features != kv_rows or output.in_features != rows:
            continue
        if not all(
            "norm" in own.lower() and (own.startswith("output.") or p.numel() == width)
            for own, p in _others(owner, paths)
        ):
            continue  # a bias for each head or a norm over all heads would have to be cut as well
        units = kv_rows // width
        wide, slim = torch.arange(rows).view(units, -1), torch.arange(kv_rows).view(units, -1)
        return _group(name, "heads", paths, (wide, slim, slim, wide))
    return None


def _ffn(name: str, owner: nn.Module) -> Group | None:
    for paths in FFN:
        if (layers := _linears(owner, paths)) is None:
            continue
        units = layers[-1].in_features
        if any(layer.out_features != units for layer in layers[:-1]):
            continue
        if "." not in paths[0] and next(_others(owner, paths), None) is not None:
            continue  # something else with weights may stand between them
        return _group(name, "channels", paths, [torch.arange(units)[:, None]] * len(paths))
    return None


def _group(owner: str, kind: Kind, paths: Sequence[str], indices: Sequence[Tensor]) -> Group:
    prefix = f"{owner}." if owner else ""
    last = len(paths) - 1
    members = tuple(
        Member(prefix + path, "columns" if i == last else "rows", index)
        for i, (path, index) in enumerate(zip(paths, indices, strict=True))
    )
    return Group(prefix + kind, kind, len(indices[0]), members, owner)


def _linears(owner: nn.Module, paths: Sequence[str]) -> list[nn.Linear] | None:
    layers = []
    for path in paths:
        module: Any = owner
        for part in path.split("."):
            module = getattr(module, "_modules", {}).get(part)
        layer = base_layer(module) if module is not None else None
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (layer.out_features, layer.in_features):
            return None
        layers.append(layer)
    return layers


def _others(owner: nn.Module, paths: Sequence[str]):
    """Names and values of the owner's parameters that are none of these layers'."""
    prefixes = tuple(f"{path}." for path in paths)
    return ((own, p) for own, p in owner.named_parameters() if not own.startswith(prefixes))
