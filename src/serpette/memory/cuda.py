"""The paper's protocol (SPSFT, D.1) on a GPU: each figure from a fresh process, as torch's allocator counts.

mem_M: a forward pass of the frozen model in evaluation mode, without gradients, on the training batch.
mem_TTL: three steps to warm up, so that the optimiser's states exist, then the most of ten steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import call, loss_of

WARM_UP, STEPS = 3, 10


def cuda_memory(
    open_model: Callable[[], nn.Module], setups: Sequence[Any], shape: Any, device: str
) -> tuple[int, list[dict[str, int]]]:
    """(mem_M, [{mem_TTL as `peak`, and the peaks of forward, backward and step} of each setup]), in bytes.

    Args:
        open_model: gives the model in the CPU's memory; is sent to other processes, so no lambda.
        setups: of `serpette.memory.compare.Setup`.
        shape: (tokens, batch size, dtype).
        device: `"cuda"`, `"cuda:1"`.

    Raises:
        ValueError: no such device.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r} is not to be had here; use device='cpu'")
    base = _fresh(_inference, open_model, shape, device)
    return base, [_fresh(_steps, open_model, setup, shape, device) for setup in setups]


def _fresh(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def _batch(model: nn.Module, shape: Any, device: str) -> dict[str, Tensor]:
    from .compare import _batch

    return {key: value.to(device) for key, value in _batch(model, *shape).items()}


def _inference(open_model: Callable[[], nn.Module], shape: Any, device: str) -> int:
    model = open_model().to(shape[2])
    batch = _batch(model, shape, device)
    model = model.to(device).eval()  # type: ignore[arg-type] - transformers' stub of nn.Module.to
    torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        call(model, batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _steps(open_model: Callable[[], nn.Module], setup: Any, shape: Any, device: str) -> dict[str, int]:
    from .compare import tuned
    from .steps import make_optimizer

    model = open_model().to(shape[2])
    batch = _batch(model, shape, device)
    model = tuned(model, setup).to(device).train()
    optimizer = make_optimizer(setup.optimizer, [p for p in model.parameters() if p.requires_grad])
    peaks: dict[str, int] = dict.fromkeys(("forward_peak", "backward_peak", "step_peak"), 0)

    def part_ends(part: str, counts: bool) -> None:
        torch.cuda.synchronize(device)
        if counts:
            peaks[part] = max(peaks[part], torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)

    for number in range(WARM_UP + STEPS):
        counts = number >= WARM_UP
        part_ends("forward_peak", False)
        loss = loss_of(call(model, batch))
        part_ends("forward_peak", counts)
        loss.backward()
        del loss
        part_ends("backward_peak", counts)
        optimizer.step()
        part_ends("step_peak", counts)
        optimizer.zero_grad(set_to_none=True)
    return {**peaks, "peak": max(peaks.values())}
