"""loprune_speed: what TSA costs beside a plain LoRA epoch, and what its short cuts cost in accuracy.

    serpette bench loprune_speed [part ...] [--quick] [--fresh]

Times are taken in interleaved pairs (A B, B A, A B ...), in one thread, as processor seconds beside the
clock; each finished piece is kept in the cache of the zoo, and a stopped run goes on from it. With a GPU the
work is done there, and the clock counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, shared by the benchmarks

from timing import Decoded, console, interleaved, run_parts, timed

import serpette
from serpette import zoo
from serpette.cost import hardware, measure
from serpette.data.examples import Examples
from serpette.data.features import Reader, find_head
from serpette.data.gradient_pass import GradientPass
from serpette.data.observe import evaluating
from serpette.evaluate import spearman
from serpette.files import write_json
from serpette.scorers import TSA
from serpette.tuning import trainable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16
QUERY_VALUE = ["q_proj", "v_proj"]
PAPER = {"random_50_percent_seconds": 343.3, "loprune_50_percent_seconds": 371.5, "no_pruning_seconds": 561.1}


def lora(model: nn.Module, rank: int = 8, targets: Any = "all-linear") -> nn.Module:
    """A LoRA that has been trained a little: B is not 0."""
    torch.manual_seed(0)
    model = trainable(model, find_head(model), "lora", rank=rank, alpha=2 * rank, target_modules=targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.to(DEVICE).eval()


class Batches:
    """Ready inputs and labels, cut into batches."""

    def __init__(self, inputs: dict[str, Tensor], labels: list[int]):
        self.inputs, self.labels = {k: v.to(DEVICE) for k, v in inputs.items()}, labels

    def __iter__(self):
        for start in range(0, len(self.labels), BATCH):
            rows = slice(start, start + BATCH)
            ids = np.arange(len(self.labels)).astype(str)[rows]
            yield {k: v[rows] for k, v in self.inputs.items()}, self.labels[rows], ids


class Rows(torch.utils.data.Dataset):
    """The same, a row at a time: what `Examples` reads."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        inputs = {k: v[i].cpu() for k, v in self.batches.inputs.items()}
        return {**inputs, "labels": self.batches.labels[i]}


def images(number: int, side: int, layers: int) -> tuple[nn.Module, Batches]:
    data = Decoded("vit-s", number, side)
    model = zoo.load_model("vit-s", num_labels=10, layers=layers, image_size=side)
    return model, Batches({"pixel_values": data.pixel_values}, data.targets)


