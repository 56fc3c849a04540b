"""Cached files -> `datasets.Dataset`s, each with a column `id` of unique strings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import uniform_of

if TYPE_CHECKING:
    from datasets import Dataset

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TRAIN_SHARE = 0.8  # where the source has no test split; decided by the id alone, so it never moves


def build_dataset(name: str, folder: Path, split: str, options: dict[str, Any]) -> Dataset:
    """All examples of `split`; see `serpette.zoo.load_dataset`."""
    builders = {
        "fashion-mnist": _fashion,
        "movie-snippets": _movies,
        "mmlu-cot": _mmlu,
        "lee-news": _news,
        "digits": _digits,
    }
    splits = ("train", "test") if name == "fashion-mnist" else ("train", "test", "all")
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist in {name}; it has {', '.join(splits)}")
    return builders[name](folder, split, **options)


def _part(ids: list[str], split: str) -> list[int]:
    in_train = (uniform_of(np.array(ids), seed=0) < TRAIN_SHARE).numpy()
    return [i for i, train in enumerate(in_train) if split == "all" or (split == "train") == bool(train)]


def _fashion(folder: Path, split: str) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value

    table = pq.read_table(folder / f"{split}.parquet").select(["image", "label"]).replace_schema_metadata()
    ids = pa.array([f"{split}-{row:05d}" for row in range(len(table))])
    kinds = {"id": Value("string"), "image": Image(), "label": ClassLabel(names=list(FASHION_CLASSES))}
    return Dataset(table.add_column(0, "id", ids), info=DatasetInfo(features=Features(kinds)))


def _movies(folder: Path, split: str, target: str) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    if target not in ("label", "rating"):
        raise ValueError(f"target={target!r} must be 'label' (negative or positive) or 'rating' (a number)")
    lines = (folder / "movies.tsv").read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    ids = [f"movie-{int(number):05d}" for number, _, _ in rows]
    kept = _part(ids, split)
    kind: Any = Value("float32")
    labels: dict[int, float] = {i: float(rows[i][1]) for i in kept}
    if target == "label":
        kept = [i for i in kept if abs(labels[i]) >= 0.5]  # the raters did not agree on a side below that
        kind = ClassLabel(names=["negative", "positive"])
        labels = {i: int(labels[i] > 0) for i in kept}
    columns = {
        "id": [ids[i] for i in kept],
        "text": [rows[i][2].strip() for i in kept],
        "label": [labels[i] for i in kept],
    }
    kinds = Features({"id": Value("string"), "text": Value("string"), "label": kind})
    return Dataset.from_dict(columns, features=kinds)


def _mmlu(folder: Path, split: str) -> Dataset:
    from datasets import Dataset

    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    pair = re.compile(r"(?:^|\n\n)Q: (.*?)\nA: (.*?)(?=\n\nQ: |\Z)", re.DOTALL)
    columns: dict[str, list[str]] = {"id": [], "subject": [], "prompt": [], "response": []}
    for subject, text in sorted(prompts.items()):
        for number, (question, answer) in enumerate(pair.findall(text)):
            row = f"{subject}-{number}", subject, question.strip(), answer.strip()
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return Dataset.from_dict(columns).select(_part(columns["id"], split))


def _news(folder: Path, split: str) -> Dataset:
    from datasets import Dataset

    lines = (folder / "news.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    ids = [f"news-{number:03d}" for number in range(len(texts))]
    return Dataset.from_dict({"id": ids, "text": texts}).select(_part(ids, split))


def _digits(folder: Path, split: str) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as Pil
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    grey = (data.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), the source counts to 16
    ids = [f"digit-{row:04d}" for row in range(len(grey))]
    kept = _part(ids, split)
    columns = {
        "id": [ids[i] for i in kept],
        "image": [Pil.fromarray(grey[i]) for i in kept],
        "label": [int(data.target[i]) for i in kept],
    }
    label = ClassLabel(names=[str(digit) for digit in range(10)])
    return Dataset.from_dict(columns, Features({"id": Value("string"), "image": Image(), "label": label}))


def take(dataset: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """At most `limit` examples, a random subset in the old order.

    Stratified by `label` when that is a ClassLabel: each class gets its share of `limit`, rounded by the
    largest remainder so that the total is exact. The choice depends on the ids and the seed only, and
    inside a class the choice of a smaller limit is part of that of a larger one.
    """
    if limit is None:
        return dataset
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit={limit!r} must be a whole number of at least 1, or None for all examples")
    if limit >= len(dataset):
        return dataset
    from datasets import ClassLabel

    if "id" in dataset.column_names:
        ids = [str(i) for i in dataset.with_format(None)["id"][:]]  # [:]: a Column read row by row is slow
    else:
        ids = [str(i) for i in range(len(dataset))]
    place = uniform_of(np.array(ids), seed).numpy()
    groups = np.zeros(len(dataset), dtype=np.int64)
    if isinstance(dataset.features.get("label"), ClassLabel):
        labels = dataset.with_format(None)["label"][:]
        groups = np.array([-1 if label is None else label for label in labels])
    kinds, counts = np.unique(groups, return_counts=True)
    exact = counts * (limit / len(dataset))
    shares = np.floor(exact).astype(int)
    for g in np.argsort(shares - exact, kind="stable")[: limit - shares.sum()]:
        shares[g] += 1
    chosen: list[int] = []
    for kind, share in zip(kinds, shares, strict=True):
        members = np.flatnonzero(groups == kind)
        chosen.extend(members[np.argsort(place[members], kind="stable")[:share]].tolist())
    return dataset.select(sorted(chosen))
