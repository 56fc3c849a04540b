"""Sentences of film critics with a small encoder: fewer texts, a few rows to train, then fewer weights.

python examples/text.py            # some minutes on one CPU core
python examples/text.py --small    # seconds; shows the way and proves nothing
"""

import copy
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from serpette import DataPruner, RowConfig, prune, rank_rows, select, zoo
from serpette.evaluate import paired_difference
from serpette.weights.measure import compare_cost

# --8<-- [start:settings]
SMALL = "--small" in sys.argv
SIZE = 80 if SMALL else 600  # training texts
TEST = 60 if SMALL else 1000
EPOCHS = 1 if SMALL else 3
LAYERS = 2 if SMALL else 6
KEEP, ROWS, SPARSITY, SEED = 0.3, 0.05, 0.5, 0
OUT = Path("runs/text-small" if SMALL else "runs/text")
# --8<-- [end:settings]

tokenizer = zoo.load_processor("minilm-l6")


# --8<-- [start:yours]
def collate(rows):
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def pretrained():
    return zoo.load_model("minilm-l6", num_labels=2, seed=SEED, layers=LAYERS)


# --8<-- [end:yours]


# --8<-- [start:rows]
def tune(texts):
    """The tuned model, its rows written into the weights, and the seconds it took."""
    config = RowConfig(fraction=ROWS, target_modules="all-linear", modules_to_save=["classifier"])
    torch.manual_seed(SEED)
    model = get_peft_model(pretrained(), config)
    start = time.perf_counter()
    rank_rows(model, DataLoader(texts, 16, collate_fn=collate), "taylor")
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
    Trainer(model, arguments, data_collator=collate, train_dataset=texts).train()
    seconds = time.perf_counter() - start
    return model.merge_and_unload(), seconds


# --8<-- [end:rows]


def found(model, texts):
    """(N,) whether the class of each text is found."""
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(texts, 64, collate_fn=collate)
        return torch.cat([model(**batch).logits.argmax(1) == batch["labels"] for batch in batches])


def difference(a, b):
    """Points of accuracy between two models on the same test texts, with the interval."""
    middle, low, high = (100 * value for value in paired_difference(a, b))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def main():
    train = zoo.load_dataset("movie-snippets", "train", limit=SIZE, seed=SEED)
    test = zoo.load_dataset("movie-snippets", "test", limit=TEST, seed=SEED)

    # --8<-- [start:select]
    pruner = DataPruner("dlc", select="flex_rand", keep=KEEP, per_class=True, seed=SEED)
    chosen = pruner.fit_transform(pretrained(), train, processing_class=tokenizer)
    choosing = sum(pruner.cost_["seconds"].values())
    control = train.select(select(pruner.result_, "random", KEEP, per_class=True, seed=SEED).rows.tolist())
    # --8<-- [end:select]

    # --8<-- [start:tune]
    full, full_seconds = tune(train)
    of_control, control_seconds = tune(control)
    of_chosen, chosen_seconds = tune(chosen)
    right = {"full": found(full, test), "control": found(of_control, test), "chosen": found(of_chosen, test)}
    # --8<-- [end:tune]

    # --8<-- [start:cut]
    cut = copy.deepcopy(full)
    start = time.perf_counter()
    prune(cut, "obs", SPARSITY, loader=DataLoader(train, 16, collate_fn=collate))
    cut_seconds = time.perf_counter() - start
    right["cut"] = found(cut, test)
    # --8<-- [end:cut]

    # --8<-- [start:lost]
    rows = [
        (f"all {len(train)} texts", "full", full_seconds, ""),
        (f"{len(control)} at random of each class", "control", control_seconds, ""),
        (f"{len(chosen)} by DLC + FlexRand", "chosen", choosing + chosen_seconds,
         difference(right["chosen"], right["control"])),
        (f"all {len(train)}, then half of the weights", "cut", full_seconds + cut_seconds, ""),
    ]  # fmt: skip
    print(f"\n{'':38}{'accuracy':>9}{'seconds':>9}  {'to all texts':23}to random")
    for label, name, seconds, to_random in rows:
        lost = difference(right[name], right["full"]) if name != "full" else ""
        accuracy = 100 * right[name].float().mean()
        print(f"{label:38}{accuracy:8.1f}%{seconds:9.0f}  {lost:23}{to_random}")
    # --8<-- [end:lost]

    # --8<-- [start:faster]
    text = collate([test[0]])
    inputs = {name: value for name, value in text.items() if name != "labels"}
    cost = compare_cost(full, cut, lambda size: {k: v.expand(size, -1) for k, v in inputs.items()}, (1, 8))
    sizes = [cost[when][what] / 2**20 for when, what in (("before", "file_bytes"), ("after", "packed_bytes"))]
    print(f"\nThe file of {sizes[0]:.0f} MiB packs into {sizes[1]:.0f} MiB.")
    for size, speed in cost["speed"].items():
        low, high = speed["interval"]
        print(f"A batch of {size} takes {speed['time_ratio']:.2f} ({low:.2f} to {high:.2f}) of the time.")
    # --8<-- [end:faster]


if __name__ == "__main__":
    main()
