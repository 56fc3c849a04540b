r"""A linear layer whose weight is its frozen W0 plus LoRA, with weights cut out of the sum.

Letters: x (N, I) tokens, W0 (O, I) frozen, A (r, I), B (O, r), s scale, M (O, I) 1 where a weight stays.

    z = x (M * (W0 + s B A))^T + b

The product is masked as a whole, which makes the merged model equal to the trained one. W = M * (W0 + s B A)
is made for the pass and dropped, and made again in the backward pass, so that of each layer only x is saved,
as in plain LoRA. "Pruning meets low-rank parameter-efficient fine-tuning" (LoRAPrune) 2023, arXiv 2305.18403,
Eq. 12. With G = dz^T x, the gradients of A and B are, by `mask_grad`:

    exact   gB = s (G * M) A^T,              gA = s B^T (G * M)        G costs as much as the layer itself
    ste     gB = s dz^T (x A^T),             gA = s (dz B)^T x         straight through M
    cv      ste, less s (G' * (1 - M)) A^T and s B^T (G' * (1 - M)), with G' from an eighth of the tokens

The gradient of x is exact in all of them. Without a cut, or with whole rows and columns cut (these are zero
in A and B, too), they agree. Convolutions are always exact.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import grad as conv_grad
from torch.nn.functional import linear

MaskGrad = Literal["exact", "ste", "cv"]
MASK_GRADS: tuple[MaskGrad, ...] = ("exact", "ste", "cv")
SAMPLED = 8  # `cv` looks at one token in so many


class MaskedLora:
    """What is swapped in for a peft LoRA layer, in place: the masked product, forward and in the merge.

    The module's parameters, their names and the adapter's file stay as they are. What follows belongs to the
    module, none of it is a buffer: buffers are sent to every process in each forward pass.

    bits: (O, I) int8, all ones where a weight stays, zero where it is removed; None: nothing is.
    cut_rows, cut_columns: (O,) and (I,) bool, whole rows and columns that are removed, of W0 in place.
    mask_grad: see the module's docstring.
    sequential: B is (I, r) and stands before W0: W = W0 + s W0 B A, with W0 as it was.
    collect: the backward pass adds dL/d(W0 + s B A), unmasked, to `gradient`.
    offset: of the tokens that `cv` looks at.
    """

    bits: Tensor | None = None
    cut_rows: Tensor | None = None
    cut_columns: Tensor | None = None
    mask_grad: MaskGrad = "ste"
    sequential: bool = False
    collect: bool = False
    gradient: Tensor | None = None
    offset: int = 0

    @property
    def cut(self) -> Tensor | None:
        """(O, I) bool, True where a weight is removed; None: nothing is."""
        cuts = [
            cut for cut in (None if self.bits is None else self.bits == 0, *self._lines()) if cut is not None
        ]
        return functools.reduce(torch.logical_or, cuts).expand(self.frozen().shape) if cuts else None

    @cut.setter
    def cut(self, cut: Tensor | None) -> None:
        self.bits = None if cut is None else (~cut).to(torch.int8).neg_()

    def adapter(self) -> str:
        """The active adapter, of which there is one."""
        module = cast(Any, self)
        return next(name for name in module.active_adapters if name in module.lora_A)

    @property
    def scale(self) -> float:
        """The factor s of B A."""
        return float(cast(Any, self).scaling[self.adapter()])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r) or, sequential, (I, r), zero where a row or column is cut."""
        module, name = cast(Any, self), self.adapter()
        A, B = module.lora_A[name].weight.flatten(1), module.lora_B[name].weight.flatten(1)
        if self.cut_columns is not None:
            A = A.masked_fill(self.cut_columns, 0)
        if self.cut_rows is not None and not self.sequential:
            B = B.masked_fill(self.cut_rows[:, None], 0)
        return A, B

    def frozen(self) -> Tensor:
        """W0 (O, I), dequantised where it is quantised."""
        base = cast(Any, self).get_base_layer()
        if not base.weight.is_floating_point():
            from peft.utils.integrations import dequantize_module_weight

            return dequantize_module_weight(base).detach()
        weight = base.weight.detach()
        return weight.t() if getattr(self, "fan_in_fan_out", False) else weight.flatten(1)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """M * (W0 + s B A) (O, I), in the wider type of W0 and the factors."""
        return _masked(_summed(self.frozen(), *self.factors(), self.scale, self.sequential), self.bits)

    def zero_cut(self) -> None:
        """Zeroes W0 where it is cut, in place; a sequential or a quantised layer only masks it."""
        if self.keeps_base:
            return
        W0 = self.frozen()
        _masked(W0, self.bits)
        for lines in self._lines():
            W0.masked_fill_(lines, 0)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What peft adds to W0 when it merges: with it, W0 becomes exactly zero where it is cut."""
        base, W0, (A, B) = cast(Any, self).get_base_layer(), self.frozen(), self.factors()
        if self.sequential:
            B = W0.to(B.dtype) @ B
        delta = self.scale * (B @ A)
        _masked(delta, self.bits)
        if self.keeps_base and self.bits is not None:
            delta -= _masked(W0.to(delta.dtype, copy=True), ~self.bits)
        delta = delta.t() if getattr(self, "fan_in_fan_out", False) else delta
        return delta.view(base.weight.shape) if base.weight.is_floating_point() else delta

    def unmerge(self) -> None:
        """As peft's; refused for a sequential LoRA, whose W0 cannot be told from the sum."""
        if self.sequential and cast(Any, self).merged:
            raise ValueError("a sequential LoRA cannot be unmerged; merge a copy of the model instead")
        super().unmerge()  # type: ignore[misc] - of peft's layer

    @property
    def keeps_base(self) -> bool:
        """W0 is not zeroed in place, only masked."""
        return self.sequential or not cast(Any, self).get_base_layer().weight.is_floating_point()

    def _lines(self) -> list[Tensor]:
        rows = None if self.cut_rows is None else self.cut_rows[:, None]
        return [lines for lines in (rows, self.cut_columns) if lines is not None]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        module = cast(Any, self)
        return module.disable_adapters or module.merged or bool(args) or bool(kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Peft's own forward pass where the adapter is merged, disabled, or chosen example by example."""
        if self._plain(args, kwargs):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc] - of peft's layer
        base, (A, B) = cast(Any, self).get_base_layer(), self.factors()
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        kernel = _ConvolveMasked if isinstance(base, nn.Conv2d) else _MultiplyMasked
        return kernel.apply(x, A, B, base.bias, self)  # type: ignore[return-value]


