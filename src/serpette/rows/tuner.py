"""The peft tuner: puts the row layers into a model, and makes the method known to peft from outside."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from packaging import version
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..importance import neurons
from ..registry import near
from ..tracing import ATTENTION
from .config import RowConfig, RowsType, ends_with
from .layer import RowLayer, row_layers, update_counts
from .layers import RowConv, RowLinear, RowNorm, layer_class
from .ranking import initial_rows


class RowModel(BaseTuner):
    """What `get_peft_model(model, RowConfig(...))` makes.

    Raises:
        ValueError: modules that match nothing, more rows than a layer has, an importance that needs data, a
            model that holds another adapter, or a loaded adapter for a model of other shapes.
    """

    prefix = "rows_"
    tuner_layer_cls = RowLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(self.peft_config[adapter_name])  # counts are the adapter's, not the user's
        assert isinstance(config, RowConfig)
        self.peft_config[adapter_name] = config
        _refuse_other_adapters(model, adapter_name)
        loaded = config.counts is not None
        if not loaded:
            _check_importance(config)
            config.target_modules = _targets(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            missing = sorted(set(config.counts or ()) - set(dict(row_layers(model))))
            if missing:
                raise ValueError(f"the adapter trains rows of {missing[0]!r}, which this model does not have")
        except Exception:  # leave the model as it was, for another try
            _take_out(model, adapter_name)
            raise
        if not loaded:
            update_counts(model, config, adapter_name)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if peft_config.freeze_attention and ATTENTION.fullmatch(key):
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        config: RowConfig = peft_config
        layer = target if isinstance(target, RowLayer) else _wrap(target, current_key, parent, config)
        for option, value in (
            ("live", config.kernel == "live"),
            ("frozen_statistics", config.running_statistics == "frozen"),
        ):
            if getattr(layer, option, value) != value:
                raise ValueError(
                    f"the adapters of {current_key!r} must share kernel and running_statistics, and "
                    f"kernel={config.kernel!r}, running_statistics={config.running_statistics!r} differ from "
                    "those of the first; give the same"
                )
        if isinstance(layer, RowLinear) and layer.live and _is_tied(layer.get_base_layer(), self.model):
            raise ValueError(
                f"kernel='live' writes into the weight of {current_key!r}, which another layer shares; "
                "use kernel='additive', or exclude it"
            )
        rows, columns = _positions(layer, current_key, config)
        layer.choose(adapter_name, rows, columns, train_bias=config.train_bias)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Adds the changes to the base weights; a tied weight that has some becomes the layer's own."""
        self._untie()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with the changes in its weights; a tied one that has some becomes its own."""
        self._untie()
        return super().merge_and_unload(*args, **kwargs)

    def _untie(self) -> None:
        for _, layer in row_layers(self.model):
            base: Any = layer.get_base_layer()
            if _is_tied(base, self.model):
                base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)
                if getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
                    self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]

    def unload(self) -> nn.Module:
        """The base model without the adapters."""
        for _, layer in row_layers(self.model):
            if isinstance(layer, RowLinear):
                layer.restore()
        return super().unload()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Adds the adapter whose change is the weighted sum of those of `adapters`; exact, not active.

        Args:
            adapters: names of adapters of this model.
            weights: one for each, of any sign.
            adapter_name: of the sum.

        Raises:
            ValueError: unknown names, a name that is taken, or not as many weights as adapters.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"adapter {name!r} is not in the model{near(name, self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken; delete that adapter or choose another")
        config: Any = copy.copy(self.peft_config[adapters[0]])
        self.peft_config[adapter_name] = config
        for _, layer in row_layers(self.model):
            _combine(layer, adapters, weights, adapter_name)
        update_counts(self.model, config, adapter_name)


def register() -> None:
    """Enters the method into peft's tables; importing `serpette.rows` does it.

    peft's own function for that refuses names that are not in its enum.
    """
    import peft
    from peft import PeftType, mapping

    tables = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": RowConfig,
        "PEFT_TYPE_TO_TUNER_MAPPING": RowModel,
        "PEFT_TYPE_TO_PREFIX_MAPPING": RowModel.prefix,
    }
    for table, value in tables.items():
        getattr(mapping, table)[RowsType.ROWS] = value
    if version.parse(peft.__version__) < version.parse("0.21") and "ROWS" not in PeftType.__members__:
        PeftType._member_map_["ROWS"] = RowsType.ROWS  # type: ignore[assignment] - it saves only members
        PeftType._member_names_.append("ROWS")


def _refuse_other_adapters(model: nn.Module, adapter_name: str) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model is a PeftModel already; add a second adapter with model.add_adapter(name, config), "
            "or start from model.unload() or model.merge_and_unload()"
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, RowLayer):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} of another adapter method; "
                "merge_and_unload() or unload() that one first"
            )
        if isinstance(module, RowLayer) and adapter_name in module._get_available_adapters():
            raise ValueError(
                f"{name!r} has an adapter {adapter_name!r} already; choose another name, "
                "or unload() that one first"
            )


def _take_out(model: nn.Module, adapter: str) -> None:
    for name, layer in row_layers(model):
        if layer._get_available_adapters() <= {adapter}:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        elif adapter in layer._get_available_adapters():
            layer.delete_adapter(adapter)


def _is_tied(layer: nn.Module, model: nn.Module) -> bool:
    """Whether another module of the model has the same weight, as a language model's head often has."""
    return sum(m._parameters.get("weight") is layer.weight for m in model.modules()) > 1


