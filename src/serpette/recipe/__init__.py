"""A recipe: what to prune, what to tune and what to compare, as plain dataclasses read from YAML.

Reading is strict: an unknown key, a wrong type or an impossible value is a ValueError that names the file,
the key and the way out. `pipeline.run` is the reader of these fields.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..registry import near
from .prune import WHILE_TUNING, PruneSpec, check_prune
from .reading import build, check_limits, fields_of, parse
from .stages import EvaluateSpec, Export, ShrinkSpec, check_evaluate, check_export, check_shrink
from .tune import ROWS, TuneSpec, check_tune, check_tune_task

PREDICTED = (
    "value", "low", "high", "loss", "loss_low", "loss_high", "seconds", "peak_bytes", "speedup",
)  # fmt: skip


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
    prune: dict[str, Any] | None = None
    """What differs from the recipe's `prune`, e.g. `{sparsity: 0.9}`; {}: nothing, or the defaults."""
    shrink: dict[str, Any] | bool | None = None
    """What differs from the recipe's `shrink`; true or {}: nothing, or the defaults; false: not shrunk."""
    export: tuple[Export, ...] | None = None
    """In place of the recipe's `export`."""
    evaluate: dict[str, Any] | bool | None = None
    """What differs from the recipe's `evaluate`; true or {}: nothing, or the defaults; false: not at all."""
    predicted: dict[str, float] = field(default_factory=dict)
    """What an adviser foretold, for the report: value, low, high, loss, seconds, peak_bytes, speedup ..."""


