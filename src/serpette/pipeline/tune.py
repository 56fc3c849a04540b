"""The stages `tune` and `prune` of an arm: what trains, what is cut meanwhile or at once, at what cost."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import scoring
from ..cost import forward_flops, measure, train_flops
from ..data.budget import split
from ..data.gradient_pass import WARMUP_BATCH, WARMUP_STEPS
from ..files import write_json
from ..recipe import ArmSpec, PruneSpec, TuneSpec
from ..recipe.prune import ONE_SHOT, config_of
from ..recipe.tune import ADAPTERS
from ..tuning import rank, set_seeds, train, trainable
from ..types import uniform_of
from ..zoo.quiet import quiet_transformers
from . import weights
from .job import Job
from .stages import Stages

CALIBRATION_BATCH = 16  # examples a pass of the importance in one shot


@dataclass
class Tuned:
    """The model of an arm after tuning and pruning."""

    model: Any  # with its adapter beside it, or merged if weights were cut
    masks: dict[str, Tensor] | None  # of these {layer: bool (O, I), True where a weight stays}
    facts: dict[str, Any]  # for result.json: seconds, flops, peak_bytes, steps, trainable_parameters


def tuned(job: Job, arm: ArmSpec, positions: Tensor, stages: Stages) -> Tuned:
    """The arm's model, tuned on the scored examples at `positions`; read from disk if an earlier run did it.

    A long tuning that was killed goes on from its last checkpoint. Its seconds are those that led to the
    checkpoint and those since; what was lost between the checkpoint and the kill is not known.
    """
    place = stages.place("tuned")
    if place.exists():
        return _read(job, arm, place)
    recipe = job.recipe
    tune, prune = recipe.tune_of(arm), recipe.prune_of(arm)
    set_seeds(recipe.seed)
    if tune.method == "none":
        made = _untuned(job, arm, prune, positions)
    else:
        made = _tuned(job, arm, tune, prune, positions, stages.place("checkpoints"))
    stages.keep("tuned", lambda folder: _write(made, folder))
    shutil.rmtree(stages.place("checkpoints"), ignore_errors=True)
    return made


def _tuned(
    job: Job, arm: ArmSpec, tune: TuneSpec, prune: PruneSpec | None, positions: Tensor, folder: Path
) -> Tuned:
    from .checkpoints import Checkpoints

    seed = job.recipe.seed
    device = next(job.model.parameters()).device
    with measure(device) as cost:
        model: Any = copy.deepcopy(job.model)
        model = trainable(model, scoring.tuned_head(model), **tune.adapter(seed))
        if hasattr(model, "peft_config"):  # else peft looks on the hub for the vocabulary of its name
            model.peft_config["default"].base_model_name_or_path = None
        ranking = _rank(job, model, tune, positions)
        pruner = None
        if prune is not None:
            from ..weights import Pruner

            pruner, model = Pruner(config_of(prune, seed)), weights.prepared(model, prune)
        checkpoints = Checkpoints(folder, ranking)
        with quiet_transformers():  # the Trainer warns of other names in its checkpoints
            train(
                model,
                len(positions),
                job.reader(positions),
                seed=seed,
                on_step=job.say.step,
                callbacks=[*([] if pruner is None else [pruner]), checkpoints],
                out=folder,
                resume_from=checkpoints.last,
                **tune.training,
            )
    earlier = checkpoints.earlier
    seconds = {
        "ranking": ranking + earlier["ranking"],
        "tuning": cost.seconds - ranking + earlier["tuning"],
    }
    facts = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops": _flops(job, arm, tune, model, positions),
        "peak_bytes": cost.peak_bytes,
        "steps": tune.epochs * -(-len(positions) // tune.batch_size),
        "seconds": seconds,
    }
    masks = None
    if pruner is not None:
        pruning = sum(pruner.seconds_.values())
        start, masks = time.perf_counter(), dict(pruner.masks_)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        seconds |= {
            "tuning": seconds["tuning"] - pruning,
            "pruning": pruning + time.perf_counter() - start,
        }
    return Tuned(model, masks, facts)


def _untuned(job: Job, arm: ArmSpec, prune: PruneSpec | None, positions: Tensor) -> Tuned:
    """The model as it is, or cut in one shot."""
    masks, tune = None, job.recipe.tune_of(arm)
    device = next(job.model.parameters()).device
    with measure(device) as cost:
        model = copy.deepcopy(job.model).requires_grad_(False)
        if prune is not None:
            from ..weights import prune as cut

            pruner = cut(
                model,
                prune.importance,
                loader=_Batches(job, seen(job, prune.importance_examples, positions)),
                options=prune.importance_options,
                seed=job.recipe.seed,
                progress=job.say.shown,
                **{name: getattr(prune, name) for name in ONE_SHOT},
            )
            masks = dict(pruner.masks_)
    seconds = {"ranking": 0.0, "tuning": 0.0} | ({} if prune is None else {"pruning": cost.seconds})
    return Tuned(
        model,
        masks,
        {
            "trainable_parameters": 0,
            "flops": _flops(job, arm, tune, model, positions),
            "peak_bytes": cost.peak_bytes,
            "steps": 0,
            "seconds": seconds,
        },
    )


class _Batches:
    """The scored examples at `positions`, batch by batch, where the model is."""

    def __init__(self, job: Job, positions: Tensor):
        self.device, self.read = next(job.model.parameters()).device, job.reader(positions)
        self.starts = range(0, len(positions), CALIBRATION_BATCH)
        self.count = len(positions)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in self.starts:
            batch = self.read(list(range(start, min(start + CALIBRATION_BATCH, self.count))))
            yield {k: v.to(self.device) for k, v in batch.items()}


def _write(made: Tuned, folder: Path) -> None:
    from safetensors.torch import save_file, save_model

    from .checkpoints import running

    if hasattr(made.model, "peft_config"):
        made.model.save_pretrained(folder, save_embedding_layers=False)
        save_file(running(made.model), folder / "running.safetensors")
    else:
        save_model(made.model, str(folder / "model.safetensors"))
    if made.masks is not None:
        save_file(
            {name: mask.contiguous() for name, mask in made.masks.items()}, folder / "masks.safetensors"
        )
    write_json(folder / "facts.json", made.facts | {"cut": [*(made.masks or ())]})


def _read(job: Job, arm: ArmSpec, folder: Path) -> Tuned:
    from safetensors.torch import load_file, load_model

    from .checkpoints import load_state, running

    model: Any = copy.deepcopy(job.model)
    device = next(model.parameters()).device
    facts, masks = json.loads((folder / "facts.json").read_text(encoding="utf-8")), None
    if cut := facts.pop("cut"):
        held = load_file(folder / "masks.safetensors")  # in another order
        masks = {name: held[name].to(device) for name in cut}
    if (folder / "model.safetensors").exists():
        load_model(model, str(folder / "model.safetensors"))
    else:
        from peft import PeftModel

        assert job.recipe.tune_of(arm).method in ADAPTERS
        with quiet_transformers():
            model = PeftModel.from_pretrained(model, folder)
        load_state(running(model), folder / "running.safetensors")
    return Tuned(model, masks, facts)


def _rank(job: Job, model: nn.Module, tune: TuneSpec, positions: Tensor) -> float:
    """Seconds in which the rows were chosen; 0 where a layer's own weights have told them already."""
    if tune.method != "rows" or not (tune.needs or tune.dependencies or tune.scope == "global"):
        return 0.0
    start, looked_at = time.perf_counter(), seen(job, tune.importance_examples, positions)
    read = job.reader(looked_at)
    rank(model, len(looked_at), read, tune.importance, tune.scope, tune.batch_size, job.say.shown)
    return time.perf_counter() - start


