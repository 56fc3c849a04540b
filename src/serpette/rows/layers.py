"""One class for each kind of layer that can train rows: linear, convolution, embedding, norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels import AddAt, FrozenWithRows
from .layer import RowLayer


class RowLinear(RowLayer):
    """nn.Linear, GPT-2's Conv1D (whose weight is (in, out)) and quantised linear layers.

    `live`: the changes are written into the weight before each forward pass, so that it costs one matrix
    product; the original rows and columns are kept aside. For one adapter on an unquantised base. Writing to
    a parameter's `.data` without a backward pass is not noticed; use `copy_` under `torch.no_grad()`.
    """

    def __init__(self, base_layer: nn.Module, live: bool = False):
        super().__init__(base_layer)
        self.transposed = type(base_layer).__name__ == "Conv1D"
        self.live = live
        self._written: dict[str, tuple[tuple[int, int], ...]] = {}  # ids, versions of what W holds
        self._original: tuple[Any, ...] = ()
        if live and not self._plain:
            raise ValueError(
                f"kernel='live' writes into the weight, and that of {type(base_layer).__name__} is quantised "
                "or special; use kernel='additive'"
            )

    @property
    def base_shape(self) -> tuple[int, ...]:
        base = self.get_base_layer()
        if self.transposed:
            return tuple(base.weight.t().shape)
        return base.out_features, base.in_features  # not the weight's: a 4-bit one is packed

    @property
    def _plain(self) -> bool:
        """Whether the layer is nothing but x W^T + b, so that it can be computed here."""
        base = self.get_base_layer()
        return (
            (type(base) is nn.Linear or self.transposed)
            and base.weight.is_floating_point()
            and not is_traceable_wrapper_subclass(base.weight)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        )

    def neuron_first(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.live:
            return self._forward_live(x, *args, **kwargs)  # type: ignore[reportCallIssue]
        return super().forward(x, *args, **kwargs)

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        if not self._plain:
            y = self.base_layer(x)
            for adapter in active:
                y = self._added(x, y, adapter)
            return y
        if self.live:
            self.write(active[0])
        base = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        W = self.neuron_first(base.weight)
        y = FrozenWithRows.apply(x, W, base.bias, *self.changes(active[0]), self.live)
        if self.live and y.requires_grad:  # a step comes next, which not every optimizer lets torch see
            y.register_hook(lambda g: self._written.update(dict.fromkeys(self._written, ())))
        for adapter in active[1:]:
            y = self._added(x, y, adapter)
        return y

    def _added(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        A, a, rows, B, columns = self.changes(adapter)
        x = x.to(y.dtype)  # a quantised layer may compute in another type than it is given
        if A is not None:
            y = AddAt.apply(y, F.linear(x, A.to(x.dtype), None if a is None else a.to(x.dtype)), rows, -1)
        if B is not None:
            y = y + F.linear(x.index_select(-1, columns), B.to(x.dtype))
        return y

    # -- live

    @torch.compiler.disable  # a graph does not see versions
    def _forward_live(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or not set(self._written) <= set(self.active_adapters):
            self.restore()
        return super().forward(x, *args, **kwargs)

    @torch.no_grad()
    def write(self, adapter: str) -> None:
        """Brings the weight up to date with the adapter, if it changed since the last time."""
        parameters = [
            getattr(self, n)[adapter] for n in self.adapter_layer_names if adapter in getattr(self, n)
        ]
        versions = tuple((id(p), p._version) for p in parameters)
        if self._written.get(adapter) == versions:
            return
        A, a, rows, B, columns = self.changes(adapter)
        base = self.get_base_layer()
        W = self.neuron_first(base.weight)
        if not self._written:
            self._original = (
                None if A is None else W.index_select(0, rows),
                None if a is None else base.bias.index_select(0, rows),
                None if B is None else W.index_select(1, columns),
            )
        W_rows, b_rows, W_columns = self._original
        if B is not None:
            W.index_copy_(1, columns, (W_columns + B).to(W.dtype))
        if A is not None:  # last: what crosses belongs to the rows
            W.index_copy_(0, rows, (W_rows + A).to(W.dtype))
        if a is not None:
            base.bias.index_copy_(0, rows, (b_rows + a).to(W.dtype))
        self._written = {adapter: versions}

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the pre-trained rows and columns back into the weight."""
        for adapter in self._written:
            _, a, rows, _, columns = self.changes(adapter)
            base = self.get_base_layer()
            W = self.neuron_first(base.weight)
            W_rows, b_rows, W_columns = self._original
            if W_columns is not None:
                W.index_copy_(1, columns, W_columns)
            if W_rows is not None:
                W.index_copy_(0, rows, W_rows)
            if b_rows is not None:
                base.bias.index_copy_(0, rows, b_rows)
        self._written, self._original = {}, ()

    def choose(self, adapter: str, *args: Any, **kwargs: Any) -> None:
        if self.live:
            others = self._get_available_adapters() - {adapter}
            if others:
                raise ValueError(
                    f"kernel='live' holds one adapter in the weight, {sorted(others)[0]!r}, and there is no "
                    f"room for {adapter!r}; use kernel='additive'"
                )
            self.restore()
        super().choose(adapter, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore()
        super().delete_adapter(adapter_name)

    def _merge(self, adapter: str, safe_merge: bool) -> None:
        self.restore()
        super()._merge(adapter, safe_merge)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args)

    def _apply(self, *args: Any, **kwargs: Any) -> RowLinear:  # to another device or type
        self.restore()
        return super()._apply(*args, **kwargs)


