"""What a piece of work costs: seconds, peak memory, FLOPs; and on which machine that was."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil
import torch
from torch import nn

SAMPLE_SECONDS = 0.02  # how often the resident memory is read: short beside any batch, cheap beside any work
PACKAGES = (
    "serpette", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors",
    "numpy", "scipy", "scikit-learn", "pyarrow",
)  # fmt: skip


@dataclass
class Cost:
    """What was measured: wall-clock `seconds`, and `peak_bytes` of memory while it ran."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measure(device: str | torch.device = "cpu") -> Iterator[Cost]:
    """Time and peak memory of the block; filled in when the block ends, also when it raises.

    On a CPU the memory is the resident size of the whole process, read at the start, at the end and every
    20 ms between by a thread; a shorter peak may be missed. On CUDA it is what PyTorch allocated on the
    device; the device's peak counter is reset at the start, so nested measurements of CUDA memory would
    disturb each other, and pending kernels are waited for at both ends.

    Args:
        device: where the work runs, `"cpu"` or `"cuda"`, `"cuda:1"`.

    Example:
        >>> with measure() as cost:
        ...     total = sum(range(1000))
        >>> cost.seconds > 0 and cost.peak_bytes > 0
        True
    """
    device, cost = torch.device(device), Cost()
    cuda = device.type == "cuda"
    process, done = psutil.Process(), threading.Event()

    def look() -> None:
        cost.peak_bytes = max(cost.peak_bytes, process.memory_info().rss)

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            look()

    sampler = None
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        look()
        sampler = threading.Thread(target=sample, daemon=True, name="serpette-memory")
        sampler.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        if sampler is None:
            cost.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            done.set()
            sampler.join()
            look()


def versions() -> dict[str, str]:
    """Version of Python and of the packages that shape a result, those that are installed.

    >>> "torch" in versions()
    True
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    if "serpette" not in found:  # run from its source tree
        import serpette

        found["serpette"] = getattr(serpette, "__version__", "source")
    return found


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The machine: `cpu` name, usable `cores`, torch `threads`, `memory_bytes`, `device` and, on CUDA, `gpu`.

    >>> hardware()["device"]
    'cpu'
    """
    device = torch.device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return machine


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def forward_flops(model: nn.Module, inputs: Any) -> int:
    """Floating-point operations (a multiply-add is two) of one forward pass over `inputs`.

    Counts matrix products and convolutions, as torch's FlopCounterMode does. Attention is run in its plain
    form while counting, because the fused CPU kernel has no formula in most releases of torch; a causal
    mask saves nothing in this count. Nothing is trained and no buffer is changed.

    Args:
        model: any module; counted in evaluation mode, then set back.
        inputs: a dict (keyword arguments), a tuple or list (positional) or one tensor.

    >>> forward_flops(nn.Linear(3, 5, bias=False), torch.zeros(7, 3))
    210
    """
    return _count(model, inputs, training=False)


def train_flops(model: nn.Module, inputs: Any) -> int:
    """Floating-point operations of one forward and backward pass, for the parameters that train.

    Frozen parts cost only what the gradients of others need to pass through them. The loss is `.loss` of
    the output where there is one (give the labels), else the sum of the logits or of the output. The
    optimiser's step, which has no matrix product, and gradient checkpointing are not counted. `.grad` is
    left as it was.

    Args:
        model: any module with at least one parameter that requires a gradient.
        inputs: as for `forward_flops`.

    Raises:
        ValueError: when no parameter requires a gradient.

    >>> train_flops(nn.Linear(3, 5, bias=False), torch.zeros(7, 3))
    420
    """
    return _count(model, inputs, training=True)


def _count(model: nn.Module, inputs: Any, training: bool) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameters = [p for p in model.parameters() if p.requires_grad]
    if training and not parameters:
        raise ValueError("model has no parameter with requires_grad=True; nothing would be trained")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        counter = FlopCounterMode(display=False)
        with torch.set_grad_enabled(training), sdpa_kernel(SDPBackend.MATH), counter:
            output = call(model, inputs)
            if training:
                torch.autograd.grad(loss_of(output), parameters, allow_unused=True)
        return int(counter.get_total_flops())
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`: a dict (keyword arguments), a tuple or list (positional) or one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def loss_of(output: Any) -> torch.Tensor:
    """`.loss` of a model's output where there is one, else the sum of the logits or of the output."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    if isinstance(output, torch.Tensor):
        return output.float().sum()
    if getattr(output, "logits", None) is not None:
        return output.logits.float().sum()
    return output[0].float().sum()
