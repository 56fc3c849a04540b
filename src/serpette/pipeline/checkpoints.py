"""Checkpoints of a long tuning: where they are whole, and what the Trainer leaves out of them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..files import write_json

EVERY_SECONDS = 60.0  # from one checkpoint to the next; a shorter training writes none
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
SPENT = "spent.json"  # written last: a checkpoint with it is whole
TRAINED = "trained.safetensors"


class Checkpoints(TrainerCallback):
    """Has the Trainer write a checkpoint now and then, and keeps the last whole one.

    Args:
        folder: the Trainer's output_dir.
        ranking: seconds of this process that chose rows before the training.
    """

    def __init__(self, folder: Path, ranking: float = 0.0):
        self.folder, self.last = folder, last(folder)
        self.earlier = spent(self.last)
        self.ranking, self.begin = ranking, time.perf_counter()
        self.saved = self.begin

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """What trains and is not in the Trainer's files, or is there by other names, as of ViT."""
        if state.global_step and self.last is not None:
            load_state(trained(model), self.last / TRAINED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint where the last one is old."""
        due = time.perf_counter() - self.saved >= EVERY_SECONDS
        control.should_save = due and state.global_step < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Completes the checkpoint, after the other callbacks, and removes those before it."""
        folder = self.folder / f"checkpoint-{state.global_step}"
        save_file({n: t.contiguous() for n, t in trained(model).items()}, folder / TRAINED)
        now = time.perf_counter()
        mine = {"ranking": self.ranking, "tuning": now - self.begin}
        write_json(folder / SPENT, {part: mine[part] + self.earlier[part] for part in mine})
        for other in self.folder.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)
        self.saved = time.perf_counter()


def last(folder: Path) -> Path | None:
    """The last checkpoint in `folder` that was written whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{SPENT}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def spent(checkpoint: Path | None) -> dict[str, float]:
    """Seconds of `ranking` and of `tuning` that led to a checkpoint."""
    if checkpoint is None:
        return {"ranking": 0.0, "tuning": 0.0}
    return json.loads((checkpoint / SPENT).read_text(encoding="utf-8"))


def running(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of BatchNorm, which train without a gradient."""
    return {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in RUNNING}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What changes in a training: parameters with a gradient and running statistics."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} | running(model)


def load_state(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills `tensors` with those of the same names in a file."""
    held = load_file(path)
    for name, tensor in tensors.items():
        tensor.copy_(held[name])
