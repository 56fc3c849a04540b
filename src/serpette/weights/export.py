"""A pruned model for others to run: ONNX, checked against torch; 2:4 kernels, where they are faster.

`save_pretrained` needs no help: zeros are numbers, and a shrunk model has a stock configuration.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import call

HALVES = (torch.float16, torch.bfloat16)


def to_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Writes `model` as ONNX, and runs the file in onnxruntime to see that it computes the same.

    Zeros stay zeros, but are stored and multiplied like other numbers. Needs the extra `onnx`.

    Args:
        model: float32, a LoRA merged; exported in evaluation mode without a cache of keys and values.
        example_inputs: a dict (keyword arguments), a tuple (positional) or one tensor, on the model's device;
            two examples or more.
        path: of the file; what exceeds 2 GB is stored beside it.
        dynamic: the file takes any number of examples (dimension 0 of each input) and, of inputs of whole
            numbers (n, length), any length; False: the shapes of `example_inputs` alone.
        tolerance: largest difference, relative to the largest output, or 1. The default leaves room for
            another order of summation in float32 through dozens of layers, not for a wrong operator.

    Returns:
        The largest difference seen, in those units; in the dynamic case also on other shapes.

    Raises:
        ValueError: when the outputs differ by more than `tolerance` (the file is removed then), the model is
            not float32, a LoRA is not merged, the inputs are too few, or one of onnx, onnxscript and
            onnxruntime is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> to_onnx(model, torch.randn(2, 4), "model.onnx") < 1e-5  # doctest: +SKIP
        True
    """
    try:
        import onnx  # noqa: F401 - named in the error, needed by the exporter
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"to_onnx needs {error.name}: pip install 'serpette[onnx]'") from error

    wrong = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
    if wrong is not None:
        dtype = model.get_parameter(wrong).dtype
        raise ValueError(f"parameter {wrong!r} is {dtype}, and to_onnx takes float32: give model.float()")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("the model has a LoRA beside its weights; merge it first: merge_and_unload()")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    named = isinstance(inputs, Mapping)
    shapes = _dynamic_shapes(inputs) if dynamic else None

    path = Path(path)
    with _evaluation_without_cache(model), _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            model,
            () if named else tuple(inputs),
            kwargs=dict(inputs) if named else None,
            output_names=_output_names(call(model, inputs)),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        program.save(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        try:
            return max(
                _difference(model, session, i, tolerance)
                for i in ([inputs, _other_shapes(inputs)] if dynamic else [inputs])
            )
        except ValueError:
            path.unlink()
            Path(f"{path}.data").unlink(missing_ok=True)
            raise


def _items(inputs: Any) -> list[tuple[str, Tensor]]:
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(str(name), tensor) for name, tensor in pairs]


def _has_length(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _dynamic_shapes(inputs: Any) -> Any:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = []
    for name, tensor in _items(inputs):
        sizes = tensor.shape[: 1 + _has_length(tensor)]
        if not sizes or min(sizes) < 2:
            raise ValueError(
                f"example_inputs: {name!r} has shape {tuple(tensor.shape)}, but a dynamic file is traced "
                "with two examples or more, of two tokens or more; give such, or dynamic=False"
            )
        shapes.append({0: batch, 1: length} if _has_length(tensor) else {0: batch})
    return dict(zip(inputs, shapes, strict=True)) if isinstance(inputs, Mapping) else tuple(shapes)


def _other_shapes(inputs: Any) -> Any:
    """One example more, one token less."""
    others = []
    for _, tensor in _items(inputs):
        more = torch.cat([tensor, tensor[:1]])
        others.append(more[:, :-1] if _has_length(tensor) else more)
    return dict(zip(inputs, others, strict=True)) if isinstance(inputs, Mapping) else tuple(others)


def _output_names(output: Any) -> list[str] | None:
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return list(output)
    return None


def _difference(model: nn.Module, session: Any, inputs: Any, tolerance: float) -> float:
    from torch.utils._pytree import tree_leaves

    arrays = [tensor.cpu().numpy() for _, tensor in _items(inputs)]
    names = list(inputs) if isinstance(inputs, Mapping) else [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, arrays, strict=True)))
    largest = 0.0
    expectations = tree_leaves(call(model, inputs))
    for output, value, array in zip(session.get_outputs(), expectations, found, strict=True):
        expected, got = value.double().cpu(), torch.from_numpy(array).double()
        off = (expected - got).abs() / expected.abs().max().clamp(min=1)
        worst = int(off.argmax())
        if not off.max() <= tolerance:  # NaN is not
            raise ValueError(
                f"output {output.name!r}: onnxruntime gives {got.flatten()[worst]:g} where torch gives "
                f"{expected.flatten()[worst]:g}, which is above tolerance={tolerance}; the file was removed"
            )
        largest = max(largest, float(off.max()))
    return largest


