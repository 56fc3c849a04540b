"""One tuning of each arm for each seed: full, head, LoRA, rows; on a ViT, an EfficientNet and an encoder."""

from __future__ import annotations

import functools
import json
import time
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
from serpette.data.store import write_json
from serpette.evaluate import accuracy_by_class
from serpette.rows import rank_rows
from serpette.tuning import trainable

SIZE, SEEDS, EPOCHS, BATCH = 500, 5, 4, 16
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
    """`rank`: of the LoRA that trains about as many weights as the rows; `test`, `size`: examples."""

    rank: int
    test: int
    size: int = SIZE
    targets: str | tuple[str, ...] = "all-linear"


SETTINGS = {
    "fashion-vit": Setting(rank=12, test=1500),
    "movies-minilm": Setting(rank=12, test=1000),
    "fashion-effnet": Setting(rank=8, test=1000, size=320, targets="all-layers"),
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
    "test": {name: s.test for name, s in SETTINGS.items()},
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
    test = zoo.load_dataset("fashion-mnist", "test", limit=SETTINGS["fashion-effnet"].test)
    read = [Examples(d, processing_class=processor).read(range(len(d)))[1:3] for d in (train, test)]
    place = {row: i for i, row in enumerate(order)}
    return (
        place,
        Pixels(read[0][0]["pixel_values"]),
        Pixels(read[1][0]["pixel_values"]),
        torch.tensor(read[1][1]),
    )


def data(name: str, seed: int) -> tuple[Any, Tensor, Any, Tensor]:
    """(training examples, labels, test examples, labels) of a seed."""
    drawn = tasks.draw(tasks.features(name), "clean", seed, size=SIZE)
    if name == "fashion-effnet":
        place, train, test, test_labels = _pixels(SEEDS + 1)
    else:
        place, train, test, test_labels = adapters.activations(
            name, ("clean", "wrong_labels"), SEEDS + 1, SIZE
        )
    labels = drawn.signals.labels
    assert labels is not None
    rows = torch.tensor([place[int(row)] for row in drawn.rows])
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    mixed = mixed[: _small.get("size", SETTINGS[name].size)]
    wanted = _small.get("test", SETTINGS[name].test)
    few = torch.arange(0, len(test), max(1, len(test) // wanted))[:wanted]  # texts lie in order of length
    return train[rows[mixed]], labels[mixed], test[few], test_labels[few]


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


def precision(name: str) -> ExitStack:
    """bfloat16 where it is faster here; plain attention is, on so few tokens."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if name != "fashion-effnet":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


def tune(
    model: nn.Module, name: str, examples: Any, labels: Tensor, seed: int, head_rate: float, rate: float
) -> None:
    """AdamW without decay; the head has its own learning rate, and both fall linearly to 0."""
    epochs = _small.get("epochs", EPOCHS)
    for part, module in model.named_modules():
        module.train("lora_dropout" in part)  # the encoders' own dropout stays off
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if ("classifier" in n) == is_head], "rate": its}
        for is_head, its in ((True, head_rate), (False, rate))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    steps, step = epochs * -(-len(examples) // BATCH), 0
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
            optimizer.step()
            step += 1
    model.eval()


def predict(model: nn.Module, name: str, examples: Any) -> Tensor:
    """(M, C) logits."""
    with torch.inference_mode(), precision(name):
        parts = [model(**examples[r].inputs()).logits for r in torch.arange(len(examples)).split(100)]
    return torch.cat(parts).float()


def rate_file(folder: Path, name: str) -> Path:
    """Where the learning rates of a set lie."""
    return folder / f"rates-{name}.json"


def choose_rates(name: str, folder: Path) -> dict[str, float]:
    """{family: learning rate of least validation loss}, by the extra seed."""
    file = rate_file(folder, name)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for kind, rates in RATES.items():
        if kind in found:
            continue
        examples, labels, _, _ = data(name, SEEDS)
        half = len(labels) // 2
        train, held = torch.arange(half), torch.arange(half, len(labels))
        losses = {}
        for rate in rates:
            arm = "rows/magnitude" if kind == "rows" else kind
            model, _ = adapt(name, arm, SEEDS, examples[train], labels[train])
            head_rate = found["head"]["learning_rate"] if found else rate
            tune(model, name, examples[train], labels[train], SEEDS, head_rate, rate)
            losses[rate] = float(cross_entropy(predict(model, name, examples[held]), labels[held]))
        found[kind] = {
            "learning_rate": min(losses, key=lambda r: losses[r]),
            "validation_loss": {f"{r:g}": v for r, v in losses.items()},
        }
        write_json(file, found)
    return {kind: entry["learning_rate"] for kind, entry in found.items()}


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
    examples, labels, test, test_labels = data(name, seed)
    for arm in wanted:
        if arm in done:
            continue
        model, ranking = adapt(name, arm, seed, examples, labels)
        cpu = time.process_time()
        tune(model, name, examples, labels, seed, rates["head"], rates[family(arm)])
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
