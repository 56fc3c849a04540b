"""SmolLM2-135M tuned on news and pruned to whole heads and channels: held-out perplexity, one file a seed."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pruned import METHODS, SEEDS, at, parse
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from serpette import zoo
from serpette.evaluate import paired_over_seeds, seeds_interval
from serpette.files import write_json
from serpette.tuning import trainable
from serpette.weights import PruneConfig, attach

TOKENS, BATCH, STEPS, TEST, RATE = 64, 4, 20, 64, 5e-4
ARMS = (
    "lora",
    *(f"structured/{m}@0.2" for m in ("lora_prune", "map_lora")),
    *(f"structured/{m}@0.5" for m in ("lora_prune", "map_lora", "rap")),
)
FACTS = {
    "model": "SmolLM2-135M-Instruct, 30 blocks of 9 heads (3 KV heads), 1,536 channels; LoRA r = 8 on all",
    "data": "news articles, cut into texts of tokens", "tokens": TOKENS, "batch_size": BATCH, "steps": STEPS,
    "seeds": SEEDS, "test_texts": TEST, "learning_rate": RATE, "precision": "float32",
    "units_left": "of 3 KV heads 2 at 20 % and 1 at 50 %, of 1,536 channels 1,232 and 768",
}  # fmt: skip
HEAD = ("arm", "perplexity", "loss to LoRA", "loss to magnitude", "loss to random", "zeros", "seconds")
CONTROLS = {"vs_lora": lambda arm: "lora", "vs_map_lora": at("map_lora"), "vs_random": at("rap")}


@functools.lru_cache(maxsize=1)
def texts() -> tuple[Tensor, Tensor]:
    """(N, TOKENS) token ids to train on, and to test on."""
    tokenizer = zoo.load_processor("smollm2-135m")
    parts = []
    for split in ("train", "test"):
        ids = [
            i for text in zoo.load_dataset("lee-news", split)["text"] for i in tokenizer(text)["input_ids"]
        ]
        parts.append(torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS))
    return parts[0], parts[1][:TEST]


def losses(model: nn.Module, texts: Tensor) -> Tensor:
    """(n,) mean loss of each text's tokens."""
    logits = model(input_ids=texts, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none").mean(1)


def run_arm(model: nn.Module, arm: str, seed: int) -> dict[str, Any]:
    """One arm of one seed; `model` is used up."""
    _, method, sparsity = parse(arm)
    train, test = texts()
    torch.manual_seed(seed)
    model = trainable(model, None, "lora", rank=8, alpha=16)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH]
    cpu, pruner = time.process_time(), None
    if sparsity:
        config = PruneConfig(METHODS[method][1], sparsity, pattern="structured", seed=seed)
        pruner = attach(model, config, STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    for step, rows in enumerate(order.split(BATCH)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        losses(model, train[rows]).mean().backward()
        if pruner is not None:
            pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    if pruner is not None:
        pruner.finish()
    cpu = time.process_time() - cpu
    model = model.merge_and_unload()  # type: ignore[operator]
    with torch.inference_mode():
        loss = torch.cat([losses(model, part) for part in test.split(8)])
    masks = pruner.masks_ if pruner is not None else {}
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "loss": float(loss.mean()),
        "seconds": cpu,
        "zeros": zeros / max(1, sum(mask.numel() for mask in masks.values())),
    }


def cell_file(folder: Path, seed: int) -> Path:
    """The arms of a seed."""
    return folder / f"smollm2-seed{seed}.json"


def cells(folder: Path, seed: int) -> dict[str, Any]:
    """{arm: what it came to} of a seed, as far as it is there."""
    file = cell_file(folder, seed)
    return json.loads(file.read_text()) if file.exists() else {}


def run(seed: int, folder: Path) -> None:
    """The arms that are missing."""
    torch.set_num_threads(1)
    for arm in ARMS:
        if arm not in cells(folder, seed):
            entry = run_arm(zoo.load_model("smollm2-135m"), arm, seed)
            write_json(cell_file(folder, seed), cells(folder, seed) | {arm: entry})


def jobs(folder: Path) -> list[tuple]:
    """Arguments of `run`."""
    return [(seed, folder) for seed in range(SEEDS)]


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for each arm whose seeds are all there; differences are of the loss, in nats."""
    found = [cells(folder, seed) for seed in range(SEEDS)]
    whole = {arm: [f[arm] for f in found] for arm in ARMS if all(arm in f for f in found)}
    rows = []
    for arm, entries in whole.items():
        loss = np.array([entry["loss"] for entry in entries])
        middle, low, high = seeds_interval(loss)
        row: dict[str, Any] = {
            "arm": arm,
            "perplexity": math.exp(middle),
            "interval": [math.exp(low), math.exp(high)],
            "zeros": entries[0]["zeros"],
            "seconds": float(np.median([entry["seconds"] for entry in entries])),
        }
        for key, control in CONTROLS.items():
            other = control(arm)
            if other in whole and other != arm:
                row[key] = list(paired_over_seeds(loss, np.array([e["loss"] for e in whole[other]])))
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a table."""
    low, high = row["interval"]
    differences = ["" if key not in row else "{:+.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in CONTROLS]
    return (
        row["arm"],
        f"{row['perplexity']:.1f} [{low:.1f}, {high:.1f}]",
        *differences,
        f"{row['zeros']:.0%}",
        f"{row['seconds']:.0f}",
    )