def _check_importance(config: RowConfig) -> None:
    importance = neurons.make(config.importance)
    if importance.needs:
        raise ValueError(
            f"importance={config.importance!r} needs data, which get_peft_model has not; "
            f"leave it at 'magnitude', then call rank_rows(model, loader, {config.importance!r})"
        )


def _targets(model: nn.Module, config: RowConfig) -> list[str] | str:
    """`target_modules`, checked; "all-linear" and "all-layers" become names."""
    wrapped = dict(row_layers(model))
    inside = tuple(f"{name}." for name in wrapped)
    modules = {
        name: wrapped[name].get_base_layer() if name in wrapped else module
        for name, module in model.named_modules()
        if name and not name.startswith(inside)
    }
    targets = config.target_modules
    if targets in ("all-linear", "all-layers"):
        kinds = (RowLinear,) if targets == "all-linear" else (RowLinear, RowConv, RowNorm)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        saved = config.modules_to_save or ()
        found = {
            name
            for name, module in modules.items()
            if layer_class(module) in kinds
            and module is not head
            and not any(f".{name}".endswith(f".{s}") for s in saved)
        }
        targets = sorted(found)
        if not found and config.target_modules == "all-linear":
            raise ValueError(f"{type(model).__name__} has no linear layers; use target_modules='all-layers'")
    elif isinstance(targets, str):
        found = {name for name in modules if re.fullmatch(targets, name)}
    else:
        found = set()
        for target in targets or ():
            matching = {name for name in modules if f".{name}".endswith(f".{target}")}
            if not matching:
                known = {name.split(".")[-1] for name in modules} | (set(modules) if "." in target else set())
                raise ValueError(f"target_modules: nothing is named {target!r}{near(target, known)}")
            found |= matching
    if not found:
        words = {"all-linear", "all-layers", *(name.split(".")[-1] for name in modules)}
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}"
            f"{near(str(config.target_modules), words)}; "
            "name modules, or use 'all-linear' or 'all-layers'"
        )
    for pattern in config.modes if isinstance(config.modes, dict) else ():
        if not any(ends_with(name, pattern) for name in found):
            known = {name.split(".")[-1] for name in found}
            raise ValueError(
                f"modes: {pattern!r} matches none of the modules that train{near(pattern, known)}"
            )
    if config.freeze_attention:
        if not any(ATTENTION.fullmatch(name) for name in modules):
            raise ValueError(
                f"freeze_attention=True, but no module of {type(model).__name__} has attention in its name; "
                "leave it off, or name what to leave out with exclude_modules"
            )
        if all(ATTENTION.fullmatch(name) for name in found):
            raise ValueError("freeze_attention=True leaves nothing of target_modules: all is attention")
    assert targets is not None
    return targets


