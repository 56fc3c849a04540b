"""One tuning of each arm for each seed: full, head, LoRA, rows; on a ViT, an EfficientNet and an encoder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import classifiers
import torch
from classifiers import BATCH, SEEDS, SIZE, TEST, data, head_of, new_model, predict, tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from serpette.evaluate import accuracy_by_class
from serpette.files import write_json
from serpette.rows import rank_rows
from serpette.tuning import trainable

EPOCHS = 4
FRACTION = 0.05  # of the rows; with dependencies of the groups, which then train about as many weights
RANKED = 256  # training examples that an importance sees
RATES = {
    "head": (1e-3, 3e-3, 1e-2, 3e-2),  # first: the head's own rate in every arm
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "lora": (1e-4, 3e-4, 1e-3, 2e-3),
    "rows": (1e-4, 3e-4, 1e-3, 2e-3),
}


@dataclass(frozen=True)
class Setting:
    """`rank`: of the LoRA that trains about as many weights as the rows; `size`: training examples."""

    rank: int
    size: int = SIZE
    targets: str | tuple[str, ...] = "all-linear"


SETTINGS = {
    "fashion-vit": Setting(rank=12),
    "movies-minilm": Setting(rank=12),
    "fashion-effnet": Setting(rank=8, size=320, targets="all-layers"),
}
BASELINES = ("full", "head", "lora", "lora_dropout")
METHODS = ("random", "magnitude", "taylor")  # with 2 or 10 classes QMTaylor is Taylor exactly
ROWS = tuple(f"rows/{m}" for m in METHODS) + tuple(f"rows/{m}/dependencies" for m in METHODS[1:])
FROZEN = ("lora/frozen_attention", "rows/magnitude/frozen_attention")
FACTS = {
    "examples": {name: s.size for name, s in SETTINGS.items()}, "seeds": SEEDS,
    "epochs": EPOCHS, "batch_size": BATCH, "optimizer": "AdamW, no decay", "schedule": "linear to 0",
    "fraction": FRACTION, "examples_that_importance_sees": RANKED,
    "trained_layers": {
        "fashion-vit": "the last 4 of 8 blocks, 56 px", "movies-minilm": "the last 3 of 6 layers",
        "fashion-effnet": "all convolutions and norms, 64 px, frozen running statistics",
    },
    "test": TEST,
    "rank": {name: s.rank for name, s in SETTINGS.items()},
    "learning_rate": "of the head by head-only tuning, of each family's other weights beside it, by the "
    "validation loss of an extra seed, half of whose examples train",
    "precision": "bfloat16 autocast; float32 for the EfficientNet",
}  # fmt: skip

_small: dict[str, int] = {}  # for `--quick`


def make_small() -> None:
    """From now on, in this process, everything is a smoke run."""
    _small.update(size=60, epochs=1, test=200)


def arms(name: str) -> tuple[str, ...]:
    """Of a set; a CNN has no attention to freeze."""
    return (*BASELINES, *ROWS, *(() if name == "fashion-effnet" else FROZEN))


def family(arm: str) -> str:
    """Whose learning rate an arm takes."""
    return arm.split("/")[0].split("_")[0]


def task(name: str, seed: int) -> tuple[Any, Tensor, Any, Tensor]:
    """(training examples, labels, test examples, labels) of a seed."""
    setting = SETTINGS[name]
    return data(name, seed, _small.get("size", setting.size), _small.get("test", TEST[name]))


def epochs() -> int:
    """Passes over the training examples."""
    return _small.get("epochs", EPOCHS)


def adapt(name: str, arm: str, seed: int, examples: Any, labels: Tensor) -> tuple[nn.Module, float]:
    """(the model with what the arm trains, CPU seconds of choosing it)."""
    model, setting = new_model(name, seed), SETTINGS[name]
    method, *options = arm.split("/")
    targets: Any = setting.targets
    more: dict[str, Any] = {}
    if method == "rows":
        dependencies = "dependencies" in options
        more = {
            "fraction": FRACTION,
            "importance": "random" if options[0] == "random" else "magnitude",
            "seed": seed,
            "dependencies": dependencies,
        }
    elif method.startswith("lora") and name == "fashion-effnet":  # peft's LoRA knows no depthwise filters
        targets = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    model = trainable(
        model,
        head_of(model),
        "lora" if method.startswith("lora") else method,  # type: ignore[arg-type]
        rank=setting.rank,
        alpha=2 * setting.rank,
        dropout=0.1 if method == "lora_dropout" else 0.0,
        target_modules=targets,
        freeze_attention="frozen_attention" in options,
        **more,
    )
    cpu = time.process_time()
    if method == "rows" and (options[0] == "taylor" or more["dependencies"]):
        seen = [
            {**examples[rows].inputs(), "labels": labels[rows]}
            for rows in torch.arange(min(RANKED, len(labels))).split(32)
        ]
        rank_rows(model, seen, options[0], num_classes=int(labels.max()) + 1, progress=False)
    return model, time.process_time() - cpu


def rate_file(folder: Path, name: str) -> Path:
    """Where the learning rates of a set lie."""
    return folder / f"rates-{name}.json"


def choose_rates(name: str, folder: Path) -> dict[str, float]:
    """{family: learning rate of least validation loss}, by the extra seed."""

    def fresh(kind: str, *seen: Any) -> nn.Module:
        return adapt(name, "rows/magnitude" if kind == "rows" else kind, SEEDS, *seen)[0]

    return classifiers.choose_rates(
        rate_file(folder, name), RATES, lambda: task(name, SEEDS), fresh, name, epochs()
    )


def cell_file(folder: Path, name: str, seed: int) -> Path:
    """The arms of a seed; written anew after each arm."""
    return folder / f"{name}-seed{seed}.json"


def run(name: str, seed: int, folder: Path, wanted: tuple[str, ...]) -> None:
    """The arms of `wanted` that are missing."""
    torch.set_num_threads(1)
    file = cell_file(folder, name, seed)
    done = json.loads(file.read_text()) if file.exists() else {}
    if all(arm in done for arm in wanted):
        return
    rates = choose_rates(name, folder)
    examples, labels, test, test_labels = task(name, seed)
    for arm in wanted:
        if arm in done:
            continue
        model, ranking = adapt(name, arm, seed, examples, labels)
        cpu = time.process_time()
        tune(model, name, examples, labels, seed, rates["head"], rates[family(arm)], epochs())
        cpu = time.process_time() - cpu
        logits = predict(model, name, test)
        by_class = accuracy_by_class(logits, test_labels, int(labels.max()) + 1)
        done[arm] = {
            "accuracy": float((logits.argmax(1) == test_labels).double().mean()),
            "loss": float(cross_entropy(logits, test_labels)),
            "worst_class": float(by_class.min()),
            "seconds": cpu,
            "ranking_seconds": ranking,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in new_model(name, seed).parameters()),
        }
        write_json(file, done)


def jobs(folder: Path) -> list[tuple]:
    """Arguments of `run`: without dependencies first."""
    found = []
    for dependencies in (False, True):
        for name in SETTINGS:
            some = tuple(a for a in arms(name) if ("dependencies" in a) == dependencies)
            found += [(name, seed, folder, some) for seed in range(SEEDS)]
    return found