@contextmanager
def _evaluation_without_cache(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache:
        config.use_cache = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if cache:
            config.use_cache = cache


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about packages that are not installed and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def why_not_semi_structured(linear: nn.Linear) -> str | None:
    """Why a linear layer cannot run on the 2:4 kernels of torch; None if it can.

    >>> why_not_semi_structured(nn.Linear(4, 4))
    'is torch.float32, not float16 or bfloat16'
    """
    rows, columns = linear.weight.shape
    if linear.weight.dtype not in HALVES:
        return f"is {linear.weight.dtype}, not float16 or bfloat16"
    if rows % 32 or columns % 64:
        return f"has shape ({rows}, {columns}), not multiples of (32, 64)"
    if (linear.weight.detach().reshape(-1, 4) != 0).sum(1).max() > 2:
        return "is not 2:4 sparse"
    return None


def semi_structured(model: nn.Module, example_inputs: Any, repeats: int = 20) -> dict[str, dict[str, Any]]:
    """Converts, in place, the 2:4 linear layers of a model that this makes faster on this GPU.

    Each layer is timed by itself on the inputs that it gets from `example_inputs`, dense and sparse in turns.
    It stays dense unless the interval of the ratio of its times lies below 1. A converted layer runs, but
    does not train and is not written by `save_pretrained`: save before.

    Args:
        model: on a CUDA device, in float16 or bfloat16, pruned with `pattern="2:4"`.
        example_inputs: as in use; the number of tokens decides which kernel is faster.
        repeats: timed pairs a layer, 6 or more.

    Returns:
        For each linear layer `converted`, the `reason` why not or None, and where it was timed `time_ratio`
        (sparse / dense) and its `interval` at 95 %.

    Raises:
        ValueError: when no layer is 2:4 sparse with a fitting shape and dtype, or the model is not on CUDA.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    result: dict[str, dict[str, Any]] = {
        n: {"converted": False, "reason": why_not_semi_structured(m)} for n, m in linears.items()
    }
    ready = {name: linears[name] for name, r in result.items() if r["reason"] is None}
    if not ready:
        reasons = "; ".join(f"{name} {r['reason']}" for name, r in list(result.items())[:3])
        raise ValueError(
            f"no linear layer can be converted ({reasons}); prune with pattern='2:4' in bfloat16"
        )
    elsewhere = next((name for name, linear in ready.items() if not linear.weight.is_cuda), None)
    if elsewhere is not None:
        raise ValueError(
            f"layer {elsewhere!r} is on {linears[elsewhere].weight.device}, but 2:4 kernels need CUDA: "
            "model.cuda(), on a GPU of compute capability 8.0 or newer"
        )
    inputs: dict[str, Tensor] = {}

    def keep_input(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0].detach()

        return hook

    hooks = [linear.register_forward_pre_hook(keep_input(name)) for name, linear in ready.items()]
    try:
        with _evaluation_without_cache(model), torch.no_grad():
            call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, linear in ready.items():
        if name not in inputs:
            result[name]["reason"] = "is not used by example_inputs"
        else:
            result[name] = _convert_if_faster(linear, inputs.pop(name), repeats)
    return result


def _convert_if_faster(linear: nn.Linear, x: Tensor, repeats: int) -> dict[str, Any]:
    from torch.sparse import to_sparse_semi_structured

    from .measure import median_interval, seconds_in_turns

    dense = linear.weight
    try:
        sparse = nn.Parameter(to_sparse_semi_structured(dense.detach()), requires_grad=False)
        twin = nn.Linear(1, 1, device="meta")
        twin.weight, twin.bias = sparse, linear.bias
        old, new = seconds_in_turns([linear, twin], (x,), runs=repeats)
    except RuntimeError as error:  # a kernel that this GPU, this torch or this number of tokens does not have
        return {"converted": False, "reason": f"cannot run: {str(error).splitlines()[0]}"}
    ratios = [n / o for n, o in zip(new, old, strict=True)]
    interval = median_interval(ratios)
    if interval[1] < 1:
        linear.weight = sparse
    return {
        "converted": interval[1] < 1,
        "reason": None if interval[1] < 1 else "is not faster",
        "time_ratio": median(ratios),
        "interval": interval,
    }
