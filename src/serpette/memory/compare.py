"""Several ways to tune one model, side by side: predicted at its true shapes, and measured where it fits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..cost import hardware, versions
from ..registry import near
from ..tuning import trainable
from .cuda import cuda_memory
from .shapes import PRESETS, example_batch, fake_copy, from_configuration, head_of, preset, without_memory
from .steps import OPTIMIZERS, floor_memory, inference_memory, step_memory

OF_ROWS = ("rows", "columns", "both")
TUNERS = (*OF_ROWS, "lora", "dora", "shira", "full", "head")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """One way to tune: what trains, and what is done to save memory.

    Args:
        tuner: one of `TUNERS`.
        r: rows or columns of each layer, or the rank of LoRA, DoRA and SHiRA.
        fraction: of the rows or columns, in place of `r`.
        dropout: of LoRA and DoRA; it keeps a second copy of each layer's input.
        freeze_attention: nothing trains inside attention blocks.
        checkpointing: of each block of the model, as transformers does it.
        recompute: norm outputs and gated products are computed again, see `recompute`.
        optimizer: one of `OPTIMIZERS`.
    """

    tuner: str = "rows"
    r: int = 16
    fraction: float | None = None
    dropout: float = 0.0
    freeze_attention: bool = False
    checkpointing: bool = False
    recompute: bool = False
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.tuner not in TUNERS:
            raise ValueError(f"tuner={self.tuner!r} is not known{near(self.tuner, TUNERS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is not known{near(self.optimizer, OPTIMIZERS)}")
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.fraction is not None and self.tuner not in OF_ROWS:
            raise ValueError(f"fraction={self.fraction} is of rows and columns; give {self.tuner!r} an r")

    @property
    def name(self) -> str:
        """What it is called in tables."""
        words = [("FA " if self.freeze_attention else "") + self.tuner]
        if self.tuner not in ("full", "head"):
            words.append(f"r {self.r}" if self.fraction is None else f"{self.fraction:.2g}")
        if self.dropout and self.tuner in ("lora", "dora"):
            words.append(f"dropout {self.dropout:g}")
        words += [word for word in ("checkpointing", "recompute") if getattr(self, word)]
        if self.optimizer != "adamw":
            words.append(self.optimizer)
        return ", ".join(words)


def parse(text: str, default: Setup | None = None) -> Setup:
    """`"lora,r=64,dropout=0.1"` -> a Setup; what it does not say is that of `default`.

    Raises:
        ValueError: an unknown tuner or key, or a value of another type.

    >>> parse("lora,r=64,dropout=0.1").name
    'lora, r 64, dropout 0.1'
    """
    tuner, *pairs = text.split(",")
    kinds = {"r": int, "fraction": float, "dropout": float, "tuner": str, "optimizer": str}
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.strip().partition("=")
        known = [f.name for f in fields(Setup)]
        if key not in known:
            raise ValueError(f"tuner={text!r}: {key!r} is not an option{near(key, known)}")
        if key in kinds:
            try:
                given[key] = kinds[key](value)
            except ValueError:
                raise ValueError(f"tuner={text!r}: {key} must be a number, not {value!r}") from None
        elif value.lower() in ("", "true", "false"):
            given[key] = not equals or value.lower() == "true"
        else:
            raise ValueError(f"tuner={text!r}: {key} must be true or false, not {value!r}")
    default, tuner = default or Setup(), tuner.strip()
    if tuner in TUNERS and tuner not in OF_ROWS:
        given.setdefault("fraction", None)
    return replace(default, tuner=tuner, **given)


def opened(open_model: Callable[..., tuple[nn.Module, Any]], name: str, **options: Any) -> nn.Module:
    """The model called `name`, real: a preset with random weights, else what `open_model` gives."""
    return preset(name) if name in PRESETS else open_model(name, **options)[0]


def compare(
    model: str | nn.Module,
    setups: Sequence[Setup],
    *,
    tokens: int = 2048,
    batch_size: int = 1,
    dtype: str = "float32",
    labels: int | None = None,
    device: str | None = None,
    measure: bool = False,
    open_model: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Memory of a training step for each of `setups`, in bytes.

    Predicted: the same operations on tensors without storage, counted one by one, with fused attention. Work
    space inside an operation and what an allocator rounds up are left out.

    Args:
        model: a name of `PRESETS`; a hub id or local folder, of which the configuration is read and no
            weights; or a model, of which a copy without storage is made.
        setups: what to compare.
        tokens: length of the texts; images have the model's size.
        batch_size: texts or images in a step.
        dtype: of the frozen weights; adapters in half precision are made float32 by peft.
        labels: width of the head of a model made from its configuration; None: what that says.
        device: whose memory is meant, and where `measure` runs: `"cpu"`, `"cuda"`. They differ in the masks
            of dropout and in the optimiser's step. None: `"cpu"` to measure without a GPU, else `"cuda"`.
        measure: also run the steps with real tensors: on a CPU counted as in the prediction, on CUDA by the
            paper's protocol (D.1), each in a fresh process.
        open_model: gives the real model to measure; needed for a hub id or a folder. For CUDA a function that
            can be sent to another process.

    Returns:
        A dict for `result.json`: what was run, and `rows`, one for each setup. `lower_bound` is what is fixed
        (weights, trained, gradients, states) and the activations of the frozen model with a gradient for its
        embeddings; the gradients come when activations go, so a peak can be smaller by them. It is None for a
        head alone and with `recompute`, which need less.

    Raises:
        ValueError: what the setups, the model or this machine's memory do not allow.

    Example:
        `compare("llama-2-7b", [parse("rows,r=128"), parse("lora,r=64,dropout=0.1")])`
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known{near(dtype, DTYPES)}")
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not setups:
        raise ValueError("setups is empty; give at least one, such as parse('rows,r=128')")
    if any(setup.tuner == "shira" for setup in setups):
        raise ValueError(
            "tuner='shira' works with sparse tensors, which cannot be predicted; measure a real model "
            "with serpette.memory.step_memory"
        )
    kind = DTYPES[dtype]
    device = device or ("cpu" if measure and not torch.cuda.is_available() else "cuda")
    foreach = torch.device(device).type == "cuda" or None
    rows: list[dict[str, Any]] = []
    floors: dict[bool, int] = {}
    with without_memory(device) as mode:

        def make() -> nn.Module:
            return _fake(model, mode, kind, labels)

        base = make()
        batch = _batch(base, tokens, batch_size, kind)
        inference = inference_memory(base, batch)
        for setup in setups:
            if setup.checkpointing not in floors:
                frozen = _checkpointed(make()) if setup.checkpointing else make()
                floors[setup.checkpointing] = floor_memory(frozen, batch)
            found = step_memory(tuned(make(), setup), batch, setup.optimizer, foreach)
            fixed = found.weights + found.trainable + found.gradients + found.states
            rows.append(
                {
                    "name": setup.name,
                    "setup": asdict(setup),
                    **asdict(found),
                    "peak": found.peak,
                    "at_peak": found.at_peak,
                    "over_weights": found.peak - found.weights,
                    "over_inference": found.peak - inference,
                    "lower_bound": None
                    if setup.tuner == "head" or setup.recompute
                    else fixed + floors[setup.checkpointing],
                }
            )
    result: dict[str, Any] = {
        "kind": "memory",
        "model": model if isinstance(model, str) else type(model).__name__,
        "tokens": tokens if "input_ids" in batch else None,
        "batch": {key: list(value.shape) for key, value in batch.items()},
        "dtype": dtype,
        "device": device,
        "attention": getattr(getattr(base, "config", None), "_attn_implementation", None),
        "weights": sum(p.numel() * p.element_size() for p in base.parameters()),
        "inference": inference,
        "rows": rows,
        "versions": versions(),
    }
    if measure:
        result["hardware"] = hardware(device)
        _measure(result, setups, open_model or partial(_given, model), (tokens, batch_size, kind), device)
    return result


def _given(model: str | nn.Module) -> nn.Module:
    if isinstance(model, str) and model not in PRESETS:
        raise ValueError(f"measure=True needs open_model, which gives the real {model!r}")
    return preset(model) if isinstance(model, str) else model


def _measure(
    result: dict[str, Any], setups: Sequence[Setup], open_model: Any, shape: Any, device: str
) -> None:
    if torch.device(device).type == "cuda":
        inference, found = cuda_memory(open_model, setups, shape, device)
        result["measured_inference"] = inference
        for row, measured in zip(result["rows"], found, strict=True):
            row["measured"] = measured
        return
    needed = max(row["peak"] for row in result["rows"]) + result["weights"]
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"measure=True needs {needed / GIB:.1f} GiB and {free / GIB:.1f} are free; leave it off, or take "
            "fewer tokens or a smaller model"
        )
    base = open_model().to(shape[2])
    batch = _batch(base, *shape)
    for setup, row in zip(setups, result["rows"], strict=True):
        found = step_memory(tuned(copy.deepcopy(base), setup), batch, setup.optimizer)
        row["measured"] = {**asdict(found), "peak": found.peak}
    result["measured_inference"] = inference_memory(base, batch)


def tuned(model: nn.Module, setup: Setup) -> nn.Module:
    """`model` with what `setup` says, ready to train.

    Raises:
        ValueError: a tuner or a way to save memory that the model has no place for.
    """
    if setup.checkpointing:
        _checkpointed(model)
    method: Any = "rows" if setup.tuner in ("columns", "both") else setup.tuner
    options: dict[str, Any] = {}
    if method == "rows":
        options = {"modes": setup.tuner}
        if setup.fraction is not None:
            options["fraction"] = setup.fraction
    model = trainable(
        model,
        head_of(model),
        method,
        rank=setup.r,
        dropout=setup.dropout,
        freeze_attention=setup.freeze_attention,
        **options,
    )
    if setup.recompute:
        from .recompute import recompute

        recompute(model)
    return model


def _checkpointed(model: Any) -> nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(f"checkpointing=True needs a transformers model; {type(model).__name__} is none")
    enable({"use_reentrant": False})
    return model


def _fake(model: str | nn.Module, mode: Any, dtype: torch.dtype, labels: int | None) -> nn.Module:
    if isinstance(model, nn.Module):
        return fake_copy(model.to(dtype), mode)
    changes = {} if labels is None else {"num_labels": labels}
    with _default_dtype(dtype):
        return preset(model, **changes) if model in PRESETS else from_configuration(model, **changes)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batch(model: nn.Module, tokens: int, batch_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = example_batch(model, tokens, batch_size)
    return {key: value.to(dtype) if key == "pixel_values" else value for key, value in batch.items()}
