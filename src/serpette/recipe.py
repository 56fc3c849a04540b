"""A recipe: what to prune, what to tune and what to compare, as plain dataclasses read from YAML.

Reading is strict: an unknown key, a wrong type or an impossible value is a ValueError that names the file,
the key and the way out. `pipeline.run` is the reader of these fields.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .registry import near


@dataclass(frozen=True)
class ModelSpec:
    """The pre-trained model."""

    name: str
    """A zoo name, a hub id or a local folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the loader, e.g. `{layers: 8}`."""


@dataclass(frozen=True)
class DataSpec:
    """The training examples, which are pruned, and the test examples, which never are."""

    train: str
    """A zoo name, a hub id, an image folder, or a parquet, CSV or JSONL file."""
    test: str | None = None
    """The same for the test examples; None: the source of `train`."""
    train_split: str = "train"
    """Split of `train`."""
    test_split: str = "test"
    """Split of `test`."""
    train_limit: int | None = None
    """At most so many training examples, drawn with the recipe's seed; None: all."""
    test_limit: int | None = None
    """At most so many test examples; None: all."""
    label_column: str | None = None
    """Column of the labels; None: found by its name (label, labels, target, rating, class)."""
    max_length: int | None = None
    """Tokens a text is cut to; None: 128, and 1024 in a causal language model."""


@dataclass(frozen=True)
class TuneSpec:
    """How each arm is fine-tuned, with the stock Trainer and AdamW."""

    method: Literal["lora", "dora", "shira", "rows", "full", "head"] = "lora"
    """What trains: an adapter (of rows: `serpette.RowConfig`) and the head, every weight, or the head."""
    epochs: int = 3
    """Passes over what an arm keeps: the same for every arm, so a smaller arm takes fewer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate; 1e-3 suits adapters and a head, full tuning wants about 1e-5."""
    batch_size: int = 16
    """Examples a step."""
    rank: int = 8
    """Rank of LoRA and DoRA; SHiRA trains as many weights; of rows the number a layer, without `fraction`."""
    alpha: float = 16
    """LoRA scale is alpha / rank."""
    dropout: float = 0.0
    """LoRA dropout, a share in [0, 1)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get the adapter, as peft names them; rows know "all-layers", too."""
    freeze_attention: bool = False
    """No adapter inside attention blocks."""
    fraction: float | None = None
    """Of rows: the share of each layer's that trains, in (0, 1]; None: `rank` of them."""
    modes: Literal["rows", "columns", "both"] | dict[str, str] = "rows"
    """Of rows: what trains, also by layer as {pattern: mode}; columns hold less for the backward pass."""
    importance: str = "magnitude"
    """Of rows: by what they are chosen, a method of `serpette.importance`."""
    importance_examples: int = 256
    """Of rows: so many kept training examples an importance looks at that needs data."""
    scope: Literal["layer", "global"] = "layer"
    """Of rows: the same number or share in each layer, or the best of all layers."""
    dependencies: bool = False
    """Of rows: those of a layer and the columns of the next that read them are chosen together."""
    kernel: Literal["additive", "live"] = "additive"
    """Of rows: added to the layer's output, or written into its weight, which is faster."""
    train_bias: bool = False
    """Of rows: their biases train, too."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate, as the Trainer names it."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises, in [0, 1]."""

    @property
    def needs(self) -> frozenset[str]:
        """What the importance of the rows must observe of examples; empty: nothing."""
        from .importance import registry as importances

        return importances.make(self.importance).needs if self.method == "rows" else frozenset()

    def adapter(self, seed: int) -> dict[str, Any]:
        """Arguments of `serpette.tuning.trainable`; an importance that needs data ranks afterwards."""
        names = {"method", *SETTINGS[self.method]} - {"importance_examples", "scope"}
        rows = {"importance": "magnitude" if self.needs else self.importance, "seed": seed}
        return {k: getattr(self, k) for k in names} | (rows if self.method == "rows" else {})

    def differing(self, other: TuneSpec) -> dict[str, Any]:
        """The settings that mean something here and are not those of `other`."""
        ignored = {name for names in SETTINGS.values() for name in names} - {*SETTINGS[self.method]}
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        changed = {k: v for k, v in mine.items() if v != its[k] and k not in ignored}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}  # as JSON has it


ROWS = (
    "fraction", "modes", "importance", "importance_examples", "scope", "dependencies", "kernel", "train_bias",
)  # fmt: skip
SHARED = ("rank", "target_modules", "freeze_attention")
# what a method looks at, beside the training that is the same for all
SETTINGS: dict[str, tuple[str, ...]] = {
    "lora": (*SHARED, "alpha", "dropout"),
    "dora": (*SHARED, "alpha", "dropout"),
    "shira": SHARED,
    "rows": (*SHARED, *ROWS),
    "full": (),
    "head": (),
}