@dataclass(frozen=True)
class Recipe:
    """One job: score the training examples, tune each arm on what it keeps, compare on the test examples.

    Its stages are keys: `data`, `tune`, `prune`, `shrink`, `export`, `evaluate`; an arm may change each.
    """

    name: str
    """Name of the job: letters, digits, dot, dash and underscore."""
    model: ModelSpec
    data: DataSpec
    arms: tuple[ArmSpec, ...]
    tune: TuneSpec = TuneSpec()
    prune: PruneSpec | None = None
    """How weights are pruned; None: not at all, but in an arm with a `prune` of its own."""
    shrink: ShrinkSpec | None = None
    """Structured pruning: {} makes the result smaller and dense; None: it stays as wide, and masked."""
    export: tuple[Export, ...] | None = None
    """What is saved of an arm: for peft, for `from_pretrained`, bitmask and values alone, for onnxruntime;
    []: nothing. None: the adapter where one is left, else all weights, of the first seed alone as they are
    large, and nothing where the model is as it was."""
    evaluate: EvaluateSpec | None = EvaluateSpec()
    """What is measured; None: nothing, and no test examples are needed."""
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
        changed = fields_of(TuneSpec, arm.tune, f"{arm.name}.tune", "recipe")
        if "rank" in changed:
            changed = {"fraction": None} | changed
        return dataclasses.replace(self.tune, **changed)

    def prune_of(self, arm: ArmSpec) -> PruneSpec | None:
        """`prune` with what `arm` changes; None where no weight is cut."""
        if self.prune is None and arm.prune is None:
            return None
        changed = fields_of(PruneSpec, arm.prune or {}, f"{arm.name}.prune", "recipe")
        spec = dataclasses.replace(self.prune or PruneSpec(), **changed)
        return spec if spec.sparsity else None

    def shrink_of(self, arm: ArmSpec) -> ShrinkSpec | None:
        """`shrink` with what `arm` changes; None where the model keeps its widths."""
        return self._stage(ShrinkSpec, arm, "shrink") if self.prune_of(arm) is not None else None

    def export_of(self, arm: ArmSpec) -> tuple[Export, ...] | None:
        """What is saved of `arm`; None: by what it is."""
        return self.export if arm.export is None else arm.export

    def evaluate_of(self, arm: ArmSpec) -> EvaluateSpec | None:
        """`evaluate` with what `arm` changes; None where nothing is measured."""
        return self._stage(EvaluateSpec, arm, "evaluate")

    @property
    def evaluated(self) -> bool:
        """Whether any arm is, so that test examples are needed."""
        return any(self.evaluate_of(arm) is not None for arm in self.arms)

    def _stage(self, cls: type, arm: ArmSpec, name: str) -> Any:
        whole, own = getattr(self, name), getattr(arm, name)
        if own is None or own is False:
            return None if own is False else whole
        changed = fields_of(cls, {} if own is True else own, f"{arm.name}.{name}", "recipe")
        return dataclasses.replace(whole or cls(), **changed)

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
        tree = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    recipe = build(Recipe, tree, "", str(path))
    check(recipe, str(path))
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; `load` of it gives the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe, or a part of it, as nested dicts and lists, as in the YAML and in result.json."""

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
    check_limits(limits, f"{where}: ")
    strict = (*ROWS, "freeze_attention", "dropout")  # sizes may stay where the method has no use for them
    given = [k for k in strict if getattr(recipe.tune, k) != getattr(TuneSpec, k)]
    check_tune(recipe.tune, given, f"{where}: tune")
    names = [arm.name for arm in recipe.arms]
    for i, arm in enumerate(recipe.arms):
        key = f"{where}: arms.{i}"
        if names.index(arm.name) < i:
            raise ValueError(f"{key}.name={arm.name!r} is taken by arms.{names.index(arm.name)}")
        if arm.tune:
            fields_of(TuneSpec, arm.tune, f"arms.{i}.tune", where)
            check_tune(recipe.tune_of(arm), [*arm.tune], f"{key}.tune")
            if {"rank", "fraction"} <= {*arm.tune}:
                raise ValueError(f"{key}.tune has both rank and fraction; give one of them")
        _check_prune(recipe, arm, i, where)
        _check_stages(recipe, arm, i, where)
        _check_methods(recipe, arm, key)
        _check_keep(arm, key, data.train_limit or 1)
    if recipe.evaluated and (data.test or data.train, data.test_split) == (data.train, data.train_split):
        raise ValueError(
            f"{where}: data.test_split={data.test_split!r} of {data.train!r} is the training split, too; "
            "name another split, or other test examples with data.test"
        )
    if recipe.shrink is not None and not any(recipe.prune_of(arm) for arm in recipe.arms):
        raise ValueError(f"{where}: shrink means nothing where no arm is pruned; give prune, or leave it out")
    if recipe.task is not None:
        check_task(recipe, recipe.task, where)


def check_task(recipe: Recipe, task: str, where: str = "recipe") -> None:
    """Whether each arm, and what trains, has a meaning in the `task` of the data.

    Raises:
        ValueError: names the arm, and what has a meaning.
    """
    from ..data.selectors import registry as selectors
    from ..scorers import registry as scorers

    for i, arm in enumerate(recipe.arms):
        key = f"{where}: arms.{i}"
        check_tune_task(recipe.tune_of(arm), task, f"{key}.tune" if arm.tune else f"{where}: tune")
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


def _check_prune(recipe: Recipe, arm: ArmSpec, i: int, where: str) -> None:
    if arm.prune is not None:
        fields_of(PruneSpec, arm.prune, f"arms.{i}.prune", where)
    prune = recipe.prune_of(arm)
    if prune is None:
        return
    whole, tune = recipe.prune or PruneSpec(), recipe.tune_of(arm)
    given = {k for k in vars(whole) if getattr(whole, k) != getattr(PruneSpec(), k)}
    if tune.method != recipe.tune.method:  # the recipe's settings are for another way to tune
        given -= {*WHILE_TUNING, "importance_examples"}
    key = f"{where}: prune" if arm.prune is None else f"{where}: arms.{i}.prune"
    check_prune(prune, tune, sorted(given | {*(arm.prune or {})}), key)


def _check_stages(recipe: Recipe, arm: ArmSpec, i: int, where: str) -> None:
    """Of what becomes of the model, and of what was foretold of it."""

    def key(name: str) -> str:
        return f"{where}: {name}" if getattr(arm, name) is None else f"{where}: arms.{i}.{name}"

    for name, cls in (("shrink", ShrinkSpec), ("evaluate", EvaluateSpec)):
        own = getattr(arm, name)
        if isinstance(own, dict):
            fields_of(cls, own, f"arms.{i}.{name}", where)
    prune = recipe.prune_of(arm)
    if prune is not None:
        check_shrink(prune, recipe.shrink_of(arm), key("shrink"))
    elif arm.shrink is not None and arm.shrink is not False:
        raise ValueError(f"{key('shrink')} means nothing where no weight is pruned; give the arm a prune")
    check_export(recipe.export_of(arm), recipe.tune_of(arm), prune, key("export"))
    check_evaluate(recipe.evaluate_of(arm), key("evaluate"))
    for name, value in arm.predicted.items():
        if name not in PREDICTED:
            raise ValueError(f"{where}: unknown key arms.{i}.predicted.{name}{near(name, PREDICTED)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: arms.{i}.predicted.{name}={value!r} must be a number")


def _check_methods(recipe: Recipe, arm: ArmSpec, key: str) -> None:
    """That scorer and selector exist and take their options, and what a scorer with a LoRA needs."""
    from ..data.selectors import registry as selectors
    from ..scorers import registry as scorers

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
    from ..data.budget import count

    try:
        count(total, arm.keep)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if arm.select is None and arm.keep < 1:
        raise ValueError(
            f"{key}.select is missing: keep={arm.keep} needs a selector; `serpette list selectors`"
        )
