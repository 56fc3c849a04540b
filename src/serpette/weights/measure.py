"""What a model costs, and whether a pruned one is really faster: parameters, FLOPs, bytes, measured seconds.

Zeros in a dense weight make nothing faster, and a time measured now and one measured before differ by
whatever else the machine did. So two models are run in turns, and one is called faster only where the
interval of the ratio of their times excludes 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import call, forward_flops
from .layers import PrunedLayer, pruned_layers
from .packed import sizes_of

CONFIDENCE = 0.95
LEAST_RUNS = 6  # the fewest of which an interval of the median at 95 % exists


def cost_of(
    model: nn.Module,
    example_inputs: Callable[[int], Any],
    batch_sizes: Sequence[int] = (1, 8, 32),
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Size and speed of a model.

    Args:
        model: as it is used: a LoRA must have been merged (`merge_and_unload()`). Run in evaluation mode and
            without gradients, where it stands; then set back.
        example_inputs: gives the inputs of a batch of the size that it is called with, on the model's device:
            a dict (keyword arguments), a tuple (positional) or one tensor.
        batch_sizes: that are timed. 1 shows latency, 32 throughput.
        seconds: spent timing each batch size, at least; never fewer than 6 runs, after 2 to warm up.

    Returns:
        `parameters` and `nonzero_parameters`; `prunable_weights` and `nonzero_prunable_weights`, of linear
        layers and convolutions but the head; `flops_per_example`, in which zeros count like other numbers;
        `file_bytes` and `packed_bytes` (see `serpette.weights.packed`); `latency_seconds`, the median by
        batch size, and `examples_per_second`.

    Raises:
        ValueError: when a LoRA is not merged, or no layer could be pruned.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> cost = cost_of(model, lambda batch: torch.zeros(batch, 4), batch_sizes=[1], seconds=0)
        >>> cost["parameters"], cost["prunable_weights"], cost["flops_per_example"], cost["file_bytes"]
        (58, 32, 96, 232)
    """
    timed = {size: seconds_in_turns([model], example_inputs(size), seconds)[0] for size in batch_sizes}
    return _static_cost(model, example_inputs) | _times(timed)


def compare_cost(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Callable[[int], Any],
    batch_sizes: Sequence[int] = (1, 8, 32),
    seconds: float = 2.0,
) -> dict[str, Any]:
    """The costs of two models, timed in turns on the same inputs, and what the second gains.

    Args:
        before, after, example_inputs, batch_sizes: as in `cost_of`.
        seconds: spent timing each batch size, both models together, at least.

    Returns:
        `before` and `after` as from `cost_of`, and for each batch size in `speed`: `time_ratio` (after /
        before, the median over the pairs of neighbouring runs), `interval` (of that median at 95 %, from the
        order statistics, so without an assumption about the noise) and `faster`: True where the interval lies
        below 1, False where it lies above, None where it holds 1 and nothing can be said.

    Raises:
        ValueError: as `cost_of`.

    Example:
        >>> big, small = (nn.Sequential(nn.Linear(64, n), nn.Linear(n, 2)) for n in (2048, 8))
        >>> gain = compare_cost(big, small, lambda batch: torch.zeros(batch, 64), [32], seconds=0.1)
        >>> gain["speed"][32]["faster"]
        True
    """
    pairs = {size: seconds_in_turns([before, after], example_inputs(size), seconds) for size in batch_sizes}
    speed = {}
    for size, (old, new) in pairs.items():
        ratios = [n / o for n, o in zip(new, old, strict=True)]
        low, high = median_interval(ratios)
        faster = True if high < 1 else False if low > 1 else None
        speed[size] = {"time_ratio": median(ratios), "interval": (low, high), "faster": faster}
    costs = [
        _static_cost(model, example_inputs) | _times({size: runs[i] for size, runs in pairs.items()})
        for i, model in enumerate((before, after))
    ]
    return {"before": costs[0], "after": costs[1], "speed": speed}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval between two of the values that holds the median of their distribution at 95 % or more.

    Of n independent values the number below the median is binomial(n, 1/2), whatever the distribution.

    Raises:
        ValueError: with fewer than 6 values, of which no such interval exists.

    >>> median_interval([5, 1, 4, 2, 3, 6])
    (1, 6)
    """
    n = len(values)
    if n < LEAST_RUNS:
        raise ValueError(f"{n} values have no interval of the median at 95 %; give {LEAST_RUNS} or more")
    outside, skipped = 0.0, 0
    while True:  # how many values can be left out at each end
        outside += 2 * math.comb(n, skipped) / 2**n
        if outside > 1 - CONFIDENCE:
            break
        skipped += 1
    ordered = sorted(values)
    return ordered[skipped - 1], ordered[n - skipped]


def sparsity_by_layer(model: nn.Module) -> dict[str, float]:
    """Share of zeros in the weight of each layer that can be pruned, by name.

    Raises:
        ValueError: when a LoRA is not merged, or no layer could be pruned.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[0].weight.data = torch.eye(2)
    >>> sparsity_by_layer(model)
    {'0': 0.5}
    """
    return {
        layer.name: 1 - int(torch.count_nonzero(layer.frozen())) / layer.frozen().numel()
        for layer in _prunable(model)
    }


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    layers: Sequence[str] | None = None,
    importances: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The metric with one layer pruned at a time: which layers can lose many weights, and which cannot.

    Each layer's least important weights are zeroed, `evaluate` is called, and the weights are put back
    exactly, also when it raises. It costs one evaluation a layer and sparsity.

    Args:
        model: changed while this runs; a LoRA must have been merged.
        evaluate: gives the metric of the model; must give the same for the same weights.
        sparsities: shares of a layer's weights that are removed, each in [0, 1).
        layers: names of the layers; default: all that can be pruned.
        importances: (O, I) of each layer by name, high = keep; default: the magnitude of the weights.

    Returns:
        `unpruned`, the metric of the model as it is, and `layers`: {name: {sparsity: metric}}.

    Raises:
        ValueError: an unknown layer, a layer without importance, or as `cost_of`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found = sensitivity(model, lambda m: float(m[0].weight.count_nonzero()), sparsities=[0.5])
        >>> found["unpruned"], found["layers"]
        (6.0, {'0': {0.5: 3.0}})
    """
    from ..registry import near
    from .patterns import Unstructured

    known = {layer.name: layer for layer in _prunable(model)}
    for name in layers or ():
        if name not in known:
            raise ValueError(f"layers: unknown layer {name!r}{near(name, known)}")
    result: dict[str, Any] = {"unpruned": float(evaluate(model)), "layers": {}}
    for name in layers or known:
        weight = known[name].frozen()
        if importances is not None and name not in importances:
            raise ValueError(f"importances has no layer {name!r}; give it, or leave it out of layers")
        importance = weight.abs() if importances is None else importances[name]
        original, metrics = weight.clone(), {}
        for sparsity in sparsities:
            cut = Unstructured()({name: importance}, {}, sparsity)[name]
            try:
                weight.masked_fill_(cut.to(weight.device), 0)
                metrics[sparsity] = float(evaluate(model))
            finally:
                weight.copy_(original)
        result["layers"][name] = metrics
    return result


