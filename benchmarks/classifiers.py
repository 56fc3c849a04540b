"""Classifiers that a benchmark fine-tunes: upper layers of an encoder on cached activations, or a small CNN.

`fashion-vit`: the last 4 of 8 blocks, 56 px; `movies-minilm`: the last 3 of 6 layers; `fashion-effnet`: all
of an EfficientNet-lite0 at 64 px.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import tasks
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from serpette import zoo
from serpette.data.examples import Examples
from serpette.files import write_json

SIZE, SEEDS, BATCH = 500, 5, 16
TEST = {"fashion-vit": 1500, "movies-minilm": 1000, "fashion-effnet": 1000}


class Classifier(nn.Module):
    """`adapters.Upper` in the manners of transformers: the loss beside the logits."""

    def __init__(self, upper: nn.Module):
        super().__init__()
        self.upper = upper

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        logits = self.upper(**inputs).float()
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def new_model(name: str, seed: int) -> nn.Module:
    """The pre-trained layers and a new head, in evaluation mode: no dropout but LoRA's own."""
    torch.manual_seed(seed)
    if name == "fashion-effnet":
        model: Any = zoo.load_model("efficientnet-lite0", **tasks.LITE)
        head = model.classifier
    else:
        model = Classifier(adapters.upper(name))
        head = model.upper.classifier
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return model.float().eval()


def head_of(model: Any) -> nn.Module:
    """The layer that trains whole in every arm."""
    return model.upper.classifier if isinstance(model, Classifier) else model.classifier


@dataclass
class Pixels:
    """(N, 3, H, W) images, indexed as `adapters.Activations` are."""

    values: Tensor

    def __getitem__(self, rows: Tensor) -> Pixels:
        return Pixels(self.values[rows])

    def __len__(self) -> int:
        return len(self.values)

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self.values}


@functools.lru_cache(maxsize=2)
def _pixels(seeds: int) -> tuple[dict[int, int], Pixels, Pixels, Tensor]:
    pool = tasks.features("fashion-effnet")
    order = sorted({int(r) for s in range(seeds) for r in tasks.draw(pool, "clean", s, size=SIZE).rows})
    processor = zoo.load_processor("efficientnet-lite0", image_size=tasks.LITE["image_size"])
    train = zoo.load_dataset("fashion-mnist", "train", limit=len(pool.ids)).select(order)
    test = zoo.load_dataset("fashion-mnist", "test", limit=TEST["fashion-effnet"])
    read = [Examples(d, processing_class=processor).read(range(len(d)))[1:3] for d in (train, test)]
    place = {row: i for i, row in enumerate(order)}
    return (
        place,
        Pixels(read[0][0]["pixel_values"]),
        Pixels(read[1][0]["pixel_values"]),
        torch.tensor(read[1][1]),
    )


def data(name: str, seed: int, size: int = SIZE, test: int | None = None) -> tuple[Any, Tensor, Any, Tensor]:
    """(training examples, labels, test examples, labels) of a seed; `SEEDS` is the extra one, for choices."""
    drawn = tasks.draw(tasks.features(name), "clean", seed, size=SIZE)
    if name == "fashion-effnet":
        place, train, held_out, test_labels = _pixels(SEEDS + 1)
    else:
        place, train, held_out, test_labels = adapters.activations(
            name, ("clean", "wrong_labels"), SEEDS + 1, SIZE
        )
    labels = drawn.signals.labels
    assert labels is not None
    rows = torch.tensor([place[int(row)] for row in drawn.rows])
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]
    wanted = test or TEST[name]
    few = torch.arange(0, len(held_out), max(1, len(held_out) // wanted))[:wanted]  # texts lie by length
    return train[rows[mixed]], labels[mixed], held_out[few], test_labels[few]


def precision(name: str) -> ExitStack:
    """bfloat16 where it is faster here; plain attention is, on so few tokens."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if name != "fashion-effnet":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


def tune(
    model: nn.Module,
    name: str,
    examples: Any,
    labels: Tensor,
    seed: int,
    head_rate: float,
    rate: float,
    epochs: int,
    begin: Callable[[torch.optim.Optimizer, int], Callable[[], None]] | None = None,
) -> None:
    """AdamW without decay; the head has its own learning rate, and both fall linearly to 0.

    `begin(optimizer, steps)` gives what is called between each backward pass and the optimizer's step.
    """
    for part, module in model.named_modules():
        module.train("lora_dropout" in part)  # the encoders' own dropout stays off
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if ("classifier" in n) == is_head], "rate": its}
        for is_head, its in ((True, head_rate), (False, rate))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    steps, step = epochs * -(-len(examples) // BATCH), 0
    between = begin(optimizer, steps) if begin else None
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(examples), generator=generator).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - step / steps)
            with precision(name):
                loss = model(**examples[rows].inputs(), labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            if between:
                between()
            optimizer.step()
            step += 1
    model.eval()


def predict(model: nn.Module, name: str, examples: Any) -> Tensor:
    """(M, C) logits."""
    with torch.inference_mode(), precision(name):
        parts = [model(**examples[r].inputs()).logits for r in torch.arange(len(examples)).split(100)]
    return torch.cat(parts).float()


def choose_rates(
    file: Path,
    rates: dict[str, tuple[float, ...]],
    task: Callable[[], tuple[Any, Tensor, Any, Tensor]],
    adapt: Callable[[str, Any, Tensor], nn.Module],
    name: str,
    epochs: int,
) -> dict[str, float]:
    """{kind: learning rate of least validation loss}, on the `task` of the extra seed; kept in `file`.

    Half of its examples train. The head comes first, and its rate is the head's in the others.
    """
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for kind in [kind for kind in rates if kind not in found]:
        examples, labels, _, _ = task()
        train, held = torch.arange(len(labels)).tensor_split([len(labels) // 2])
        losses = {}
        for rate in rates[kind]:
            model = adapt(kind, examples[train], labels[train])
            head_rate = found["head"]["learning_rate"] if found else rate
            tune(model, name, examples[train], labels[train], SEEDS, head_rate, rate, epochs)
            losses[rate] = float(cross_entropy(predict(model, name, examples[held]), labels[held]))
        found[kind] = {
            "learning_rate": min(losses, key=lambda r: losses[r]),
            "validation_loss": {f"{r:g}": v for r, v in losses.items()},
        }
        write_json(file, found)
    return {kind: entry["learning_rate"] for kind, entry in found.items()}
