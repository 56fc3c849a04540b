r"""Per-example gradients of the LoRA factors of a peft model, read off one backward pass by hooks.

A LoRA layer computes h = W0 x + s B A x. With delta = dL/dh at each token and G = sum over tokens of
delta x^T, its gradients are g_B = s G A^T and g_A = s B^T G. A hook on `lora_A` sees x and u = A x, one on
the output of `lora_B` sees s delta when the backward pass reaches it; G itself is never formed.

The hooks know peft's layers by their attributes (`lora_A`, `lora_B`, `scaling`), so peft is not imported
here. Letters: n examples, T tokens (positions of a convolution), I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold


@dataclass
class LayerGradients:
    """What one layer saw of a batch; tokens that `mask_nT` excludes are zero.

    `raw_nTO` and `raw_nTr` are the gradients of the layer's two outputs as the backward pass had them; times
    `unit` they are delta and B' delta of the summed loss.
    """

    index: int
    x_nTI: Tensor
    u_nTr: Tensor
    raw_nTO: Tensor
    raw_nTr: Tensor
    unit: float | Tensor
    mask_nT: Tensor | None
    A_rI: Tensor
    B_Or: Tensor
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """G A^T (n, O, r) and B^T G (n, r, I): the gradients of B and A, each over s."""
        AG_nrO = self.u_nTr.mT @ self.raw_nTO * self.unit
        return AG_nrO.mT, self.raw_nTr.mT @ self.x_nTI * self.unit

    def both(self) -> Tensor:
        """B^T G A^T (n, r, r)."""
        return self.raw_nTr.mT @ self.u_nTr * self.unit

    @property
    def delta_nTO(self) -> Tensor:
        """dL/dh of the summed loss."""
        return self.raw_nTO * self.unit


@dataclass
class LoraLayer:
    """One LoRA layer of the model, with the adapter that is active."""

    name: str
    A: nn.Module
    B: nn.Module
    scale: float

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r) as matrices, float32 or wider; I of a convolution counts its patch."""
        return _wide(self.A.weight.detach()).flatten(1), _wide(self.B.weight.detach()).flatten(1)  # type: ignore[operator]

    @property
    def sizes(self) -> tuple[int, int]:
        """(I, O)."""
        return self.A.weight.flatten(1).shape[1], self.B.weight.shape[0]  # type: ignore[operator,return-value]


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers of `model` that train, in the order of its modules.

    Raises:
        ValueError: no LoRA; merged, frozen or several active adapters; a kind of layer without the plain
            form h = W0 x + s B A x.

    Example:
        >>> lora_layers(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: the model (Linear) has no LoRA layer; peft.get_peft_model makes one
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "scaling"):
            layer = _layer(name, module)
            if layer is not None:
                layers.append(layer)
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no LoRA layer; peft.get_peft_model makes one"
        )
    frozen = [layer.name for layer in layers if not _trains(layer)]
    if frozen:
        raise ValueError(
            f"the LoRA factors of {frozen[0]!r} are frozen ({len(frozen)} of {len(layers)} layers); load the "
            "adapter with is_trainable=True, or set requires_grad on them"
        )
    return layers


def _layer(name: str, module: Any) -> LoraLayer | None:
    active = [a for a in module.active_adapters if a in module.lora_A or a in module.lora_embedding_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"{name!r} has {len(active)} active adapters; activate one: model.set_adapter(NAME)")
    adapter = active[0]
    kind = _unsupported(module, adapter)
    if kind:
        raise ValueError(
            f"{name!r} is {kind}, whose gradient is not that of h = W0 x + s B A x; leave it out of "
            "target_modules, or use a plain LoRA (Linear, Conv1D and Conv2d layers, rsLoRA, PiSSA, OLoRA)"
        )
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        raise ValueError(f"the adapter of {name!r} is merged or disabled; unmerge and enable it first")
    return LoraLayer(name, module.lora_A[adapter], module.lora_B[adapter], float(module.scaling[adapter]))


def _unsupported(module: Any, adapter: str) -> str | None:
    """What kind of layer it is, if its gradient cannot be read; None if it can."""
    if adapter in module.lora_embedding_A:
        return "a LoRA on an Embedding"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(module, "use_dora", {}).get(adapter):
        return f"a LoRA variant ({type(variant).__name__ if variant is not None else 'DoRA'})"
    A, B = module.lora_A[adapter], module.lora_B[adapter]
    if isinstance(A, nn.Linear) and isinstance(B, nn.Linear):
        base = module.get_base_layer()
        return f"a LoRA on {type(base).__name__}" if isinstance(base, nn.MultiheadAttention) else None
    if isinstance(A, nn.Conv2d) and isinstance(B, nn.Conv2d):
        if A.groups > 1 or B.groups > 1:
            return "a LoRA on a grouped convolution"
        return None if A.padding_mode == "zeros" else f"a convolution with padding_mode={A.padding_mode!r}"
    return f"a LoRA on {type(module.get_base_layer()).__name__}"


def _trains(layer: LoraLayer) -> bool:
    return layer.A.weight.requires_grad and layer.B.weight.requires_grad  # type: ignore[union-attr,return-value]


