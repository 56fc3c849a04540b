"""The command `serpette`. Each command is a function; tyro makes its options and its help from the signature.

Imports of torch and transformers wait inside the commands, so that `--help` is quick.
Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from . import cli_advise, cli_reports, cli_tuning

DESCRIPTION = """Fine-tuning made cheap by pruning: of the data, of the trainable rows, of the weights.

`serpette COMMAND --help` shows the options of a command and an example; `serpette --version` prints the
version. With `--debug` an error comes with its traceback. A command that was stopped goes on where it was
when it is given again."""

app = tyro.extras.SubcommandApp()


@app.command(name="list")
def list_(
    kind: Positional[
        Literal[
            "scorers",
            "selectors",
            "importances",
            "neuron-importances",
            "weight-importances",
            "models",
            "datasets",
        ]
    ],
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Names that the other commands understand, one a line.

    Example: serpette list scorers

    Args:
        kind: What to list; of the importances, those of rows are neuron-importances, those of the weights
            that a prune stage cuts weight-importances.
        as_json: A JSON list of objects with `name` and `about` in place of the names.
    """
    if kind in ("models", "datasets"):
        from . import zoo

        about = {name: _about(entry) for name, entry in dict(getattr(zoo, kind)()).items()}
    else:
        from .data.selectors import registry as selectors
        from .importance import neurons, weights
        from .importance import registry as importances
        from .scorers import registry as scorers

        registry = {
            "scorers": scorers,
            "selectors": selectors,
            "importances": importances,
            "neuron-importances": neurons,
            "weight-importances": weights,
        }[kind]
        about = {name: _about(cls) for name, cls in registry.items()}
    print(
        json.dumps([{"name": n, "about": a} for n, a in about.items()], indent=1)
        if as_json
        else "\n".join(about)
    )


@app.command
def fetch(names: Positional[tuple[str, ...]]) -> None:
    """Fetch models or data sets of the zoo into the cache (SERPETTE_CACHE, or ~/.cache/serpette).

    Example: serpette fetch vit-s fashion-mnist

    Args:
        names: Names from `serpette list models` or `serpette list datasets`.
    """
    from . import zoo

    if not names:
        raise ValueError(
            "name what to fetch, e.g. `serpette fetch vit-s`; `serpette list models` shows the names"
        )
    for name in names:
        held = zoo.is_cached(name)
        print(f"{name}: {zoo.fetch(name)}{' (was there)' if held else ''}")


