"""Worked answers with a small language model: fewer instructions, then fewer channels; loss in nats.

python examples/llm.py            # a quarter of an hour on one CPU core
python examples/llm.py --small    # about a minute; shows the way and proves nothing
"""

import math
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from serpette import Pruner, score, select, shrink, zoo
from serpette.data.instructions import collate, encode
from serpette.data.language import response_losses
from serpette.evaluate import paired_difference
from serpette.weights.measure import compare_cost

# --8<-- [start:settings]
SMALL = "--small" in sys.argv
SIZE = 16 if SMALL else 40  # training examples
TEST = 8 if SMALL else 24
LONGEST = 400 if SMALL else 800  # characters; longer examples are left out
LAYERS = 2 if SMALL else 30
EPOCHS = 2
KEEP, SPARSITY, SEED = 0.5, 0.2, 0
OUT = Path("runs/llm-small" if SMALL else "runs/llm")
# --8<-- [end:settings]

tokenizer = zoo.load_processor("smollm2-135m")


# --8<-- [start:yours]
def examples(split, count):
    rows = zoo.load_dataset("mmlu-cot", split).shuffle(SEED)
    short = [i for i, row in enumerate(rows) if len(row["prompt"] + row["response"]) <= LONGEST]
    return rows.select(short[:count])


def pretrained():
    return zoo.load_model("smollm2-135m", task="causal-lm", layers=LAYERS)


def tune(rows, *callbacks):
    """The tuned model with its LoRA merged into the weights, and the seconds it took."""
    torch.manual_seed(SEED)
    model = get_peft_model(pretrained(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=OUT / "trainer",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        seed=SEED,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    start = time.perf_counter()
    Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[*callbacks]).train()
    seconds = time.perf_counter() - start
    return model.merge_and_unload(), seconds


def losses(model, rows):
    """(N,) mean loss of each response, in nats a token."""
    model.eval()
    with torch.inference_mode():
        return torch.cat(
            [response_losses(model, batch)[0] for batch in DataLoader(rows, 4, collate_fn=collate)]
        )


# --8<-- [end:yours]


def difference(a, b):
    """Nats between two models on the same test examples, with the interval."""
    middle, low, high = paired_difference(a, b)
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def main():
    train = examples("train", SIZE)
    test = examples("test", TEST)

    # --8<-- [start:score]
    scores = score(pretrained(), train, "ifd", processing_class=tokenizer, batch_size=4)
    scoring = sum(scores.cost["seconds"].values())
    chosen = select(scores, "top_hard", KEEP, seed=SEED).rows.tolist()
    control = select(scores, "random", KEEP, seed=SEED).rows.tolist()
    # --8<-- [end:score]

    # --8<-- [start:tune]
    tokens = [encode(row, tokenizer) for row in train]
    full, full_seconds = tune(tokens)
    of_control, control_seconds = tune([tokens[row] for row in control])
    of_chosen, chosen_seconds = tune([tokens[row] for row in chosen])
    # --8<-- [end:tune]

    # --8<-- [start:cut]
    pruner = Pruner("lora_prune", SPARSITY, pattern="structured", targets="ffn")
    masked, cut_seconds = tune(tokens, pruner)
    small = shrink(masked, pruner.masks_)
    small.save_pretrained(OUT / "model")
    small = AutoModelForCausalLM.from_pretrained(OUT / "model", dtype=torch.float32)
    # --8<-- [end:cut]

    # --8<-- [start:lost]
    held_out = [encode(row, tokenizer) for row in test]
    models = {"none": pretrained(), "full": full, "control": of_control, "chosen": of_chosen, "cut": small}
    lost = {name: losses(model, held_out) for name, model in models.items()}
    rows = [
        ("before tuning", "none", 0.0, ""),
        (f"all {len(train)} examples", "full", full_seconds, ""),
        (f"{len(control)} at random", "control", control_seconds, ""),
        (
            f"{len(chosen)} by IFD",
            "chosen",
            scoring + chosen_seconds,
            difference(lost["chosen"], lost["control"]),
        ),
        (f"all {len(train)}, a fifth of the channels", "cut", cut_seconds, ""),
    ]
    print(f"\n{'':34}{'loss':>7}{'perplexity':>12}{'seconds':>9}  {'to all examples':28}to random")
    for label, name, seconds, to_random in rows:
        to_full = difference(lost[name], lost["full"]) if name != "full" else ""
        loss = float(lost[name].mean())
        print(f"{label:34}{loss:7.3f}{math.exp(loss):12.2f}{seconds:9.0f}  {to_full:28}{to_random}")
    # --8<-- [end:lost]

    # --8<-- [start:faster]
    ids = torch.tensor([tokens[0]["input_ids"]])
    cost = compare_cost(full, small, lambda size: {"input_ids": ids.expand(size, -1)}, (1,))
    left = cost["after"]["parameters"] / cost["before"]["parameters"]
    low, high = cost["speed"][1]["interval"]
    print(f"\nThe pruned model has {100 * left:.0f}% of the parameters,")
    print(
        f"and reads a prompt in {cost['speed'][1]['time_ratio']:.2f} ({low:.2f} to {high:.2f}) of the time."
    )
    # --8<-- [end:faster]


if __name__ == "__main__":
    main()