def _prunable(model: nn.Module) -> list[PrunedLayer]:
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("the model has a LoRA beside its weights; merge it first: merge_and_unload()")
    return pruned_layers(model)


def _static_cost(model: nn.Module, example_inputs: Callable[[int], Any]) -> dict[str, Any]:
    weights, sizes = [layer.frozen() for layer in _prunable(model)], sizes_of(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in model.parameters()),
        "prunable_weights": sum(w.numel() for w in weights),
        "nonzero_prunable_weights": sum(int(torch.count_nonzero(w)) for w in weights),
        "flops_per_example": forward_flops(model, example_inputs(1)),
        "file_bytes": sizes.dense_bytes,
        "packed_bytes": sizes.packed_bytes,
    }


def _times(runs: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    latency = {size: median(seconds) for size, seconds in runs.items()}
    return {
        "latency_seconds": latency,
        "examples_per_second": {size: size / seconds for size, seconds in latency.items()},
    }


def seconds_in_turns(
    models: Sequence[nn.Module], inputs: Any, seconds: float = 0.0, runs: int = LEAST_RUNS
) -> list[list[float]]:
    """Seconds of each run of each model; who begins a turn alternates, so that a drift favours none.

    Args:
        models: run in evaluation mode, without gradients, 2 times to warm up, then in turns.
        inputs: as for `serpette.cost.forward_flops`.
        seconds, runs: at least so long, and so many runs of each model.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    taken: list[list[float]] = [[] for _ in models]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
                for _ in range(2):
                    _run(model, inputs)
            begin = time.perf_counter()
            while len(taken[0]) < runs or time.perf_counter() - begin < seconds:
                order = range(len(models)) if len(taken[0]) % 2 == 0 else reversed(range(len(models)))
                for i in order:
                    taken[i].append(_run(models[i], inputs))
    finally:
        for module, mode in modes:
            module.training = mode
    return taken


def _run(model: nn.Module, inputs: Any) -> float:
    cuda = next((p.device for p in model.parameters() if p.is_cuda), None)
    if cuda is not None:
        torch.cuda.synchronize(cuda)
    start = time.perf_counter()
    call(model, inputs)
    if cuda is not None:
        torch.cuda.synchronize(cuda)
    return time.perf_counter() - start
