"""Models of true shapes that take no memory, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..registry import near

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
# Public configurations: (class of the model, fields of its configuration).
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaForCausalLM",
        {**LLAMA, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096},
    ),
    "llama-2-13b": (
        "LlamaForCausalLM",
        {
            "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40,
            "intermediate_size": 13824, "vocab_size": 32000, "max_position_embeddings": 4096,
        },
    ),
    "llama-3-8b": (
        "LlamaForCausalLM",
        {
            **LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
    ),
    "mistral-7b": (
        "MistralForCausalLM",
        {**LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000},
    ),
    "bert-base": ("BertForSequenceClassification", {"num_labels": 2}),
    "vit-b": ("ViTForImageClassification", {"num_labels": 1000}),
}  # fmt: skip


def preset(name: str, **changes: Any) -> nn.Module:
    """The model called `name` in `PRESETS`, with random weights; `changes` are fields of its configuration.

    Inside `without_memory` it takes none.

    Raises:
        ValueError: an unknown name.

    >>> with without_memory():
    ...     sum(p.numel() for p in preset("llama-2-7b").parameters())
    6738415616
    """
    import transformers

    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known{near(name, PRESETS)}")
    cls, fields = PRESETS[name]
    return _build(
        getattr(transformers, cls), getattr(transformers, cls).config_class(**{**fields, **changes})
    )


def from_configuration(source: str, **changes: Any) -> nn.Module:
    """The model of a local folder or a hub id, made from its configuration alone, with random weights.

    `changes` are fields of the configuration.

    Raises:
        ValueError: no readable configuration, or none of a class of transformers.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source, **changes)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model={source!r} is no preset{near(source, PRESETS)}, and has no readable config.json: {text}"
        ) from error
    names = getattr(config, "architectures", None) or [""]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(
            f"model={source!r} is of the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have; give a model of one it has"
        )
    return _build(cls, config)


def _build(cls: Any, config: Any) -> nn.Module:
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return cls(config)


@contextmanager
def without_memory(device: str = "cpu") -> Iterator[FakeTensorMode]:
    """Inside the block tensors are fake: they have shapes and types and no storage.

    Code that asks for a value is told that all are true and not any is, that integers are 0 and floats 1.
    transformers asks whether masks are all true, and takes the path of a real batch without padding.

    Args:
        device: whose kernels are meant. On a CPU dropout keeps a mask of floats, and attention with dropout
            is not fused; on CUDA the mask is of bytes, and attention keeps no more than without dropout.
    """
    from transformers.utils import import_utils

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        # else transformers takes the path it has for tracing, with full masks and copied keys and values
        if hasattr(import_utils, "is_fake_tensor"):
            stack.enter_context(mock.patch.object(import_utils, "is_fake_tensor", lambda x: False))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap))
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True))
        if torch.device(device).type == "cuda":
            stack.enter_context(mock.patch.object(F, "dropout", _cuda_dropout))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _cuda_attention))
        stack.enter_context(mode)
        stack.enter_context(_Values())
        yield mode


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _cuda_attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
    nn_: Any = torch._C._nn  # type: ignore[attr-defined] - torch has no stub of it
    return nn_.scaled_dot_product_attention(*args, **kwargs)


def _swap(a: Tensor, b: Tensor) -> None:
    """For `module.to(...)` on fake parameters, which torch refuses to swap while it watches them itself."""
    if (a.dtype, a.device) != (b.dtype, b.device):
        a.data = b.detach()


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """The usual one gives the copy of a fake tensor a storage that its views do not share."""
    if id(tensor) not in memo:
        made = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    return memo[id(tensor)]


class _Values(TorchDispatchMode):
    """Answers for values that fake tensors do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].dtype == torch.bool:
                return not getattr(args[0], "is_any", False)
            return 1.0 if args[0].is_floating_point() else 0
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any:
            made.is_any = True
        return made


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """`model` with fake parameters and buffers, shared ones still shared; the given one stays as it is."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = mode.from_tensor(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def example_batch(model: nn.Module, tokens: int, batch_size: int) -> dict[str, Tensor]:
    """A batch that a transformers model trains on: ids or pixels without padding, and labels of class 0.

    Args:
        tokens: length of a text; images have the size that the model was made for.
        batch_size: texts or images.

    Raises:
        ValueError: more tokens than the model has positions, or inputs that are neither texts nor images.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    words = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if main == "input_ids":
        most = getattr(config, "max_position_embeddings", None)
        if most and tokens > most:
            raise ValueError(f"tokens={tokens} is more than the {most} positions of {type(model).__name__}")
        ids = torch.zeros(batch_size, tokens, dtype=torch.long)
        batch = {"input_ids": ids}
        if words:
            return batch | {"labels": ids}
    elif main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        batch = {"pixel_values": torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes neither texts nor images; "
            "use serpette.memory.step_memory with a batch of it"
        )
    if getattr(model, "base_model", None) is model:
        return batch  # features, no head
    regression = getattr(config, "problem_type", None) == "regression" or config.num_labels == 1
    kind = torch.float32 if regression else torch.long
    return batch | {"labels": torch.zeros(batch_size, dtype=kind)}


def head_of(model: nn.Module) -> nn.Module | None:
    """The head of a classifier; None for a language model, whose words stay frozen, and a bare backbone."""
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return None
    if getattr(model, "base_model", None) is model:
        return None
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
