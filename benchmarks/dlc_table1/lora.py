"""The part with fine-tuning: LoRA on the last 4 of 8 layers, on cached activations of the first 4."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import adapters
import cells
import numpy as np
import tasks
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from serpette import zoo
from serpette.data import budget
from serpette.data.examples import Examples
from serpette.data.selectors import Random
from serpette.evaluate import accuracy_by_class
from serpette.files import write_json
from serpette.tuning import trainable

KEEPS = (0.5, 0.3, 0.1)
SETTINGS = {
    "task": "fashion-vit/clean", "drawn": 1000, "test": 3000, "layers_tuned": 4, "rank": 8, "alpha": 16,
    "epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "schedule": "linear to 0", "optimizer": "AdamW",
    "precision": "float32, tests in bfloat16",
}  # fmt: skip
LOWER = 4


def choose_arms(table: dict[str, Any]) -> list[str]:
    """Random, stratified random, DLC + FlexRand, and the best pair of each of the three best other scorers.

    Best by the mean difference to stratified random of the head-only part (Fashion-MNIST, clean, at the
    shares of this part). That looks at test accuracies of heads, so it favours the three a little.
    """
    gain: dict[str, list[float]] = {}
    for row in table["rows"]:
        scorer = row["arm"].split("+")[0]
        if row["task"] == "fashion-vit/clean" and row["keep"] in KEEPS and scorer in cells.all_scorers():
            if not scorer.startswith(("dlc", "unmasked")):
                gain.setdefault(row["arm"], []).append(row["vs_stratified"][0])
    best: dict[str, str] = {}  # scorer: arm
    for arm in sorted(gain, key=lambda a: -float(np.mean(gain[a]))):
        best.setdefault(arm.split("+")[0], arm)
    others = list(best.values())[:3]
    return ["random", "stratified_random", "dlc+flex_rand", *others] if others else []


def jobs(arms: list[str], seeds: int, folder: Path) -> list[tuple]:
    """Arguments of `run`, the long ones first."""
    pruned = [(arms, keep, seed, folder) for keep in KEEPS for seed in range(seeds)]
    return pruned + [(["no_pruning"], 1.0, seed, folder) for seed in range(seeds)]


def lora_file(folder: Path, keep: float, seed: int) -> Path:
    """Where the arms of one share and seed lie; written anew after each arm."""
    return folder / "lora" / f"keep{keep:g}-seed{seed}.json"


def prepare(seeds: int) -> None:
    """Activations after the lower layers, of the examples that the seeds draw and of the test set."""
    file = _activations_file(seeds)
    if file.exists():
        return
    source, pool_limit, _, model_name, options, batch_size = tasks.SETS["fashion-vit"]
    pool = tasks.features("fashion-vit")
    drawn = sorted(
        {int(r) for s in range(seeds) for r in tasks.draw(pool, "clean", s, size=SETTINGS["drawn"]).rows}
    )
    train = zoo.load_dataset(source, "train", limit=pool_limit).select(drawn)
    test = zoo.load_dataset(source, "test", limit=SETTINGS["test"])
    assert list(train["id"]) == pool.ids[drawn].tolist()
    model = zoo.load_model(model_name, layers=LOWER, image_size=options["image_size"])
    processor = zoo.load_processor(model_name, image_size=options["image_size"])
    tensors = {"rows": torch.tensor(drawn), "test_labels": torch.tensor(test["label"])}
    for part, data in (("train", train), ("test", test)):
        examples = Examples(data, processing_class=processor)
        tensors[part] = torch.cat(
            [
                adapters.after_layers(model, examples.read(rows.tolist())[1])
                for rows in torch.arange(len(data)).split(batch_size)
            ]
        ).half()
    save_file(tensors, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def _activations_file(seeds: int) -> Path:
    return tasks.cache() / f"fashion-vit-layer{LOWER}-{seeds}seeds-{SETTINGS['test']}.safetensors"


@functools.lru_cache(maxsize=1)
def _activations(seeds: int) -> dict[str, Tensor]:
    return load_file(_activations_file(seeds))


def tune(hidden: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A LoRA and a head, trained on (k, T, D) activations for `epochs`."""
    torch.manual_seed(seed)  # the LoRA's factors; the head's weights are the zoo's
    _, _, _, name, options, _ = tasks.SETS["fashion-vit"]
    whole = zoo.load_model(name, seed=seed, **options)
    upper = adapters.Upper(whole.dinov2.encoder.layer[LOWER:], whole.dinov2.layernorm, whole.classifier)
    model = trainable(upper, upper.classifier, "lora", rank=SETTINGS["rank"], alpha=SETTINGS["alpha"]).train()
    steps = SETTINGS["epochs"] * -(-len(hidden) // SETTINGS["batch_size"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, SETTINGS["learning_rate"], weight_decay=0.0)
    generator, step = torch.Generator().manual_seed(seed), 0
    for _ in range(SETTINGS["epochs"]):
        for rows in torch.randperm(len(hidden), generator=generator).split(SETTINGS["batch_size"]):
            for group in optimizer.param_groups:
                group["lr"] = SETTINGS["learning_rate"] * (1 - step / steps)
            loss = cross_entropy(model(hidden[rows].float()), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model.merge_and_unload().eval()  # the same logits, sooner


def run(arms: list[str], keep: float, seed: int, folder: Path, seeds: int = 5) -> int:
    """Every arm at one share and seed; the number of arms that were trained now."""
    torch.set_num_threads(1)
    file = lora_file(folder, keep, seed)
    done = json.loads(file.read_text())["arms"] if file.exists() else {}
    missing = [arm for arm in arms if arm not in done]
    if not missing:
        return 0
    held = _activations(seeds)
    bench = cells.Seed(cells.pool_of("fashion-vit", None, None), "clean", seed, SETTINGS["drawn"])
    position = {int(row): i for i, row in enumerate(held["rows"])}
    hidden = held["train"][[position[int(row)] for row in bench.task.rows]]
    labels = bench.signals.labels
    k = budget.count(len(labels), keep)
    for arm in missing:
        if arm == "no_pruning":
            picks = torch.arange(len(labels))
        elif arm in ("random", "stratified_random"):
            picks = bench.pick(Random(), "none", k, arm != "random", f"lora {arm}")
        else:
            scorer, name = arm.split("+")
            picks = bench.pick(bench.searched(scorer, name, keep), scorer, k, True, f"lora {arm}")
        start = time.perf_counter()
        model = tune(hidden[picks], labels[picks], seed)
        seconds = time.perf_counter() - start
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # tests cost more than training
            logits = torch.cat([model(part.float()).float() for part in held["test"].split(100)])
        by_class = accuracy_by_class(logits, held["test_labels"], bench.signals.num_classes)
        done[arm] = {
            "accuracy": float((logits.argmax(1) == held["test_labels"]).double().mean()),
            "worst_class": float(by_class.min()),
            "seconds": seconds,
        }
        write_json(file, {"keep": keep, "seed": seed, "kept": k, "settings": SETTINGS, "arms": done})
    return len(missing)
