"""Data and model for a job, as the user names them: the task, the classes and the model that fits both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .data.examples import Examples, check_labels
from .data.features import Reader, accepted_names
from .data.observe import infer_task
from .data.sources import device_of, encode_labels, open_dataset, open_model
from .types import Task


@dataclass
class Opened:
    """What `opened` returns: `examples` reads `dataset` as the model takes it; `classes` are the names."""

    model: nn.Module
    processor: Any
    dataset: Any
    examples: Examples
    task: Task
    classes: list[str]

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return next(self.model.parameters()).device.type == "cuda"


def opened(
    model: Any,
    dataset: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    max_length: int | None = None,
    task: Task | None = None,
    device: str = "auto",
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Opened:
    """Opens both, with a head for the classes that the data has.

    Args:
        model, dataset: names, paths or objects, see `serpette.data.sources`.
        task: None: by the label column; without one, the responses of instructions, chats or text, if the
            model is a causal language model.
        options: of the model.

    Raises:
        ValueError: see `open_model` and `open_dataset`; no labels where the task needs them.
    """
    data = open_dataset(dataset, split, limit=limit, seed=seed)
    data, found, classes = labelled(data, task, label_column, id_column)
    made = {"seed": seed} | (options or {})
    if found in (None, "causal-lm"):
        network, processor = open_model(model, task=found, **made)
        if found is None and infer_task(network, Reader(network)) != "causal-lm":
            Examples(data, label_column=label_column).target()  # which says that there are no labels
        found = "causal-lm"
    else:
        network, processor = open_model(model, task=found, num_labels=len(classes) or 1, **made)
    network.to(device_of(device))  # type: ignore[arg-type] - transformers' stub of nn.Module.to
    examples = Examples(
        data,
        processing_class=processor,
        label_column=label_column,
        id_column=id_column,
        max_length=max_length,
        task=found,
    )
    examples.accepted = accepted_names(network)
    return Opened(network, processor, data, examples, found, classes)


def labelled(
    data: Any, task: Task | None, label_column: str | None = None, id_column: str | None = None
) -> tuple[Any, Task | None, list[str]]:
    """(data with numbers for its classes, the task, the names of the classes).

    The task is None where it was not given and the rows are chats, instructions or text without a label: a
    causal language model learns these, another model cannot.

    Raises:
        ValueError: no labels, or none that the task has a meaning for; the example is named.
    """
    rows = Examples(data, label_column=label_column, id_column=id_column)
    if task == "causal-lm" or (task is None and rows.has_instructions):
        return data, task, []
    if task == "regression" and (rows.label_column or not rows.columns):
        return data, task, []
    if rows.label_column:
        data = encode_labels(data, rows.label_column)
        rows = Examples(data, label_column=label_column, id_column=id_column)
    raw = None if rows.class_names else rows.labels()
    if task == "classification" and raw is not None:  # whole numbers are classes, also as floats
        count = int(check_labels(raw, rows.ids, 0, task).max()) + 1
    else:
        task, count = rows.target()
    return data, task, (rows.class_names or [str(c) for c in range(count)])
