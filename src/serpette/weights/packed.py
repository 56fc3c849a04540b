"""Sparse weights on disk: one bit a weight that says whether it is zero, and the values that are not.

A weight of b bytes with share s of zeros takes 1/8 + (1 - s) b bytes: float32 at 50 % is 1.9 times smaller,
at 90 % 7.6 times. For storage and transport only; what is loaded is dense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = "serpette.packed.1"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as an element


@dataclass(frozen=True)
class Sizes:
    """Bytes of the same tensors, a tied one counted once, without a file's header of some kilobytes."""

    dense_bytes: int
    packed_bytes: int


def pack_mask(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as (ceil(n / 8),) uint8 on the CPU, the first element in the lowest bit.

    >>> pack_mask(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy(), bitorder="little"))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of that `shape` from which `pack_mask` made `bits`, on the CPU.

    Raises:
        ValueError: when the number of bytes does not fit the shape.

    >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), (1, 3))
    tensor([[ True, False,  True]])
    """
    count = int(np.prod(shape, dtype=np.int64))
    if len(bits) != -(-count // 8):
        raise ValueError(
            f"a mask of shape {tuple(shape)} takes {-(-count // 8)} bytes, but {len(bits)} are given"
        )
    flat = np.unpackbits(bits.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(flat.astype(bool)).view(tuple(shape))


def sizes_of(tensors: Mapping[str, Tensor] | nn.Module) -> Sizes:
    """What the tensors, or the state of a model, take in a safetensors file, and what in a packed one.

    >>> sizes_of({"w": torch.eye(8)})
    Sizes(dense_bytes=256, packed_bytes=40)
    """
    once, _ = _untied(tensors)
    return Sizes(
        sum(t.numel() * t.element_size() for t in once.values()), sum(map(_packed_bytes, once.values()))
    )


def save_packed(tensors: Mapping[str, Tensor] | nn.Module, path: str | Path) -> Sizes:
    """Writes tensors, or the state of a model, to one safetensors file, packed where that is smaller.

    -0.0 is a value here, not a zero, so that what is loaded has the same bits. Tied tensors are stored once.

    Args:
        tensors: by name, or a module, whose `state_dict()` is taken.
        path: of the file; its folder must exist.

    Returns:
        The bytes of the tensors as they are, and as they are in the file.

    Example:
        >>> import tempfile
        >>> weight = torch.randn(4, 16).masked_fill(torch.rand(4, 16) < 0.7, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = save_packed({"fc.weight": weight}, f"{folder}/packed.safetensors")
        ...     same = torch.equal(load_packed(f"{folder}/packed.safetensors")["fc.weight"], weight)
        >>> same, sizes.packed_bytes < sizes.dense_bytes
        (True, True)
    """
    from safetensors.torch import save_file

    once, tied = _untied(tensors)
    stored, shapes, storages = {}, {}, set()
    dense_bytes = 0
    for name, tensor in once.items():
        dense = tensor.numel() * tensor.element_size()
        dense_bytes += dense
        if _packed_bytes(tensor) < dense:
            value = tensor.cpu().contiguous()
            kept = value.view(BITS[value.element_size()]) != 0
            stored[f"mask/{name}"], stored[f"values/{name}"] = pack_mask(kept), value[kept]
            shapes[name] = list(value.shape)
        else:
            value = tensor.cpu().contiguous()
            storage = value.untyped_storage().data_ptr()
            stored[f"dense/{name}"] = (
                value.clone() if storage in storages else value
            )  # two views of one tensor
            storages.add(storage)
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes), "tied": json.dumps(tied)}
    save_file(stored, str(path), metadata)
    return Sizes(dense_bytes, sum(t.numel() * t.element_size() for t in stored.values()))


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a packed file by name, on the CPU, with the same bits; tied ones are one tensor.

    Raises:
        ValueError: when the file was not written by `save_packed`, or is damaged.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {metadata.get('format')!r}, not {FORMAT!r}, which save_packed writes; "
                "a plain safetensors file is read by safetensors.torch.load_file"
            )
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    tensors = {key.removeprefix("dense/"): t for key, t in stored.items() if key.startswith("dense/")}
    for name, shape in json.loads(metadata["shapes"]).items():
        kept, values = unpack_mask(stored[f"mask/{name}"], shape), stored[f"values/{name}"]
        if int(kept.sum()) != len(values):
            raise ValueError(
                f"{path} is damaged: {name!r} has {len(values)} values for {int(kept.sum())} places"
            )
        tensor = torch.zeros(shape, dtype=values.dtype)
        tensor[kept] = values
        tensors[name] = tensor
    return tensors | {name: tensors[first] for name, first in json.loads(metadata["tied"]).items()}


def _untied(tensors: Mapping[str, Tensor] | nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each different tensor by its first name, and the first name of each further name."""
    state = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    first, once, tied = {}, {}, {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name!r} is no dense tensor with values and cannot be packed; leave it out")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            once[name] = tensor.detach()
    return once, tied


def _packed_bytes(tensor: Tensor) -> int:
    dense = tensor.numel() * tensor.element_size()
    if tensor.element_size() not in BITS or tensor.is_complex() or not tensor.dim():
        return dense
    nonzero = int(torch.count_nonzero(tensor.contiguous().view(BITS[tensor.element_size()])))
    return min(dense, -(-tensor.numel() // 8) + nonzero * tensor.element_size())