@dataclass(frozen=True)
class ArmSpec:
    """One way to choose the training examples, or what trains on them."""

    name: str
    """Its name in the report."""
    scorer: str | None = None
    """`serpette list scorers`; None: no score, for the full set or a random choice."""
    select: str | None = None
    """`serpette list selectors`; None: keep everything."""
    keep: float = 1.0
    """Share of the examples that stay, in (0, 1]."""
    per_class: bool | Literal["equal"] | None = None
    """True: the same share of each class; "equal": the same number; False: all together; None: by task."""
    scorer_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the scorer, e.g. `{variant: official}`."""
    select_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the selector, e.g. `{gamma: 0.3}`."""
    tune: dict[str, Any] = field(default_factory=dict)
    """What differs from the recipe's `tune`, e.g. `{method: rows, fraction: 0.05}`."""


@dataclass(frozen=True)
class Recipe:
    """One job: score the training examples, tune each arm on what it keeps, compare on the test examples."""

    name: str
    """Name of the job: letters, digits, dot, dash and underscore."""
    model: ModelSpec
    data: DataSpec
    arms: tuple[ArmSpec, ...]
    tune: TuneSpec = TuneSpec()
    task: Literal["classification", "regression", "causal-lm"] | None = None
    """What the model learns; None: by the label column, and without one the responses of instructions."""
    seed: int = 0
    """Of everything random: the drawn examples, the choice, the new weights, the order."""
    seeds: int = 1
    """The job is done for so many seeds, from `seed` on, and compared seed by seed; 5 show what is noise."""
    batch_size: int = 64
    """Examples a forward pass while scoring; changes speed and memory, never a score."""
    proxy: Literal["probe", "finetune", "model"] = "probe"
    """Whose logits the scorers see: of a linear probe on the features, a fine-tuning, the model itself."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`, `mps`; `auto`: a GPU if there is one."""
    on_bad: Literal["set_aside", "raise"] = "set_aside"
    """What happens to an example that cannot be read: listed and left out, or an error."""
    out: str | None = None
    """Folder of the results; None: `runs/` and the name."""

    def tune_of(self, arm: ArmSpec) -> TuneSpec:
        """`tune` with what `arm` changes; its `rank` takes the place of a `fraction`."""
        changed = _values(TuneSpec, arm.tune, f"{arm.name}.tune", "recipe")
        if "rank" in changed:
            changed = {"fraction": None} | changed
        return dataclasses.replace(self.tune, **changed)

    @property
    def folder(self) -> Path:
        """Where the results go: `out`, or `runs/NAME`."""
        return Path(self.out or f"runs/{self.name}")


def load(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, a wrong type, a value out of its range.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "tiny.yaml")
        >>> text = "{name: tiny, model: {name: vit-s}, data: {train: digits}, arms: [{name: full}]}"
        >>> _ = file.write_text(text)
        >>> load(file).arms[0].keep
        1.0
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {str(path)!r} does not exist; an example is recipes/demo.yaml")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    recipe = _build(Recipe, tree, "", str(path))
    check(recipe, str(path))
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; `load` of it gives the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts and lists, as in the YAML and in result.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(recipe))


