"""Classifiers tuned and pruned: the cells that the LoRAPrune benchmarks share, one file a model and seed.

An arm is `METHOD` (nothing is pruned), `METHOD@SPARSITY`, or `structured/METHOD@SPARSITY`;
`then/METHOD@SPARSITY` tunes first and prunes afterwards, in as many epochs again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifiers
import numpy as np
import torch
from classifiers import BATCH, SEEDS, TEST, data, head_of, new_model, predict, tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from serpette.evaluate import accuracy_by_class, paired_over_seeds, seeds_interval
from serpette.files import write_json
from serpette.tuning import trainable
from serpette.weights import PruneConfig, attach, prune, sequential

SIZE, EPOCHS, RANK, EVERY_K = 320, 4, 8, 4
CHOSEN_ON = 500  # examples of the extra seed, half of which train
MODELS = ("fashion-vit", "movies-minilm")
RATES = {
    "head": (1e-3, 3e-3, 1e-2, 3e-2),  # first: the head's own rate in every arm
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "bias": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (1e-4, 3e-4, 1e-3, 2e-3),
    "sequential": (1e-4, 3e-4, 1e-3, 2e-3),
    "rows": (1e-4, 3e-4, 1e-3, 2e-3),
}
# method -> (what trains, importance)
METHODS = {
    "map": ("full", "magnitude"),
    "mvp": ("full", "movement"),
    "rap": ("lora", "random"),
    "map_lora": ("lora", "magnitude"),
    "pst": ("lora", "pst"),
    "lora_prune": ("lora", "lora_prune"),
    "lora_prune_exact": ("lora", "lora_prune"),
    "lora_prune_seq": ("sequential", "lora_prune_seq"),
    "original_gradient": ("lora", "original_gradient"),
    "taylor_once": ("lora", "taylor"),
    "all_weights": ("full", "original_gradient"),
    "obs": ("full", "obs"),
}
UNPRUNED = ("full", "head", "partial1", "bias", "lora", "lora16", "rows")
FACTS = {
    "models": {
        "fashion-vit": "DINOv2-derived ViT-S, the last 4 of 8 blocks, 56 px",
        "movies-minilm": "MiniLM-L6, the last 3 layers",
    },
    "examples": SIZE, "test": {name: TEST[name] for name in MODELS}, "seeds": SEEDS, "epochs": EPOCHS,
    "batch_size": BATCH, "rank": RANK, "alpha": 2 * RANK, "optimizer": "AdamW, no decay",
    "schedule": "learning rate linear to 0; sparsity cubic, from 10 to 70 % of the steps",
    "every_k": EVERY_K, "average": 0.9, "mask_grad": "ste; exact in lora_prune_exact and original_gradient",
    "sparsity": "of each linear layer of the blocks that are tuned; structured: of heads and FFN channels",
    "learning_rate": "of the head by head-only tuning, of each family beside it, unpruned, by the validation "
    "loss of an extra seed, half of whose 500 examples train",
    "precision": "bfloat16 autocast",
}  # fmt: skip

_small: dict[str, int] = {}  # for `--quick`


def make_small() -> None:
    """From now on, in this process, everything is a smoke run."""
    _small.update(size=64, epochs=2, test=200)


def task(name: str, seed: int) -> tuple[Any, Tensor, Any, Tensor]:
    """(training examples, labels, test examples, labels) of a seed."""
    size = CHOSEN_ON if seed == SEEDS else SIZE
    return data(name, seed, _small.get("size", size), _small.get("test", TEST[name]))


def parse(arm: str) -> tuple[str, str, float]:
    """(how: "", "structured" or "then", method, sparsity)."""
    how, _, rest = arm.rpartition("/")
    method, _, sparsity = rest.partition("@")
    return how, method, float(sparsity or 0)


def family(method: str) -> str:
    """What trains, which has a learning rate of its own."""
    if method in METHODS:
        return METHODS[method][0]
    return {"lora16": "lora", "partial1": "full"}.get(method, method)


def adapt(name: str, method: str, seed: int) -> nn.Module:
    """The model with what trains."""
    model: Any = new_model(name, seed)
    kind, head = family(method), head_of(model)
    if method in ("partial1", "bias"):
        model.requires_grad_(False)
        head.requires_grad_(True)
        for part, parameter in model.named_parameters():
            if method == "bias" and part.endswith(".bias"):
                parameter.requires_grad_(True)
        if method == "partial1":
            model.upper.layers[-1].requires_grad_(True)
        return model
    rank = 16 if method == "lora16" else RANK
    more = {"fraction": 0.05} if kind == "rows" else {}
    tuner: Any = "lora" if kind == "sequential" else kind
    model = trainable(model, head, tuner, rank=rank, alpha=2 * rank, **more)
    return sequential(model) if kind == "sequential" else model


def merged(model: nn.Module) -> nn.Module:
    """Without adapters."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]


