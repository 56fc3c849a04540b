"""Pooled features and logits of any classifier, encoder or plain module, read off one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Features = str | Callable[[nn.Module, dict[str, Tensor]], Tensor] | None


def find_head(model: nn.Module) -> nn.Linear | None:
    """The last Linear of a classifier; None for a bare transformers backbone or a module without one."""
    if getattr(model, "base_model_prefix", None) and getattr(model, "base_model", None) is model:
        return None
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    return linears[-1] if linears else None


class Reader:
    """Runs `model` on a batch: gives features (n, D) and logits (n, C) or None, float32 on the CPU.

    The features are the input of the classification head (the mean over tokens that are attended if
    it has a token axis), or the pooled output of a backbone without a head. `features` overrides
    that: the name of a module, whose input is taken, or `f(model, inputs) -> (n, D)`.

    Raises:
        ValueError: a model without features, a module name that does not exist.
    """

    def __init__(self, model: nn.Module, features: Features = None):
        self.model, self.features = model, features
        self.head = find_head(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self._tapped: Tensor | None = None
        self.is_transformers = hasattr(model, "config") and hasattr(model, "base_model_prefix")
        self.tap = self.head
        if isinstance(features, str):
            modules = dict(model.named_modules())
            if features not in modules:
                from ..registry import near

                raise ValueError(
                    f"features={features!r} is not a module of the model{near(features, modules)}"
                )
            self.tap = modules[features]
        if self.tap is None and not callable(features) and not self.is_transformers:
            raise ValueError(
                f"{type(model).__name__} has no Linear layer whose input could serve as features; "
                "name a module with features='name', or give features=lambda model, inputs: ..."
            )

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 if there is none."""
        return self.head.out_features if self.head is not None else 0

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        inputs = {name: self._fitting(value) for name, value in inputs.items()}
        if callable(self.features):
            return self.features(self.model, inputs).float().cpu(), None
        handle = self.tap.register_forward_pre_hook(self._record) if self.tap is not None else None
        try:
            output = call(self.model, inputs)
        finally:
            if handle is not None:
                handle.remove()
        mask = inputs.get("attention_mask")
        if self.tap is None:
            pooled, logits = _pooled_output(output, is_text="input_ids" in inputs), None
        else:
            assert self._tapped is not None, "the head was not reached by the forward pass"
            pooled, self._tapped = self._tapped, None
            logits = output if torch.is_tensor(output) else getattr(output, "logits", None)
        if pooled.ndim == 3:
            pooled = _mean_tokens(pooled, mask)
        logits = logits.float().cpu() if self.head is not None and torch.is_tensor(logits) else None
        return pooled.flatten(1).float().cpu(), logits

    def _fitting(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tapped = args[0].detach()


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """`model` on `inputs`; a single tensor goes in by position, whatever a plain module calls it."""
    if set(inputs) == {"x"} or (len(inputs) == 1 and not hasattr(model, "config")):
        return model(*inputs.values())
    return model(**inputs)


def accepted_names(model: nn.Module) -> set[str] | None:
    """The inputs that `model.forward` names, as the Trainer reads them; None for a module that names none."""
    inner = getattr(model, "get_base_model", lambda: model)()
    if not hasattr(inner, "config"):
        return None
    parameters = inspect.signature(inner.forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _pooled_output(output: Any, is_text: bool) -> Tensor:
    if not is_text and getattr(output, "pooler_output", None) is not None:
        return output.pooler_output  # vision: CLS after the norm, or the pooled map of a CNN
    return output.last_hidden_state  # text: mean over the tokens, as sentence encoders are used


def _mean_tokens(hidden_nTD: Tensor, mask_nT: Tensor | None) -> Tensor:
    if mask_nT is None or mask_nT.shape != hidden_nTD.shape[:2]:
        return hidden_nTD.mean(1)
    weight_nT1 = mask_nT.to(hidden_nTD.dtype)[..., None]
    return (hidden_nTD * weight_nT1).sum(1) / weight_nT1.sum(1).clamp(min=1)