def check(recipe: Recipe, where: str = "recipe") -> None:
    """Ranges and names that types cannot hold.

    Raises:
        ValueError: names `where`, the key, the value and the limit.
    """
    data = recipe.data
    sizes = [(f"data.{k}", getattr(data, k)) for k in ("train_limit", "test_limit", "max_length")]
    limits = [
        ("name", recipe.name, bool(re.fullmatch(r"\w[\w.-]*", recipe.name)), "letters, digits and . - _"),
        ("seed", recipe.seed, 0 <= recipe.seed < 2**32, "in [0, 2**32)"),
        ("seeds", recipe.seeds, 1 <= recipe.seeds <= 2**32 - recipe.seed, "at least 1"),
        ("batch_size", recipe.batch_size, recipe.batch_size >= 1, "at least 1"),
        *((key, size, size is None or size >= 1, "at least 1, or null") for key, size in sizes),
        ("arms", recipe.arms, len(recipe.arms) >= 1, "at least one arm, e.g. [{name: full}]"),
    ]
    _check_limits(limits, f"{where}: ")
    strict = (*ROWS, "freeze_attention", "dropout")  # sizes may stay where the method has no use for them
    given = [k for k in strict if getattr(recipe.tune, k) != getattr(TuneSpec, k)]
    _check_tune(recipe.tune, given, f"{where}: tune")
    if (data.test or data.train, data.test_split) == (data.train, data.train_split):
        raise ValueError(
            f"{where}: data.test_split={data.test_split!r} of {data.train!r} is the training split, too; "
            "name another split, or other test examples with data.test"
        )
    names = [arm.name for arm in recipe.arms]
    for i, arm in enumerate(recipe.arms):
        key = f"{where}: arms.{i}"
        if names.index(arm.name) < i:
            raise ValueError(f"{key}.name={arm.name!r} is taken by arms.{names.index(arm.name)}")
        if arm.tune:
            _values(TuneSpec, arm.tune, f"arms.{i}.tune", where)
            _check_tune(recipe.tune_of(arm), [*arm.tune], f"{key}.tune")
            if {"rank", "fraction"} <= {*arm.tune}:
                raise ValueError(f"{key}.tune has both rank and fraction; give one of them")
        _check_methods(recipe, arm, key)
        _check_keep(arm, key, data.train_limit or 1)
    if recipe.task is not None:
        check_task(recipe, recipe.task, where)


def check_task(recipe: Recipe, task: str, where: str = "recipe") -> None:
    """Whether each arm, and what trains, has a meaning in the `task` of the data.

    Raises:
        ValueError: names the arm, and what has a meaning.
    """
    from .data.selectors import registry as selectors
    from .scorers import registry as scorers

    for i, arm in enumerate(recipe.arms):
        key = f"{where}: arms.{i}"
        _check_tune_task(recipe.tune_of(arm), task, f"{key}.tune" if arm.tune else f"{where}: tune")
        if arm.scorer is not None and task not in scorers[arm.scorer].tasks:
            able = ", ".join(name for name, cls in scorers.items() if task in cls.tasks)
            raise ValueError(
                f"{key}.scorer={arm.scorer!r} has no meaning in a {task}; those that have: {able}"
            )
        if arm.per_class and task != "classification":
            raise ValueError(
                f"{key}.per_class={arm.per_class!r} needs classes, and this is a {task}; leave it out"
            )
        selector = selectors.make(arm.select, **arm.select_options) if arm.select else None
        if task == "causal-lm" and len(getattr(selector, "candidates", list)()) > 1:
            raise ValueError(
                f"{key}.select={arm.select!r} is open: its option is searched by a probe on labels, and a "
                "causal-lm has none; give it, e.g. select_options: {gamma: 0.5}, or use top_hard"
            )


def _check_limits(limits: list[tuple[str, Any, bool, str]], before: str) -> None:
    for key, value, fine, limit in limits:
        if not fine:
            raise ValueError(f"{before}{key}={value!r} must be {limit}")


def _check_tune(tune: TuneSpec, given: list[str], key: str) -> None:
    """Ranges, names, and that `method` has a use for the settings that are `given`."""
    from .importance import registry as importances

    infinite, fraction, seen = float("inf"), tune.fraction, tune.importance_examples
    percent = f"; did you mean {fraction / 100:g}?" if fraction and 1 < fraction <= 100 else ""
    limits = [
        ("epochs", tune.epochs, tune.epochs >= 1, "at least 1"),
        ("learning_rate", tune.learning_rate, 0 < tune.learning_rate < infinite, "above 0"),
        ("batch_size", tune.batch_size, tune.batch_size >= 1, "at least 1"),
        ("rank", tune.rank, tune.rank >= 1, "at least 1"),
        ("alpha", tune.alpha, 0 < tune.alpha < infinite, "above 0"),
        ("dropout", tune.dropout, 0 <= tune.dropout < 1, "in [0, 1)"),
        ("weight_decay", tune.weight_decay, 0 <= tune.weight_decay < infinite, "0 or more"),
        ("warmup", tune.warmup, 0 <= tune.warmup <= 1, "a share in [0, 1]"),
        ("fraction", fraction, fraction is None or 0 < fraction <= 1, f"a share in (0, 1]{percent}"),
        ("importance_examples", seen, seen >= 1, "at least 1"),
        ("scope", tune.scope, not tune.dependencies or tune.scope == "layer", "'layer' if dependencies"),
    ]
    _check_limits(limits, f"{key}.")
    for name in given:
        able = [method for method, names in SETTINGS.items() if name in names]
        if able and tune.method not in able:
            raise ValueError(
                f"{key}.{name}={getattr(tune, name)!r} means nothing to method={tune.method!r}; it is of "
                f"{' or '.join(map(repr, able))}"
            )
    for pattern, mode in tune.modes.items() if isinstance(tune.modes, dict) else ():
        if mode not in ("rows", "columns", "both"):
            raise ValueError(f"{key}.modes[{pattern!r}]={mode!r} must be 'rows', 'columns' or 'both'")
    if tune.importance not in importances:
        known = near(tune.importance, importances)
        raise ValueError(f"{key}.importance={tune.importance!r} is unknown{known}")


