"""What the models see, once: features along the learning paths, and a fine-tuning run.

Everything lies in the cache of the zoo and is written in pieces, so a killed run goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import serpette
from serpette import zoo
from serpette.data.examples import Examples
from serpette.data.observe import Observation, observe
from serpette.masking import LOW_DISCREPANCY
from serpette.scorers import DLC
from serpette.types import Signals

SHARES = tuple(float(p) for p in LOW_DISCREPANCY)  # of the weights masked: 0, 1/2, 1/4, 3/4, 1/8 ...
MODELS = {  # name: (zoo entry, options, batch size)
    "vit-8": ("vit-s", {"layers": 8, "image_size": 56}, 64),
    "vit-4": ("vit-s", {"layers": 4, "image_size": 56}, 64),
    "lite0": ("efficientnet-lite0", {"image_size": 64}, 64),
}


@dataclass(frozen=True)
class Size:
    """How many images, seeds and epochs; `--quick` is the smaller one."""

    pool: int = 3000
    train: int = 2000  # of the pool, drawn anew by each seed
    test: int = 5000
    random_pool: int = 1000  # images scored under random masks
    mask_seeds: int = 10
    tuned: int = 1000  # images of the fine-tuning run, the same ones
    epochs: int = 5
    seeds: int = 10


QUICK = Size(pool=300, train=200, test=200, random_pool=150, mask_seeds=2, tuned=150, epochs=2, seeds=2)


def cache() -> Path:
    return zoo.cache_dir() / "benchmarks" / "dlc_ablation"


def along(
    model_name: str, images: int, scorers: Sequence[DLC], folder: str, split: str = "train"
) -> Observation:
    """`images` of Fashion-MNIST under each path that `scorers` ask for."""
    entry, options, batch_size = MODELS[model_name]
    model = zoo.load_model(entry, num_labels=10, **options)
    processor = zoo.load_processor(entry, image_size=options["image_size"])
    examples = Examples(zoo.load_dataset("fashion-mnist", split, limit=images), processing_class=processor)
    return observe(model, examples, scorers, batch_size=batch_size, folder=cache() / folder)


def l1_path(model_name: str, images: int, points: int) -> Signals:
    scorer = DLC(points=SHARES[:points])
    return along(model_name, images, [scorer], f"{model_name}-{images}-{points}").signals


def random_paths(images: int, mask_seeds: int, points: int = 4) -> tuple[Signals, list[DLC]]:
    """The same images under masks in l1 order and in `mask_seeds` random orders."""
    scorers = [DLC(points=SHARES[:points])]
    scorers += [DLC(points=SHARES[:points], principle="random", seed=seed) for seed in range(mask_seeds)]
    return along("vit-8", images, scorers, f"random-{images}-{mask_seeds}-{points}").signals, scorers


def test_set(images: int) -> Signals:
    return along("vit-8", images, [], f"test-{images}", split="test").signals


def fine_tuned(images: int, epochs: int) -> Signals:
    """`history` (T, N, C) of a LoRA run of the stock Trainer over all of the images."""
    file = cache() / f"finetune-{images}-{epochs}.safetensors"
    signals = along("vit-8", images, [], f"finetune-{images}").signals
    if not file.exists():
        entry, options, _ = MODELS["vit-8"]
        model = zoo.load_model(entry, num_labels=10, **options)
        processor = zoo.load_processor(entry, image_size=options["image_size"])
        examples = Examples(zoo.load_dataset("fashion-mnist", limit=images), processing_class=processor)
        rows = torch.arange(images)
        tuned = serpette.FineTune(epochs=epochs).train(signals, model, examples, rows)
        part = file.with_suffix(".part")
        save_file({"history": tuned.history}, part)
        part.replace(file)
    signals.history = load_file(file)["history"]
    return signals


def everything(size: Size) -> None:
    """Fills the cache, the dear parts first."""
    l1_path("vit-8", size.pool, len(SHARES))
    test_set(size.test)
    fine_tuned(size.tuned, size.epochs)
    l1_path("vit-4", size.pool, 5)
    l1_path("lite0", size.pool, 5)
    random_paths(size.random_pool, size.mask_seeds)
