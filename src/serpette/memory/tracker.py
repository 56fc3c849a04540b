"""Bytes of tensors that are alive, as torch makes and frees them; and those kept for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cost import call, loss_of


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes that a forward pass of `model` on `batch` keeps for its backward pass.

    Each storage counts once and whole, however many tensors look into it; the model's parameters and buffers
    do not count, being there anyway. With gradient checkpointing it is what the checkpoints keep. What an
    operation keeps outside autograd's own store (an attribute of its context) is not seen here; `LiveBytes`
    sees it.

    Args:
        model: any module, in the mode it is in.
        batch: a dict (keyword arguments), a tuple or list (positional) or one tensor.

    >>> saved_bytes(nn.Linear(3, 5), torch.zeros(7, 3))  # the input, 7 x 3 x 4 bytes
    84
    """
    own = {storage_key(t) for t in tensors_of(model)}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # what a detached part of the graph kept goes with it

    def pack(t: Tensor) -> _Kept:
        entry = _Kept(t.detach())  # an output would hold its own operation
        kept.add(entry)
        return entry

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda entry: entry.tensor):
        loss = loss_of(call(model, batch))  # noqa: F841 - it keeps the graph until the count is taken
    parts = (part for entry in kept for part in entry.parts())
    return storage_bytes(part for part in parts if storage_key(part) not in own)


class _Kept:
    """A tensor in autograd's store; gone with the operation that keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def parts(self) -> list[Tensor]:
        t = self.tensor
        return [t] if t.layout == torch.strided else [t._indices(), t._values()]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, a shared one once."""
    return [*model.parameters(), *model.buffers()]


def storage_key(t: Tensor) -> int:
    """The same for tensors that share a storage, as long as one of them lives."""
    return t.untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each once."""
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the block make, until they are freed.

    Real and fake tensors alike, so that a model that does not fit this machine is measured at its true shapes
    under `serpette.memory.shapes.without_memory`. Work space inside a single operation is not seen, nor what
    an allocator rounds up.

    Attributes:
        now: bytes alive.
        peak: most of `now` since it was last set to 0 or to `now`.
        tagged: any number that a caller keeps, such as the bytes of gradients.
        tagged_at_peak: `tagged` when `peak` was reached.

    >>> with LiveBytes() as live:
    ...     x = torch.zeros(256)
    ...     y = x + 1
    ...     del x
    >>> live.now, live.peak
    (1024, 2048)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.tagged = self.tagged_at_peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before the block."""
        for tensor in tensors:
            self._add(tensor)

    def restart(self) -> None:
        """Forgets the peak."""
        self.peak, self.tagged_at_peak = self.now, self.tagged

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        if self.now > self.peak:
            self.peak, self.tagged_at_peak = self.now, self.tagged

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf)
        return made
