"""What the arms of a recipe reached on the test examples, and how sure their differences are.

One seed: paired over the test examples. Several: paired seed by seed, mean and t-interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data.examples import Examples
from .data.language import response_losses
from .data.observe import evaluating
from .evaluate import (
    accuracy,
    accuracy_by_class,
    paired_difference,
    paired_over_seeds,
    r2,
    seeds_interval,
)

METRICS = {"classification": "accuracy", "regression": "r2", "causal-lm": "perplexity"}
# what an arm's differences to another are made of, by task; of a perplexity the loss, which has a mean
COMPARED = {"classification": "accuracy", "regression": "accuracy", "causal-lm": "loss"}

# of an arm, the same for all seeds, but for what is exported of the first alone
SETTINGS = (
    "name", "scorer", "select", "keep", "per_class", "epochs", "method", "tune", "prune", "predicted",
    "export",
)  # fmt: skip
# by what an arm chooses its examples
DATA = ("scorer", "select", "keep", "per_class")


def predict(
    model: nn.Module, examples: Examples, batch_size: int
) -> tuple[Tensor, list[int], dict[str, str]]:
    """Outputs (N, C) float32 on the CPU, the rows that could be read, {id: reason} of the others.

    Of a causal language model (N, 2): the mean loss of the response tokens, and how many they are.
    """
    device = next(model.parameters()).device
    outputs, kept, set_aside = [], [], {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            good, inputs, _, bad = examples.read(range(start, min(start + batch_size, len(examples))))
            set_aside |= bad
            if not good:
                continue
            if examples.task == "causal-lm":
                output = torch.stack(response_losses(model, inputs), 1)
            else:
                output = model(**{k: v.to(device) for k, v in inputs.items()}).logits
            outputs.append(output.float().cpu())
            kept += good
    if not outputs:
        raise ValueError(f"none of the {len(examples)} test examples could be read")
    return torch.cat(outputs), kept, set_aside


def quality(
    task: str, outputs: Tensor, truth: Tensor | None, kept_labels: Tensor | None, num_classes: int
) -> dict[str, Any]:
    """The metric of an arm, and `each`: its part of every test example, whose differences are compared.

    Args:
        outputs: of `predict`.
        truth: (N,) labels of the test examples; None in a causal language model.
        kept_labels: (k,) of the training examples that the arm kept.
    """
    if task == "causal-lm":
        loss_N, tokens_N = outputs.double().unbind(1)
        return {
            "perplexity": float(((loss_N * tokens_N).sum() / tokens_N.sum()).exp()),
            "loss": float(loss_N.mean()),
            "response_tokens": int(tokens_N.sum()),
            "each": loss_N.tolist(),
        }
    assert truth is not None and kept_labels is not None
    if task == "regression":
        loss = (outputs[:, 0] - truth) ** 2 / truth.var(correction=0)
        return {"accuracy": r2(outputs, truth), "each": (1 - loss).tolist()}
    by_class = accuracy_by_class(outputs, truth, num_classes)
    return {
        "accuracy": accuracy(outputs, truth),
        "accuracy_by_class": [None if np.isnan(a) else float(a) for a in by_class],
        "kept_by_class": torch.bincount(kept_labels, minlength=num_classes).tolist(),
        "each": (outputs.argmax(1) == truth).int().tolist(),
    }


def comparisons(arms: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Each arm against its controls, on the same test examples or seed by seed.

    The controls are, of the arms tuned alike, the one that keeps all, a random choice of the same share (one
    balanced over the classes first), and for a score the ranking by the loss at the same share. An arm that
    keeps all, but is tuned otherwise, has full fine-tuning as its control, or the first arm that keeps all;
    rows have LoRA, too. An arm whose weights are pruned has the unpruned arm of the same examples, the one
    that keeps all examples, and the same cut by chance and by magnitude, all tuned alike. Differences are of
    the metric; in a causal language model of the mean loss of an example's response, in nats, where less is
    better.

    Args:
        arms: with `each`, or `by_seed` as `mean_of_seeds` makes them.
    """
    found = []
    for arm in arms:
        for other in controls(arm, arms):
            if "by_seed" in arm:
                mine, its = ([one[COMPARED[task]] for one in a["by_seed"]] for a in (arm, other))
                difference, low, high = paired_over_seeds(mine, its)
            else:
                difference, low, high = paired_difference(arm["each"], other["each"])
            found.append(
                {
                    "arm": arm["name"],
                    "to": other["name"],
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "within_noise": low <= 0 <= high,
                }
            )
    return found


