"""What trains, and the stock Trainer over numbered examples: for recipes and for the fine-tuned proxy."""

from __future__ import annotations

import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Method = Literal["lora", "dora", "shira", "rows", "full", "head"]


def trainable(
    model: nn.Module,
    head: nn.Module | None,
    method: Method,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    freeze_attention: bool = False,
    checkpointing: bool = False,
    **rows: Any,
) -> nn.Module:
    """`model` with what `method` trains: an adapter and the head, everything, or the head alone.

    Args:
        head: the layer that stays whole and trains with the adapter; None in a causal language model, whose
            head of the vocabulary (often tied to the embeddings) gets neither an adapter nor training.
        method: `"dora"` and `"shira"` are peft's; `"rows"` is `serpette.RowConfig`.
        rank: of LoRA and DoRA; SHiRA trains as many weights as a LoRA of that rank; of `"rows"` the number of
            rows, unless `rows` has a `fraction`.
        freeze_attention: no adapter inside attention blocks.
        checkpointing: gradient checkpointing of each block, as transformers does it.
        **rows: further arguments of `serpette.RowConfig`, for `"rows"`.

    Raises:
        ValueError: `"head"` for a model without one, an adapter that finds no layer, or checkpointing of a
            model that does not know it.
    """
    if checkpointing:
        _checkpoint(model)
    if method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if method == "head":
        if head is None:
            raise ValueError(f"method='head' needs a model with a head; {type(model).__name__} has none")
        head.requires_grad_(True)
        return model
    from peft import get_peft_model

    targets = _targets(model, head) if target_modules == "all-linear" else target_modules
    if not targets:
        raise ValueError(
            f"method={method!r} finds no Linear layer in {type(model).__name__} but its head; use 'full' or "
            "'head', name convolutions with target_modules, or use 'rows' with target_modules='all-layers'"
        )
    shared: dict[str, Any] = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": [name for name, module in model.named_modules() if module is head] or None,
    }
    if method == "rows":
        from .rows import RowConfig

        size = {} if rows.get("fraction") else {"r": rank}
        config: Any = RowConfig(**shared, **size, freeze_attention=freeze_attention, **rows)
    else:
        excluded = _attention(model) if freeze_attention else None
        config = _peft_config(model, method, rank, alpha, dropout, excluded, shared)
    with _quiet():
        return get_peft_model(model, config)  # type: ignore[arg-type] - any module


def _peft_config(
    model: nn.Module,
    method: str,
    rank: int,
    alpha: float,
    dropout: float,
    excluded: str | None,
    shared: dict[str, Any],
) -> Any:
    from peft import LoraConfig, ShiraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if method == "shira":
        torch.sparse.check_sparse_tensor_invariants.disable()  # as they are; unsaid, peft's SHiRA warns
        config: Any = ShiraConfig(r=rank, **shared)
        if excluded:  # it has no exclude_modules
            linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
            found = {name for name in linears if check_target_module_exists(config, name)}
            config.target_modules = {name for name in found if not re.fullmatch(excluded, name)}
        return config
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] - peft takes a float
        lora_dropout=dropout,
        exclude_modules=excluded,
        use_dora=method == "dora",
        **shared,
    )


def _checkpoint(model: Any) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"checkpointing=True, but {type(model).__name__} has no blocks that can be computed again; "
            "leave it off"
        )
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _attention(model: nn.Module) -> str:
    """The pattern of modules inside attention blocks."""
    from .tracing import ATTENTION

    if not any(ATTENTION.fullmatch(name) for name, _ in model.named_modules()):
        raise ValueError(
            f"freeze_attention=True, but no module of {type(model).__name__} has attention in its name; "
            "leave it off, or name what gets the adapter with target_modules"
        )
    return ATTENTION.pattern


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings of names that peft and its own Trainer still use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _targets(model: nn.Module, head: nn.Module | None) -> list[str]:
    """Every Linear but the head: peft's own "all-linear" keeps the head out of some model classes only."""
    words: Any = getattr(model, "get_output_embeddings", lambda: None)()  # of a language model
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and m is not words
    ]


def set_seeds(seed: int) -> None:
    """Every generator that a Trainer or a new weight draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank(
    model: nn.Module,
    examples: int,
    collate: Callable[[list[int]], dict[str, Tensor]],
    importance: str,
    scope: Literal["layer", "global"] = "layer",
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """`serpette.rank_rows` on examples 0 .. `examples` - 1, which `collate` turns into a batch."""
    from torch.utils.data import DataLoader

    from .rows.ranking import rank_rows

    loader = DataLoader(list(range(examples)), batch_size, collate_fn=collate)  # type: ignore[arg-type]
    rank_rows(model, loader, importance, scope=scope, progress=progress)


def train(
    model: nn.Module,
    examples: int,
    collate: Callable[[list[int]], dict[str, Tensor]],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.0,
    schedule: str = "linear",
    warmup: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
    callbacks: Sequence[Any] = (),
    out: str | Path | None = None,
    resume_from: str | Path | None = None,
) -> None:
    """Tunes what is trainable in `model` on examples 0 .. `examples` - 1, which `collate` turns into a batch.

    Args:
        warmup: share of the steps over which the learning rate rises.
        on_step: called with (step, all steps) after each step.
        callbacks: transformers' TrainerCallbacks, such as `serpette.Pruner`.
        out: folder of the checkpoints, where a callback asks for some.
        resume_from: a checkpoint of the same training, to go on from with the same bits.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(out or scratch),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type=schedule,
            warmup_steps=round(warmup * epochs * -(-examples // batch_size)),
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(range(examples)),  # type: ignore[arg-type] - a list is a map-style data set
            data_collator=collate,
            callbacks=[*callbacks, Tick()],
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # it prints a dict where tqdm is off
                trainer.remove_callback(type(callback))
        with _quiet():
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
