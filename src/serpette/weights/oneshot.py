"""Prunes a model once, without training: by its weights alone, or by what some batches of data show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .layers import pruned_layers
from .patterns import NM, pattern_of
from .pruner import Pruner


def prune(
    model: nn.Module,
    importance: Any = "magnitude",
    sparsity: float = 0.5,
    *,
    loader: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    example_inputs: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Pruner:
    """Removes weights of `model`, in place.

    Args:
        model: plain, or with LoRA: then the masks hold in the merged model.
        importance: see `PruneConfig`; `"obs"` (SparseGPT) also moves the weights that stay.
        sparsity: share that is removed, in [0, 1).
        loader: batches: mappings of arguments of the model, or tuples. Needed unless the importance looks at
            the weights alone. A few hundred examples are usual; 128 in Wanda and SparseGPT, 10 in LLM-Pruner.
        loss: (model, batch) -> scalar. Default: `.loss` of the model's output.
        example_inputs: see `Pruner`.
        progress: a bar over the batches.
        **settings: of `PruneConfig`, such as `pattern`, `scope`, `exclude`.

    Returns:
        The Pruner, for its `masks_`, `sparsity_` and `save`.

    Raises:
        ValueError: see `Pruner`; a loader that is missing or empty, a model without a loss.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune(net, "magnitude", 0.25).sparsity_
        {'0': 0.25}
        >>> batches = [(torch.randn(16, 8),)]
        >>> prune(net, "obs", 0.5, loader=batches, progress=False).sparsity_
        {'0': 0.5}
    """
    config = PruneConfig(importance, sparsity, schedule="one_shot", start=0.0, end=0.0, every_k=1, **settings)
    method = config.method()
    if method.weight_needs and loader is None:
        raise ValueError(f"importance {method.name!r} needs data; give loader=, some batches of examples")
    if "hessian" in method.weight_needs:
        return _reconstruct(model, config, method, loader, progress)
    pruner = Pruner(config, example_inputs=example_inputs).begin(model, 1)
    pruner.step_ = 1
    backward = bool(method.weight_needs - {"input_norms"})
    asked: list[Any] = [layer.base.weight for layer in pruner.layers if not layer.lora and backward]
    before = [weight.requires_grad for weight in asked]
    try:
        for weight in asked:
            weight.requires_grad_(True)
        for number, batch in enumerate(_batches(loader, progress) if method.weight_needs else (), 1):
            with torch.set_grad_enabled(backward):
                value = (loss or _loss)(model, batch) if backward else _run(model, batch)
            if backward:
                value.backward()
                pruner.score(decay=1 - 1 / number)
                model.zero_grad()
        pruner.cut(sparsity)
    finally:
        for weight, grad in zip(asked, before, strict=True):
            weight.requires_grad_(grad)
        pruner.finish()
    return pruner


@torch.no_grad()
def _reconstruct(model: nn.Module, config: PruneConfig, method: Any, loader: Any, progress: bool) -> Pruner:
    """SparseGPT: each layer by the inputs that it has in the unpruned model."""
    if config.pattern == "structured" or config.scope != "layer":
        raise ValueError(
            "importance 'obs' prunes single weights layer by layer; leave pattern and scope alone"
        )
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(
            "importance 'obs' moves the weights that stay; merge the LoRA first: merge_and_unload()"
        )
    layers = pruned_layers(model, config.targets, config.exclude)
    pattern = pattern_of(config.pattern)
    pattern.check(config.sparsity, {layer.name: layer.shape for layer in layers})
    for layer in layers:
        layer.watch_products()
    for batch in _batches(loader, progress):
        _run(model, batch)
    nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
    for layer in layers:
        assert layer.products is not None
        weight, cut = method.reconstruct(layer.weight(), 2 * layer.products, config.sparsity, nm)
        layer.frozen().copy_(weight)
        layer.remove(cut)
        layer.release()
    pruner = Pruner(config)
    pruner._layers = {layer.name: layer for layer in layers}
    pruner.history_ = [(1, config.sparsity)]
    return pruner


def _batches(loader: Any, progress: bool) -> Iterator[Any]:
    from rich.progress import track

    batch = None
    total = len(loader) if hasattr(loader, "__len__") else None
    for batch in track(loader, "reading", total, disable=not progress, transient=True):
        yield batch
    if batch is None:
        raise ValueError("loader has no batch; give some batches of examples")


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    value = getattr(_run(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        raise ValueError(f"{type(model).__name__} gives no .loss for a batch; give labels with it, or loss=")
    return value
