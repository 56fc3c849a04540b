"""The recommendation as a recipe that `serpette run` takes as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..recipe import ArmSpec, PruneSpec, Recipe, ShrinkSpec
from .probes import Choice
from .recommend import Option


def recipe_of(
    option: Option,
    skeleton: Recipe,
    *,
    on_gpu: bool,
    controls: Choice | None,
    causal: bool,
    same_metric: bool = True,
    evaluate: bool = True,
) -> Recipe:
    """One arm: what is advised. With `controls`, also everything and the same share by chance.

    Args:
        skeleton: model, data and the fine-tune that was advised on.
        on_gpu: peak memory is predicted for tensors, as CUDA counts them; a CPU's is of the process.
        controls: the choice by chance that stands beside a score.
        causal: a causal language model, whose losses are nats.
        same_metric: the run measures what was predicted: accuracy, not balanced accuracy.
    """
    chosen, way = option.outlook, option.tuning
    tune = replace(
        skeleton.tune,
        method=way.method,
        modes=way.modes or "rows",
        freeze_attention=way.freeze_attention,
        checkpointing=way.checkpointing,
    )
    said = option.as_dict(causal)
    predicted: dict[str, float] = {"seconds": option.seconds}
    if same_metric:
        predicted |= {"loss": said["loss"], "loss_low": said["low"], "loss_high": said["high"]}
    if on_gpu:
        predicted["peak_bytes"] = way.peak_bytes
    if option.speedup:
        predicted["speedup"] = option.speedup
    arms = [_arm("advised", chosen.choice, chosen.keep, {k: round(v, 4) for k, v in predicted.items()})]
    if controls is not None and (chosen.keep < 1 or option.cut):
        whole: dict[str, Any] = {"prune": {"sparsity": 0.0}} if option.cut else {}
        arms.insert(0, replace(_arm("everything", chosen.choice, 1.0, {}), **whole))
        if not chosen.choice.by_chance:
            arms.append(_arm(controls.name, controls, chosen.keep, {}))
    recipe = replace(skeleton, arms=tuple(arms), tune=tune)
    if option.cut:
        recipe = replace(recipe, **_cutting(option, way.method))
    if not evaluate:
        recipe = replace(recipe, evaluate=None)
    return recipe


def _arm(name: str, choice: Choice, keep: float, predicted: dict[str, float]) -> ArmSpec:
    if keep == 1:
        return ArmSpec(name, predicted=predicted)
    return ArmSpec(
        name, choice.scorer, choice.select, keep, choice.per_class,
        select_options=choice.select_options, predicted=predicted,
    )  # fmt: skip


def _cutting(option: Option, method: str) -> dict[str, Any]:
    importance = "lora_prune" if method == "lora" else "magnitude"
    return {
        "prune": PruneSpec(importance, sparsity=option.sparsity, pattern="structured"),
        "shrink": ShrinkSpec(),
    }
