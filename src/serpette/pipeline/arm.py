"""One arm of a recipe: choose the examples, tune on them, measure."""

from __future__ import annotations

import copy
import json
import re
import time
from typing import Any

import torch
from torch import Tensor, nn

from .. import scoring
from ..arms import predict, quality
from ..cost import forward_flops, measure, train_flops
from ..data import pruner
from ..data.budget import split
from ..data.gradient_pass import WARMUP_BATCH, WARMUP_STEPS
from ..data.mmd import mmd
from ..data.proxy import TRAINING_SIGNALS
from ..data.search import describe
from ..data.selectors import registry as selectors
from ..data.store import write_json
from ..recipe import ArmSpec, TuneSpec, to_dict
from ..recipe.prune import config_of
from ..scorers import registry as scorers
from ..tuning import rank, set_seeds, train, trainable
from ..types import uniform_of
from . import weights
from .job import Job

MMD_EXAMPLES = 5000  # the distance costs N^2
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "warmup")


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
    if arm.scorer is None and "embeddings" not in selector.needs:
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


def run_arm(job: Job, arm: ArmSpec, number: int) -> dict[str, Any]:
    """The arm's entry in `result.json`; read from disk if an earlier run finished it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", arm.name)
    path = job.folder / "arms" / f"{number:02d}-{name}.json"
    if path.exists():
        job.say(f"{arm.name}: done before")
        return json.loads(path.read_text())
    positions, selector, seconds = select(job, arm)
    tune, prune, seed = job.recipe.tune_of(arm), job.recipe.prune_of(arm), job.recipe.seed
    labels = job.scores.signals.labels
    kept_labels = None if labels is None else labels[positions]
    steps = tune.epochs * -(-len(positions) // tune.batch_size)
    job.say(f"{arm.name}: tuning on {len(positions):,} of {job.scores.total:,} examples, {steps:,} steps")
    set_seeds(seed)
    device = next(job.model.parameters()).device
    with measure(device) as cost:
        model = copy.deepcopy(job.model)
        model = trainable(model, scoring.tuned_head(model), **tune.adapter(seed))
        ranking = _rank(job, model, tune, positions)
        pruner = None
        if prune is not None:
            from ..weights import Pruner

            pruner, model = Pruner(config_of(prune, seed)), weights.prepared(model, prune)
        train(
            model,
            len(positions),
            job.reader(positions),
            seed=seed,
            on_step=job.say.step,
            callbacks=[] if pruner is None else [pruner],
            **{name: getattr(tune, name) for name in TRAINING},
        )
    spent = {"ranking": ranking, "tuning": cost.seconds - ranking}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = _flops(job, arm, tune, model, positions)
    if prune is not None:
        model, masks, merging = weights.finished(model, pruner, prune)
        assert pruner is not None
        pruning = sum(pruner.seconds_.values())
        spent |= {"tuning": spent["tuning"] - pruning, "pruning": pruning + merging}
    with measure(device) as evaluation:
        outputs, kept, bad = predict(model, job.test_examples, job.recipe.batch_size)
    if bad and job.recipe.on_bad == "raise":
        name, reason = next(iter(bad.items()))
        raise ValueError(f"test example {name!r}: {reason}; mend it, or go on without it: on_bad: set_aside")
    truth = None if job.test_labels is None else job.test_labels[kept]
    seconds |= spent | {"evaluation": evaluation.seconds}
    entry = {
        "name": arm.name,
        "scorer": arm.scorer,
        "select": arm.select,
        "selector": selector,
        "keep": arm.keep,
        "per_class": arm.per_class,
        "method": tune.method,
        "tune": tune.differing(job.recipe.tune),
        "prune": None if prune is None else to_dict(prune),
        "gamma": _gamma(selector),
        "examples": len(positions),
        "epochs": tune.epochs,
        "steps": steps,
        "seconds": seconds,
        "flops": flops,
        "peak_bytes": cost.peak_bytes,
        "mmd": _mmd(job, positions),
        "trainable_parameters": trained,
        "test_set_aside": bad,
        "ids": job.scores.signals.ids[positions.numpy()].tolist(),
    } | quality(job.task, outputs, truth, kept_labels, len(job.classes))
    if prune is not None:
        entry["weights"] = weights.measured(job, model, masks, prune, path.with_suffix("") / "model")
    if weights.is_looked_at(job, arm):
        entry["sensitivity"] = weights.sensitivity_of(job, model, positions)
    write_json(path, entry)
    return entry


def _rank(job: Job, model: nn.Module, tune: TuneSpec, positions: Tensor) -> float:
    """Seconds in which the rows were chosen; 0 where a layer's own weights have told them already."""
    if tune.method != "rows" or not (tune.needs or tune.dependencies or tune.scope == "global"):
        return 0.0
    start, seen = time.perf_counter(), _seen(job, tune, positions)
    rank(model, len(seen), job.reader(seen), tune.importance, tune.scope, tune.batch_size, job.say.shown)
    return time.perf_counter() - start


