"""The command `serpette advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

Flag = tyro.conf.FlagCreatePairsOff


def advise(
    *,
    model: str,
    dataset: str,
    time: str | None = None,
    memory: str | None = None,
    latency: str | None = None,
    max_loss: float | None = None,
    out: Path = Path("advice.yaml"),
    method: Literal["lora", "rows", "full"] = "lora",
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    rank: int = 8,
    split: str = "train",
    limit: int | None = None,
    test: str | None = None,
    test_split: str = "test",
    test_limit: int | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    task: Literal["classification", "regression", "causal-lm"] | None = None,
    metric: Literal["accuracy", "balanced_accuracy"] = "accuracy",
    clean_test: Annotated[bool, Flag] = False,
    compare: Annotated[bool, Flag] = False,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """What pays on your data: measures it in a fifth of the fine-tune at most, and writes the recipe.

    Example: serpette advise --model vit-s --dataset fashion-mnist --limit 4000 --max-loss 1.0

    Then: serpette run advice.yaml. Says in one sentence which examples to keep, how to tune and what to cut,
    with the predicted loss; "keep everything" and "a random share is as good as any score" are answers. What
    was found lies beside the recipe, in the folder advice: report.html and result.json.

    Args:
        model: The pre-trained model: a zoo name, a hub id or a local folder.
        dataset: The examples: a zoo name, a hub id, an image folder, or a parquet, CSV or JSONL file.
        time: Limit of scoring and tuning: a share of tuning with everything (0.3x), or 600s, 10min, 2h.
        memory: Limit of a training step's peak, such as 8GiB or 500MB.
        latency: Of the finished model to the unpruned one, such as 0.6x, for batches of 1 or of 8, whichever
            gains more.
        max_loss: Points of the metric that may be lost to keeping everything. Without any limit: 1.0. Where
            the time is not limited, the least time that keeps it is advised; else the least loss.
        out: File of the recipe; a stopped command goes on in the folder of that name.
        method: The fine-tune that is advised on: LoRA, rows or every weight.
        epochs: Of it.
        learning_rate: Peak learning rate of it.
        batch_size: Examples a step.
        rank: Of the LoRA, or rows of each layer.
        split: Split of the data set to tune on.
        limit: At most so many training examples, drawn with the seed; None: all of them.
        test: Test examples for the recipe; nothing is chosen by them. Default: those of the data set.
        test_split: Split of the test examples.
        test_limit: At most so many test examples; None: all of them.
        label_column: Column of the labels. Default: found by its name (label, labels, target, rating, class).
        max_length: Tokens a text is cut to. Default: 128, and 1024 for a causal language model.
        task: What the model learns. Default: by the label column.
        metric: balanced_accuracy: each class counts the same in the test, whatever its share of the training.
        clean_test: The test labels are right, even if training labels are not.
        compare: The recipe also trains on everything and on a random choice: did it come true?
        device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.
        seed: Of everything random.
    """
    from .adviser import advise as advised
    from .adviser import places
    from .recipe import TuneSpec
    from .recipe.tune import check_tune

    tune = TuneSpec(method, epochs, learning_rate, batch_size, rank, alpha=2 * rank)
    check_tune(tune, [], "serpette advise: tune")
    advice = advised(
        model, dataset, time=time, memory=memory, latency=latency, max_loss=max_loss, tune=tune, split=split,
        limit=limit, test=test, test_split=test_split, test_limit=test_limit, label_column=label_column,
        max_length=max_length, task=task, metric=metric, clean_test=clean_test, compare=compare, out=out,
        device=device, seed=seed,
    )  # fmt: skip
    print(advice.sentence)
    for option in advice.result["runners_up"]:
        print(f"Or: {option['sentence']}")
    for note in advice.result["notes"]:
        print(f"Note: {note}")
    print(places(out)[1])
    print(advice.folder / "report.html")
