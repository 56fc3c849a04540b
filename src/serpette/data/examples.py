"""Whatever holds examples, behind one face: stable ids, labels, and batches of model inputs.

Rows may be model-ready dicts (`pixel_values`, `input_ids`: what a Trainer takes), rows with an image
or a text (a processing class turns them into inputs), or (x, y) pairs of a torch `Dataset`. For a causal
language model they hold chats, instructions or text (`serpette.data.instructions`).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ..types import Task
from . import instructions
from .instructions import BadExample

LABEL_COLUMNS = ("labels", "label", "target", "rating", "class")
TEXT_COLUMNS = instructions.TEXTS
ID_COLUMN = "id"
READY = ("pixel_values", "input_ids", "inputs_embeds")
MAX_LENGTH = 128  # tokens a text is cut to by default, outside causal language models: a few sentences


class Examples:
    """One face for datasets.Dataset and torch Dataset.

    Args:
        dataset: a `datasets.Dataset` or a map-style torch `Dataset` of (x, y) pairs or dicts.
        processing_class: image processor or tokenizer for rows that are not model-ready.
        data_collator: turns a list of model-ready rows into a batch; default: stack the tensors.
        label_column, id_column: default: found by name (`label`, `labels`, ... and `id`).
            Without an id column the id is the row's number.
        max_length: tokens a text is cut to; default: 128, and 1024 in a causal language model.
        task: `"causal-lm"` reads instructions, chats and text as tokens with `labels` among the inputs, -100
            where there is no response; `observe` sets it. Otherwise it has no meaning here.

    Raises:
        ValueError: empty data set, ids that are not unique, no label column.

    Example: batches of a causal language model, also for a Trainer with the rows' numbers as its data set
        >>> rows = Examples([{"input_ids": [1, 5, 9], "labels": [-100, 5, 9]}] * 4, task="causal-lm")
        >>> rows.read([0, 2])[1]["labels"].tolist()
        [[-100, 5, 9], [-100, 5, 9]]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        processing_class: Any = None,
        data_collator: Any = None,
        label_column: str | None = None,
        id_column: str | None = None,
        max_length: int | None = None,
        task: Task | None = None,
    ):
        if isinstance(dataset, (str, Mapping)):
            what = repr(dataset) if isinstance(dataset, str) else f"a {type(dataset).__name__}"
            raise ValueError(
                f"dataset={what} must be one split with its rows; "
                "open it with serpette.data.sources.open_dataset(source, split)"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"dataset={type(dataset).__name__} must have a length and be indexable; "
                "turn a streaming data set into rows first, e.g. datasets.Dataset.from_list(list(stream))"
            )
        if len(dataset) == 0:
            raise ValueError("dataset is empty: 0 examples; check the split, the filter and limit")
        self.dataset, self.processing_class, self.data_collator = dataset, processing_class, data_collator
        self._max_length, self.task = max_length, task
        self.columns = list(dataset.column_names) if isinstance(dataset, datasets.Dataset) else []
        self.label_column = label_column or _first(LABEL_COLUMNS, self.columns)
        if label_column and self.columns and label_column not in self.columns:
            raise ValueError(
                f"label_column={label_column!r} is not a column; columns: {', '.join(self.columns)}"
            )
        self.accepted: set[str] | None = None  # names of the model's inputs; `observe` sets it
        self.image_columns = {
            name
            for name, feature in (dataset.features.items() if self.columns else ())
            if isinstance(feature, datasets.Image)
        }
        self.ids = self._read_ids(id_column)
        self._rows = self._encoded_images(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def max_length(self) -> int:
        default = instructions.MAX_LENGTH if self.task == "causal-lm" else MAX_LENGTH
        return default if self._max_length is None else self._max_length

    @property
    def has_instructions(self) -> bool:
        """Whether the columns hold chats, instructions or text for a causal language model, and no label."""
        form = instructions.find_format(self.columns)
        if form is None or form.kind != "tokens":
            return form is not None and self.label_column is None
        labels = self.dataset.features.get(form.response)  # token by token, or one a row?
        return labels is not None and not isinstance(labels, (datasets.Value, datasets.ClassLabel))

    def _read_ids(self, id_column: str | None) -> np.ndarray:
        column = id_column or (ID_COLUMN if ID_COLUMN in self.columns else None)
        if column is None:
            return np.array([str(i) for i in range(len(self))])
        if column not in self.columns:
            raise ValueError(f"id_column={column!r} is not a column; columns: {', '.join(self.columns)}")
        ids = np.array([str(i) for i in self._column(column)])
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            twice = ", ".join(repr(str(i)) for i in unique[counts > 1][:3])
            raise ValueError(
                f"ids must be unique: {twice} occur more than once in column {column!r}; "
                "remove the duplicates or name another column with id_column="
            )
        return ids

    def _column(self, name: str) -> list:
        plain = self.dataset.with_format(None).select_columns([name])
        return list(plain[:][name])

    def _encoded_images(self, dataset: Any) -> Any:
        """Images left encoded, so that one that does not decode can be named."""
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
            for column in self.image_columns:
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        return dataset

    @property
    def class_names(self) -> list[str] | None:
        if isinstance(self.dataset, datasets.Dataset) and self.label_column:
            feature = self.dataset.features.get(self.label_column)
            if isinstance(feature, datasets.ClassLabel):
                return list(feature.names)
        return None

    def target(self) -> tuple[Task, int]:
        """(task, number of classes or 0), by the label column: whole numbers are classes, others are targets.

        Raises:
            ValueError: no labels that can be read without the inputs, or they are neither.
        """
        if self.class_names:
            return "classification", len(self.class_names)
        raw = self.labels()
        if raw is None:
            columns = ", ".join(self.columns) or "none"
            raise ValueError(f"no label column found; columns: {columns}; name it with label_column=")
        if any(isinstance(label, float) for label in raw):
            return "regression", 0
        return "classification", int(check_labels(raw, self.ids, 0, "classification").max()) + 1

    def labels(self) -> list | None:
        """Raw labels where they can be had without decoding the examples, else None."""
        if self.columns:
            return self._column(self.label_column) if self.label_column else None
        targets = getattr(self.dataset, "targets", None)
        return list(targets) if targets is not None and len(targets) == len(self) else None

    def read(self, rows: Sequence[int]) -> tuple[list[int], dict[str, Tensor], list, dict[str, str]]:
        """Decodes `rows`: (rows that could be read, inputs of the model, raw labels, {id: reason}).

        In a causal language model the inputs hold the `labels` of the tokens, and the raw labels are None.

        Raises:
            ValueError: NaN or infinity in the input of an example, which is named.
        """
        good, items, labels, bad = [], [], [], {}
        for row in map(int, rows):
            try:
                item, label = self._decode(self._row(row))
            except BadExample as error:
                bad[str(self.ids[row])] = str(error)
                continue
            good.append(row)
            items.append(item)
            labels.append(label)
        if not good:
            return [], {}, [], bad
        inputs = self._collate(items)
        for name, value in inputs.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                finite = torch.isfinite(value).flatten(1).all(1)
                who = str(self.ids[good[int((~finite).nonzero()[0, 0])]])
                raise ValueError(
                    f"NaN or infinity in {name!r} of the example with id {who!r}; "
                    "mend or remove it: no score would mean anything"
                )
        return good, inputs, labels, bad

    def _row(self, row: int) -> Any:
        from PIL import Image

        try:
            return self._rows[row]
        except (
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # raised by the user's transform
            raise BadExample(f"the image does not decode: {error}") from error

    def _decode(self, item: Any) -> tuple[Any, Any]:
        """(what `_collate` takes, label)."""
        if self.task == "causal-lm":
            if not isinstance(item, dict):
                raise ValueError(
                    f"a row of a causal language model must be a dict, got {type(item).__name__}"
                )
            if self.data_collator is not None:
                return self._unused_removed(item), None
            return instructions.encode(item, self.processing_class, self.max_length), None
        if isinstance(item, (tuple, list)):
            if len(item) != 2:
                raise ValueError(f"a torch Dataset must give (x, y) pairs or dicts, got {len(item)} values")
            if self.data_collator is not None:
                return item, item[1]
            x = item[0]
            return (self._process_image(x) if is_image(x) else x), item[1]
        if not isinstance(item, dict):
            raise ValueError(f"a row must be a dict or an (x, y) pair, got {type(item).__name__}")
        label_column = self.label_column or _first(LABEL_COLUMNS, list(item)) or ""
        label = item.get(label_column)
        if any(key in item for key in READY):
            return self._unused_removed(item), label
        images = [name for name, value in item.items() if name in self.image_columns or is_image(value)]
        if self.data_collator is not None:
            return {**item, **{name: decode_image(item[name]) for name in images}}, label
        if images:
            return self._process_image(item[images[0]]), label
        text = item.get(_first(TEXT_COLUMNS, list(item)) or "")
        if isinstance(text, str):
            if self.processing_class is None:
                raise ValueError("the rows hold text: give processing_class=, the model's tokenizer")
            return text, label
        inputs = {name: value for name, value in item.items() if name not in (label_column, ID_COLUMN)}
        numbers = [
            value for value in inputs.values() if not isinstance(value, (str, bytes, type(None), dict))
        ]
        vectors = [value for value in numbers if np.ndim(value) > 0]
        if vectors:
            return torch.tensor(np.asarray(vectors[0]), dtype=torch.float32), label
        if numbers and len(numbers) == len(inputs):  # a table: every column but id and label is a feature
            return torch.tensor([float(value) for value in numbers]), label
        raise ValueError(
            f"no input found in a row with columns {', '.join(item)}: expected one of {', '.join(READY)}, an "
            f"image, a text ({', '.join(TEXT_COLUMNS)}), a vector, or numbers in every column; "
            "rename or remove columns"
        )

    def _unused_removed(self, item: dict) -> dict:
        """Without the columns that the model does not take, as the Trainer does it."""
        if self.accepted is None:
            return {k: v for k, v in item.items() if not isinstance(v, str)}
        return {k: v for k, v in item.items() if k in self.accepted or k in ("label", "labels", "label_ids")}

    def _process_image(self, value: Any) -> Any:
        if self.processing_class is None:
            raise ValueError("the rows hold images: give processing_class=, the model's image processor")
        return self.processing_class(images=decode_image(value), return_tensors="pt")["pixel_values"][0]

    def _collate(self, items: list) -> dict[str, Tensor]:
        first = items[0]
        if self.data_collator is not None:
            batch = self.data_collator(items)
            if isinstance(batch, (tuple, list)):
                batch = {"x": batch[0]}
        elif self.task == "causal-lm":
            batch = instructions.collate(items, instructions.padding_of(self.processing_class))
        elif isinstance(first, str):
            batch = self.processing_class(
                items, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        elif isinstance(first, dict):
            batch = self._collate_ready([{k: v for k, v in i.items() if "label" not in k} for i in items])
        else:
            stacked = torch.stack([torch.as_tensor(item) for item in items])
            is_image = self.processing_class is not None and stacked.ndim == 4
            batch = {"pixel_values" if is_image else "x": stacked}
        names = self.accepted
        return {
            k: v
            for k, v in dict(batch).items()
            if torch.is_tensor(v)
            and ("label" not in k or (k == "labels" and self.task == "causal-lm"))
            and (names is None or k == "x" or k in names)
        }

    def _collate_ready(self, items: list[dict]) -> Any:
        from transformers import default_data_collator

        if "input_ids" in items[0] and hasattr(self.processing_class, "pad"):
            return self.processing_class.pad(items, padding=True, return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return default_data_collator(items)


def decode_image(value: Any) -> Any:
    """A PIL image in RGB from a PIL image or the encoded `{"bytes", "path"}` of a datasets row.

    Raises:
        BadExample: if it does not decode.
    """
    from PIL import Image, UnidentifiedImageError

    if value is None:
        raise BadExample("the image is missing")
    try:
        if isinstance(value, dict):
            source = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
            if source is None:
                raise BadExample("the image is missing")
            with Image.open(source) as image:
                return image.convert("RGB")
        return value.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadExample(f"the image does not decode: {error}") from error


def check_labels(raw: Iterable, ids: Iterable, num_classes: int, task: Task) -> Tensor:
    """Labels as (N,) int64 class indices, or float32 targets in a regression.

    Args:
        num_classes: labels must be below it; 0 = not known, they may be any class index.

    Raises:
        ValueError: a label that is missing, a string, not an integer, or out of range; the example is named.
    """
    values = []
    for label, example in zip(raw, ids, strict=True):
        if torch.is_tensor(label) and label.numel() == 1:
            label = label.item()
        elif isinstance(label, np.generic):
            label = label.item()
        where = f"label={label!r} of the example with id {str(example)!r}"
        if label is None or (isinstance(label, float) and math.isnan(label)):
            raise ValueError(f"{where} is missing; remove the example, or name the column with label_column=")
        if isinstance(label, str):
            raise ValueError(
                f"{where} is a string, expected {'a number' if task == 'regression' else 'a class index'}; "
                f"encode the column first, e.g. dataset.class_encode_column('label')"
            )
        if not isinstance(label, (int, float)):
            raise ValueError(f"{where} must be a single number, got {type(label).__name__}")
        if math.isinf(label):
            raise ValueError(f"{where} must be finite")
        classes = task == "classification"
        if classes and label != int(label):
            raise ValueError(f"{where} must be a class index; for a regression say task='regression'")
        if classes and (label < 0 or (num_classes and label >= num_classes)):
            limit = f"in 0..{num_classes - 1}" if num_classes else "at least 0"
            raise ValueError(
                f"{where} must be {limit}; load the model with as many classes as the data "
                "have (num_labels=), or remove unlabelled examples"
            )
        values.append(label)
    return torch.tensor(values, dtype=torch.float32 if task == "regression" else torch.int64)


def _first(names: Sequence[str], available: Sequence[str]) -> str | None:
    return next((name for name in names if name in available), None)


def is_image(value: Any) -> bool:
    """A PIL image, or the encoded image of a datasets row."""
    if isinstance(value, dict):
        return set(value) == {"bytes", "path"}
    return type(value).__module__.startswith("PIL.")
