"""One arm of a recipe, stage by stage: choose the examples, tune, prune, shrink, save, measure."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arms import predict, quality
from ..cost import measure
from ..data import pruner
from ..data.mmd import mmd
from ..data.proxy import TRAINING_SIGNALS
from ..data.search import describe
from ..data.selectors import registry as selectors
from ..files import write_json
from ..recipe import ArmSpec, EvaluateSpec, to_dict
from ..scorers import registry as scorers
from ..types import uniform_of
from . import card, weights
from .export import export, files_of, formats
from .job import Job, needs_embeddings
from .stages import Stages
from .tune import tuned

MMD_EXAMPLES = 5000  # the distance costs N^2


def select(job: Job, arm: ArmSpec) -> tuple[Tensor, str | None, dict[str, float]]:
    """(positions among the scored examples, selector with its options, seconds)."""
    everything = torch.arange(len(job.scores.rows))
    if arm.select is None:
        return everything, None, {"scoring": 0.0, "selection": 0.0}
    selector = selectors.make(arm.select, **arm.select_options)
    scores = job.scores
    if arm.scorer is None:
        scores = copy.copy(scores)
        scores.values = {"random": scorers.make("random")(scores.signals)}
        scores.methods = {}
    scorer = job.scorer_of.get(arm.name, "random")
    selection = pruner.select(
        scores, selector, arm.keep, scorer=scorer, per_class=arm.per_class, seed=job.recipe.seed
    )
    seconds = {
        "scoring": _scoring_seconds(job, arm, selector),
        "selection": sum(selection.seconds.values()),
    }
    return selection.positions, describe(selection.selector), seconds


def _scoring_seconds(job: Job, arm: ArmSpec, selector: Any) -> float:
    """What this arm alone would have paid: the shared pass counts in full for each arm that needs it."""
    if arm.scorer is None and not needs_embeddings(selector):
        return 0.0
    method = None if arm.scorer is None else job.methods[job.scorer_of[arm.name]]
    cost = job.scores.cost
    spent = cost.get("lora" if hasattr(method, "reading") else "plain", cost)["seconds"]
    total = spent["decoding"] + spent["unmasked"]
    if method is not None:
        if f"model of {method.name}" in spent:  # a pass of its own, and none of the scored model
            return spent[f"model of {method.name}"] + spent[method.name]
        total += spent[method.name] + spent.get("warmup", 0.0) + spent.get("moments", 0.0)
        total += spent["path"] if hasattr(method, "path") else 0.0
        total += spent["proxy"] if method.needs & TRAINING_SIGNALS else 0.0
    return total


def run_arm(job: Job, arm: ArmSpec, number: int, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The arm's entry in `result.json`; read from disk if an earlier run finished it.

    Args:
        earlier: the entries of the arms before it, with which its model card compares it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", arm.name)
    path = job.folder / "arms" / f"{number:02d}-{name}.json"
    stages = Stages(path.with_suffix(""))
    if path.exists():
        stages.finish()
        job.say(f"{arm.name}: done before")
        return json.loads(path.read_text(encoding="utf-8"))
    recipe, wanted, evaluate = job.recipe, formats(job, arm), job.recipe.evaluate_of(arm)
    tune, prune, shrink = recipe.tune_of(arm), recipe.prune_of(arm), recipe.shrink_of(arm)
    positions, selector, seconds = select(job, arm)
    steps = 0 if tune.method == "none" else tune.epochs * -(-len(positions) // tune.batch_size)
    job.say(f"{arm.name}: tuning on {len(positions):,} of {job.scores.total:,} examples, {steps:,} steps")
    made = tuned(job, arm, positions, stages)
    model, facts = made.model, made.facts
    seconds |= facts["seconds"]
    if prune is not None:
        assert made.masks is not None
        model, shrinking = weights.shrunk(model, made.masks, prune, shrink)
        seconds["pruning"] += shrinking
    folder = stages.folder / "model"
    saved = stages.stage("export", lambda: export(job, model, wanted, folder))
    seconds["export"] = saved.pop("seconds")
    labels = job.scores.signals.labels
    entry = {
        "name": arm.name,
        "scorer": arm.scorer,
        "select": arm.select,
        "selector": selector,
        "keep": arm.keep,
        "per_class": arm.per_class,
        "method": tune.method,
        "tune": tune.differing(recipe.tune),
        "prune": None,
        "gamma": _gamma(selector),
        "examples": len(positions),
        "epochs": tune.epochs if steps else 0,
        "seconds": seconds,
        "mmd": _mmd(job, positions),
        "ids": job.scores.signals.ids[positions.numpy()].tolist(),
        "export": saved,
        **{key: facts[key] for key in ("steps", "flops", "peak_bytes", "trainable_parameters")},
    }
    if labels is not None and job.classes:
        entry["kept_by_class"] = torch.bincount(labels[positions], minlength=len(job.classes)).tolist()
    if arm.predicted:
        entry["predicted"] = arm.predicted
    if evaluate is not None:
        found = stages.stage("evaluate", lambda: _evaluated(job, model, evaluate, labels, positions))
        seconds["evaluation"] = found.pop("seconds")
        entry |= found
    if prune is not None:
        entry["prune"] = to_dict(prune) | {
            "shrink": shrink is not None,
            "ragged": shrink is not None and shrink.ragged,
        }
        masks, sizes = made.masks or {}, () if evaluate is None else evaluate.latency_batch_sizes
        entry["weights"] = stages.stage("measure", lambda: weights.measured(job, model, masks, sizes))
    if weights.is_looked_at(job, arm):
        work = stages.stage("sensitivity", lambda: weights.sensitivity_of(job, model, positions))
        entry["sensitivity"] = work
    if saved["formats"]:
        card.write(job, arm, entry, earlier, folder)
        entry["model"] = folder.relative_to(job.folder).as_posix()
    saved["files"] = files_of(folder)
    if prune is not None:
        entry["weights"] |= {k: v for k, v in saved.items() if k != "formats"}
    write_json(path, entry)
    stages.finish()
    return entry


def _evaluated(
    job: Job, model: nn.Module, evaluate: EvaluateSpec, labels: Tensor | None, positions: Tensor
) -> dict[str, Any]:
    assert job.test_examples is not None
    size = evaluate.batch_size or job.recipe.batch_size
    with measure(next(model.parameters()).device) as cost:
        outputs, kept, bad = predict(model, job.test_examples, size)
    if bad and job.recipe.on_bad == "raise":
        name, reason = next(iter(bad.items()))
        raise ValueError(f"test example {name!r}: {reason}; mend it, or go on without it: on_bad: set_aside")
    truth = None if job.test_labels is None else job.test_labels[kept]
    kept_labels = None if labels is None else labels[positions]
    found = quality(job.task, outputs, truth, kept_labels, len(job.classes))
    return {"seconds": cost.seconds, "test_set_aside": bad, **found}


def _mmd(job: Job, positions: Tensor) -> float | None:
    """To the full set; of that, and of the subset, at most 5,000 examples are looked at.

    None where the model has not run on the training examples.
    """
    embeddings = job.scores.signals.embeddings
    if embeddings is None:
        return None
    if len(positions) == len(embeddings):
        return 0.0
    order = uniform_of(job.scores.signals.ids, 0).argsort()
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[positions] = True
    return mmd(embeddings[order[:MMD_EXAMPLES]], embeddings[order[chosen[order]][:MMD_EXAMPLES]])


def _gamma(selector: str | None) -> float | None:
    found = re.search(r"gamma=([\d.]+)", selector or "")
    return float(found[1]) if found else None
