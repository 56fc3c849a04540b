"""What a training step holds: weights, trained parameters, gradients, optimiser states, activations, peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import call, loss_of
from ..registry import near
from .tracker import LiveBytes, storage_bytes, tensors_of

OPTIMIZERS = ("adamw", "adamw-fused", "adamw-8bit", "sgd", "adafactor")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step in the steady state, after a first step has made the optimiser's states.

    Attributes:
        parameters: how many numbers train; the only field that is not bytes.
        weights: frozen parameters and buffers.
        trainable: parameters that train.
        gradients: of all of them, when the backward pass ends.
        states: of the optimiser.
        activations: alive for the backward pass when the forward pass ends.
        forward_peak, backward_peak, step_peak: most bytes alive in each part of the step, all counted.
        gradients_at_peak: gradients that are there when the largest of the three is reached.
    """

    parameters: int
    weights: int
    trainable: int
    gradients: int
    states: int
    activations: int
    forward_peak: int
    backward_peak: int
    step_peak: int
    gradients_at_peak: int

    @property
    def peak(self) -> int:
        """Most bytes alive in the step."""
        return max(self.forward_peak, self.backward_peak, self.step_peak)

    @property
    def at_peak(self) -> dict[str, int]:
        """The peak in three parts: weights; trained parameters, gradients and states; all the rest."""
        training = self.trainable + self.states + self.gradients_at_peak
        return {
            "weights": self.weights,
            "training": training,
            "activations": self.peak - self.weights - training,
        }


def step_memory(
    model: nn.Module, batch: Any, optimizer: str = "adamw", foreach: bool | None = None
) -> StepMemory:
    """Runs two training steps of `model` on `batch` and counts the bytes of the second.

    The parameters of a real model move by two steps. Gradients are freed between steps, as the Trainer does.
    The same function measures a model of fake tensors, and then predicts.

    Args:
        model: what trains in it is what requires a gradient; it is put into training mode.
        batch: a dict with what the loss needs (labels), a tuple or one tensor; see `serpette.cost.loss_of`.
        optimizer: one of `OPTIMIZERS`.
        foreach: whether `"adamw"` and `"sgd"` work on all parameters together, which holds a copy of them
            for a moment. None: as torch does, on CUDA only.

    Raises:
        ValueError: nothing trains, or an optimiser that is unknown or not installed.

    >>> found = step_memory(nn.Linear(4, 3), torch.zeros(2, 4), "sgd")
    >>> found.trainable, found.gradients, found.states
    (60, 60, 0)
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter with requires_grad=True; nothing would be trained")
    stepper = make_optimizer(optimizer, parameters, foreach)
    model.train()
    live = LiveBytes()
    live.hold([*tensors_of(model), *_tensors(batch)])

    def count(parameter: Tensor) -> None:
        live.tagged += storage_bytes([parameter.grad])  # type: ignore[list-item] - it has just been made

    hooks = [p.register_post_accumulate_grad_hook(count) for p in parameters]
    peaks: list[tuple[int, int]] = []

    def part_ends() -> None:
        peaks.append((live.peak, live.tagged_at_peak))
        live.restart()

    try:
        with live, torch.enable_grad():
            for _ in range(2):
                live.tagged = 0
                live.restart()
                before = live.now
                loss = loss_of(call(model, batch))
                activations = live.now - before
                part_ends()
                loss.backward()
                del loss
                part_ends()
                gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)
                stepper.step()
                part_ends()
                stepper.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    (forward, _), (backward, _), (step, _) = peaks[-3:]
    ids = {id(p) for p in parameters}
    return StepMemory(
        parameters=sum(p.numel() for p in parameters),
        weights=storage_bytes(t for t in tensors_of(model) if id(t) not in ids),
        trainable=storage_bytes(parameters),
        gradients=gradients,
        states=storage_bytes(t for state in stepper.state.values() for t in _tensors(state)),
        activations=activations,
        forward_peak=forward,
        backward_peak=backward,
        step_peak=step,
        gradients_at_peak=max(peaks[-3:])[1],
    )


def inference_memory(model: nn.Module, batch: Any) -> int:
    """Most bytes alive in a forward pass without gradients, in evaluation mode: the paper's mem_M (D.1)."""
    live = LiveBytes()
    live.hold([*tensors_of(model), *_tensors(batch)])
    model.eval()
    with live, torch.no_grad():
        call(model, batch)
    return live.peak


def floor_memory(model: nn.Module, batch: Any) -> int:
    """Bytes of activations at the peak when nothing trains but gradients must pass all of a frozen model.

    No tuner that reaches the first layer can do with less, unless it computes something twice.

    Args:
        model: is frozen by this; its input embeddings ask for a gradient during the pass.
        batch: as for `step_memory`.
    """
    model.requires_grad_(False).train()
    entry = _entry(model)
    handle = entry.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    live = LiveBytes()
    live.hold([*tensors_of(model), *_tensors(batch)])
    try:
        with live, torch.enable_grad():
            loss_of(call(model, batch)).backward()
    finally:
        handle.remove()
    return live.peak - storage_bytes(tensors_of(model))


def _entry(model: nn.Module) -> nn.Module:
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        return embeddings
    return next(m for m in model.modules() if next(m.children(), None) is None and list(m.parameters()))


def make_optimizer(
    name: str, parameters: list[nn.Parameter], foreach: bool | None = None
) -> torch.optim.Optimizer:
    """The optimiser called `name` in `OPTIMIZERS`, over `parameters`.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, 1e-4, foreach=foreach)
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, 1e-4, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, 1e-4, foreach=foreach)
    if name == "adafactor":
        if not hasattr(torch.optim, "Adafactor"):
            raise ValueError(f"optimizer='adafactor' needs torch 2.5, and this is {torch.__version__}")
        return torch.optim.Adafactor(parameters, 1e-4)
    if name == "adamw-8bit":
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(parameters[0], FakeTensor):
            return EightBitStates(parameters)
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found] - an extra
        except ImportError:
            raise ValueError(
                "optimizer='adamw-8bit' runs with bitsandbytes, which is not installed "
                "(pip install bitsandbytes); without --measure it is predicted"
            ) from None
        return AdamW8bit(parameters, 1e-4)
    raise ValueError(f"optimizer={name!r} is not known{near(name, OPTIMIZERS)}")


class EightBitStates(torch.optim.Optimizer):
    """Holds what bitsandbytes' AdamW8bit would and updates nothing: for predictions.

    Two states of a byte a number with a float32 scale for each block of 256; tensors below 4,096 numbers keep
    float32 states.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Makes the states, the first time."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                small = p.numel() < 4096
                kind = torch.float32 if small else torch.uint8
                for number in (1, 2):
                    self.state[p][f"state{number}"] = torch.zeros_like(p, dtype=kind)
                    if not small:
                        self.state[p][f"absmax{number}"] = torch.zeros(-(-p.numel() // 256), device=p.device)


def _tensors(value: Any) -> Iterable[Tensor]:
    from torch.utils._pytree import tree_leaves

    return (
        t for t in tree_leaves(dict(value) if hasattr(value, "items") else value) if isinstance(t, Tensor)
    )