def _check_tune_task(tune: TuneSpec, task: str, key: str) -> None:
    if task == "causal-lm" and tune.method == "head":
        raise ValueError(
            f"{key}.method='head' has no meaning in a causal-lm, whose head is that of the vocabulary; "
            "use 'lora', 'rows' or 'full'"
        )
    if "labels" in tune.needs and task != "classification":
        raise ValueError(f"{key}.importance={tune.importance!r} needs classes; in a {task} use 'taylor'")


def _check_methods(recipe: Recipe, arm: ArmSpec, key: str) -> None:
    """That scorer and selector exist and take their options, and what a scorer with a LoRA needs."""
    from .data.selectors import registry as selectors
    from .scorers import registry as scorers

    made = {}
    for kind, registry, options in (
        ("scorer", scorers, arm.scorer_options),
        ("select", selectors, arm.select_options),
    ):
        name = getattr(arm, kind)
        if name is not None and name not in registry:
            raise ValueError(f"{key}.{kind}={name!r} is unknown{near(name, registry)}")
        try:
            made[kind] = registry.make(name, **options) if name is not None else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}.{kind}: {error}") from None
    reading = getattr(made["scorer"], "reading", None)
    if reading is None:
        return
    if recipe.tune.method != "lora":  # scoring uses the recipe's own settings, whatever the arm trains
        raise ValueError(
            f"{key}.scorer={arm.scorer!r} reads the gradients of a LoRA, and tune.method="
            f"{recipe.tune.method!r} has none; use tune.method: lora, or another scorer"
        )
    if not hasattr(reading, "target"):
        return
    if not reading.target:
        raise ValueError(
            f"{key}.scorer_options has no target: a name, a path or ids of what the examples are to be like, "
            "e.g. {target: my-data, target_split: validation}"
        )
    test = recipe.data.test or recipe.data.train, recipe.data.test_split
    if (reading.target, reading.target_split) == test:
        raise ValueError(
            f"{key}.scorer_options: target={reading.target!r} with target_split={reading.target_split!r} are "
            "the test examples, by which nothing may be chosen; name another split, e.g. target_split: train"
        )


def _check_keep(arm: ArmSpec, key: str, total: int) -> None:
    from .data.budget import count

    try:
        count(total, arm.keep)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if arm.select is None and arm.keep < 1:
        raise ValueError(
            f"{key}.select is missing: keep={arm.keep} needs a selector; `serpette list selectors`"
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-4` is one), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A dict; two equal keys are an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} is given twice, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _build(hint: Any, value: Any, key: str, file: str) -> Any:
    """`value` from YAML as the type `hint`; `key` is its dotted place in the file."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast(type, hint), value, key, file)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            if _fits(option, value):
                return _build(option, value, key, file)
    elif origin is tuple and isinstance(value, list):
        return tuple(_build(args[0], item, f"{key}.{i}", file) for i, item in enumerate(value))
    elif _fits(hint, value):
        return float(value) if hint is float else value
    raise ValueError(f"{file}: {key}={value!r} must be {_words(hint)}")


def _build_dataclass(cls: type, value: Any, key: str, file: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key or 'the recipe'}={value!r} must be a mapping of key: value")
    values = _values(cls, value, key, file)
    for f in dataclasses.fields(cls):
        if f.name not in value and f.default is f.default_factory is dataclasses.MISSING:
            hint = typing.get_type_hints(cls)[f.name]
            raise ValueError(f"{file}: key {_join(key, f.name)} is missing; it must be {_words(hint)}")
    return cls(**values)


def _values(cls: type, value: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """The fields of `cls` that `value` has, each as its type."""
    hints = typing.get_type_hints(cls)
    for name in value:
        if name not in hints:
            raise ValueError(f"{file}: unknown key {_join(key, name)}{near(name, hints)}")
    return {name: _build(hints[name], item, _join(key, name), file) for name, item in value.items()}


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {tuple: list, dict: dict}.get(origin, hint))


def _words(hint: Any) -> str:
    """A type in words, to stand after "must be"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is tuple:
        return "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words[hint]