def controls(arm: dict[str, Any], arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `arm` is compared with, out of `arms`."""
    if arm.get("prune"):
        return _controls_of_cut(arm, arms)
    arms = [a for a in arms if not a.get("prune")]
    whole = [a for a in arms if a["select"] is None]
    first = next((a for a in whole if a.get("method") == "full"), whole[0] if whole else None)
    if arm["select"] is None:
        lora = [a for a in whole if a.get("method") == "lora" and a is not first]
        found = [] if arm is first else [first, *(lora[:1] if arm.get("method") == "rows" else [])]
        return [c for c in found if c is not None]
    tuned_alike = [a for a in arms if _tune(a) == _tune(arm) and a is not arm]
    full = next((a for a in tuned_alike if a["select"] is None), first)
    alike = [a for a in tuned_alike if a["select"] is not None and a["keep"] == arm["keep"]]
    chance = [a for a in alike if a["scorer"] in (None, "random") or a["select"] == "random"]
    chance.sort(key=lambda a: not a["per_class"])  # stable: the balanced ones first
    losses = [a for a in alike if a["scorer"] == "loss"]
    losses.sort(key=lambda a: (a["select"], a["per_class"]) != (arm["select"], arm["per_class"]))
    scored = arm["scorer"] not in (None, "random", "loss")
    return [c for c in (full, *chance[:1], *(losses[:1] if scored else [])) if c is not None]


def _controls_of_cut(arm: dict[str, Any], arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def same(other: dict[str, Any]) -> bool:
        """The same examples, tuned alike."""
        return _tune(arm) == _tune(other) and all(arm[key] == other[key] for key in DATA)

    dense = [a for a in arms if not a.get("prune")]
    whole = [a for a in dense if a["select"] is None]
    whole.sort(key=lambda a: _tune(a) != _tune(arm))  # stable: those tuned alike first
    found = [*[a for a in dense if same(a)][:1], *whole[:1]]
    mine = arm["prune"]
    ladder = ("random", "magnitude", mine["importance"])
    for name in ladder[: ladder.index(mine["importance"])]:
        found += [
            a
            for a in arms
            if a.get("prune")
            and same(a)
            and a["prune"]["importance"] == name
            and all(a["prune"][key] == mine[key] for key in ("sparsity", "pattern", "targets"))
        ][:1]
    return [a for i, a in enumerate(found) if all(a is not b for b in found[:i])]


def _tune(arm: dict[str, Any]) -> dict[str, Any]:
    return arm.get("tune") or {}


def mean_of_seeds(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`result.json` of a recipe with several seeds, from those of its seeds.

    An arm's numbers are means over the seeds, `interval` is the t-interval (95 %) of its metric, and
    `by_seed` holds each.
    """
    first = parts[0]
    task = first["task"]
    metric = "perplexity" if task == "causal-lm" else "accuracy"
    arms = []
    for number, arm in enumerate(first["arms"]):
        each = [part["arms"][number] for part in parts]
        same = {key: arm[key] for key in SETTINGS if key in arm}
        by_seed = [
            {"seed": part["seed"], **{k: v for k, v in one.items() if k not in same}}
            for part, one in zip(parts, each, strict=True)
        ]
        means = {key: _mean([one.get(key) for one in each]) for key in arm if key not in same}
        if metric in arm:  # else it was not evaluated
            _, low, high = seeds_interval([one[metric] for one in each])
            means["interval"] = [low, high]
        arms.append(same | means | {"by_seed": by_seed})
    set_aside = {s["id"]: s for part in parts for s in part["data"]["set_aside"]}
    return first | {
        "seeds": [part["seed"] for part in parts],
        "data": first["data"] | {"set_aside": list(set_aside.values())},
        "observing": _mean([part["observing"] for part in parts]),
        "scorers": {
            name: entry | {"seconds": _mean([part["scorers"][name]["seconds"] for part in parts])}
            for name, entry in first["scorers"].items()
        },
        "arms": arms,
        "comparisons": comparisons([arm for arm in arms if metric in arm], task),
    }


def _mean(values: list[Any]) -> Any:
    """Of numbers, and of lists and dicts of them place by place; texts that differ are listed."""
    held = [value for value in values if value is not None]
    if not held:
        return None
    if all(value == held[0] for value in held):
        return held[0]
    if isinstance(held[0], dict):
        return {key: _mean([value.get(key) for value in held]) for key in held[0]}
    if isinstance(held[0], list):
        return [_mean(list(row)) for row in zip(*held, strict=True)]
    if isinstance(held[0], str):
        return ", ".join(dict.fromkeys(held))
    return float(np.mean(held))
