"""Whatever names examples or a model -> the examples, the model: zoo, hub, folders, files, objects."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from ..registry import near

if TYPE_CHECKING:
    from datasets import Dataset

FILE_KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
IMAGE_KINDS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def open_dataset(source: Any, split: str = "train", limit: int | None = None, seed: int = 0, **options: Any):
    """The examples that `source` names, as a `datasets.Dataset` (a torch Dataset stays one).

    Args:
        source: tried in this order: a name of the zoo (`"digits"`, `"movie-snippets:rating"`); a path: a
            folder of `save_to_disk`, a folder of class folders with images, a .parquet, .csv, .jsonl or
            .json file or a folder of these; a hub id, `"owner/name"` or `"owner/name:config"`. Or an object:
            `datasets.Dataset`, `DatasetDict`, torch Dataset of (x, y).
        split: of the zoo, the hub, a `DatasetDict`, or a folder with one folder or file a split. A single
            file or a folder without splits is `"train"`, and what its name says (`test.csv`, `pets/test`).
        limit: at most so many examples, chosen at random; class by class if `label` is a ClassLabel.
        seed: of that choice.
        **options: of a zoo data set.

    Returns:
        A `datasets.Dataset` with a column `id`: the source's own, else the path of the image inside its
        folder, else the number of the row. Images that do not decode are not noticed here.

    Raises:
        ValueError: unknown source or split, no examples, options that do not apply.

    >>> len(open_dataset("digits", limit=50))
    50
    """
    import datasets as hf

    from .. import zoo

    name = str(source)
    is_text = isinstance(source, (str, os.PathLike))
    in_zoo = isinstance(source, str) and name.partition(":")[0] in zoo.datasets()
    if options and not in_zoo:
        raise ValueError(
            f"options {sorted(options)} only apply to data sets of the zoo, not to {_show(source)}"
        )
    if in_zoo:
        dataset = zoo.load_dataset(name, split, **options)
    elif is_text and Path(source).expanduser().exists():
        dataset = _from_path(Path(source).expanduser(), split)
    elif is_text:
        dataset = _from_hub(name, split)
    elif isinstance(source, hf.Dataset):
        dataset = source
    elif isinstance(source, Mapping):
        dataset = _pick(source, split, "the DatasetDict")
    elif isinstance(source, TorchDataset) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        return _limited_torch(source, limit, seed)
    else:
        raise ValueError(
            f"source={_show(source)} must be a name, a path, a datasets.Dataset "
            "or a torch Dataset with a length"
        )
    if isinstance(dataset, (hf.IterableDataset, hf.IterableDatasetDict)):
        raise ValueError("a streaming data set has no length; load it without streaming=True")
    if len(dataset) == 0:
        raise ValueError(
            f"source={_show(source)} has no examples in split {split!r}; check the file or the split"
        )
    if "id" not in dataset.column_names:
        dataset = _with_ids(dataset, [str(row) for row in range(len(dataset))])
    from ..zoo.corpora import take

    return take(dataset, limit, seed)


def _show(source: Any) -> str:
    return repr(source) if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"


def _with_ids(dataset: Dataset, ids: list[str]) -> Dataset:
    return cast("Dataset", dataset.add_column("id", ids))  # type: ignore[call-arg]


def _pick(splits: Mapping, split: str, what: str) -> Any:
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist in {what}; it has {', '.join(map(str, splits))}")
    return splits[split]


def _limited_torch(source: Any, limit: int | None, seed: int):
    if not hasattr(source, "__len__"):
        raise ValueError(f"source={_show(source)} has no length; give a map-style torch Dataset")
    if len(source) == 0:
        raise ValueError(f"source={_show(source)} has no examples")
    if limit is None or limit >= len(source):
        return source
    if limit < 1:
        raise ValueError(f"limit={limit!r} must be a whole number of at least 1, or None for all examples")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return Subset(source, sorted(order[:limit].tolist()))


def _from_path(path: Path, split: str) -> Dataset:
    import datasets as hf

    if path.is_file():
        if path.suffix.lower() not in FILE_KINDS:
            raise ValueError(
                f"{path.name!r} must end in {', '.join(FILE_KINDS)}; convert it, or give a folder"
            )
        return _from_files({"train": [path], **_by_split([path])}, split, path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = hf.load_from_disk(str(path))
        return saved if isinstance(saved, hf.Dataset) else _pick(saved, split, str(path))
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in FILE_KINDS and p.is_file())
    if files:
        return _from_files(_by_split(files), split, path)
    for inner in ("data", ""):  # the layout of hub repositories, then of split folders
        folders = [p for p in sorted((path / inner).glob("*")) if p.is_dir() and p.name in _SPLIT_WORDS]
        if folders:
            chosen = _pick(
                {_SPLIT_WORDS[p.name]: p for p in folders}, _SPLIT_WORDS.get(split, split), str(path)
            )
            return _from_path(chosen, "train")
    if (path / "data").is_dir() and not any(p.is_dir() for p in path.iterdir() if p.name != "data"):
        return _from_path(path / "data", split)
    return _from_images(path, split)


_SPLIT_WORDS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation"}


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """`train-0.parquet`, `test.csv` -> by their first word; files without such a name are all `train`."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        word = re.split(r"[-_.]", file.name)[0].lower()
        by_split.setdefault(_SPLIT_WORDS.get(word, "train"), []).append(file)
    return by_split