class LoraGradients:
    """Hooks that hand each layer's gradients of a batch to `visit` while the backward pass runs.

    Use as a context manager, and call `begin` before each forward pass. The gradient checkpointing of
    transformers, both kinds, and autocast are fine: what a rerun of the forward pass saw replaces what the
    first one saw, and half precision is widened to float32.

    Args:
        model: with LoRA layers, see `lora_layers`.
        visit: called once a layer and batch, with the layers in the order of the backward pass.

    Raises:
        ValueError: as `lora_layers`; in the backward pass if a layer is used twice in one forward pass.
    """

    def __init__(self, model: nn.Module, visit: Callable[[LayerGradients], None]):
        self.layers = lora_layers(model)
        self.visit = visit
        self.active = False
        self._input_of: list[int] = []
        self._inputs: dict[int, int] = {}
        self._handles: list[Any] = []

    @property
    def input_of(self) -> list[int]:
        """A number for each layer, known after a forward pass: layers with the same number have one input."""
        if not self._input_of and self._inputs:
            unused = len(self.layers)
            self._input_of = [self._inputs.get(i, unused + i) for i in range(len(self.layers))]
        return self._input_of

    def begin(
        self,
        examples: int,
        mask: Tensor | None = None,
        gather: Tensor | None = None,
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        """Announces a batch.

        Args:
            examples: n.
            mask: (n, T) of the tokens, 0 or False = padding. Layers with another number of positions
                (pooled, convolved) have no padding.
            gather: (n, T) positions of each example's tokens in a packed batch, -1 = none; see `packed`.
            loss_scale: what the loss of the backward pass is times the sum of the examples' losses; may
                still be set on the object (`loss_scale`) when the gradient of the logits arrives.
        """
        self.examples, self.mask, self.gather, self.loss_scale = examples, mask, gather, loss_scale
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: dict[int, Tensor | None] = {}
        self._pointers: dict[tuple, int] = {}
        self.active = True

    def end(self) -> None:
        """Forgets the batch; hooks do nothing until the next `begin`."""
        self._seen, self._outputs, self.active = {}, {}, False

    def __enter__(self) -> LoraGradients:
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.A.register_forward_hook(self._input_hook(index)))
            self._handles.append(layer.B.register_forward_hook(self._output_hook(index)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def _input_hook(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not self.active:
                return
            x = args[0].detach()
            self._seen[index] = x, output.detach()
            key = (x.data_ptr(), x.shape, x.stride())
            self._inputs[index] = self._pointers.setdefault(key, len(self._pointers))
            if output.requires_grad:  # its gradient comes after that of B's output
                output.register_hook(lambda gradient: self._arrived(index, gradient))

        return hook

    def _output_hook(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.active and output.requires_grad:
                output.register_hook(lambda gradient: self._keep(index, gradient))

        return hook

    def _keep(self, index: int, gradient: Tensor) -> None:
        if self.active and index in self._outputs:
            raise ValueError(
                f"the LoRA layer {self.layers[index].name!r} is used more than once in a forward pass; "
                "leave layers that are shared out of target_modules"
            )
        self._outputs[index] = gradient.detach() if self.active else None

    def _arrived(self, index: int, gradient: Tensor) -> None:
        if not self.active:
            return
        layer = self.layers[index]
        x, u = self._seen.pop(index)
        raw = self._outputs[index]
        assert raw is not None, "the gradient of B's output comes first"
        self._outputs[index] = None
        x_nTI, u_nTr = self._tokens(_patches(layer.A, x)), self._tokens(_channels_last(u, layer.A))
        raw_nTO = self._tokens(_channels_last(raw, layer.B))
        raw_nTr = self._tokens(_channels_last(gradient.detach(), layer.A))
        mask_nT = None
        if self.gather is not None:
            mask_nT = self.gather >= 0
        elif self.mask is not None and self.mask.numel() == x_nTI.shape[0] * x_nTI.shape[1]:
            mask_nT = self.mask.reshape(x_nTI.shape[:2]).bool()
        if mask_nT is not None:
            if bool(mask_nT.all()):
                mask_nT = None
            else:
                weight_nT1 = mask_nT[..., None].to(x_nTI.dtype)
                x_nTI, u_nTr = x_nTI * weight_nT1, u_nTr * weight_nT1
                raw_nTO, raw_nTr = raw_nTO * weight_nT1, raw_nTr * weight_nT1
        A_rI, B_Or = layer.factors
        unit = 1 / (layer.scale * self.loss_scale)
        self.visit(
            LayerGradients(index, x_nTI, u_nTr, raw_nTO, raw_nTr, unit, mask_nT, A_rI, B_Or, layer.scale)
        )

    def _tokens(self, value: Tensor) -> Tensor:
        """(n, T, D) from (n, D), (n, T, D), (n windows, T, D) or (n, H, W, D)."""
        value = _wide(value)
        if self.gather is not None:
            flat = value.reshape(-1, value.shape[-1])
            return flat[self.gather.clamp(min=0)]
        if value.numel() % (self.examples * value.shape[-1]):
            raise ValueError(
                f"a LoRA layer saw {tuple(value.shape)}, which is no whole number of tokens for each of the "
                f"{self.examples} examples; the layer mixes examples: leave it out of target_modules"
            )
        return value.reshape(self.examples, -1, value.shape[-1])


def packed(position_ids: Tensor) -> Tensor:
    """(n, T) token positions of the examples of a packed batch, told by where `position_ids` start at 0.

    >>> packed(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[ 0,  1,  2],
            [ 3,  4, -1]])
    """
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([position_ids.numel()]))
    offsets = torch.arange(int(lengths.max()), device=starts.device)
    return torch.where(offsets < lengths[:, None], starts[:, None] + offsets, -1)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _channels_last(value: Tensor, module: nn.Module) -> Tensor:
    """A convolution's (n, C, H, W) as (n, H W, C); anything else as it is."""
    return value.flatten(2).mT if isinstance(module, nn.Conv2d) else value


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the factor A multiplies: tokens, or the patches of a convolution, (n, positions, I)."""
    if not isinstance(module, nn.Conv2d):
        return x
    padding = module.padding
    if isinstance(padding, str):
        x, padding = pad(x, module._reversed_padding_repeated_twice), 0
    return unfold(_wide(x), module.kernel_size, module.dilation, padding, module.stride).mT