def pruning(
    model: nn.Module, how: str, method: str, sparsity: float, seed: int, kept: list[Any]
) -> Callable[[torch.optim.Optimizer, int], Callable[[], None]]:
    """What `classifiers.tune` calls to prune; the Pruner is put into `kept`."""
    exact = method in ("lora_prune_exact", "original_gradient")
    config = PruneConfig(
        METHODS[method][1],
        sparsity,
        pattern="structured" if how == "structured" else "unstructured",
        mask_grad="exact" if exact else "ste",
        every_k=EVERY_K,
        seed=seed,
    )

    def begin(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
        kept.append(attach(model, config, steps, optimizer))
        return kept[0].step

    return begin


def cpu_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, CPU seconds)."""
    start = time.process_time()
    return work(), time.process_time() - start


def run_arm(name: str, arm: str, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """One arm of one seed."""
    how, method, sparsity = parse(arm)
    examples, labels, test, test_labels = task(name, seed)
    epochs = _small.get("epochs", EPOCHS)
    model = adapt(name, method, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in new_model(name, seed).parameters())
    rate, head_rate = rates[family(method)], rates["head"]
    seconds, kept = 0.0, list[Any]()

    def tuned(begin: Any = None) -> float:
        arguments = (model, name, examples, labels, seed, head_rate, rate, epochs, begin)
        return cpu_of(lambda: tune(*arguments))[1]

    if how == "then" or method == "obs":
        seconds += tuned()
    if method in ("obs", "taylor_once"):
        batches = [
            {**examples[rows].inputs(), "labels": labels[rows]}
            for rows in torch.arange(len(labels)).split(32)
        ]
        few = batches if method == "obs" else batches[:4]
        pattern = "structured" if how == "structured" else "unstructured"
        pruner, its = cpu_of(
            lambda: prune(model, METHODS[method][1], sparsity, loader=few, pattern=pattern, progress=False)
        )
        kept.append(pruner)
        seconds += its + (0.0 if method == "obs" else tuned())
    elif sparsity:
        seconds += tuned(pruning(model, how, method, sparsity, seed, kept))
        kept[0].finish()
    elif how != "then":
        seconds += tuned()
    model = merged(model)
    logits = predict(model, name, test)
    masks = kept[0].masks_ if kept else {}
    zeros = sum(int((model.get_submodule(n).weight == 0).sum()) for n in masks)  # type: ignore[operator,arg-type]
    return {
        "accuracy": float((logits.argmax(1) == test_labels).double().mean()),
        "loss": float(cross_entropy(logits, test_labels)),
        "worst_class": float(accuracy_by_class(logits, test_labels, int(labels.max()) + 1).min()),
        "seconds": seconds,
        "pruning_seconds": sum(kept[0].seconds_.values()) if kept else 0.0,
        "trained": trained,
        "parameters": whole,
        "zeros": zeros,
        "prunable": sum(mask.numel() for mask in masks.values()),
    }


def rate_file(folder: Path, name: str) -> Path:
    """Where the learning rates of a model lie."""
    return folder / f"rates-{name}.json"


def choose_rates(name: str, folder: Path) -> dict[str, float]:
    """{family: learning rate of least validation loss}, unpruned, by the extra seed."""
    torch.set_num_threads(1)

    def fresh(kind: str, *seen: Any) -> nn.Module:
        return adapt(name, "lora_prune_seq" if kind == "sequential" else kind, SEEDS)

    epochs = _small.get("epochs", EPOCHS)
    return classifiers.choose_rates(
        rate_file(folder, name), RATES, lambda: task(name, SEEDS), fresh, name, epochs
    )


def chosen_rates(folder: Path) -> dict[str, Any]:
    """What `choose_rates` found, of the models that are there."""
    files = {name: rate_file(folder, name) for name in MODELS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def cell_file(folder: Path, name: str, seed: int) -> Path:
    """The arms of a seed; written anew after each arm."""
    return folder / f"{name}-seed{seed}.json"


def cells(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """{arm: what it came to} of a seed, as far as it is there."""
    file = cell_file(folder, name, seed)
    return json.loads(file.read_text()) if file.exists() else {}


def run(name: str, seed: int, folder: Path, wanted: tuple[str, ...]) -> None:
    """The arms of `wanted` that are missing."""
    torch.set_num_threads(1)
    rates = choose_rates(name, folder)
    for arm in wanted:
        if arm not in cells(folder, name, seed):
            entry = run_arm(name, arm, seed, rates)
            write_json(cell_file(folder, name, seed), cells(folder, name, seed) | {arm: entry})


def jobs(folder: Path, arms: tuple[str, ...]) -> list[tuple]:
    """Arguments of `run`, seed by seed."""
    return [(name, seed, folder, arms) for seed in range(SEEDS) for name in MODELS]


def table(
    folder: Path, arms: tuple[str, ...], controls: dict[str, Callable[[str], str]]
) -> list[dict[str, Any]]:
    """A row for each model and arm whose seeds are all there; `controls`: {key: arm -> its partner}."""
    rows = []
    for name in MODELS:
        found = [cells(folder, name, seed) for seed in range(SEEDS)]
        whole = {arm: [f[arm] for f in found] for arm in arms if all(arm in f for f in found)}
        for arm, entries in whole.items():
            accuracy = _percent(entries)
            row: dict[str, Any] = {
                "model": name,
                "arm": arm,
                "accuracy": float(accuracy.mean()),
                "interval": list(seeds_interval(accuracy)[1:]),
                "worst_class": float(_percent(entries, "worst_class").mean()),
                "loss": float(np.mean([e["loss"] for e in entries])),
                "trained_share": entries[0]["trained"] / entries[0]["parameters"],
                "zeros": entries[0]["zeros"] / max(1, entries[0]["prunable"]),
                "seconds": float(np.median([e["seconds"] for e in entries])),
                "pruning_seconds": float(np.median([e["pruning_seconds"] for e in entries])),
            }
            for key, control in controls.items():
                other = control(arm)
                if other in whole and other != arm:
                    row[key] = list(paired_over_seeds(accuracy, _percent(whole[other])))
            rows.append(row)
    return rows


def _percent(entries: list[dict], what: str = "accuracy") -> np.ndarray:
    return 100 * np.array([entry[what] for entry in entries])


def at(method: str) -> Callable[[str], str]:
    """The arm of `method` at the same sparsity and pattern."""

    def control(arm: str) -> str:
        how, _, sparsity = parse(arm)
        return f"{how + '/' if how else ''}{method}@{sparsity:g}" if sparsity else ""

    return control