class MaskedLoraLinear(MaskedLora, LoraLinear):
    """LoRA on a Linear, or on GPT-2's Conv1D."""


class MaskedLoraConv2d(MaskedLora, LoraConv2d):
    """LoRA on a convolution."""


@functools.cache
def masked_class(kind: type) -> type:
    """The class to swap in for a LoRA layer of class `kind`, also a quantised one."""
    known = {LoraLinear: MaskedLoraLinear, LoraConv2d: MaskedLoraConv2d}
    return known.get(kind) or type(f"Masked{kind.__name__}", (MaskedLora, kind), {})


def _summed(W0: Tensor, A: Tensor, B: Tensor, s: float, sequential: bool) -> Tensor:
    """W0 + s B A, a new tensor."""
    wide = torch.promote_types(W0.dtype, A.dtype)
    A, B = A.to(wide), B.to(wide)
    if sequential:
        B = W0.to(wide) @ B
    if W0.dtype == wide:
        return torch.addmm(W0, B, A, alpha=s)
    return W0.to(wide).addmm_(B, A, alpha=s)


class _MultiplyMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, layer: MaskedLora) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            W0, s = layer.frozen(), layer.scale
            W = _masked(_summed(W0, A, B, s, layer.sequential).to(x.dtype), layer.bits)
            y = linear(x, W, None if bias is None else bias.to(x.dtype))
        quantised = not cast(Any, layer).get_base_layer().weight.is_floating_point()
        ctx.save_for_backward(x, A, B, None if quantised else W0)
        ctx.layer, ctx.bits, ctx.scale = layer, layer.bits, s
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dz.device.type, enabled=False):
            return _MultiplyMasked.gradients(ctx, dz)

    @staticmethod
    def gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, W0 = ctx.saved_tensors
        layer, bits, s = ctx.layer, ctx.bits, ctx.scale
        W0 = layer.frozen() if W0 is None else W0
        dz_NO, x_NI = dz.reshape(-1, dz.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = gA = gB = gb = None
        if ctx.needs_input_grad[0]:
            W = _masked(_summed(W0, A, B, s, layer.sequential).to(dz.dtype), bits)
            dx = (dz_NO @ W).view(x.shape)
            del W
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            exact = layer.mask_grad == "exact" and bits is not None
            G = dz_NO.t() @ x_NI if exact or layer.collect else None
            if layer.collect:
                _collect(layer, G)
            B_Or = (W0.to(B.dtype) @ B if layer.sequential else B).to(dz.dtype)
            A_rI = A.to(dz.dtype)
            if exact:
                assert G is not None
                G = _masked(G, bits)
                gB, gA = G @ A_rI.t(), B_Or.t() @ G
            else:
                gB, gA = dz_NO.t() @ (x_NI @ A_rI.t()), (dz_NO @ B_Or).t() @ x_NI
                if layer.mask_grad == "cv" and bits is not None:
                    each = SAMPLED if len(x_NI) >= SAMPLED else 1
                    some = slice(layer.offset % each, None, each)
                    outside = _masked(dz_NO[some].t() @ x_NI[some], ~bits).mul_(each)
                    gB, gA = gB - outside @ A_rI.t(), gA - B_Or.t() @ outside
            gB, gA = gB.mul_(s).to(B.dtype), gA.mul_(s).to(A.dtype)
            if layer.sequential:
                gB = W0.to(B.dtype).t() @ gB
        if ctx.needs_input_grad[3]:
            gb = dz_NO.sum(0, dtype=ctx.bias_dtype)
        return dx, gA, gB, gb, None


class _ConvolveMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, layer: MaskedLora) -> Tensor:
        conv = cast(Any, layer).get_base_layer()
        with torch.autocast(x.device.type, enabled=False):
            W = _ConvolveMasked.weight(layer, layer.bits, A, B, conv, x.dtype)
            y = conv._conv_forward(x, W, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, A, B, conv.weight)
        ctx.layer, ctx.bits, ctx.conv = layer, layer.bits, conv
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def weight(
        layer: MaskedLora, bits: Tensor | None, A: Tensor, B: Tensor, conv: nn.Conv2d, dtype: torch.dtype
    ) -> Tensor:
        W = _summed(layer.frozen(), A, B, layer.scale, False).to(dtype)
        return _masked(W, bits).view(conv.weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, W0 = ctx.saved_tensors
        layer, bits, conv = ctx.layer, ctx.bits, ctx.conv
        how = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "groups")}
        dx = gA = gB = gb = None
        with torch.autocast(dz.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                W = _ConvolveMasked.weight(layer, bits, A, B, conv, dz.dtype)
                dx = conv_grad.conv2d_input(x.shape, W, dz, **how)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                G = conv_grad.conv2d_weight(x, W0.shape, dz, **how).flatten(1)
                if layer.collect:
                    _collect(layer, G)
                G = _masked(G, bits).to(A.dtype)
                gB, gA = layer.scale * (G @ A.t()), layer.scale * (B.t() @ G)
            if ctx.needs_input_grad[3]:
                gb = dz.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return dx, gA, gB, gb, None


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _masked(W: Tensor, bits: Tensor | None) -> Tensor:
    """`W`, zeroed in place where `bits` are; on the CPU 20 times faster than `masked_fill_`."""
    if bits is not None:
        W.view(INTEGERS[W.element_size()]).bitwise_and_(bits)
    return W


def _collect(layer: MaskedLora, G: Tensor | None) -> None:
    assert G is not None
    layer.gradient = G.to(torch.float32, copy=True) if layer.gradient is None else layer.gradient + G.float()
