"""spsft_memory: Tables 6 to 9's memory, predicted at the true shapes and measured on small models.

    serpette bench spsft_memory [llama | small | cuda ...] [--quick] [--report]

llama: Llama-2-7B and Llama-3-8B, float32, one text of 2,048 tokens, by fake tensors, as on CUDA. Blocks are
alike, so models of 2 and 3 layers are run and the 32 layers follow; that bytes grow evenly is checked with 4.
small: real steps of real models on this CPU, and saved bytes. cuda: the paper's protocol (D.1) on a GPU.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, shared by the benchmarks

import readme
from timing import console, run_parts

from serpette import zoo
from serpette.cost import hardware
from serpette.files import write_json
from serpette.memory import StepMemory, saved_bytes, step_memory
from serpette.memory.compare import Setup, compare, parse, tuned
from serpette.memory.shapes import example_batch, preset, without_memory
from serpette.memory.steps import floor_memory
from serpette.memory.tracker import storage_bytes, tensors_of

GIB, TOKENS, LAYERS = 2**30, 2048, 32
# setup: the paper's mem (total minus the frozen model's), GB, for Llama-2-7B and Llama-3-8B; Tables 6 and 7
PAPER: dict[str, tuple[float | None, float | None]] = {
    "rows,r=128": (17.62, 24.49),
    "rows,r=128,recompute": (None, None),
    "columns,r=128": (None, None),
    "lora,r=64": (None, None),
    "lora,r=64,dropout=0.1": (23.46, 30.37),
    "dora,r=64": (44.80, None),
    "shira,r=64": (None, None),
    "rows,r=128,freeze_attention": (15.21, 22.41),
    "columns,r=128,freeze_attention": (None, None),
    "lora,r=64,freeze_attention": (None, None),
    "lora,r=64,dropout=0.1,freeze_attention": (17.25, 24.55),
    "dora,r=64,freeze_attention": (30.57, None),
    "rows,r=128,checkpointing": (None, None),
    "lora,r=64,checkpointing": (None, None),
    "columns,r=128,checkpointing": (None, None),
    "rows,r=128,checkpointing,optimizer=adamw-8bit": (None, None),
}
EXACT = {"llama-2-7b": (145_752_064, 78_643_200), "llama-3-8b": (159_383_552, 92_274_688)}


def predicted(name: str, text: str, layers: int) -> StepMemory:
    with without_memory("cuda"):
        model = tuned(preset(name, num_hidden_layers=layers), parse(text))
        batch = example_batch(preset(name, num_hidden_layers=1), TOKENS, 1)
        return step_memory(model, batch, parse(text).optimizer, foreach=True)


def grown(two: StepMemory, three: StepMemory, layers: int) -> StepMemory:
    """What `layers` layers take, if each takes the same."""
    a, b = asdict(two), asdict(three)
    return StepMemory(**{key: a[key] + (layers - 2) * (b[key] - a[key]) for key in a})


def floor(name: str) -> int:
    """Activations at the peak of the frozen model of 32 layers."""
    with without_memory("cuda"):
        batch = example_batch(preset(name, num_hidden_layers=1), TOKENS, 1)
        two, three = (floor_memory(preset(name, num_hidden_layers=n), batch) for n in (2, 3))
    return two + (LAYERS - 2) * (three - two)


def llama(folder: Path, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens": TOKENS,
        "batch_size": 1,
        "dtype": "float32",
        "attention": "sdpa, fused",
    }
    for place, name in enumerate(list(EXACT)[: 1 if quick else 2]):
        rows: dict[str, Any] = {}
        lowest = floor(name)
        for number, (text, paper) in enumerate(list(PAPER.items())[: 2 if quick else None]):
            file = folder / f"{name}-{text.replace(',', '-')}.json"
            if not file.exists():
                try:
                    two, three = (predicted(name, text, layers) for layers in (2, 3))
                except Exception as error:  # a tuner that fake tensors do not take is said, not hidden
                    rows[text] = {
                        "not_predicted": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    }
                    console.print(f"  {name} {text}: {rows[text]['not_predicted'][:100]}", markup=False)
                    continue
                if number < 2:
                    assert grown(two, three, 4) == predicted(name, text, 4), "bytes do not grow evenly"
                write_json(file, asdict(grown(two, three, LAYERS)))
            memory = StepMemory(**json.loads(file.read_text()))
            fixed = memory.trainable + memory.gradients + memory.states
            less = parse(text).recompute or parse(text).checkpointing  # than the frozen model keeps
            rows[text] = {
                **asdict(memory),
                "peak": memory.peak,
                "at_peak": memory.at_peak,
                "over_weights_gib": (memory.peak - memory.weights) / GIB,
                "lower_bound_over_weights_gib": None if less else (fixed + lowest) / GIB,
                "paper_gb": paper[place],
            }
            console.print(f"  {name} {text}: {rows[text]['over_weights_gib']:.2f} GiB", markup=False)
        for text, exact in zip(("rows,r=128", "rows,r=128,freeze_attention"), EXACT[name], strict=True):
            assert text not in rows or rows[text]["parameters"] == exact
        found[name] = {"floor_activations": lowest, "rows": rows}
    return found


SMALL = (
    "rows,r=32",
    "columns,r=32",
    "rows,r=32,recompute",
    "lora,r=16",
    "lora,r=16,dropout=0.1",
    "dora,r=16",
)
SMALL += ("shira,r=16", "full", "rows,r=32,freeze_attention", "rows,r=32,checkpointing")


def small(folder: Path, quick: bool) -> dict[str, Any]:
    """Real steps on the CPU; ViT of 224 px, MiniLM and SmolLM2 with 128 tokens."""
    cases: dict[str, tuple[Any, int, int]] = {
        "minilm-l6": (partial(zoo.load_model, "minilm-l6", num_labels=2), 128, 8),
        "vit-s": (partial(zoo.load_model, "vit-s", num_labels=10, image_size=224), 1, 4),
        "smollm2-135m": (partial(zoo.load_model, "smollm2-135m", task="causal-lm"), 128, 1),
    }
    found: dict[str, Any] = {}
    for name, (make, tokens, batch_size) in list(cases.items())[: 1 if quick else 3]:
        base = make()
        batch = example_batch(base, tokens, batch_size)
        rows = {}
        for text in SMALL[: 2 if quick else None]:
            file = folder / f"{name}-{text.replace(',', '-')}.json"
            if not file.exists():
                setup = parse(text)
                real = step_memory(tuned(copy.deepcopy(base), setup), batch)
                kept = saved_bytes(tuned(copy.deepcopy(base), setup).train(), batch)
                write_json(file, {**asdict(real), "peak": real.peak, "saved_bytes": kept})
            rows[text] = json.loads(file.read_text())
            console.print(f"  {name} {text}: {rows[text]['saved_bytes'] / 2**20:.1f} MiB saved", markup=False)
        found[name] = {
            "batch": {key: list(value.shape) for key, value in batch.items()},
            "weights": storage_bytes(tensors_of(base)),
            "rows": rows,
        }
    return found


def cuda(folder: Path, quick: bool) -> dict[str, Any]:
    """The protocol D.1 for what fits the GPU; prediction beside it."""
    if not torch.cuda.is_available():
        return {"not_run": "no GPU"}
    name = "llama-2-7b"
    setups: list[Setup] = [parse(text) for text in list(PAPER)[: 2 if quick else None]]
    return compare(name, setups, tokens=TOKENS, device="cuda", measure=True, open_model=partial(preset, name))


PARTS = {"llama": llama, "small": small, "cuda": cuda}


def main(out: Path, args: list[str]) -> None:
    if "--report" not in args:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        facts = {
            "seed": 0,
            "paper": "SPSFT, Tables 6 and 7 (LoRA's dropout 0.1)",
            "hardware": hardware(device),
        }
        run_parts("spsft_memory", PARTS, out, args, facts)
    if "--quick" not in args:
        tables(out / "README.md", json.loads((out / "result.json").read_text())["parts"])


def tables(file: Path, parts: dict[str, Any]) -> None:
    """Fills the README's tables."""
    shapes, models = [], []
    for name in EXACT:
        head = (name, "trains, M", "activations", "peak over weights", "frozen + trained", "paper, GB")
        rows = parts["llama"].get(name, {}).get("rows", {})
        shapes.append(readme.table(head, [_predicted_line(text, row) for text, row in rows.items()]))
    for name, case in parts["small"].items():
        head = (name, "trains, M", "saved, MiB", "peak over weights, MiB")
        lines = [
            (
                text,
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['saved_bytes'] / 2**20:.1f}",
                f"{(row['peak'] - row['weights']) / 2**20:.1f}",
            )
            for text, row in case["rows"].items()
        ]
        models.append(readme.table(head, lines))
    readme.fill(file, llama="\n\n".join(shapes), small="\n\n".join(models))


def _predicted_line(text: str, row: dict[str, Any]) -> tuple[str, ...]:
    paper = str(row.get("paper_gb") or "")
    if "not_predicted" in row:
        return text, "", "", "not predicted", "", paper
    bound = row["lower_bound_over_weights_gib"]
    return (
        text,
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['activations'] / GIB:.2f}",
        f"{row['over_weights_gib']:.2f}",
        f"{bound:.2f}" if bound else "",
        paper,
    )