class RowConv(RowLayer):
    """nn.Conv1d, Conv2d, Conv3d and their subclasses.

    A stock convolution in one group adds the selected filters' part. Another one, which may pad or normalise
    in its own way, runs once with a weight that holds the changes.
    """

    @property
    def no_columns(self) -> str | None:  # type: ignore[override] - it depends on the layer
        grouped = self.get_base_layer().groups > 1
        return "the inputs of a grouped convolution do not reach every filter" if grouped else None

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        base = self.get_base_layer()
        if type(base) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or base.groups > 1:
            return functional_call(base, self.changed(active), (x,))
        y, channels = self.base_layer(x), -1 - len(base.kernel_size)
        for adapter in active:
            A, a, rows, B, columns = self.changes(adapter)
            if A is not None:
                y = AddAt.apply(y, base._conv_forward(x, *_cast(x, A, a)), rows, channels)
            if B is not None:
                y = y + base._conv_forward(x.index_select(channels, columns), *_cast(x, B, None))
        return y


def _cast(x: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    """To the type of `x`; autocast casts by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return list(values)
    return [None if value is None else value.to(x.dtype) for value in values]


class RowEmbedding(RowLayer):
    """nn.Embedding: a row is a token, a column a feature of all tokens."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        if base_layer.max_norm is not None:
            raise ValueError(
                f"max_norm={base_layer.max_norm} rescales the tokens' rows; exclude {base_layer}"
            )

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        y, base = self.base_layer(x), self.get_base_layer()
        scale = getattr(base, "embed_scale", None)  # of Gemma, applied in its forward pass
        for adapter in active:
            A, _, rows, B, columns = self.changes(adapter)
            if A is not None:
                assert rows is not None
                slot = torch.searchsorted(rows, x).clamp_(max=len(rows) - 1)
                trains = rows[slot] == x
                if base.padding_idx is not None:
                    trains &= x != base.padding_idx
                delta = F.embedding(slot, A) * trains.unsqueeze(-1)
                y = y + self._scaled(delta, scale, y.dtype)
            if B is not None:
                y = AddAt.apply(
                    y, self._scaled(F.embedding(x, B, base.padding_idx), scale, y.dtype), columns, -1
                )
        return y

    @staticmethod
    def _scaled(delta: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
        return (delta if scale is None else delta * scale).to(dtype)


class RowNorm(RowLayer):
    """LayerNorm, RMSNorm of any model, GroupNorm, BatchNorm: a row is the gain of a channel.

    The layer runs once, with a gain and a bias that hold the changes.

    Args:
        frozen_statistics: a BatchNorm normalises with its running statistics and leaves them alone.
    """

    no_columns = "a norm has one weight for each channel, so no columns"

    def __init__(self, base_layer: nn.Module, frozen_statistics: bool = True):
        super().__init__(base_layer)
        self.frozen_statistics = frozen_statistics
        self.train(base_layer.training)

    def train(self, mode: bool = True) -> RowNorm:
        super().train(mode)
        if self.frozen_statistics:
            self.base_layer.eval()
        return self

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        return functional_call(self.get_base_layer(), self.changed(active), (x,))


def layer_class(module: nn.Module) -> type[RowLayer] | None:
    """The class that wraps `module`, or None."""
    name = type(module).__name__
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return RowConv
    if isinstance(module, nn.Embedding):
        return RowEmbedding
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or (name == "Conv1D" and hasattr(module, "nf")):
        return RowLinear
    if hasattr(module, "in_features") and hasattr(module, "out_features") and "Linear" in name:
        return RowLinear  # a quantised one
    is_norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
    if (is_norm or name.endswith(("RMSNorm", "LayerNorm"))) and getattr(weight, "ndim", 0) == 1:
        return RowNorm
    return None