def _wrap(target: nn.Module, key: str, parent: nn.Module, config: RowConfig) -> RowLayer:
    cls = layer_class(target)
    if cls is None or isinstance(parent, nn.MultiheadAttention):
        kind = type(parent if cls else target).__name__
        raise ValueError(
            f"{key!r}: the rows of a {kind} cannot train; supported are Linear, Conv1d/2d/3d, Embedding, "
            "LayerNorm, RMSNorm, GroupNorm and BatchNorm. Leave it out with exclude_modules"
        )
    if cls is RowLinear:
        return RowLinear(target, live=config.kernel == "live")
    if cls is RowNorm:
        return RowNorm(target, frozen_statistics=config.running_statistics == "frozen")
    return cls(target)


def _positions(layer: RowLayer, key: str, config: RowConfig) -> tuple[Tensor | None, Tensor | None]:
    """The rows and columns to begin with: by an importance without data, or as many as were saved."""
    if config.counts is not None:
        if key not in config.counts:
            raise ValueError(f"the adapter was made for a model without {key!r}, so it does not fit this one")
        rows, columns, neurons, inputs = config.counts[key]
        if (neurons, inputs) != (layer.neurons, layer.inputs):
            raise ValueError(
                f"the adapter was made for {key!r} with {neurons} rows and {inputs} columns, and here it has "
                f"{layer.neurons} and {layer.inputs}; load it onto the model it was made from"
            )
        return (torch.arange(rows) if rows else None), (torch.arange(columns) if columns else None)
    mode = config.mode_of(key)
    if layer.no_columns and mode != "rows":
        if not isinstance(config.modes, str):
            raise ValueError(
                f"modes give {key!r} {mode!r}, but its columns cannot train: {layer.no_columns}; "
                "give it 'rows', or exclude it"
            )
        mode = "rows"  # a norm among "all-layers"
    rows = columns = None
    base = layer.get_base_layer()
    if mode != "columns":
        count = config.count(layer.neurons, key)
        rows = initial_rows(base, count, config.importance, config.seed, name=key)
    if mode != "rows":
        count = config.count(layer.inputs, key)
        columns = initial_rows(base, count, config.importance, config.seed, columns=True, name=key)
    return rows, columns


def _combine(layer: RowLayer, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Gives `layer` the adapter `name`: the union of their rows and columns, with the weighted changes."""
    have = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer._get_available_adapters()]
    if not have:
        return
    union: list[Any] = []
    for held in (layer.rows_index, layer.rows_column_index):
        indices = [held[a] for a, _ in have if a in held]
        union.append(torch.cat(indices).unique() if indices else None)
    bias = any(a in layer.rows_bias for a, _ in have)
    layer.choose(name, *union, train_bias=bias)
    dtype = torch.promote_types(*(layer._dtype_and_grad(a)[0] for a in (have[0][0], have[-1][0])))
    with torch.no_grad():
        delta = sum(w * layer.get_delta_weight(a).to(dtype) for a, w in have)
        assert isinstance(delta, Tensor)
        delta, (rows, columns) = layer.neuron_first(delta), union
        if columns is not None:
            layer.rows_columns[name].data = delta.index_select(1, columns)
            if rows is not None:
                layer.rows_columns[name].index_fill_(0, rows, 0)
        if rows is not None:
            layer.rows_weight[name].data = delta.index_select(0, rows)
            for a, w in have:
                if a in layer.rows_bias:
                    place = torch.searchsorted(rows, layer.rows_index[a])
                    layer.rows_bias[name].index_add_(0, place, (w * layer.rows_bias[a]).to(dtype))
    for held in (layer.rows_weight, layer.rows_bias, layer.rows_columns):
        if name in held:
            held[name].requires_grad_(False)
