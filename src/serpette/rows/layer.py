"""What replaces a layer: the frozen layer, and for each adapter the rows and columns that train."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import RowConfig
from .kernels import AddAt, MaskRows


class RowLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and what trains of it. Abstract: `serpette.rows.layers` has one for each kind of layer.

    A weight is read neuron first: (n, f, ...) for n rows (outputs, filters, tokens, channels of a norm) of f
    inputs. By adapter name: `rows_weight` (r, f, ...) and `rows_bias` (r,) are the change of the rows
    `rows_index` (r,), sorted; `rows_columns` (n, c, ...) is that of the columns `rows_column_index` (c,).
    Elements where both cross belong to the rows.

    Args:
        base_layer: is frozen and otherwise left as it is.
    """

    adapter_layer_names = ("rows_weight", "rows_bias", "rows_columns")
    other_param_names = ("rows_index", "rows_column_index")
    rows_index: Any
    rows_column_index: Any
    no_columns: str | None = None  # why a layer cannot train columns

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer: Any = base_layer.requires_grad_(False)
        self.rows_weight, self.rows_bias, self.rows_columns = (nn.ParameterDict() for _ in range(3))
        self.rows_index, self.rows_column_index = (BufferDict({}, persistent=True) for _ in range(2))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def get_base_layer(self) -> Any:
        """The frozen layer."""
        return super().get_base_layer()

    @property
    def base_shape(self) -> tuple[int, ...]:
        """(n, f, ...) of the frozen weight, neuron first."""
        return tuple(self.get_base_layer().weight.shape)

    @property
    def neurons(self) -> int:
        """How many rows there are."""
        return self.base_shape[0]

    @property
    def inputs(self) -> int:
        """How many columns there are; 0 where a neuron has a single weight."""
        return self.base_shape[1] if len(self.base_shape) > 1 else 0

    def choose(
        self,
        adapter: str,
        rows: Tensor | None,
        columns: Tensor | None = None,
        *,
        train_bias: bool | None = None,
    ) -> None:
        """From now on `adapter` trains these rows and columns, from a change of zero.

        Args:
            rows: (r,) int64, sorted positions among the neurons, or None.
            columns: (c,) int64, sorted positions among the inputs, or None.
            train_bias: whether the rows' biases train too, if the layer has any; None: as before.

        Raises:
            ValueError: positions outside the layer, or columns of a layer that cannot train them.
        """
        if columns is not None and self.no_columns:
            raise ValueError(
                f"columns of a {type(self.get_base_layer()).__name__} cannot train: {self.no_columns}"
            )
        for name, index, size in (("rows", rows, self.neurons), ("columns", columns, self.inputs)):
            check_index(name, index, size)
        dtype, trains = self._dtype_and_grad(adapter)
        train_bias = adapter in self.rows_bias if train_bias is None else train_bias
        device = self.get_base_layer().weight.device
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter in getattr(self, name):
                del getattr(self, name)[adapter]

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=trains)

        if rows is not None:
            self.rows_index[adapter] = rows.to(device)
            self.rows_weight[adapter] = zeros(len(rows), *self.base_shape[1:])
            if train_bias and getattr(self.get_base_layer(), "bias", None) is not None:
                self.rows_bias[adapter] = zeros(len(rows))
        if columns is not None:
            self.rows_column_index[adapter] = columns.to(device)
            self.rows_columns[adapter] = zeros(self.neurons, len(columns), *self.base_shape[2:])

    def _dtype_and_grad(self, adapter: str) -> tuple[torch.dtype, bool]:
        for held in (self.rows_weight, self.rows_columns):
            if adapter in held:
                return held[adapter].dtype, held[adapter].requires_grad
        dtype = self.get_base_layer().weight.dtype
        return (dtype if dtype.is_floating_point else torch.float32), True  # integers: a quantised base

    def trained(self, adapter: str) -> bool:
        """Whether any change of the adapter is not zero."""
        names = self.adapter_layer_names
        return any(adapter in getattr(self, n) and bool(getattr(self, n)[adapter].any()) for n in names)

    def changes(self, adapter: str) -> tuple[Any, ...]:
        """(rows' weight, rows' bias, rows, columns' weight, columns); None for what the adapter has not."""
        held = (getattr(self, name) for name in self.adapter_layer_names + self.other_param_names)
        A, a, B, rows, columns = (h[adapter] if adapter in h else None for h in held)
        if B is not None and rows is not None:
            B = MaskRows.apply(B, rows)
        return A, a, rows, B, columns

    def changed(self, active: list[str]) -> dict[str, Tensor]:
        """The base layer's weight and bias with the changes of the adapters `active`."""
        base = self.get_base_layer()
        values: dict[str, Any] = {"weight": base.weight, "bias": getattr(base, "bias", None)}
        for adapter in active:
            A, a, rows, B, columns = self.changes(adapter)
            for name, change, index, dim in (
                ("weight", A, rows, 0),
                ("weight", B, columns, 1),
                ("bias", a, rows, 0),
            ):
                if change is not None:
                    values[name] = AddAt.apply(values[name], change, index, dim)
        return {name: value for name, value in values.items() if value is not None}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the frozen layer, with the active adapters' changes."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [a for a in self.active_adapters if a in self._get_available_adapters()]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(x, active)

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        """The output with the changes of the adapters `active`, of which there is at least one."""
        raise NotImplementedError

    # -- merging

    def neuron_first(self, weight: Tensor) -> Tensor:
        """A view of the base layer's weight with the neurons in its first dimension."""
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change as a dense tensor of the base weight's shape; as peft names it."""
        delta = torch.zeros_like(self.get_base_layer().weight, dtype=self._dtype_and_grad(adapter)[0])
        self._add_changes(delta, adapter, 1)
        return delta

    @torch.no_grad()
    def _add_changes(self, weight: Tensor, adapter: str, sign: int) -> None:
        A, _, rows, B, columns = self.changes(adapter)
        weight = self.neuron_first(weight)
        if A is not None:
            weight.index_add_(0, rows, A.to(weight.dtype), alpha=sign)
        if B is not None:
            weight.index_add_(1, columns, B.to(weight.dtype), alpha=sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the changes to the frozen weight, until `unmerge`.

        Args:
            safe_merge: leave the weight alone and raise if the result is not finite.
            adapter_names: None means the active ones.

        Raises:
            ValueError: a quantised base, or with `safe_merge` a result that is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self._get_available_adapters():
                self._merge(adapter, safe_merge)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def _merge(self, adapter: str, safe_merge: bool) -> None:
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            raise ValueError(
                f"adapter {adapter!r} cannot be merged into the quantised {type(base).__name__}; "
                "merge into the model loaded in bfloat16, or serve it unmerged through to_lora"
            )
        weight = base.weight.clone() if safe_merge else base.weight
        self._add_changes(weight, adapter, 1)
        change = self.rows_bias[adapter] if adapter in self.rows_bias else None
        if safe_merge:
            if not weight.isfinite().all() or (change is not None and not change.isfinite().all()):
                raise ValueError(
                    f"adapter {adapter!r} has values that are not finite, so the merged weight would; "
                    "nothing was merged into this layer"
                )
            base.weight.copy_(weight)
        if change is not None:
            base.bias.index_add_(0, self.rows_index[adapter], change.to(base.bias.dtype))

    def unmerge(self) -> None:
        """Takes the merged changes off the weight again, up to rounding."""
        while self.merged_adapters:
            self._unmerge(self.merged_adapters.pop())

    @torch.no_grad()
    def _unmerge(self, adapter: str) -> None:
        base = self.get_base_layer()
        self._add_changes(base.weight, adapter, -1)
        if adapter in self.rows_bias:
            change = self.rows_bias[adapter].to(base.bias.dtype)
            base.bias.index_add_(0, self.rows_index[adapter], change, alpha=-1)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; its changes leave the weight if they are merged."""
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
            self._unmerge(adapter_name)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = self.get_base_layer().weight.device if device is None else device
        for name in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                # peft would cast to the weight's type too, and before 0.19 even positions
                held[adapter_name].data = held[adapter_name].data.to(device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, size in (("rows_index", self.neurons), ("rows_column_index", self.inputs)):
            for key, index in state_dict.items():
                if key.startswith(f"{prefix}{name}."):
                    check_index(key, index, size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "rows." + super().__repr__()


def row_layers(model: nn.Module) -> list[tuple[str, RowLayer]]:
    """(name, layer) of every row layer; the name as in the model without the adapter."""
    return [
        (re.sub(r"^base_model\.model\.", "", name), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, RowLayer)
    ]


def update_counts(model: nn.Module, config: RowConfig, adapter: str) -> None:
    """Writes into the configuration what `adapter` trains, for whoever loads it."""
    config.counts = {}
    for name, layer in row_layers(model):
        if adapter in layer._get_available_adapters():
            rows, columns = (
                len(held[adapter]) if adapter in held else 0
                for held in (layer.rows_index, layer.rows_column_index)
            )
            config.counts[name] = [rows, columns, layer.neurons, layer.inputs]


def check_index(name: str, index: Tensor | None, size: int) -> None:
    """Raises a ValueError if positions do not fit a layer of that size."""
    if index is None or index.is_meta or not len(index):
        return
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise ValueError(
            f"{name} must lie in [0, {size}), and {int(index.max())} does not; "
            "was the adapter made for a model of other shapes?"
        )
