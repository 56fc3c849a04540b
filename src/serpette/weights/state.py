"""What a pruning knows, in one file beside a checkpoint: cuts in bits, averages, state of the importance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layers import PrunedLayer, plain_name
from .packed import pack_mask, unpack_mask

NAME = "pruning_state.safetensors"


def write(
    folder: str | Path, cuts: dict[str, Tensor], tensors: dict[str, Tensor], facts: dict[str, Any]
) -> Path:
    """`NAME` in `folder`, whole or not at all."""
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {f"cut/{name}": pack_mask(cut.cpu()) for name, cut in cuts.items()}
    held |= {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    shapes = {name: list(cut.shape) for name, cut in cuts.items()}
    part = path.with_name(f".{NAME}.part")
    save_file(held, part, {"facts": json.dumps({**facts, "shapes": shapes})})
    part.replace(path)
    return path


def read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Cuts (O, I) bool by layer, the other tensors, and the facts.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    path = Path(folder) / NAME
    if not path.exists():
        raise ValueError(
            f"{str(folder)!r} holds no {NAME}: it was saved without Pruner, or lies elsewhere; name the "
            "folder, or resume from an earlier checkpoint"
        )
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); resume from an earlier checkpoint") from error
    cuts = {
        name: unpack_mask(tensors.pop(f"cut/{name}"), tuple(shape)) for name, shape in facts["shapes"].items()
    }
    return cuts, tensors, facts


def restore(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model`, a LoRA or plain model, with what a Pruner had cut when it saved `folder`.

    An adapter's file holds A and B, not the masks: load the adapter, then restore the masks, before it is
    used or merged.

    Raises:
        ValueError: no state in `folder`, or of another model.

    Example:
        >>> import tempfile
        >>> from serpette.weights.oneshot import prune
        >>> folder, net = tempfile.mkdtemp(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        >>> _ = prune(net, "magnitude", 0.5).save(folder)
        >>> fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        >>> int((restore(fresh, folder)[0].weight == 0).sum())
        8
    """
    cuts, _, _ = read(folder)
    modules = {plain_name(name): (name, module) for name, module in model.named_modules()}
    for name, cut in cuts.items():
        if name not in modules:
            raise ValueError(
                f"{str(folder)!r} has a mask of {name!r}, which {type(model).__name__} does not have"
            )
        layer = PrunedLayer(*modules[name])
        if layer.shape != tuple(cut.shape):
            raise ValueError(f"the mask of {name!r} has shape {tuple(cut.shape)}, its weight {layer.shape}")
        layer.remove(cut.to(layer.device))
    return model