@app.command
def score(
    *,
    model: str,
    dataset: str,
    out: Path,
    scorer: UseAppendAction[tuple[str, ...]] = (),
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 64,
    label_column: str | None = None,
    id_column: str | None = None,
    proxy: Literal["probe", "finetune", "model"] = "probe",
    task: Literal["classification", "regression", "causal-lm"] | None = None,
    max_length: int | None = None,
    rank: int = 8,
    target: str | None = None,
    target_split: str = "train",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Score each example of a data set, into OUT/scores.parquet. Higher = harder, or picked sooner.

    Example: serpette score --model vit-s --dataset fashion-mnist --limit 1000 --scorer dlc --out scores

    Args:
        model: The pre-trained model: a zoo name, a hub id or a local folder.
        dataset: The examples: a zoo name, a hub id, an image folder, or a parquet, CSV or JSONL file.
        out: Folder of the scores; a stopped command goes on there.
        scorer: A score to compute; give it again for another one. Default: dlc. One pass serves all.
        split: Split of the data set.
        limit: At most so many examples, drawn with the seed; None: all of them.
        batch_size: Examples a forward pass; changes speed and memory, never a score.
        label_column: Column of the labels. Default: found by its name (label, labels, target, rating, class).
        id_column: Column of unique ids. Default: `id`; without one an id is the number of the row.
        proxy: Whose logits the scores see that need training: a linear probe on the features, a short
            fine-tuning, or the model itself.
        task: What the model learns. Default: by the label column; without one, the responses of instructions,
            chats or text, if the model is a causal language model.
        max_length: Tokens a text is cut to. Default: 128, and 1024 for a causal language model.
        rank: Of the LoRA that tsa, tsa_joint and less read: a fresh one on all linear layers but the head,
            which they warm up. The other scores are those of the model without it.
        target: What the examples are to be like, for less: a data set, named as `dataset`. Not the test set.
        target_split: Split of that data set.
        device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.
        seed: Of the draw and of the scores that have a random part.
    """
    _at_least("limit", limit, 1)
    _at_least("batch_size", batch_size, 1)
    _at_least("max_length", max_length, 1)
    _at_least("rank", rank, 1)
    if "less" in scorer and target is None:
        raise ValueError("scorer 'less' needs --target: a data set that the examples are to be like")
    from . import scoring
    from .opening import opened
    from .scorers import registry

    toward = {"less": {"target": target, "target_split": target_split}}
    methods = [registry.make(name, **toward.get(name, {})) for name in scorer or ("dlc",)]
    job = opened(
        model, dataset, split=split, limit=limit, label_column=label_column, id_column=id_column, task=task,
        device=device, seed=seed,
    )  # fmt: skip
    scoring.score(
        job.model,
        job.dataset,
        methods,
        lora={"rank": rank, "alpha": 2 * rank},
        processing_class=job.processor,
        label_column=label_column,
        id_column=id_column,
        task=job.task,
        proxy=proxy,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        out=out,
    )
    print(out / "scores.parquet")


@app.command
def select(
    *,
    scores: Path,
    selector: str,
    keep: float,
    out: Path,
    scorer: str | None = None,
    per_class: bool = True,
    seed: int = 0,
) -> None:
    """Choose the examples that stay and write their ids, and how they were chosen to OUT's .result.json.

    Example: serpette select --scores scores --scorer dlc --selector flex_rand --keep 0.3 --out kept.txt

    Args:
        scores: Folder that `serpette score` wrote.
        selector: How to choose: a name from `serpette list selectors`.
        keep: Share of the examples that stay, in (0, 1]; the total is met exactly.
        out: File for the ids: .txt holds one a line; .json and .parquet work too.
        scorer: Which score to select by; needed where the folder holds several.
        per_class: Keep the same share of each class, or (--no-per-class) choose among all together.
        seed: Of the random part of a selector.
    """
    from .cost import versions
    from .data import pruner
    from .data.scores import Scores, config_of
    from .files import write_atomic, write_json

    if out.suffix not in (".txt", ".json", ".parquet"):
        raise ValueError(f"out={str(out)!r} must end in .txt, .json or .parquet")
    held = Scores.load(scores)
    chosen = pruner.select(
        held, selector, keep, scorer=scorer, per_class=None if per_class else False, seed=seed
    )
    ids = chosen.ids.tolist()
    if out.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"id": pyarrow.array(ids, pyarrow.string())}), buffer)
        write_atomic(out, buffer.getvalue().to_pybytes())
    else:
        text = json.dumps(ids, ensure_ascii=False) if out.suffix == ".json" else "\n".join(ids)
        write_atomic(out, text + "\n")
    write_json(
        out.with_suffix(".result.json"),
        {
            "kind": "selection",
            "scores": str(scores),
            "scorer": held.of(scorer)[0],
            "selector": config_of(chosen.selector),
            "searched": chosen.searched,
            "keep": keep,
            "per_class": per_class,
            "examples": len(ids),
            "seconds": chosen.seconds,
            "seed": seed,
            "versions": versions(),
        },
    )
    print(f"{len(ids)} ids in {out}")


@app.command
def run(recipe: Positional[Path]) -> None:
    """Run a whole job from a recipe: score, select, tune each arm, compare, and write a report.

    Example: serpette run recipes/demo.yaml --tune.epochs 3 --seed 1

    Every key of the recipe can be overridden after its name; `serpette run RECIPE.yaml --help` shows them.

    Args:
        recipe: The recipe, a YAML file.
    """
    _run(recipe, [])


def _run(path: Path, overrides: list[str]) -> None:
    from . import recipe as recipes

    loaded = recipes.load(path)
    prog = f"serpette run {path}"
    job = tyro.cli(
        recipes.Recipe, default=loaded, args=overrides, prog=prog, description=recipes.Recipe.__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    recipes.check(job, str(path))
    from . import pipeline

    print(pipeline.run(job))


app.command(cli_advise.advise)
for command in (cli_reports.report, cli_reports.compare):
    app.command(command)
for command in (cli_tuning.prune, cli_tuning.shrink, cli_tuning.memory):
    app.command(command)


@app.command
def bench(
    name: Positional[str] = "",
    show: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Run one of the benchmarks of the repository; it goes on where it stopped.

    Example: serpette bench dlc_speed

    Whatever follows the name goes to the benchmark.

    Args:
        name: A folder in benchmarks/.
        show: List the names, one a line.
    """
    _bench(name, [], show or not name)


def _bench(name: str, args: list[str], show: bool) -> None:
    from .registry import near

    roots = [Path.cwd(), Path(__file__).resolve().parents[2]]
    found = [file for root in roots for file in sorted(root.glob("benchmarks/*/bench.py"))]
    files: dict[str, Path] = {}
    for file in found:
        files.setdefault(file.parent.name, file)  # that of the current folder wins
    if not files:
        raise ValueError("no benchmarks/*/bench.py here; run this inside a clone of the repository")
    if show:
        print("\n".join(sorted(files)))
        return
    if name not in files:
        raise ValueError(f"unknown benchmark {name!r}{near(name, files)}")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", files[name])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(files[name].parent))  # a benchmark may be of several files
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(files[name].parent, args)


@app.command
def doctor(
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Versions, devices, extras, the zoo and its cache: what is there, and how to get what is not.

    Example: serpette doctor

    Args:
        as_json: A JSON list of objects in place of the table.
    """
    from . import doctor as doctors

    return doctors.main(as_json)


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code; `args` defaults to those of the process."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        if args[:1] == ["--version"]:
            from .doctor import version_of

            print(f"serpette {version_of('serpette') or '(not installed: run from its source)'}")
            return 0
        if args[:1] == ["run"] and len(args) > 1 and not args[1].startswith("-"):
            _run(Path(args[1]), args[2:])
            return 0
        if args[:1] == ["bench"] and len(args) > 2 and not args[1].startswith("-"):
            _bench(args[1], args[2:], args[2:] == ["--list"])
            return 0
        return (
            app.cli(prog="serpette", description=DESCRIPTION, args=args, config=(tyro.conf.OmitArgPrefixes,))
            or 0
        )
    except KeyboardInterrupt:
        print("\nStopped. What was computed is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `serpette list scorers | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = _for_users(error)
        if debug or line is None:
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text(line, style="red"))
        return 2


def _for_users(error: Exception) -> str | None:
    """One line for an error that its message explains; None for a bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        folder = Path(error.filename).parent if isinstance(error.filename, str) else Path.cwd()
        return (
            f"The disk is full: {folder}. Make room and give the same command again: what was done is kept."
        )
    if isinstance(
        error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    ):
        return text or type(error).__name__
    ours = type(error).__module__.startswith("serpette.") and isinstance(error, RuntimeError)  # ZooError
    return text if ours else None


def _about(thing: Any) -> str:
    """One line about an entry of the zoo, or about a method: the first of its docstring or its module's."""
    if description := getattr(thing, "description", None):
        return str(description)
    doc = inspect.getdoc(thing) if "__doc__" in vars(thing) and thing.__doc__ else None
    return (doc or inspect.getdoc(inspect.getmodule(thing)) or "").strip().split("\n")[0]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


if __name__ == "__main__":
    sys.exit(main())
