"""The commands about tuning: `serpette prune`, `serpette shrink`, `serpette memory`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

Flag = tyro.conf.FlagCreatePairsOff


def prune(
    *,
    model: str,
    dataset: str,
    out: Path,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    importance: str = "lora_prune",
    targets: Literal["both", "attention", "ffn"] = "both",
    scope: Literal["layer", "global"] = "layer",
    schedule: str = "cubic",
    shrink: Annotated[bool, Flag] = False,
    ragged: Annotated[bool, Flag] = False,
    export: UseAppendAction[tuple[Literal["safetensors", "onnx", "packed"], ...]] = (),
    compare: Annotated[bool, Flag] = False,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    rank: int = 8,
    split: str = "train",
    test_split: str = "test",
    limit: int | None = None,
    test_limit: int | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    task: Literal["classification", "regression", "causal-lm"] | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Fine-tune with LoRA and prune the weights meanwhile; the model, result.json and a report go to OUT.

    Example: serpette prune --model vit-s --dataset fashion-mnist --limit 500 --pattern structured --shrink
    --out small

    That is a recipe with one arm (two with --compare), written to OUT/recipe.yaml; `serpette run` knows more.
    Single weights that are pruned make nothing faster, only a packed file smaller; `--pattern structured
    --shrink` removes attention heads and channels, which makes a smaller model.

    Args:
        model: The pre-trained model: a zoo name, a hub id or a local folder.
        dataset: The examples: a zoo name, a hub id, an image folder, or a parquet, CSV or JSONL file.
        out: Folder of the results; a stopped command goes on there.
        sparsity: Share of the weights, or of the heads and channels, that is removed, in [0, 1).
        pattern: unstructured (single weights), n:m such as 2:4, or structured (whole heads and channels).
        importance: By what they are chosen: a name from `serpette list importances`.
        targets: Prune attention, the FFN, or both.
        scope: The same share of each layer, or the least important of all layers.
        schedule: How the sparsity grows: cubic, linear or one_shot.
        shrink: Remove what is pruned: a smaller, dense model. Of structured alone.
        ragged: Shrink, each layer as narrow as it can be, for serpette.weights.load alone. By default only as
            far as the stock from_pretrained can load it.
        export: How the model is saved: safetensors, onnx, packed (bitmask and values); give it again for
            another one. Default: safetensors.
        compare: Tune an unpruned model alike, to say what pruning lost.
        epochs: Passes over the examples.
        learning_rate: Peak learning rate of the LoRA.
        batch_size: Examples a step.
        rank: Of the LoRA.
        split: Split of the data set to tune on.
        test_split: Split of the data set to measure on.
        limit: At most so many training examples, drawn with the seed; None: all of them.
        test_limit: At most so many test examples; None: all of them.
        label_column: Column of the labels. Default: found by its name (label, labels, target, rating, class).
        max_length: Tokens a text is cut to. Default: 128, and 1024 for a causal language model.
        task: What the model learns. Default: by the label column.
        device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.
        seed: Of everything random.
    """
    from .recipe import ArmSpec, DataSpec, ModelSpec, PruneSpec, Recipe, ShrinkSpec, TuneSpec, check

    recipe = Recipe(
        name="prune",
        model=ModelSpec(model),
        data=DataSpec(
            dataset, train_split=split, test_split=test_split, train_limit=limit, test_limit=test_limit,
            label_column=label_column, max_length=max_length,
        ),
        tune=TuneSpec("lora", epochs, learning_rate, batch_size, rank, alpha=2 * rank),
        prune=PruneSpec(
            importance, sparsity=sparsity, pattern=pattern, schedule=schedule, scope=scope, targets=targets,
        ),
        shrink=ShrinkSpec(ragged) if shrink or ragged else None,
        arms=(
            *([ArmSpec("unpruned", prune={"sparsity": 0.0})] if compare else []),
            ArmSpec("pruned", export=export or ("safetensors",)),
        ),
        task=task,
        seed=seed,
        batch_size=max(batch_size, 8),
        device=device,
        out=str(out),
    )  # fmt: skip
    check(recipe, "serpette prune")
    from . import pipeline

    report = pipeline.run(recipe)
    print(next(out.glob("arms/??-pruned/model"), out))
    print(report)