def _seen(job: Job, tune: TuneSpec, positions: Tensor) -> Tensor:
    """The examples that an importance looks at, drawn by the seed; of each class its share."""
    signals = job.scores.signals

    def shuffled(places: Tensor) -> Tensor:
        return places[uniform_of(signals.ids[places.numpy()], job.recipe.seed).argsort()]

    order, count = shuffled(positions), min(tune.importance_examples, len(positions))
    if job.task != "classification":
        return order[:count]
    assert signals.labels is not None
    labels = signals.labels[order]
    shares = split(labels, count)
    return shuffled(torch.cat([order[labels == c][:share] for c, share in shares.items()]))


def _mmd(job: Job, positions: Tensor) -> float:
    """To the full set; of that, and of the subset, at most 5,000 examples are looked at."""
    embeddings = job.scores.signals.require("embeddings", "mmd")
    if len(positions) == len(embeddings):
        return 0.0
    order = uniform_of(job.scores.signals.ids, 0).argsort()
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[positions] = True
    return mmd(embeddings[order[:MMD_EXAMPLES]], embeddings[order[chosen[order]][:MMD_EXAMPLES]])


def _flops(job: Job, arm: ArmSpec, tune: TuneSpec, model: nn.Module, positions: Tensor) -> dict[str, float]:
    """Counted on one batch and multiplied; the scoring of an arm without a scorer is free."""
    size = min(tune.batch_size, len(positions))
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in job.reader(positions)(list(range(size))).items()}
    trained, forward = train_flops(model, inputs) / size, forward_flops(job.model, inputs) / size
    spent = 0.0
    if arm.scorer is not None:
        method, total = job.methods[job.scorer_of[arm.name]], job.scores.total
        if hasattr(method, "reading"):
            # forward and backward: of all, of those for moments, of the warm-up
            reading = method.reading
            sample = getattr(reading, "sample", getattr(reading, "target_limit", 0))
            steps = WARMUP_STEPS if reading.warmup_steps is None else reading.warmup_steps
            seen = total * reading.epochs + min(sample or total, total) + steps * WARMUP_BATCH
            spent = trained * seen
        else:
            passes = len(job.scores.signals.paths[method.path].points) if hasattr(method, "path") else 1
            spent = forward * passes * total
    # forward, backward to the activations, backward to the weights
    passes = bool(tune.needs) + bool(tune.needs - {"input_norms"}) + ("elementwise" in tune.needs)
    ranking = forward * passes * min(tune.importance_examples, len(positions))
    return {"scoring": spent, "ranking": ranking, "tuning": trained * len(positions) * tune.epochs}


def _gamma(selector: str | None) -> float | None:
    found = re.search(r"gamma=([\d.]+)", selector or "")
    return float(found[1]) if found else None