def _from_files(by_split: dict[str, list[Path]], split: str, path: Path) -> Dataset:
    """Read tables straight into memory-friendly Arrow; nothing is written to a cache."""
    import datasets as hf

    files = _pick(by_split, _SPLIT_WORDS.get(split, split), str(path))
    parts = []
    for file in files:
        try:
            part = _read(file)
        except Exception as error:  # each reader fails in its own way
            raise ValueError(f"{file.name!r} cannot be read: {_one_line(error)}") from error
        if len(part):
            parts.append(part)
    if not parts:
        raise ValueError(
            f"source={str(path)!r} has no examples in split {split!r}; check the file or the split"
        )
    return hf.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _read(file: Path) -> Dataset:
    import datasets as hf

    if file.stat().st_size == 0:
        return hf.Dataset.from_dict({})
    kind = FILE_KINDS[file.suffix.lower()]
    if kind == "parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        info = hf.DatasetInfo(features=hf.Features.from_arrow_schema(table.schema))
        return hf.Dataset(table, info=info)
    if kind == "csv":
        import pyarrow.csv as pc

        options = pc.ParseOptions(newlines_in_values=True)
        return hf.Dataset(pc.read_csv(file, parse_options=options))
    import json

    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
    return hf.Dataset.from_list(rows)


def _from_images(path: Path, split: str) -> Dataset:
    """Class folders of images; the folder names, sorted, are the classes."""
    import datasets as hf

    if _SPLIT_WORDS.get(split, split) not in ("train", _SPLIT_WORDS.get(path.name)):
        raise ValueError(f"split={split!r} does not exist in {str(path)!r}; it has train")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_KINDS and p.is_file())
    ids = [p.relative_to(path).as_posix() for p in files]
    if not files:
        raise ValueError(
            f"{str(path)!r} has no examples: expected class folders with images, "
            f"files ending in {', '.join(FILE_KINDS)}, or a folder of save_to_disk"
        )
    columns: dict[str, Any] = {"id": ids, "image": [str(p) for p in files]}
    kinds: dict[str, Any] = {"id": hf.Value("string"), "image": hf.Image()}
    classes = sorted({i.split("/")[0] for i in ids if "/" in i})
    if classes:
        loose = [i for i in ids if "/" not in i]
        if loose:
            raise ValueError(f"{loose[0]!r} lies beside the class folders of {str(path)!r}; move it into one")
        columns["label"] = [classes.index(i.split("/")[0]) for i in ids]
        kinds["label"] = hf.ClassLabel(names=classes)
    return hf.Dataset.from_dict(columns, features=hf.Features(kinds))