def texts(number: int, tokens: int) -> tuple[nn.Module, Batches]:
    """Snippets put together until each has `tokens` tokens, so that none is padded."""
    data, tokenizer = zoo.load_dataset("movie-snippets", limit=2000), zoo.load_processor("minilm-l6")
    ids = tokenizer(" ".join(data["text"][:]))["input_ids"][: number * tokens]
    assert len(ids) == number * tokens, "not enough text"
    ids = torch.tensor(ids).view(number, tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return zoo.load_model("minilm-l6", num_labels=2), Batches(inputs, [i % 2 for i in range(number)])


def plain_epoch(model: nn.Module, batches: Batches) -> None:
    """Forward, backward and AdamW on each batch: a LoRA epoch without the Trainer's own work."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6)
    model.train()
    for inputs, labels, _ in batches:
        optimizer.zero_grad()
        cross_entropy(model(**inputs).logits, torch.tensor(labels, device=DEVICE)).backward()
        optimizer.step()
    _wait()


def scoring_pass(passes: GradientPass, batches: Batches) -> list[Tensor]:
    found = [passes(inputs, labels, ids)[1] for inputs, labels, ids in batches]
    _wait()
    return [value for values in found for value in values.values()]


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def prepared(model: nn.Module, batches: Batches, **options: Any) -> GradientPass:
    """Entered, with its moments; the caller leaves it."""
    passes = GradientPass(Reader(model), [TSA(warmup_steps=0, **options).reading], "classification", 10)
    passes.__enter__()
    passes.prepare(Examples(Rows(batches)), BATCH, None, 0, 1)
    return passes


CASES = {  # name: (what makes it, targets of the LoRA)
    "ViT-S, 8 layers, 56 px (17 tokens), all linear": (lambda n: images(n, 56, 8), "all-linear"),
    "ViT-S, 8 layers, 56 px (17 tokens), q and v": (lambda n: images(n, 56, 8), QUERY_VALUE),
    "ViT-S, 4 layers, 224 px (257 tokens), all linear": (lambda n: images(n // 4, 224, 4), "all-linear"),
    "ViT-S, 4 layers, 224 px (257 tokens), q and v": (lambda n: images(n // 4, 224, 4), QUERY_VALUE),
    "MiniLM, 128 tokens, all linear": (lambda n: texts(n // 2, 128), "all-linear"),
    "MiniLM, 128 tokens, query and value": (lambda n: texts(n // 2, 128), ["query", "value"]),
}


def scoring(folder: Path, quick: bool) -> dict[str, Any]:
    """The scoring pass with frozen moments over a plain LoRA epoch on the same batches; reach 1.10."""
    number, pairs = (64, 1) if quick else (192, 3)
    found: dict[str, Any] = {"target": 1.10, "cases": {}}
    for case, (make, targets) in CASES.items():
        slug = "".join(c if c.isalnum() else "-" for c in case)
        if not (folder / f"scoring-{slug}-{pairs - 1}.json").exists():
            model, batches = make(number)
            model = lora(model, targets=targets)
            few = Batches({k: v[:BATCH] for k, v in batches.inputs.items()}, batches.labels[:BATCH])
            plain_epoch(model, few)

            def epoch(m: nn.Module = model, b: Batches = batches) -> None:
                plain_epoch(m, b)

            with evaluating(model):
                passes = prepared(model, batches, sample=64)
                try:
                    scoring_pass(passes, few)

                    def score(p: GradientPass = passes, b: Batches = batches) -> None:
                        p.reader.model.eval()
                        scoring_pass(p, b)

                    interleaved(score, epoch, lambda i, s=slug: folder / f"scoring-{s}-{i}.json", pairs)
                finally:
                    passes.__exit__()
        taken = [json.loads((folder / f"scoring-{slug}-{i}.json").read_text()) for i in range(pairs)]
        found["cases"][case] = summary(taken)
    return found


def summary(pairs: list[dict]) -> dict[str, Any]:
    kinds = {}
    for kind in ("processor", "clock"):
        ratios = [p["a"][kind] / p["b"][kind] for p in pairs]
        kinds[kind] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    seconds = {side: statistics.median(p[side]["processor"] for p in pairs) for side in "ab"}
    return kinds | {"scoring_seconds": seconds["a"], "plain_epoch_seconds": seconds["b"], "pairs": len(pairs)}


def moments(folder: Path, quick: bool) -> dict[str, Any]:
    """Short cuts in the moments: seconds, and the Spearman correlation to the exact score.

    Exact: moments over all examples and all their tokens, one factor a layer and side.
    """
    number, side = (64, 28) if quick else (512, 56)
    ways: dict[str, dict[str, Any]] = {
        "exact (two_pass, all tokens, no sharing)": {
            "statistics": "two_pass", "tokens": None, "share_inputs": False
        },
        "two_pass, all tokens, shared inputs": {"statistics": "two_pass", "tokens": None},
        "two_pass, 1 token in 8, shared inputs": {"statistics": "two_pass", "tokens": 3},
        "sampled 256, all tokens": {"sample": 256, "tokens": None},
        "sampled 256, 1 token in 8": {"sample": 256, "tokens": 3},
        "sampled 64, all tokens": {"sample": 64, "tokens": None},
        "sampled 64, 1 token in 8": {"sample": 64, "tokens": 3},
        "running": {"statistics": "running"},
        "running, 1 token in 8": {"statistics": "running", "tokens": 3},
    }  # fmt: skip
    model = batches = None
    rows: dict[str, Any] = {}
    values: dict[str, Tensor] = {}
    for way, options in ways.items():
        slug = "".join(c if c.isalnum() else "-" for c in way)
        file = folder / f"moments-{slug}.json"
        if not file.exists():
            if model is None:
                model, batches = images(number, side, 8)
                model = lora(model)
            assert batches is not None
            with evaluating(model):
                spent, passes = timed(lambda o=options, m=model, b=batches: prepared(m, b, **o))
                try:
                    again, blocks = timed(lambda p=passes, b=batches: torch.cat(scoring_pass(p, b)))
                finally:
                    passes.__exit__()
            score = blocks[:, :, :2].double().flatten(1).nanmean(1)
            write_json(file, {"moments": spent, "scoring": again, "score": score.tolist()})
        cell = json.loads(file.read_text())
        values[way] = torch.tensor(cell["score"], dtype=torch.float64)
        rows[way] = {
            "moments_processor_seconds": cell["moments"]["processor"],
            "scoring_processor_seconds": cell["scoring"]["processor"],
            "spearman_to_exact": spearman(values[way], values[next(iter(ways))]),
        }
        console.print(f"  {way}: {rows[way]['spearman_to_exact']:.4f}", highlight=False)
    return {"model": f"ViT-S, 8 layers, {side} px, all linear, rank 8, {number} images", "rows": rows}


def folded(folder: Path, quick: bool) -> dict[str, Any]:
    """An epoch of the stock Trainer with `ScoreWhileTraining` over one without; reach 1.10."""
    pairs = 1 if quick else 3
    found: dict[str, Any] = {"target": 1.10, "cases": {}}
    cases = {
        "ViT-S, 4 layers, 224 px, q and v": (224, 4, QUERY_VALUE, 48),
        "ViT-S, 4 layers, 224 px, all linear": (224, 4, "all-linear", 48),
        "ViT-S, 8 layers, 56 px, all linear": (56, 8, "all-linear", 192),
    }
    for case, (side, layers, targets, number) in cases.items():
        slug = "".join(c if c.isalnum() else "-" for c in case)
        shares = folder / f"folded-{slug}-shares.json"
        if not shares.exists():
            model, batches = images(number, side, layers)
            rows, own = Rows(batches), []

            def train(
                with_scores: bool, m: nn.Module = model, r: Rows = rows, t: Any = targets, o: list = own
            ) -> None:
                from copy import deepcopy

                from transformers import Trainer, TrainerCallback, TrainingArguments

                class OneEpoch(TrainerCallback):
                    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                        control.should_training_stop = True

                callbacks: list[Any] = [OneEpoch()]
                if with_scores:
                    callbacks.append(serpette.ScoreWhileTraining("tsa", at_epoch=1, keep=0.5))
                with tempfile.TemporaryDirectory() as scratch:
                    arguments = TrainingArguments(
                        scratch, num_train_epochs=2, per_device_train_batch_size=BATCH, report_to=[],
                        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-3,
                        use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=False,
                    )  # fmt: skip
                    trainer = Trainer(
                        lora(deepcopy(m), targets=t), arguments, train_dataset=r, callbacks=callbacks
                    )
                    trainer.train()
                if with_scores:
                    o.append(callbacks[1].cost_["extra_share"])

            train(True)  # imports and first passes
            own.clear()
            interleaved(
                lambda t=train: t(True),
                lambda t=train: t(False),
                lambda i, s=slug: folder / f"folded-{s}-{i}.json",
                pairs,
            )
            write_json(shares, own)
        taken = [json.loads((folder / f"folded-{slug}-{i}.json").read_text()) for i in range(pairs)]
        found["cases"][case] = summary(taken) | {"extra_share_reported": json.loads(shares.read_text())}
    return found


def growth(folder: Path, quick: bool) -> dict[str, Any]:
    """Processor seconds and bytes with N, with the rank r and with the width d (random weights)."""
    cells = [("N", n, 8, 384) for n in (64, 128, 256)] + [("r", 64, r, 384) for r in (2, 8, 32)]
    cells += [("d", 64, 8, d) for d in (192, 384, 768)]
    rows = []
    for what, number, rank, width in cells[:: 4 if quick else 1]:
        file = folder / f"growth-{what}-{number}-{rank}-{width}.json"
        if not file.exists():
            subprocess.run(
                [sys.executable, __file__, "grow", str(number), str(rank), str(width), str(file)], check=True
            )
        rows.append(
            {"varies": what, "examples": number, "rank": rank, "width": width} | json.loads(file.read_text())
        )
        console.print(f"  {what} {number} {rank} {width}", highlight=False)
    return {"model": "Dinov2 of 2 layers, 112 px (65 tokens), random weights, all linear", "rows": rows}


def grow(number: int, rank: int, width: int, file: Path) -> None:
    """One cell of `growth`, in a fresh process."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=6,
        patch_size=14,
        image_size=112,
        num_labels=10,
    )
    model = lora(Dinov2ForImageClassification(config), rank)
    batches = Batches({"pixel_values": torch.randn(number, 3, 112, 112)}, [i % 10 for i in range(number)])
    plain_epoch(model, Batches({k: v[:BATCH] for k, v in batches.inputs.items()}, batches.labels[:BATCH]))
    with measure(DEVICE) as plain:
        spent_plain, _ = timed(lambda: plain_epoch(model, batches))
    with evaluating(model), measure(DEVICE) as ours:
        spent, passes = timed(lambda: prepared(model, batches, sample=64))
        again, _ = timed(lambda: scoring_pass(passes, batches))
        passes.__exit__()
    write_json(
        file,
        {
            "plain_epoch_processor_seconds": spent_plain["processor"],
            "moments_processor_seconds_for_64": spent["processor"],
            "scoring_processor_seconds": again["processor"],
            "scoring_over_plain": again["processor"] / spent_plain["processor"],
            "peak_bytes_plain": plain.peak_bytes,
            "peak_bytes_scoring": ours.peak_bytes,
        },
    )


PARTS = {"scoring": scoring, "moments": moments, "growth": growth, "folded": folded}


def main(out: Path, args: list[str]) -> None:
    facts = {"batch_size": BATCH, "seed": 0, "paper": PAPER, "hardware": hardware(DEVICE)}
    run_parts("loprune_speed", PARTS, out, args, facts, f"loprune_speed-{DEVICE.type}")


if __name__ == "__main__":  # a fresh process of `growth`
    numbers = map(int, sys.argv[2:5])
    grow(*numbers, Path(sys.argv[5]))
