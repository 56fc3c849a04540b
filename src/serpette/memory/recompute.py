"""Saves less for the backward pass: what is cheap to compute again is not kept.

Two kinds of tensor, both kept only because a linear layer that trains needs its input:

    a norm's output                     computed again from the norm's input, which the norm keeps anyway
    act(gate) and act(gate) * up        computed again from gate and up, which are kept anyway

Of a Llama block in float32 with T tokens, width d and MLP width f, with rows that train or LoRA without
dropout, that is 2 T d + 2 T f numbers, for the price of two norms, an activation and a product. In half
precision an RMSNorm keeps a float32 copy of its input, so nothing is gained with norms there. It is exact:
the same operations on the same numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def recompute(model: nn.Module, norms: bool = True, gated: bool = True) -> Recompute:
    """From now on `model` keeps less in each forward pass and computes it again in the backward pass.

    Inside a block with gradient checkpointing it changes nothing: less than that is kept there already. Where
    LoRA has dropout, a linear layer keeps the dropped-out input, which is another tensor, and only act(gate)
    is saved.

    Args:
        model: any module. Its norms are those that are `nn.LayerNorm`, `nn.RMSNorm` or called ...RMSNorm or
            ...LayerNorm, frozen or not; its gated MLPs have gate_proj, up_proj, down_proj and act_fn and
            compute `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
        norms: outputs of norms.
        gated: products of gated MLPs.

    Returns:
        A handle: `remove()` ends it, or use it in a `with`.

    Raises:
        ValueError: a model that has neither, or, at its first forward pass, a module with these four parts
            that computes something else.

    >>> from serpette.memory import saved_bytes
    >>> net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    >>> plain = saved_bytes(net, torch.zeros(4, 8))
    >>> with recompute(net):
    ...     plain - saved_bytes(net, torch.zeros(4, 8))  # 4 x 8 x 4 bytes: what went into the linear layer
    128
    """
    return Recompute(model, norms, gated)


class Recompute:
    """The handle that `recompute` returns."""

    def __init__(self, model: nn.Module, norms: bool, gated: bool):
        # storage of an output -> how to make it again; forgotten when the storage is freed
        self._recipes: weakref.WeakKeyDictionary[torch.UntypedStorage, _Recipe] = weakref.WeakKeyDictionary()
        self._hooks: list[Any] = []
        self._entered: list[ExitStack] = []
        self._outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] = (_same, _same)
        for module in model.modules():
            if norms and _is_norm(module):
                self._hooks.append(module.register_forward_hook(self._after_norm))
            elif gated and all(hasattr(module, part) for part in GATED):
                _Gated(module, self)
        if not self._hooks:
            raise ValueError(
                f"{type(model).__name__} has no norm and no gated MLP ({', '.join(GATED)}) to compute again"
            )
        self._hooks.append(model.register_forward_pre_hook(self._enter, prepend=True))
        self._hooks.append(model.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Ends it; backward passes of earlier forward passes still work."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Recompute:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _enter(self, *args: Any) -> None:
        stack = ExitStack()
        if torch.is_grad_enabled():
            self._outer = _hooks_outside()
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
        self._entered.append(stack)

    def _leave(self, *args: Any) -> None:
        self._entered.pop().close()

    def _after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(output, Tensor):
            self.remember(output, norm.forward, args[0])

    def remember(self, output: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
        """`output` is `compute(*inputs)`; if autograd wants to keep it, keep that instead."""
        if torch.is_grad_enabled() and self._entered and not any(_shares(output, x) for x in inputs):
            self._recipes[output.untyped_storage()] = _Recipe(compute, inputs, output)

    def _pack(self, tensor: Tensor) -> Any:
        pack, unpack = self._outer
        recipe = self._recipes.get(tensor.untyped_storage())
        if recipe is None or tensor._version != recipe.version:
            return partial(_unchanged, unpack, pack(tensor.detach()), tensor._version)
        recipe.keep(pack, unpack)
        return partial(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class _Recipe:
    """How to make an output again; the result is shared by the layers that kept it and then dropped."""

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], output: Tensor):
        self.compute = compute
        self.inputs = [x.detach() for x in inputs]
        self.versions = [x._version for x in inputs]
        self.version = output._version
        self.wanted = 0
        self.kept: list[Callable[[], Tensor]] = []
        self.result: Tensor | None = None
        kind = output.device.type
        self.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }

    def keep(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """One more layer wants the output; the inputs are kept as those who look on from outside want it."""
        self.wanted += 1
        if not self.kept:
            self.kept = [partial(unpack, pack(x)) for x in self.inputs]

    def __call__(self, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
        result = self.result
        if result is None:
            inputs = [unpacked() for unpacked in self.kept]
            if [x._version for x in self.inputs] != self.versions:
                raise RuntimeError("what recompute() kept was changed in place after the forward pass")
            with torch.no_grad(), torch.autocast(**self.autocast):
                result = self.compute(*inputs)
        self.wanted -= 1
        self.result = result if self.wanted > 0 else None
        return result.as_strided(size, stride, offset)


def _unpack(kept: Callable[[], Tensor]) -> Tensor:
    return kept()


def _unchanged(unpack: Callable[[Any], Tensor], packed: Any, version: int) -> Tensor:
    """What was kept; torch itself looks for changes in place only where there are no hooks."""
    tensor = unpack(packed)
    if tensor is packed and tensor._version != version:
        raise RuntimeError("what the backward pass needs was changed in place after the forward pass")
    return tensor


def _hooks_outside() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The saved-tensor hooks that are in force, such as those of `saved_bytes`: torch asks only the last."""
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined] - torch has no stub of it
    return autograd._top_saved_tensors_default_hooks(True) or (_same, _same)


def _same(x: Any) -> Any:
    return x


class _Gated:
    """Watches the parts of one gated MLP during a forward pass."""

    def __init__(self, mlp: Any, handle: Recompute):
        self.mlp, self.handle, self.checked = mlp, handle, False
        self.gate: Tensor | None = None
        self.up: Tensor | None = None
        add = handle._hooks.append
        add(mlp.gate_proj.register_forward_hook(lambda m, args, out: setattr(self, "gate", out)))
        add(mlp.up_proj.register_forward_hook(lambda m, args, out: setattr(self, "up", out)))
        add(mlp.act_fn.register_forward_hook(self._after_activation))
        add(mlp.down_proj.register_forward_pre_hook(self._before_down))

    def _after_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.gate is not None and args[0] is self.gate:
            self.handle.remember(output, self.mlp.act_fn.forward, self.gate)

    def _before_down(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        gate, up, self.gate, self.up = self.gate, self.up, None, None
        if gate is None or up is None or args[0].shape != up.shape:
            return
        if not self.checked and not isinstance(args[0], FakeTensor):
            self._check(gate, up, args[0])
        self.handle.remember(args[0], self._product, gate, up)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.mlp.act_fn.forward(gate) * up

    @torch.no_grad()
    def _check(self, gate: Tensor, up: Tensor, product: Tensor) -> None:
        first = (slice(0, 1),) * (up.ndim - 1)
        # a few numbers may take another way through the processor than many, so not to the bit
        if not torch.allclose(
            self._product(gate[first], up[first]), product[first], 1e-2, 1e-5, equal_nan=True
        ):
            raise ValueError(
                f"{type(self.mlp).__name__} does not compute down_proj(act_fn(gate_proj(x)) * up_proj(x)); "
                "use recompute(model, gated=False)"
            )
        self.checked = True


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
