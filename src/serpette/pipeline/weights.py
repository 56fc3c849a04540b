"""What becomes of an arm whose weights were pruned: made smaller, measured; and how sensitive layers are."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.observe import evaluating
from ..recipe import ArmSpec, PruneSpec, ShrinkSpec
from ..types import uniform_of
from .job import Job

TIMED_SECONDS = 3.0  # a batch size, both together
TIMES = ("latency_seconds", "examples_per_second")
LOSS_EXAMPLES = {"causal-lm": 4}  # training examples whose loss tells the sensitivity of a layer, else 64
SHARES = (0.25, 0.5, 0.75, 0.9)  # of a layer's weights that are cut for it
SENSITIVITY_SECONDS = 30  # with slower models a part of the layers is looked at


def prepared(model: nn.Module, prune: PruneSpec) -> nn.Module:
    """`model` with the LoRA that the importance is of."""
    from ..weights.sequential import sequential

    return sequential(model) if prune.importance == "lora_prune_seq" else model


def shrunk(
    model: nn.Module, masks: dict[str, Tensor], prune: PruneSpec, shrink: ShrinkSpec | None
) -> tuple[nn.Module, float]:
    """(the model that would be shipped, seconds)."""
    from ..weights.shrink import shrink as smaller

    if shrink is None:
        return model, 0.0
    start = time.perf_counter()
    model = smaller(model, masks, ragged=shrink.ragged, round_to=prune.round_to)
    return model, time.perf_counter() - start


def measured(
    job: Job, model: nn.Module, masks: dict[str, Tensor], batch_sizes: tuple[int, ...]
) -> dict[str, Any]:
    """The arm's `weights` in result.json: before and after, by layer."""
    from ..weights.measure import compare_cost

    job.say("measuring the pruned model")
    dense = copy.deepcopy(job.model)  # of the same shapes as the unpruned arm
    found = compare_cost(dense, model, lambda size: inputs_of(job, size), batch_sizes, TIMED_SECONDS)
    before, after = ({k: v for k, v in found[side].items() if k not in TIMES} for side in ("before", "after"))
    return {
        "sparsity": _share(list(masks.values())),
        "before": before,
        "after": after,
        "timings": [
            {
                "batch_size": size,
                "before": found["before"]["latency_seconds"][size],
                "after": found["after"]["latency_seconds"][size],
                "speedup": 1 / speed["time_ratio"],
                "low": 1 / speed["interval"][1],
                "high": 1 / speed["interval"][0],
            }
            for size, speed in found["speed"].items()
        ],
        "layers": [{"name": name, "sparsity": _share([mask])} for name, mask in masks.items()],
    }


def _share(masks: list[Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def inputs_of(job: Job, size: int) -> dict[str, Tensor]:
    """The first examples that can be read, of the test if there is one, as often as `size` needs them.

    Without labels.
    """
    device = next(job.model.parameters()).device
    if job.test_examples is None:
        inputs = job.reader(torch.arange(len(job.scores.rows)))(list(range(min(size, len(job.scores.rows)))))
    else:
        good: list[int] = []
        for rows in torch.arange(len(job.test_examples)).split(size):
            good += job.test_examples.read(rows.tolist())[0]
            if len(good) >= size:
                break
        if not good:
            raise ValueError(
                f"none of the {len(job.test_examples)} test examples could be read; mend data.test"
            )
        _, inputs, _, _ = job.test_examples.read(good[:size])
    copies = -(-size // len(next(iter(inputs.values()))))
    return {k: torch.cat([v] * copies)[:size].to(device) for k, v in inputs.items() if k != "labels"}


def is_looked_at(job: Job, arm: ArmSpec) -> bool:
    """Whether the sensitivity of its layers is of interest: of the first unpruned arm beside pruned ones."""
    recipe = job.recipe
    arms = [a for a in recipe.arms if (spec := recipe.evaluate_of(a)) is not None and spec.sensitivity]
    dense = [a for a in arms if recipe.prune_of(a) is None]
    return job.first and len(dense) < len(arms) and arm == (dense or arms)[0]


def sensitivity_of(job: Job, model: Any, positions: Tensor) -> dict[str, Any]:
    """The loss of a few training examples with one layer at a time cut by magnitude, in bounded time."""
    from ..weights.measure import sensitivity, sparsity_by_layer

    job.say("sensitivity of the layers")
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    seen = positions[: LOSS_EXAMPLES.get(job.task, 64)]
    inputs = job.reader(seen)(list(range(len(seen))))
    inputs = {k: v.to(next(model.parameters()).device) for k, v in inputs.items()}

    def loss(network: nn.Module) -> float:
        with evaluating(network), torch.inference_mode():
            return float(network(**inputs).loss)

    layers = list(sparsity_by_layer(model))
    loss(model)
    start = time.perf_counter()
    loss(model)
    count = int(SENSITIVITY_SECONDS / (time.perf_counter() - start) / len(SHARES))
    drawn = uniform_of(np.array(layers), 0).argsort()[: max(count, 6)].sort().values
    found = sensitivity(model, loss, SHARES, [layers[i] for i in drawn.tolist()])
    return {
        "dense": found["unpruned"],
        "sparsities": list(SHARES),
        "of": len(layers),
        "layers": [{"name": n, "losses": list(by.values())} for n, by in found["layers"].items()],
    }
