"""What cutting heads and channels would do to a model that is not tuned yet: size, speed, and what is lost.

    loss(s)        = quality of a fresh head on h - quality of a fresh head on h_s, in points
    sensitivity(l) = sum_n || h_l,n - h_n ||^2 / sum_n || h_n - mean h ||^2

h are the pooled features of the dense model, h_s those at sparsity s, h_l those with layer l alone cut. Of a
causal language model both are rises of the mean response loss, in nats.
Letters: N examples, D features, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.features import Reader
from ..data.language import LanguageReader
from ..data.observe import evaluating
from ..evaluate import paired_difference
from ..types import Task, uniform_of
from ..weights import find_groups, prune, shrink
from ..weights.measure import LEAST_RUNS, compare_cost, sensitivity, sparsity_by_layer
from .head import cross_fitted

Read = Callable[[list[int]], dict[str, Tensor]]
TIMED_SHARE = 0.5  # of the seconds, for timing
TIMED_SECONDS = 3.0  # a batch size, both models together: more tells no more
TIMED_RUNS = 2 * (LEAST_RUNS + 2)  # the fewest forward passes of a comparison


@dataclass(frozen=True)
class Cut:
    """The model with one share of its heads and channels removed in one shot, not tuned afterwards.

    Attributes:
        sparsity: share that was asked for; widths are rounded to what the model's configuration can say.
        parameters, file: shares that are left.
        timings: {"batch_size", "speedup", "low", "high"} against the dense model.
        outputs: (N, D) pooled features; of a causal language model (N, 2) response losses in nats and tokens.
    """

    sparsity: float
    parameters: float
    file: float
    timings: list[dict[str, Any]]
    outputs: Tensor


def cuts(
    model: nn.Module,
    read: Read,
    n: int,
    *,
    task: Task,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    batch_size: int = 16,
    batch_sizes: Sequence[int] = (1, 8),
    seconds: float = 60.0,
    importance: str = "magnitude",
) -> list[Cut]:
    """The model at each of `sparsities`, made smaller, timed against the dense one and read on `n` examples.

    Args:
        model: without adapters; left as it is.
        read: positions in 0 .. n - 1 -> inputs of the model; with `labels` for a causal language model.
        n: examples whose outputs are taken; some hundreds for a classification.
        sparsities: each in [0, 1), in the order in which they matter.
        batch_size: examples read at a time.
        batch_sizes: that are timed: 1 shows latency. A larger one is left out where it takes too long.
        seconds: the first sparsity is always done; another one only if as much time is left as the one before
            took. Half of it is meant for timing, at most 3 s a batch size.
        importance: by what heads and channels are chosen, a name of `serpette.importance.weights`;
            `"magnitude"` needs no pass over the data.

    Raises:
        ValueError: the model has no heads or channels that are known or can be traced, and why.

    Example:
        >>> from serpette.zoo import tiny
        >>> images = torch.rand(4, 3, 32, 32)
        >>> read = lambda positions: {"pixel_values": images[positions]}
        >>> cut = cuts(tiny("vit"), read, 4, task="classification", sparsities=[0.5], seconds=1)[0]
        >>> round(cut.parameters, 2), cut.outputs.shape
        (0.65, torch.Size([4, 32]))
    """
    start, found, last = perf_counter(), [], 0.0
    one = _given(model, read([0]))
    if not find_groups(model, example_inputs=one):
        raise ValueError(f"{type(model).__name__} has no heads or channels that could be cut")
    for sparsity in sparsities:
        begin = perf_counter()
        if found and begin - start + last > seconds:
            break
        pruned = copy.deepcopy(model)
        masks = prune(
            pruned,
            importance,
            sparsity,
            pattern="structured",
            loader=(_on_device(model, read(picks)) for picks in _picks(n, batch_size)),
            example_inputs=one,
            progress=False,
        ).masks_
        smaller = not all(bool(mask.all()) for mask in masks.values())
        small = shrink(pruned, masks, example_inputs=one) if smaller else model
        del pruned
        reading = perf_counter()
        outputs = outputs_of(small, read, n, task=task, batch_size=batch_size)
        each = (perf_counter() - reading) / n
        share = TIMED_SHARE * seconds / len(sparsities) / len(batch_sizes)
        sizes = [size for size in batch_sizes if size == batch_sizes[0] or TIMED_RUNS * size * each <= share]
        shares, timings = _compared(model, small, read, n, sizes, min(share, TIMED_SECONDS))
        found.append(Cut(sparsity, *shares, timings, outputs))
        last = perf_counter() - begin
    return found


def _compared(
    model: nn.Module, small: nn.Module, read: Read, n: int, sizes: Sequence[int], seconds: float
) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    if small is model:
        return (1.0, 1.0), [{"batch_size": size, "speedup": 1.0, "low": 1.0, "high": 1.0} for size in sizes]

    def inputs(size: int) -> Any:
        return _given(model, read([place % n for place in range(size)]))

    found = compare_cost(model, small, inputs, sizes, seconds)
    before, after = found["before"], found["after"]
    timings = [
        {
            "batch_size": size,
            "speedup": 1 / speed["time_ratio"],
            "low": 1 / speed["interval"][1],
            "high": 1 / speed["interval"][0],
        }
        for size, speed in found["speed"].items()
    ]
    shares = (after[key] / before[key] for key in ("parameters", "file_bytes"))
    return tuple(shares), timings  # type: ignore[return-value] - two of them


def outputs_of(model: nn.Module, read: Read, n: int, *, task: Task, batch_size: int = 16) -> Tensor:
    """(N, D) pooled features of examples 0 .. n - 1, float32 on the CPU; causal LM: (N, 2) losses, tokens."""
    causal = task == "causal-lm"
    reader = LanguageReader(model) if causal else Reader(model)
    parts = []
    with evaluating(model), torch.no_grad():
        for picks in _picks(n, batch_size):
            inputs = read(picks)
            if not causal:
                inputs = {name: value for name, value in inputs.items() if name != "labels"}
            features, losses = reader(inputs)
            parts.append(losses if causal else features)
    return torch.cat(parts)


def predicted_losses(
    cuts: Sequence[Cut],
    dense_outputs: Tensor,
    labels: Tensor | None,
    num_classes: int,
    *,
    task: Task,
    seed: int = 0,
) -> list[tuple[float, float, float]]:
    """(loss, low, high) of each cut against the dense model, paired over the examples, with 95 % intervals.

    Points of accuracy, or 100 x R^2: of a head fitted on other examples than it is judged on, on the features
    of the cut model and of the dense one. The rise of the mean response loss in nats of a causal language
    model. Nothing was tuned after the cut: tuning recovers a part of the loss, so this is an upper estimate.

    Args:
        dense_outputs: of the same examples in the same order, as `outputs_of` gives them.
        labels: (N,) classes or numbers; None for a causal language model.
        num_classes: 0 in a regression.
        seed: of the folds, the same for all.

    Raises:
        ValueError: as `serpette.evaluate.paired_difference`.

    >>> dense = torch.tensor([[2.0, 5], [3.0, 5], [2.5, 5]])
    >>> cut = Cut(0.5, 0.6, 0.6, [], dense + torch.tensor([1.0, 0]))
    >>> predicted_losses([cut], dense, None, 0, task="causal-lm")
    [(1.0, 1.0, 1.0)]
    """

    def quality(outputs: Tensor) -> Tensor:
        """Each example's part of the metric, of which more is better."""
        if task == "causal-lm":
            return -outputs[:, 0].double()
        assert labels is not None
        fitted = cross_fitted(outputs, labels, num_classes, seed=seed)
        if num_classes:
            return (fitted.argmax(1) == labels).double()
        return 1 - (fitted[:, 0] - labels).double() ** 2 / labels.double().var(correction=0)

    dense, unit = quality(dense_outputs), 1 if task == "causal-lm" else 100
    found = []
    for cut in cuts:
        loss, low, high = paired_difference(dense, quality(cut.outputs))
        found.append((unit * loss, unit * low, unit * high))
    return found


