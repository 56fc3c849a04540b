"""A row or column adapter is a LoRA adapter: exported, stock peft and every server of LoRA run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..registry import near
from .layer import RowLayer, row_layers
from .layers import RowConv, RowEmbedding, RowNorm


def to_lora(model: PeftModel, folder: str | Path, adapter: str = "default") -> Path:
    r"""Writes `adapter` as a LoRA adapter of the same change, exactly.

    Rows: B (O, r) is one-hot, A the trained rows. Columns: A (c, I) is one-hot, B the trained
    columns. Both: one after the other. The scale is 1. Trained biases become LoRA biases; trained norms,
    `modules_to_save` and (beside trained biases, where peft allows no LoRA) embeddings are saved whole.

    Args:
        model: as `get_peft_model(model, RowConfig(...))` made it.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.
        adapter: its name.

    Returns:
        `folder`.

    Raises:
        ValueError: an adapter that the model does not have, or one that trains what LoRA cannot express:
            columns of a convolution, a grouped or dilated one, norms alone.

    Example:
        >>> import tempfile
        >>> from peft import PeftModel, get_peft_model
        >>> from torch import nn
        >>> from serpette.rows import RowConfig, to_lora
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = get_peft_model(net, RowConfig(r=2, target_modules=["0"]))
        >>> folder = to_lora(model, tempfile.mkdtemp())
        >>> type(PeftModel.from_pretrained(model.unload(), folder).peft_config["default"]).__name__
        'LoraConfig'
    """
    if adapter not in model.peft_config:
        raise ValueError(f"adapter {adapter!r} is not in the model{near(adapter, model.peft_config)}")
    config: Any = model.peft_config[adapter]
    ranks: dict[str, int] = {}
    whole = [n for n, m in model.get_base_model().named_modules() if _ends_with(n, config.modules_to_save)]
    tensors = {f"base_model.model.{k}": v for k, v in _saved_whole(model, adapter, whole).items()}
    layers = [(n, layer) for n, layer in row_layers(model) if adapter in layer._get_available_adapters()]
    has_bias = any(adapter in layer.rows_bias for _, layer in layers if not isinstance(layer, RowNorm))
    for name, layer in layers:
        key = f"base_model.model.{name}"
        if isinstance(layer, RowNorm) or (has_bias and isinstance(layer, RowEmbedding)):  # peft: not both
            whole.append(name)
            tensors |= {f"{key}.{k}": v for k, v in _whole(layer, adapter).items()}
            continue
        A, B = _factors(name, layer, adapter)
        ranks[name] = len(A)
        if isinstance(layer, RowEmbedding):
            tensors |= {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
            continue
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        if has_bias:
            tensors[f"{key}.lora_B.bias"] = _bias(layer, adapter)
    if not ranks:
        raise ValueError(f"adapter {adapter!r} trains norms only, and LoRA has no place for them alone")
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules="|".join(re.escape(name) for name in ranks),
        lora_bias=has_bias,
        fan_in_fan_out=any(getattr(layer, "transposed", False) for _, layer in layers),
        modules_to_save=whole or None,
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    return folder


def _ends_with(name: str, suffixes: list[str] | None) -> bool:
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes or ())


def _saved_whole(model: PeftModel, adapter: str, names: list[str]) -> dict[str, Tensor]:
    base = model.get_base_model()
    found: dict[str, Tensor] = {}
    for name in names:
        module: Any = base.get_submodule(name)
        found |= {f"{name}.{k}": v for k, v in module.modules_to_save[adapter].state_dict().items()}
    return found


@torch.no_grad()
def _whole(layer: RowLayer, adapter: str) -> dict[str, Tensor]:
    """The state of the base layer with the changes in it."""
    state = {k: v.clone() for k, v in layer.get_base_layer().state_dict().items()}
    layer._add_changes(state["weight"], adapter, 1)
    if adapter in layer.rows_bias:
        change = layer.rows_bias[adapter].to(state["bias"].dtype)
        state["bias"].index_add_(0, layer.rows_index[adapter], change)
    return state


def _bias(layer: RowLayer, adapter: str) -> Tensor:
    bias = torch.zeros(layer.neurons, dtype=layer._dtype_and_grad(adapter)[0])
    if adapter in layer.rows_bias:
        bias[layer.rows_index[adapter].cpu()] = layer.rows_bias[adapter].detach().cpu()
    return bias


def _factors(name: str, layer: RowLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (r, f, ...) and B (n, r, ...) whose product is the change."""
    A, _, rows, B, columns = (None if c is None else c.detach().cpu() for c in layer.changes(adapter))
    kernel: tuple[int, ...] = ()
    if isinstance(layer, RowConv):
        base = layer.get_base_layer()
        if base.groups > 1 or set(base.dilation) != {1} or base.padding_mode != "zeros" or B is not None:
            raise ValueError(
                f"{name!r}: LoRA in peft cannot express trained columns of a convolution, nor rows of one "
                "with groups, dilation or another padding than zeros; use merge_and_unload() instead"
            )
        kernel = (1,) * len(base.kernel_size)
    parts = []
    if A is not None:
        assert rows is not None
        parts.append((A, nn.functional.one_hot(rows, layer.neurons).t().to(A.dtype)))
    if B is not None:
        assert columns is not None
        parts.append((nn.functional.one_hot(columns, layer.inputs).to(B.dtype), B))
    A, B = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
    if isinstance(layer, RowEmbedding):  # there the change is (B A)^T
        return B.t(), A.t()
    return A, B.view(*B.shape, *kernel)
