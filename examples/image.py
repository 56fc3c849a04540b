"""Fashion-MNIST with a vision transformer: fewer images, then fewer weights, and what each of them loses.

python examples/image.py            # some minutes on one CPU core
python examples/image.py --small    # seconds; shows the way and proves nothing
"""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from serpette import Pruner, score, select, shrink, zoo
from serpette.evaluate import paired_difference
from serpette.weights.measure import compare_cost

# --8<-- [start:settings]
SMALL = "--small" in sys.argv
SIZE = 80 if SMALL else 400  # training images
TEST = 60 if SMALL else 800
EPOCHS = 3 if SMALL else 4
MODEL = {"layers": 2, "image_size": 28} if SMALL else {"layers": 8, "image_size": 56}
KEEP, SPARSITY, SEED = 0.3, 0.5, 0
OUT = Path("runs/image-small" if SMALL else "runs/image")
# --8<-- [end:settings]

processor = zoo.load_processor("vit-s", image_size=MODEL["image_size"])


# --8<-- [start:yours]
def collate(rows):
    batch = processor([row["image"] for row in rows], return_tensors="pt")
    return {"pixel_values": batch["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}


def pretrained():
    return zoo.load_model("vit-s", num_labels=10, seed=SEED, **MODEL)


def tune(images, *callbacks):
    """The tuned model with its LoRA merged into the weights, and the seconds it took."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    torch.manual_seed(SEED)
    model = get_peft_model(pretrained(), config)
    arguments = TrainingArguments(
        output_dir=OUT / "trainer",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        seed=SEED,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    start = time.perf_counter()
    Trainer(model, arguments, data_collator=collate, train_dataset=images, callbacks=[*callbacks]).train()
    seconds = time.perf_counter() - start
    return model.merge_and_unload(), seconds


def found(model, images):
    """(N,) whether the class of each image is found."""
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(images, 64, collate_fn=collate)
        return torch.cat(
            [model(batch["pixel_values"]).logits.argmax(1) == batch["labels"] for batch in batches]
        )


# --8<-- [end:yours]


def difference(a, b):
    """Points of accuracy between two models on the same test images, with the interval."""
    middle, low, high = (100 * value for value in paired_difference(a, b))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def main():
    train = zoo.load_dataset("fashion-mnist", "train", limit=SIZE, seed=SEED)
    test = zoo.load_dataset("fashion-mnist", "test", limit=TEST, seed=SEED)

    # --8<-- [start:score]
    scores = score(pretrained(), train, "herding", processing_class=processor)
    scoring = sum(scores.cost["seconds"].values())
    # --8<-- [end:score]

    # --8<-- [start:select]
    chosen = select(scores, "top_hard", KEEP, per_class=True, seed=SEED)
    control = select(scores, "random", KEEP, per_class=True, seed=SEED)
    # --8<-- [end:select]

    # --8<-- [start:tune]
    full, full_seconds = tune(train)
    of_control, control_seconds = tune(train.select(control.rows.tolist()))
    of_chosen, chosen_seconds = tune(train.select(chosen.rows.tolist()))
    # --8<-- [end:tune]

    # --8<-- [start:cut]
    pruner = Pruner("lora_prune", SPARSITY, pattern="structured")
    masked, cut_seconds = tune(train, pruner)
    small = shrink(masked, pruner.masks_)
    small.save_pretrained(OUT / "model")
    small = AutoModelForImageClassification.from_pretrained(OUT / "model")
    # --8<-- [end:cut]

    # --8<-- [start:lost]
    models = {"full": full, "control": of_control, "chosen": of_chosen, "cut": small}
    right = {name: found(model, test) for name, model in models.items()}
    rows = [
        (f"all {len(train)} images", "full", full_seconds, ""),
        (f"{len(control.rows)} at random of each class", "control", control_seconds, ""),
        (f"{len(chosen.rows)} by herding", "chosen", scoring + chosen_seconds,
         difference(right["chosen"], right["control"])),
        (f"all {len(train)}, half of heads and channels", "cut", cut_seconds, ""),
    ]  # fmt: skip
    print(f"\n{'':38}{'accuracy':>9}{'seconds':>9}  {'to all images':23}to random")
    for label, name, seconds, to_random in rows:
        lost = difference(right[name], right["full"]) if name != "full" else ""
        accuracy = 100 * right[name].float().mean()
        print(f"{label:38}{accuracy:8.1f}%{seconds:9.0f}  {lost:23}{to_random}")
    # --8<-- [end:lost]

    # --8<-- [start:faster]
    pixels = collate([test[0]])["pixel_values"]
    cost = compare_cost(full, small, lambda size: {"pixel_values": pixels.expand(size, -1, -1, -1)}, (1, 8))
    left = cost["after"]["parameters"] / cost["before"]["parameters"]
    print(f"\nThe pruned model has {100 * left:.0f}% of the parameters.")
    for size, speed in cost["speed"].items():
        low, high = speed["interval"]
        print(f"A batch of {size} takes {speed['time_ratio']:.2f} ({low:.2f} to {high:.2f}) of the time.")
    # --8<-- [end:faster]


if __name__ == "__main__":
    main()
