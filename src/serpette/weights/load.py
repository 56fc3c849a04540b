"""Smaller models on disk: safetensors, the configuration, and `shrunk.json` where that does not say enough.

No pickle is read and no code but that of the installed transformers is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .groups import find_groups
from .shrink import HEAD_COUNTS, SIZES, layout, unlike_stock, update_config

NOTE = "shrunk.json"
FORMAT = 1


def save_shrunk(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Write `model` so that `load` reads it, and stock `from_pretrained` where the configuration allows.

    Args:
        model: from `shrink`, or cut by `slice_` and merged.
        folder: made if need be.

    Returns:
        `{"stock": bool, "reason": str}`, as in `shrunk.json`; without that file the folder is stock.

    Raises:
        ValueError: the model still has adapters.
    """
    if any(hasattr(module, "base_layer") or hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError(
            "the model still has adapters; save_shrunk(model.merge_and_unload(), folder) instead"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).unlink(missing_ok=True)
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        try:
            note = update_config(model, find_groups(model))
        except ValueError:  # no known family
            note = update_config(model, [])
        layers = unlike_stock(model)
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        note, layers = update_config(model, []), layout(model)
        note["stock"] = False
        save_model(model, str(folder / "model.safetensors"))
    if not note["stock"]:
        text = json.dumps(
            {"format": FORMAT, "class": type(model).__name__, **note, "layers": layers}, indent=1
        )
        (folder / NOTE).write_text(text, encoding="utf-8")
    return note


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of a folder that `save_shrunk` or a stock `save_pretrained` wrote, in eval mode, on the CPU.

    Args:
        folder: with `config.json` and `model.safetensors`.
        model: for what is no model of transformers: one as it was before it was shrunk; it is cut to the
            saved shapes and given the saved weights, in place.

    Raises:
        ValueError: no such folder, its class is neither in transformers nor imported and no `model` is
            given, or `shrunk.json`
            does not fit the model.

    Example:
        >>> import tempfile
        >>> from serpette.weights.shrink import shrink
        >>> def fresh():
        ...     return nn.Sequential(nn.ModuleDict({"fc1": nn.Linear(4, 16), "fc2": nn.Linear(16, 2)}))
        >>> keep = torch.ones(2, 16, dtype=torch.bool)
        >>> keep[:, 3:9] = False
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     note = save_shrunk(shrink(fresh(), {"0.fc2": keep}, round_to=1), folder)
        ...     load(folder, fresh())[0].fc1
        Linear(in_features=4, out_features=10, bias=True)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not a folder")
    layers = {}
    if (folder / NOTE).exists():
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note.get("format") != FORMAT:
            raise ValueError(
                f"{NOTE} in {folder} has format {note.get('format')!r}, this version reads {FORMAT}"
            )
        layers = note["layers"]
    if model is not None:
        from safetensors.torch import load_model

        _resize(model, layers)
        load_model(model, str(folder / "model.safetensors"))
        return model.eval()
    stock = _class_of(folder)
    if not layers:
        return stock.from_pretrained(folder, use_safetensors=True)

    class Resized(stock):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _resize(self, layers)

    Resized.__name__ = stock.__name__  # transformers looks up by it how to read the weights
    loaded = Resized.from_pretrained(folder, use_safetensors=True)
    loaded.__class__ = stock
    loaded.shrunk = {"stock": False, "reason": note["reason"]}
    return loaded


def _class_of(folder: Path) -> Any:
    import transformers

    config = folder / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.exists() else None
    found = getattr(transformers, named[0], None) if named else None
    if named and found is None:
        found = next((c for c in _imported(transformers.PreTrainedModel) if c.__name__ == named[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        what = f"a {named[0]}" if named else "a model without config.json"
        raise ValueError(
            f"{folder} holds {what}, no class of transformers or of an imported module; "
            "import it, or give the unshrunk model: load(folder, model)"
        )
    return found


def _imported(base: type) -> Iterator[type]:
    """Classes derived from `base` by modules that are imported already."""
    for derived in base.__subclasses__():
        if derived.__module__ != __name__:
            yield derived
            yield from _imported(derived)


def _resize(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    modules = dict(model.named_modules())
    for name, wanted in layers.items():
        module = modules.get(name)
        shapes, sizes = wanted["shapes"], wanted["sizes"]
        tensors = {own: getattr(module, own, None) for own in shapes}
        for own, shape in shapes.items():
            tensor = tensors[own]
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(shape):
                raise ValueError(f"{NOTE} has {name}.{own} {shape}, which {type(model).__name__} has not")
            if list(tensor.shape) == shape:
                continue
            if isinstance(tensor, nn.Parameter):
                setattr(module, own, nn.Parameter(tensor.new_empty(shape), tensor.requires_grad))
            else:
                setattr(module, own, tensor.new_empty(shape))
        for own, size in sizes.items():
            if own not in (*HEAD_COUNTS, *SIZES) or not isinstance(size, int) or not hasattr(module, own):
                raise ValueError(f"{NOTE} sets {name}.{own} = {size!r}, which is no size of that module")
            setattr(module, own, size)
