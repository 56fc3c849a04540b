"""The stage `export` of an arm: its model in the formats that are asked for, with what reads its inputs."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

from ..recipe import ArmSpec
from ..recipe.stages import Export
from ..recipe.tune import ADAPTERS
from ..zoo.quiet import quiet_transformers
from .job import Job
from .weights import inputs_of


def formats(job: Job, arm: ArmSpec) -> tuple[Export, ...]:
    """What is saved of `arm`.

    Raises:
        ValueError: an adapter is asked for of a model whose running statistics it would not hold.
    """
    from .checkpoints import running

    recipe = job.recipe
    given, pruned = recipe.export_of(arm), recipe.prune_of(arm) is not None
    tune = recipe.tune_of(arm)
    whole = bool(running(job.model))
    if given is not None:
        if "adapter" in given and whole:
            raise ValueError(
                f"export=adapter of arm {arm.name!r}: {type(job.model).__name__} has BatchNorm, whose "
                "statistics change in the tuning and are in no adapter; use safetensors"
            )
        return given
    if tune.method in ADAPTERS and not pruned and not whole:
        return ("adapter",)
    changed = tune.method != "none" or pruned
    return ("safetensors",) if changed and job.first else ()


def export(job: Job, model: Any, wanted: tuple[Export, ...], folder: Path) -> dict[str, Any]:
    """Saves `model` in `folder`; what was saved: `formats`, `seconds`, and facts such as `stock`."""
    from ..weights.load import save_shrunk
    from ..weights.packed import save_packed

    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    if not wanted:
        return {"formats": [], "seconds": 0.0}
    job.say(f"saving {', '.join(wanted)}")
    start = time.perf_counter()
    folder.mkdir(parents=True)
    found: dict[str, Any] = {}
    with quiet_transformers():
        if "adapter" in wanted:
            model.peft_config["default"].base_model_name_or_path = job.recipe.model.name
            # beside an adapter in its folder, from_pretrained would take a whole model for a base of it
            place = folder / "adapter" if "safetensors" in wanted else folder
            model.save_pretrained(place, save_embedding_layers=False)
        if {*wanted} - {"adapter"} and hasattr(model, "peft_config"):
            model = copy.deepcopy(model).merge_and_unload()  # what is evaluated stays as it was trained
        if "safetensors" in wanted:
            if job.classes:
                model.config.id2label = dict(enumerate(job.classes))
                model.config.label2id = {name: i for i, name in enumerate(job.classes)}
            found["stock"] = save_shrunk(model, folder)["stock"]
        save_processor = getattr(job.processor, "save_pretrained", None)
        if save_processor is not None and {*wanted} & {"adapter", "safetensors"}:
            save_processor(folder)
    if "packed" in wanted:
        save_packed(model, folder / "packed.safetensors")
    if "onnx" in wanted:
        from ..weights.export import to_onnx

        found["onnx_difference"] = to_onnx(model, inputs_of(job, 2), folder / "model.onnx")
    return {"formats": [*wanted], **found, "seconds": time.perf_counter() - start}


def files_of(folder: Path) -> dict[str, int]:
    """Bytes of each file below `folder`, but for the card, which is about the model and no part of it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "README.md")
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
