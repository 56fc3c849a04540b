"""README.md of an exported model: what was pruned, how, at what cost, what it reached, and how to load it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..arms import METRICS, comparisons
from ..cost import hardware, versions
from ..files import write_atomic
from ..recipe import ArmSpec
from .job import Job

HUB_METRICS = {"accuracy": "accuracy", "r2": "r_squared", "perplexity": "perplexity"}
STAGES = ("scoring", "selection", "ranking", "tuning", "pruning", "export", "evaluation")


def write(
    job: Job, arm: ArmSpec, entry: dict[str, Any], earlier: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Writes the card of an arm into `folder`, of what its `entry` of result.json says.

    Args:
        earlier: the entries of the arms that are done, with which it is compared.
    """
    tested = [one for one in (*earlier, entry) if "each" in one]
    known = [c for c in comparisons(tested, job.task) if c["arm"] == arm.name]
    parts = [
        f"---\n{yaml.safe_dump(front(job, entry), sort_keys=False, allow_unicode=True)}---\n",
        f"# {plain(job.recipe.name)}: {plain(arm.name)}\n",
        f"{plain(shown(job.recipe.model.name))}, made with Serpette {__version__}. The run's folder has "
        "its recipe (`recipe.yaml`) and all figures (`result.json`).\n",
        "## What was done\n",
        *(f"- {line}" for line in (data_line(job, entry), tune_line(job, arm, entry), *cut_lines(entry))),
        "\n## What it cost\n",
        *(f"- {line}" for line in cost_lines(job, entry)),
        "\n## What it reached\n",
        *(f"- {line}" for line in result_lines(job, entry, known)),
        "\n## How to load it\n",
        loading(job, arm, entry),
        "\n## With what\n",
        *(f"- {name} {version}" for name, version in versions().items()),
        f"- seed {job.recipe.seed}",
    ]
    if job.classes:
        names = "; ".join(f"{i} {plain(name)}" for i, name in enumerate(job.classes))
        parts.append(f"\n## Classes\n\n{names}")
    write_atomic(folder / "README.md", "\n".join(parts) + "\n")


def front(job: Job, entry: dict[str, Any]) -> dict[str, Any]:
    """The metadata that the hub reads; a model or data set of this machine goes by the name of its folder."""
    data = job.recipe.data
    image = getattr(job.model, "main_input_name", "") == "pixel_values"
    tags = {
        "classification": "image-classification" if image else "text-classification",
        "regression": None if image else "text-classification",
        "causal-lm": "text-generation",
    }
    found = {
        "base_model": shown(job.recipe.model.name),
        "datasets": [shown(data.train)],
        "library_name": "peft" if "adapter" in entry["export"]["formats"] else "transformers",
        "pipeline_tag": tags[job.task],
        "metrics": [HUB_METRICS[METRICS[job.task]]] if "each" in entry else None,
        "tags": ["serpette", *(["pruned"] if entry["prune"] else [])],
    }
    return {key: value for key, value in found.items() if value is not None}


def data_line(job: Job, entry: dict[str, Any]) -> str:
    """Which examples it was tuned on."""
    kept, total, data = entry["examples"], job.scores.total, job.recipe.data
    source = f"{plain(shown(data.train))}[{plain(data.train_split)}]"
    if entry["select"] is None:
        return f"Examples: all {kept:,} of {source}"
    by = f"selector {plain(entry['selector'])}"
    by = f"scorer {plain(entry['scorer'])}, {by}" if entry["scorer"] else by
    return f"Examples: {kept:,} of {total:,} of {source} ({100 * kept / total:.3g} %), {by}"


def tune_line(job: Job, arm: ArmSpec, entry: dict[str, Any]) -> str:
    """What trained, and how long."""
    if entry["method"] == "none":
        return "Tuning: none, the weights are those of the base model"
    tune, whole = job.recipe.tune_of(arm), sum(p.numel() for p in job.model.parameters())
    trained = entry["trainable_parameters"]
    return (
        f"Tuning: {tune.method}, {trained:,} trainable weights beside {whole:,} of the model, "
        f"{entry['epochs']} epochs, {entry['steps']:,} steps of {tune.batch_size} examples, learning rate "
        f"{tune.learning_rate:g}"
    )