def _from_hub(name: str, split: str) -> Dataset:
    import datasets as hf

    from .. import zoo

    if not HUB_ID.fullmatch(name):
        what = "does not exist" if re.search(r"^[./~\\]|/|\.\w+$", name) else "is not in the zoo"
        raise ValueError(
            f"data set {name!r} {what}{near(name, zoo.datasets())} "
            "(or give a path, or a hub id like owner/name)"
        )
    repo, _, config = name.partition(":")
    try:
        loaded = hf.load_dataset(repo, config or None)
    except Exception as error:
        raise ValueError(
            f"{name!r} is no local path, and the hub did not give it: {_one_line(error)}"
        ) from error
    return _pick(cast(Mapping, loaded), split, name)


def open_model(
    source: Any, task: str | None = None, num_labels: int | None = None, seed: int = 0, **options: Any
):
    """`(model, processing class or None)` that `source` names.

    Args:
        source: a name of the zoo; a local folder of `save_pretrained`; a hub id; or an `nn.Module`, returned
            as it is with None.
        task: `"classification"`, `"regression"`, `"causal-lm"`, or None: what the checkpoint was made for;
            classification if `num_labels` is given.
        num_labels: width of a new head, if it is not the one of the checkpoint.
        seed: of a new head.
        **options: of a zoo model (`layers`, `image_size`, ...); for others, fields of the configuration, or
            `trust_remote_code` (off unless given) and `revision`.

    Raises:
        ValueError: unknown source or option, or no head for the task.
    """
    from .. import zoo

    if isinstance(source, nn.Module):
        return source, None
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"model={_show(source)} must be a name, a path or a torch.nn.Module")
    name = str(source)
    if isinstance(source, str) and name in zoo.models():
        model = zoo.load_model(name, task=task, num_labels=num_labels, seed=seed, **options)
        return model, zoo.load_processor(name, **options)
    path = Path(source).expanduser()
    if not path.exists() and (not HUB_ID.fullmatch(name) or ":" in name):
        raise ValueError(
            f"model {name!r} is not in the zoo{near(name, zoo.models())} "
            "(or give a folder of save_pretrained, or a hub id like owner/name)"
        )
    where = str(path) if path.exists() else name
    return _from_pretrained(where, task, num_labels, seed, options)


def _from_pretrained(
    where: str, task: str | None, num_labels: int | None, seed: int, options: dict[str, Any]
):
    import transformers as hf

    from ..zoo import efficientnet_lite  # noqa: F401  (makes its checkpoints known to AutoModel)
    from ..zoo.quiet import quiet_transformers

    load = {"trust_remote_code": bool(options.pop("trust_remote_code", False))}
    if "revision" in options:
        load["revision"] = options.pop("revision")
    try:
        config = hf.AutoConfig.from_pretrained(where, **load)
    except Exception as error:
        raise ValueError(f"model {where!r} has no readable config.json: {_one_line(error)}") from error
    for option, value in options.items():
        if not hasattr(config, option):
            raise ValueError(
                f"model {where!r} has no option {option!r} in its configuration"
                f"{near(option, config.to_dict())}"
            )
        setattr(config, option, value)
    cls: Any = _auto_class(config, task, num_labels)
    if task == "regression":
        config.num_labels, config.problem_type = num_labels or 1, "regression"
    elif num_labels is not None and num_labels != config.num_labels:
        config.num_labels = num_labels
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = cls.from_pretrained(
                where, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **load
            )
    except OSError as error:
        raise ValueError(f"model {where!r} cannot be loaded: {_one_line(error)}") from error
    _warn_of_missing(model, info, where)
    processor = _processor(where, load)
    padding = getattr(processor, "pad_token_id", None)
    if padding is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = padding  # decoders that classify look for it
    return model.float().eval(), processor