def seen(job: Job, count: int, positions: Tensor) -> Tensor:
    """The `count` examples that an importance looks at, drawn by the seed; of each class its share."""
    signals = job.scores.signals

    def shuffled(places: Tensor) -> Tensor:
        return places[uniform_of(signals.ids[places.numpy()], job.recipe.seed).argsort()]

    order, count = shuffled(positions), min(count, len(positions))
    if job.task != "classification":
        return order[:count]
    assert signals.labels is not None
    labels = signals.labels[order]
    shares = split(labels, count)
    return shuffled(torch.cat([order[labels == c][:share] for c, share in shares.items()]))


def _flops(job: Job, arm: ArmSpec, tune: TuneSpec, model: nn.Module, positions: Tensor) -> dict[str, float]:
    """Counted on one batch and multiplied; the scoring of an arm without a scorer is free."""
    size = min(tune.batch_size, len(positions))
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in job.reader(positions)(list(range(size))).items()}
    trained = 0.0 if tune.method == "none" else train_flops(model, inputs) / size
    forward = forward_flops(job.model, inputs) / size
    spent = 0.0
    if arm.scorer is not None:
        method, total = job.methods[job.scorer_of[arm.name]], job.scores.total
        if hasattr(method, "reading"):
            # forward and backward: of all, of those for moments, of the warm-up
            reading = method.reading
            sample = getattr(reading, "sample", getattr(reading, "target_limit", 0))
            steps = WARMUP_STEPS if reading.warmup_steps is None else reading.warmup_steps
            read = total * reading.epochs + min(sample or total, total) + steps * WARMUP_BATCH
            scored = scoring.with_lora(job.model, job.lora, job.recipe.seed) if not trained else None
            spent = read * (trained if scored is None else train_flops(scored, inputs) / size)
        else:
            passes = len(job.scores.signals.paths[method.path].points) if hasattr(method, "path") else 1
            spent = forward * passes * total
    # forward, backward to the activations, backward to the weights
    passes = bool(tune.needs) + bool(tune.needs - {"input_norms"}) + ("elementwise" in tune.needs)
    ranking = forward * passes * min(tune.importance_examples, len(positions))
    epochs = 0 if tune.method == "none" else tune.epochs
    return {"scoring": spent, "ranking": ranking, "tuning": trained * len(positions) * epochs}