def sensitivities(
    model: nn.Module,
    read: Read,
    n: int,
    *,
    task: Task,
    batch_size: int = 16,
    sparsity: float = 0.5,
    seconds: float = 30.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How much it matters to cut one layer alone: {"name", "losses": {str(sparsity): value}} of each layer.

    Single weights go, the least by magnitude. The value is the share of the variance of the pooled features
    that changes, which means something before a head is tuned; of a causal language model the rise of the
    mean response loss in nats.

    Args:
        model: without adapters; left as it is.
        read, task, batch_size: as for `cuts`.
        n: examples that are looked at, two or more; a few batches are enough.
        sparsity: share of a layer's weights, in [0, 1).
        seconds: where the layers would take longer, as many as fit are drawn by `seed`, one at least.

    Raises:
        ValueError: no layer can be pruned.
    """
    batches = [read(picks) for picks in _picks(n, batch_size)]

    def outputs(network: nn.Module) -> Tensor:
        return outputs_of(
            network, lambda picks: batches[picks[0] // batch_size], n, task=task, batch_size=batch_size
        )

    model = copy.deepcopy(model)
    start = perf_counter()
    dense = outputs(model)
    fit = int(seconds / (perf_counter() - start)) - 2
    spread = (dense - dense.mean(0)).square().sum()

    def change(network: nn.Module) -> float:
        if task == "causal-lm":
            return float((outputs(network) - dense)[:, 0].mean())
        return float((outputs(network) - dense).square().sum() / spread)

    layers = list(sparsity_by_layer(model))
    drawn = uniform_of(np.array(layers), seed).argsort()[: max(1, fit)].sort().values.tolist()
    found = sensitivity(model, change, [sparsity], [layers[i] for i in drawn])["layers"]
    return [{"name": name, "losses": {f"{sparsity:g}": by[sparsity]}} for name, by in found.items()]


def _picks(n: int, batch_size: int) -> Iterator[list[int]]:
    for first in range(0, n, batch_size):
        yield list(range(first, min(first + batch_size, n)))


def _on_device(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _given(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """What the model reads to give outputs without a loss; one tensor for a plain module."""
    inputs = {name: value for name, value in _on_device(model, inputs).items() if name != "labels"}
    return next(iter(inputs.values())) if len(inputs) == 1 and not hasattr(model, "config") else inputs