def shrink(
    folder: Positional[Path],
    *,
    out: Path,
    ragged: Annotated[bool, Flag] = False,
    round_to: int = 8,
) -> None:
    """Make a model whose heads and channels are zero smaller and dense; it computes the same.

    Example: serpette shrink runs/prune/arms/00-pruned/model --out small

    OUT gets the model, what belongs to it (tokenizer, image processor), and a result.json with the sizes.

    Args:
        folder: A saved model, as `save_pretrained` writes it.
        out: Folder of the smaller one.
        ragged: Each layer as narrow as it can be, for serpette.weights.load alone. By default only as far as
            the stock from_pretrained can load it.
        round_to: Widths are rounded up to a multiple.
    """
    from .cost import versions
    from .files import write_json
    from .weights.load import NOTE, load, save_shrunk
    from .weights.shrink import shrink as shrunk
    from .zoo.quiet import quiet_transformers

    if out.exists() and out.samefile(folder):
        raise ValueError(f"out={str(out)!r} is the folder of the model itself; name another")
    with quiet_transformers():
        model = load(folder)
        small = shrunk(model, ragged=ragged, round_to=round_to)
        note = save_shrunk(small, out)
    for file in sorted(folder.iterdir()):
        own = ("config.json", "result.json", NOTE)
        if file.suffix in (".json", ".txt", ".model") and file.name not in own:
            if not (out / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)
    sizes = {
        name: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "bytes": sum(file.stat().st_size for file in place.glob("*.safetensors")),
        }
        for name, network, place in (("before", model, folder), ("after", small, out))
    }
    settings = {"folder": str(folder), "ragged": ragged, "round_to": round_to}
    write_json(out / "result.json", {"kind": "shrink", **settings, **sizes, **note, "versions": versions()})
    for name, size in sizes.items():
        print(f"{name}: {size['parameters']:,} parameters, {size['bytes']:,} bytes")
    print(out if note["stock"] else f"{out}, to be loaded with serpette.weights.load: {note['reason']}")


def memory(
    *,
    model: str,
    tuner: UseAppendAction[tuple[str, ...]] = (),
    tokens: int = 2048,
    batch_size: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    r: int = 16,
    fraction: float | None = None,
    dropout: float = 0.0,
    freeze_attention: bool = False,
    checkpointing: bool = False,
    recompute: bool = False,
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit", "sgd", "adafactor"] = "adamw",
    labels: int | None = None,
    measure: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    out: Path | None = None,
) -> None:
    """Memory of a training step for ways to tune: predicted at the true shapes, without allocating them.

    Example: serpette memory --model llama-2-7b --tuner rows,r=128 --tuner lora,r=64,dropout=0.1

    Args:
        model: A preset (llama-2-7b, llama-3-8b, llama-2-13b, mistral-7b, bert-base, vit-b), a zoo name, a hub
            id or a local folder; of the last two only the configuration is read, unless it is measured.
        tuner: A way to tune: rows, columns, both, lora, dora, full or head; give it again for another.
            What differs from the options below goes behind it: lora,r=64,dropout=0.1. Default: rows, lora.
        tokens: Length of the texts; images have the model's size.
        batch_size: Texts or images in a step.
        dtype: Of the frozen weights; peft makes adapters in half precision float32.
        r: Rows or columns of each layer, or the rank of LoRA, DoRA and SHiRA.
        fraction: Of the rows or columns, in place of r.
        dropout: Of LoRA and DoRA.
        freeze_attention: Nothing trains inside attention blocks.
        checkpointing: Gradient checkpointing of each block.
        recompute: Norm outputs and products of gated MLPs are computed again in the backward pass.
        optimizer: Whose states are held; adamw-8bit is that of bitsandbytes.
        labels: Width of a new head. Default: what the checkpoint was made for.
        measure: Run the steps with real tensors too, and show them beside the prediction.
        device: Whose memory is meant, and where it is measured. Default: cuda, or cpu to measure without one.
        out: Folder for result.json and the chart memory.svg.
    """
    from functools import partial

    from . import zoo
    from .data.sources import open_model
    from .files import write_atomic, write_json
    from .memory.compare import Setup, compare, opened, parse
    from .report import memory as reports

    common = Setup("rows", r, fraction, dropout, freeze_attention, checkpointing, recompute, optimizer)
    setups = [parse(text, common) for text in tuner or ("rows", "lora")]
    opener = partial(opened, open_model, model, num_labels=labels)
    result = compare(
        opener() if model in zoo.models() else model,
        setups,
        tokens=tokens,
        batch_size=batch_size,
        dtype=dtype,
        labels=labels,
        device=device,
        measure=measure,
        open_model=opener,
    )
    result["model"] = model
    reports.show(result)
    if out is not None:
        write_json(out / "result.json", result)
        write_atomic(out / "memory.svg", reports.chart(result))
        print(out / "memory.svg")
