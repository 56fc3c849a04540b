"""The models and data sets of the demo, the tests and the benchmarks, fetched once and kept.

```python
from serpette import zoo

model = zoo.load_model("vit-s", num_labels=10, layers=8)
processor = zoo.load_processor("vit-s")
train = zoo.load_dataset("fashion-mnist", "train", limit=1000)
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registry import near
from .cache import Entry, ZooError, cache_dir, ensure, fault, has_manifest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

__all__ = [
    "Entry",
    "ZooError",
    "cache_dir",
    "datasets",
    "fetch",
    "is_cached",
    "load_dataset",
    "load_model",
    "load_processor",
    "models",
    "tiny",
]


def models() -> dict[str, Entry]:
    """The models by name.

    >>> sorted(models())
    ['efficientnet-lite0', 'minilm-l6', 'smollm2-135m', 'vit-s']
    """
    from . import catalogue

    return {entry.name: entry for entry in catalogue.MODELS}


def datasets() -> dict[str, Entry]:
    """The data sets by name.

    >>> datasets()["fashion-mnist"].licence
    'MIT'
    """
    from . import catalogue

    return {entry.name: entry for entry in catalogue.DATASETS}


def _entry(name: str, known: dict[str, Entry], kind: str) -> Entry:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r} in the zoo{near(name, known)}")
    return known[name]


def _options(entry: Entry, given: dict[str, Any]) -> dict[str, Any]:
    for option in given:
        if option not in entry.options:
            known = near(option, entry.options) if entry.options else "; it has none"
            raise ValueError(f"{entry.kind} {entry.name!r} has no option {option!r}{known}")
    options = {**entry.options, **given}
    if "image_size" in options:
        from .networks import check_image_size

        check_image_size(entry, options["image_size"])
    return options


def is_cached(name: str, check: bool = False) -> bool:
    """Whether `name` can be loaded without a network; `check=True` also compares sizes and hashes."""
    entry = _entry(name, {**models(), **datasets()}, "name")
    if check and entry.sources:
        return fault(cache_dir() / name) is None
    return has_manifest(entry)


def fetch(name: str, progress: bool = True) -> Path:
    """Bring a model or data set into the cache and return its folder; nothing happens if it is there.

    A damaged folder is removed and fetched again. Two processes never fetch the same entry twice, and a
    fetch that is killed starts afresh the next time.

    Args:
        name: of `models()` or `datasets()`.
        progress: show a progress bar on stderr (one line if that is not a terminal).

    Raises:
        ZooError: no source gave the right files; the message has one line for each and says what to run.
    """
    return ensure(_entry(name, {**models(), **datasets()}, "name"), progress)


def load_model(
    name: str, *, task: str | None = None, num_labels: int | None = None, **options: Any
) -> PreTrainedModel:
    """A pre-trained transformers model, float32 and in eval mode.

    Args:
        name: of `models()`.
        task: `"classification"`, `"regression"` (one output unless `num_labels` says otherwise), or
            `"causal-lm"` (language models only). None: classification if `num_labels` is given, else the
            model without a new head: features, or next tokens for a language model.
        num_labels: width of the new head. `efficientnet-lite0` has a head of its own, for the 1000 classes
            of ImageNet: `task="classification"` without `num_labels` keeps it.
        **options: `seed` (0) of the new head; `layers` keeps the first so many transformer layers
            (`vit-s` 12, `minilm-l6` 6, `smollm2-135m` 30); `image_size` in pixels (`vit-s` 84, a multiple of
            14: its best features come from 84 to 112; `efficientnet-lite0` 224). The position embeddings
            of `vit-s` are interpolated to `image_size` once, here.

    Raises:
        ValueError: unknown name, option or value.
        ZooError: not cached and not to be had.

    Example:
        `load_model("vit-s", num_labels=10, layers=8)` has 14.5 M parameters.
    """
    entry = _entry(name, models(), "model")
    options = _options(entry, options)
    tasks = [None, "classification", "regression"] + (["causal-lm"] if name == "smollm2-135m" else [])
    if task not in tasks:
        raise ValueError(f"task={task!r} of {name} must be one of {', '.join(map(str, tasks))}")
    if task is None and num_labels is not None:
        task = "classification"
    if task == "regression" and num_labels is None:
        num_labels = 1
    if task == "classification" and num_labels is None and name != "efficientnet-lite0":
        raise ValueError(
            f"num_labels=None must be given for task='classification': {name} has no head of its own"
        )
    if task == "causal-lm" and num_labels is not None:
        raise ValueError(f"num_labels={num_labels!r} has no meaning with task='causal-lm'")
    if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels={num_labels!r} must be a whole number of at least 1")
    from .networks import build_model

    return build_model(entry, ensure(entry), task, num_labels, options)  # type: ignore[return-value]


def load_processor(name: str, **options: Any):
    """The image processor (PIL based, no torchvision) or tokenizer of a model; `options` as in `load_model`.

    Example:
        `load_processor("vit-s")(image, return_tensors="pt")["pixel_values"]` is (1, 3, 84, 84), also for a
        grey 28x28 image.
    """
    entry = _entry(name, models(), "model")
    options = _options(entry, options)
    from .networks import build_processor

    folder = cache_dir() / name if "image_size" in entry.options else ensure(entry)
    return build_processor(entry, folder, options)


def load_dataset(
    name: str, split: str = "train", *, limit: int | None = None, seed: int = 0, **options: Any
) -> Dataset:
    """A data set with a column `id` of unique strings that stay the same under any `limit`.

    `fashion-mnist` and `digits`: image, label. `movie-snippets`: text, label; `target="label"` (default)
    keeps the snippets with |rating| >= 0.5 as negative and positive, `target="rating"` has all as float32;
    `"movie-snippets:rating"` is the same. `mmlu-cot`: subject, prompt, response. `lee-news`: text. All but
    `fashion-mnist` come without a test split: a fixed random fifth, decided by the id, is `"test"`, the rest
    `"train"`, everything `"all"`.

    Args:
        name: of `datasets()`.
        split: `"train"` or `"test"`.
        limit: at most so many examples, chosen at random, class by class where there are classes.
        seed: of that choice.
        **options: see above.

    Raises:
        ValueError: unknown name, split, option or value.
        ZooError: not cached and not to be had.

    >>> digits = load_dataset("digits", limit=100)
    >>> len(digits), digits.column_names
    (100, ['id', 'image', 'label'])
    """
    name, _, variant = name.partition(":")
    entry = _entry(name, datasets(), "dataset")
    if variant:
        if entry.variant is None:
            raise ValueError(
                f"dataset {name!r} has no variants, but {variant!r} was asked for; drop ':{variant}'"
            )
        options.setdefault(entry.variant, variant)
    options = _options(entry, options)
    from .corpora import build_dataset, take

    return take(build_dataset(name, ensure(entry), split, options), limit, seed)


def tiny(kind: str, num_labels: int = 3, seed: int = 0) -> PreTrainedModel:
    """A random model of a few thousand parameters for tests; see `serpette.zoo.tiny_models`.

    >>> tiny("vit", num_labels=5).num_labels
    5
    """
    from .tiny_models import make

    return make(kind, num_labels, seed)