def _warn_of_missing(model: Any, info: dict[str, Any], where: str) -> None:
    """A new head is expected; random weights below it are not."""
    body = f"{model.base_model_prefix}."
    lost = {str(k) for k in info["missing_keys"]} | {str(k[0]) for k in info.get("mismatched_keys", ())}
    lost = sorted(k for k in lost if k.startswith(body) and "pooler" not in k and "mask_token" not in k)
    if lost:
        warnings.warn(
            f"{len(lost)} weights below the head are not in {where!r} and stay random, "
            f"{lost[0]!r} among them",
            stacklevel=4,
        )


def _auto_class(config: Any, task: str | None, num_labels: int | None):
    """The Auto class for the task, or for what the checkpoint says it is."""
    import transformers as hf

    kind = type(config)
    images = kind in hf.AutoModelForImageClassification._model_mapping
    texts = kind in hf.AutoModelForSequenceClassification._model_mapping
    made_for = " ".join(getattr(config, "architectures", None) or ())
    if task is None and num_labels is None:
        if "ImageClassification" in made_for and images:
            return hf.AutoModelForImageClassification
        if "SequenceClassification" in made_for and texts:
            return hf.AutoModelForSequenceClassification
        if "CausalLM" in made_for:
            return hf.AutoModelForCausalLM
        return hf.AutoModel
    if task == "causal-lm":
        return hf.AutoModelForCausalLM
    if task not in (None, "classification", "regression"):
        raise ValueError(f"task={task!r} must be 'classification', 'regression', 'causal-lm' or None")
    if images:
        return hf.AutoModelForImageClassification
    if texts:
        return hf.AutoModelForSequenceClassification
    raise ValueError(
        f"{config.model_type!r} models have no classification head in transformers; "
        "give the model as an nn.Module"
    )


def _processor(where: str, load: dict[str, Any]):
    """The tokenizer, image processor or processor that the checkpoint has, else None."""
    import transformers as hf

    from ..zoo.quiet import quiet_transformers

    for auto in (hf.AutoTokenizer, hf.AutoImageProcessor, hf.AutoProcessor):
        try:
            with quiet_transformers():
                found = auto.from_pretrained(where, **load)
        except Exception:  # each Auto class fails in its own way on a checkpoint that lacks the file
            continue
        if hasattr(found, "get_vocab"):  # AutoProcessor may give a tokenizer, too
            if set(found.get_vocab()) <= set(found.all_special_tokens):
                continue  # transformers 5 makes an empty tokenizer up where there is no vocabulary
            if found.pad_token is None:
                found.pad_token = found.eos_token
        return found
    return None


def device_of(name: str) -> torch.device:
    """`"auto"` is the first accelerator that torch sees, else the CPU.

    Raises:
        ValueError: a device that torch does not know or that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} is not to be had here: {_one_line(error)}; use 'auto' or 'cpu'"
        ) from None


def encode_labels(dataset: Any, column: str, names: list[str] | None = None) -> Any:
    """`dataset` with the strings of `column` as a ClassLabel; other columns and data sets as they are.

    A blank string is a missing label, as a row of a CSV file without its label has it.

    Args:
        names: the classes, in order; default: those found, sorted. Give the training set's for a test set.

    Raises:
        ValueError: a label that is not among `names`.
    """
    import datasets as hf

    feature = dataset.features.get(column) if isinstance(dataset, hf.Dataset) else None
    if not isinstance(feature, hf.Value) or "string" not in feature.dtype:
        return dataset
    labels = [label if label and label.strip() else None for label in dataset[column][:]]
    names = names or sorted({label for label in labels if label is not None})
    strange = sorted({label for label in labels if label is not None} - set(names))
    if strange:
        raise ValueError(f"label {strange[0]!r} is not one of the training classes{near(strange[0], names)}")
    encoded = [None if label is None else names.index(label) for label in labels]
    dataset = dataset.remove_columns(column).add_column(column, encoded)
    return dataset.cast_column(column, hf.ClassLabel(names=names))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
