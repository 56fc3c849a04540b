"""What trains, and the stock Trainer over numbered examples: for recipes and for the fine-tuned proxy."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn


def trainable(
    model: nn.Module,
    head: nn.Module | None,
    method: Literal["lora", "full", "head"],
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> nn.Module:
    """`model` with what `method` trains: LoRA factors and the head, everything, or the head alone.

    Args:
        head: the layer that stays whole and trains with the LoRA; None in a causal language model, whose head
            of the vocabulary (often tied to the embeddings) gets neither LoRA nor training.

    Raises:
        ValueError: `"head"` for a model without one.
    """
    if method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = _targets(model, head) if target_modules == "all-linear" else target_modules
        if not targets:
            raise ValueError(
                f"method='lora' finds no Linear layer in {type(model).__name__} but its head; "
                "use method='full' or 'head', or name convolutions with target_modules"
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] - peft takes a float
            lora_dropout=dropout,
            target_modules=targets,  # type: ignore[arg-type] - any sequence of names
            modules_to_save=[name for name, module in model.named_modules() if module is head] or None,
        )
        with _quiet():
            return get_peft_model(model, config)  # type: ignore[arg-type] - any module
    if head is None:
        raise ValueError(f"method='head' needs a model with a head; {type(model).__name__} has none")
    head.requires_grad_(True)
    return model


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
) -> None:
    """Tunes what is trainable in `model` on examples 0 .. `examples` - 1, which `collate` turns into a batch.

    Args:
        warmup: share of the steps over which the learning rate rises.
        on_step: called with (step, all steps) after each step.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
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
            callbacks=[Tick()],
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # it prints a dict where tqdm is off
                trainer.remove_callback(type(callback))
        with _quiet():
            trainer.train()
