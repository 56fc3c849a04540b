r"""Sequential LoRA: the low-rank matrices stand before the layer, not beside it.

    y = (x + s x A^T B^T) W0^T,   so W = W0 + s (W0 B) A:   a parallel LoRA with B_eff = W0 B

Letters: W0 (O, I), A (r, I), B (I, r). LoRAPrune 2023, arXiv 2305.18403, Eq. 2, in torch's convention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..lora_gradients import lora_layers
from .masked import MaskedLora, masked_class


def sequential(model: nn.Module) -> nn.Module:
    """`model` with its LoRA turned sequential, in place: `lora_B` becomes (I, r), zero at the start.

    It trains, prunes (`serpette.Pruner("lora_prune_seq", ...)`) and merges like any other LoRA. Its adapter
    file has another shape than peft's: turn a fresh model sequential before loading it, or `to_parallel`
    before saving.

    Args:
        model: a peft LoRA model on linear layers that has not been trained (B = 0).

    Raises:
        ValueError: a trained LoRA, dropout, a convolution or a quantised layer.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
    >>> sequential(net).base_model.model[0].lora_B["default"].weight.shape
    torch.Size([6, 2])
    """
    layers = lora_layers(model)
    found: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    for layer, module in zip(layers, found, strict=True):
        base, B = module.get_base_layer(), module.lora_B[module.active_adapters[0]].weight
        if isinstance(base, nn.Conv2d) or not base.weight.is_floating_point():
            raise ValueError(
                f"{layer.name!r} is {'a convolution' if isinstance(base, nn.Conv2d) else 'quantised'}; "
                "a sequential LoRA needs a plain linear layer: leave it out of target_modules"
            )
        if bool(B.detach().any()):
            raise ValueError(
                f"the LoRA of {layer.name!r} has been trained (B is not zero); "
                "turn it sequential right after get_peft_model"
            )
        check_dropout(layer.name, module)
    for module in found:
        name = module.active_adapters[0]
        B, inputs = module.lora_B[name].weight, module.lora_A[name].weight.shape[1]
        new = nn.Linear(B.shape[1], inputs, bias=False, device=B.device, dtype=B.dtype)
        nn.init.zeros_(new.weight)
        module.lora_B[name] = new
        module.__class__ = masked_class(type(module))
        module.sequential = True
    return model


def to_parallel(model: nn.Module) -> nn.Module:
    """The sequential LoRA of `model` as peft's own, in place: B becomes W0 B, the outputs stay.

    Raises:
        ValueError: no sequential LoRA.
    """
    found = [m for m in model.modules() if isinstance(m, MaskedLora) and m.sequential]
    if not found:
        raise ValueError(f"{type(model).__name__} has no sequential LoRA")
    for module in found:
        _to_parallel(module)
    return model


@torch.no_grad()
def _to_parallel(module: Any) -> None:
    old = module.lora_B[module.adapter()]
    weight = module.frozen().to(old.weight.dtype) @ old.weight
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    new.weight.copy_(weight)
    module.lora_B[module.adapter()] = new
    module.sequential = False
    module.zero_cut()


def check_dropout(name: str, module: Any) -> None:
    """Refuses a LoRA layer with dropout."""
    rate = max((getattr(m, "p", 0.0) for m in module.lora_dropout.values()), default=0.0)
    if rate:
        raise ValueError(
            f"lora_dropout={rate} of {name!r} must be 0: the merged layer that is masked has no dropout; "
            "make the LoRA with LoraConfig(lora_dropout=0.0)"
        )