def cut_lines(entry: dict[str, Any]) -> list[str]:
    """What was cut from the weights, and what is left."""
    if not entry["prune"]:
        return ["Weights: all of them"]
    prune, found = entry["prune"], entry["weights"]
    when = "in one shot" if entry["method"] == "none" else f"while it was tuned, schedule {prune['schedule']}"
    before, after = found["before"], found["after"]
    lines = [
        f"Weights: {100 * found['sparsity']:.3g} % of the pruned layers' cut, {plain(prune['pattern'])}, by "
        f"{plain(prune['importance'])}, {when}; targets: {prune['targets']}",
        f"Parameters: {before['parameters']:,} before, {after['parameters']:,} after, of which "
        f"{after['nonzero_parameters']:,} are not zero",
        f"Bytes of the weights: {before['file_bytes']:,} before, {after['file_bytes']:,} after, "
        f"{after['packed_bytes']:,} packed",
    ]
    lines += [
        f"Speed: {t['speedup']:.2f} times that of the unpruned model in batches of {t['batch_size']} "
        f"(95 %: {t['low']:.2f} to {t['high']:.2f})"
        for t in found["timings"]
    ]
    return lines


def cost_lines(job: Job, entry: dict[str, Any]) -> list[str]:
    """Seconds of each stage, memory and machine."""
    seconds = entry["seconds"]
    lines = [f"{name}: {seconds[name]:.3g} s" for name in STAGES if name in seconds]
    machine = hardware(next(job.model.parameters()).device)
    memory = "memory of the process" if machine["device"] == "cpu" else "memory on the device"
    lines.append(f"peak {memory} while tuning: {entry['peak_bytes'] / 2**20:,.0f} MiB")
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return [*lines, f"hardware: {plain(where)}"]


def result_lines(job: Job, entry: dict[str, Any], known: Sequence[dict[str, Any]]) -> list[str]:
    """The metric on the test examples, and the differences to the arms that were done."""
    if "each" not in entry:
        return ["Nothing was measured on test examples."]
    data, metric = job.recipe.data, METRICS[job.task]
    value = entry["perplexity" if job.task == "causal-lm" else "accuracy"]
    test = f"{plain(shown(data.test or data.train))}[{plain(data.test_split)}]"
    lines = [f"{metric}: {value:.4g}, on {len(entry['each']):,} examples of {test}"]
    unit = "nats of the mean loss" if job.task == "causal-lm" else metric
    lines += [
        f"against {plain(c['to'])}: {c['difference']:+.4g} {unit} (95 % of the same test examples: "
        f"{c['low']:+.4g} to {c['high']:+.4g})"
        for c in known
    ]
    return lines + ([] if known else ["It was compared with no other arm when this was written."])


def loading(job: Job, arm: ArmSpec, entry: dict[str, Any]) -> str:
    """Code that reads each of the formats."""
    parts, formats = [], entry["export"]["formats"]
    if "adapter" in formats:
        name, options = job.recipe.model.name, ", ".join(f"{k}={v!r}" for k, v in job.opened.items())
        lines = ["from peft import PeftModel", "from serpette.data.sources import open_model"]
        lines += ["import serpette.rows  # makes the adapter known to peft"] * (entry["method"] == "rows")
        lines += [f"model, processor = open_model({shown(name)!r}, {options})"]
        place = "FOLDER/adapter" if "safetensors" in formats else "FOLDER"
        parts.append(_code([*lines, f'model = PeftModel.from_pretrained(model, "{place}")']))
    if "safetensors" in formats and entry["export"]["stock"]:
        cls = type(job.model).__name__
        lines = [f"from transformers import {cls}", f'model = {cls}.from_pretrained("FOLDER")']
        parts.append(_code(lines))
    elif "safetensors" in formats:
        lines = ["from serpette.weights.load import load", 'model = load("FOLDER")']
        parts.append("A stock `from_pretrained` cannot say its widths.\n\n" + _code(lines))
    if "packed" in formats:
        lines = ["from serpette.weights.packed import load_packed"]
        parts.append(_code([*lines, 'tensors = load_packed("FOLDER/packed.safetensors")']))
    if "onnx" in formats:
        lines = ["import onnxruntime", 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")']
        parts.append(_code(lines))
    return "\n".join(parts)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def shown(source: str) -> str:
    """A name of the zoo or the hub as it is; of a path its last part.

    >>> shown("sentence-transformers/all-MiniLM-L6-v2"), shown("/home/me/data/cats")
    ('sentence-transformers/all-MiniLM-L6-v2', 'cats')
    """
    path = Path(source).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else source


def plain(text: Any) -> str:
    r"""One line of text without markup.

    >>> plain("<b>cat</b>\n| `dog`")
    '&lt;b&gt;cat&lt;/b&gt; &#124; &#96;dog&#96;'
    """
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[|`*_\[\]]", lambda sign: f"&#{ord(sign[0])};", escaped)
