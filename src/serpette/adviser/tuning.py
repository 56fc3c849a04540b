"""What each way to tune costs with this model and this batch: memory and seconds of one training step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import psutil
import torch
from torch import Tensor, nn

from ..cost import call, forward_flops, loss_of, train_flops
from ..memory.compare import Setup, tuned
from ..memory.shapes import fake_copy, without_memory
from ..memory.steps import StepMemory, make_optimizer, step_memory
from ..zoo.quiet import quiet_transformers

WAYS = {
    "LoRA": {"tuner": "lora"},
    "rows": {"tuner": "rows"},
    "columns": {"tuner": "columns"},
    "LoRA without attention": {"tuner": "lora", "freeze_attention": True},
    "full": {"tuner": "full"},
}
RUNS = 2  # steps that are timed, after 2 to warm up
MARGIN = 1.5  # a step of another way may take so many times that of the first
UNTIMED = 3  # steps' worth of what comes before the timed ones: the copy, two counted steps


@dataclass(frozen=True)
class Tuning:
    """One way to tune, with AdamW.

    Attributes:
        name: as in tables: "LoRA", "rows", "columns", "LoRA without attention", "full"; each of them also
            with ", checkpointing".
        method, modes, freeze_attention: as in a recipe's `tune`.
        checkpointing: each block of the model is computed again in the backward pass.
        trainable_parameters: how many numbers train, with the head.
        peak_bytes: most bytes alive in a step: weights, gradients, AdamW's states, activations, the batch.
        step_seconds: of one step with this batch.
        measured: whether the seconds are, or follow from FLOPs.
    """

    name: str
    method: str
    modes: str | None
    freeze_attention: bool
    checkpointing: bool
    trainable_parameters: int
    peak_bytes: int
    step_seconds: float
    measured: bool


def tunings(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    rank: int = 8,
    ways: Sequence[str] | None = None,
    seconds: float = 30.0,
    device: str | torch.device | None = None,
) -> list[Tuning]:
    """Memory and time of a training step for each way to tune `model`.

    The first way, LoRA, is always run: a few steps of forward, backward and AdamW. Then, in the order of the
    result, each way that fits into what is left of `seconds` is run in turns with it, on a copy of the model;
    its seconds are those of LoRA times the median ratio. All ways together cost some hundred steps.

    The others are predicted: memory with tensors that have no storage (the same number, see
    `serpette.memory`), seconds by the ratio of the training FLOPs to those of the same way without
    checkpointing if that was run, else to LoRA's; checkpointing adds one forward pass. FLOPs know nothing of
    the optimiser's step, so that full tuning is predicted a little too fast. A prediction costs as much as
    some ten steps of a small model; a way that is quicker to run is run.

    Args:
        model: without adapters. Left as it is; two copies are in memory at a time.
        inputs: a batch with its labels, of the size that will be tuned with.
        rank: of LoRA; of rows and columns how many of each layer.
        ways: names as in the result, of those that are asked for; None: all.
        seconds: after which no further way is run unless that is quicker than to predict it; LoRA's steps and
            predictions are not cut short. 30: all ways of a model with steps of about a third of a second.
        device: whose memory is meant and where the steps run; None: where the model is.

    Returns:
        The ways this model has a place for: without attention there is none that leaves it out, without
        support of transformers none with checkpointing, without Linear layers only "full".

    Raises:
        ValueError: no way fits the model.

    Example:
        >>> from serpette.zoo import tiny
        >>> batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
        >>> found = tunings(tiny("vit"), batch, rank=2)
        >>> found[0].name, found[0].measured, found[0].step_seconds > 0, len(found)
        ('LoRA', True, True, 10)
    """
    start = perf_counter()
    device = torch.device(device or next(model.parameters()).device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    setups = {
        name + (", checkpointing" if checkpointing else ""): Setup(**way, r=rank, checkpointing=checkpointing)
        for checkpointing in (False, True)
        for name, way in WAYS.items()
    }
    if ways is not None:
        setups = {name: setups[name] for name in ways}
    found: list[Tuning] = []
    steps: _Steps | None = None  # of the first way, LoRA
    own: list[float] = []  # its seconds
    base_flops, predicting = 0, 0.0
    with quiet_transformers(), _own_generator(device):
        for name, setup in setups.items():
            begin = perf_counter()
            left = max(seconds - (begin - start), predicting)
            try:
                if steps is None:
                    steps = _Steps(model, setup, inputs, device)
                    own, memory = [steps.seconds() for _ in range(RUNS)], steps.memory
                    taken, measured = median(own), True
                elif _expected(median(own)) <= left and _has_room(setup, steps.memory, device):
                    other = _Steps(model, setup, inputs, device)
                    pairs = [(other.seconds(), steps.seconds()) for _ in range(RUNS)]
                    own += [mine for _, mine in pairs]
                    memory, measured = other.memory, True
                    taken = median(own) * median(its / mine for its, mine in pairs)
                    del other
                else:
                    memory, flops, forward = _predicted(model, setup, inputs, device)
                    before = next((t for t in found if f"{t.name}, checkpointing" == name), found[0])
                    if before.measured and before is not found[0]:
                        ratio = 1 + forward / flops
                    else:
                        before = found[0]
                        if not base_flops:
                            _, base_flops, again = _predicted(model, setups[before.name], inputs, device)
                            base_flops += again * before.checkpointing
                        ratio = (flops + forward * setup.checkpointing) / base_flops
                    taken, measured = before.step_seconds * ratio, False
                    predicting = perf_counter() - begin
            except _NoPlace as reason:
                if name == [*setups][-1] and not found:
                    raise ValueError(f"{type(model).__name__} cannot be tuned: {reason}") from None
                continue
            rows = setup.tuner in ("rows", "columns")
            found.append(
                Tuning(
                    name=name,
                    method="rows" if rows else setup.tuner,
                    modes=setup.tuner if rows else None,
                    freeze_attention=setup.freeze_attention,
                    checkpointing=setup.checkpointing,
                    trainable_parameters=memory.parameters,
                    peak_bytes=memory.peak,
                    step_seconds=taken,
                    measured=measured,
                )
            )
    return found


class _NoPlace(Exception):
    """The model has no place for a way to tune."""


class _Steps:
    """A copy of `model` that is tuned; two counted steps have warmed it up, and AdamW has its states."""

    def __init__(self, model: nn.Module, setup: Setup, inputs: dict[str, Tensor], device: torch.device):
        self.model = _placed(copy.deepcopy(model).to(device), setup)
        self.inputs, self.device = inputs, device
        self.memory = step_memory(self.model, inputs)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer("adamw", parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Of one step."""
        self._wait()
        start = perf_counter()
        loss_of(call(self.model, self.inputs)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _placed(model: nn.Module, setup: Setup) -> nn.Module:
    try:
        return tuned(model, setup)
    except ValueError as reason:
        raise _NoPlace(reason) from None


def _expected(step: float) -> float:
    """Seconds that running another way may take, with a step of the first way before each of its own."""
    return step * (MARGIN * (UNTIMED + RUNS) + RUNS)


def _has_room(setup: Setup, first: StepMemory, device: torch.device) -> bool:
    """Whether another copy can surely be tuned: no way but full tuning holds much more than LoRA."""
    needed = 2 * first.peak + (4 * first.weights if setup.tuner == "full" else 0)
    return needed < _free(device)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _predicted(
    model: nn.Module, setup: Setup, inputs: dict[str, Tensor], device: torch.device
) -> tuple[StepMemory, int, int]:
    """(memory of a step, training FLOPs without checkpointing, FLOPs of a forward pass)."""
    with without_memory(device.type) as mode:
        batch = {name: mode.from_tensor(value) for name, value in inputs.items()}
        fake = _placed(fake_copy(model, mode).to(device), setup)
        memory = step_memory(fake, batch, foreach=device.type == "cuda" or None)
        # counted in evaluation mode, where nothing is checkpointed
        return memory, train_flops(fake, batch), forward_flops(fake, batch)


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """New adapters and dropout draw from a generator that is put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
