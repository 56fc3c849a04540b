"""Imports point one way: types <- {scorers, importance} <- {data, rows, weights} <- pipeline <- cli.

Read from the source, so that an import inside a function counts as well.
"""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "serpette"

GROUND = {"types", "registry", "files", "masking", "prototypes", "lora_gradients"}
GROUND |= {"kfac", "greedy", "tracing"}
# What each room may import of the house; a room that is not in the plan fails below.
PLAN = {
    "types": set(),
    "registry": set(),
    "files": set(),
    "masking": {"types"},
    "prototypes": {"types"},
    "lora_gradients": set(),
    "kfac": set(),
    "greedy": set(),
    "tracing": set(),
    "scorers": GROUND,
    "importance": GROUND,
    "cost": GROUND,
    "evaluate": GROUND,
    "tuning": GROUND | {"rows"},
    "report": GROUND | {"cost", "evaluate"},
    "zoo": GROUND,
    "data": GROUND | {"scorers", "zoo", "cost", "evaluate", "tuning"},
    "rows": GROUND | {"importance", "cost"},
    "memory": GROUND | {"importance", "rows", "cost", "tuning"},
    "weights": GROUND | {"importance", "cost"},
    "recipe": {"registry", "scorers", "data", "importance", "weights"},  # it checks the names of methods
    "scoring": GROUND | {"data", "tuning"},
    "arms": GROUND | {"data", "evaluate"},
    "opening": GROUND | {"data"},
    "comparing": GROUND | {"cost", "evaluate", "report"},
    "doctor": {"zoo"},
}
PLAN["pipeline"] = set(PLAN) - {"doctor"}
PLAN["adviser"] = set(PLAN) - {"doctor"}
COMMANDS = {"cli", "cli_advise", "cli_reports", "cli_tuning"}
for room in COMMANDS - {"cli"}:
    PLAN[room] = set(PLAN) - COMMANDS - {"doctor"}
PLAN["cli"] = set(PLAN)
PLAN["__init__"] = set(PLAN) - COMMANDS - {"doctor"}

METHOD_ROOMS = ("scorers", "importance", "data.selectors")
METHOD_TOP = {"torch", "numpy"} | set(sys.stdlib_module_names)
METHOD_LAZY = {"sklearn", "scipy", "threadpoolctl"}


def modules():
    """Dotted name inside serpette -> (tree, is a package) of every file."""
    found = {}
    for file in sorted(SRC.rglob("*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        is_package = len(parts) > 1 and parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = (ast.parse(file.read_text(encoding="utf-8")), is_package)
    return found


def imports(name, tree, is_package, *, top_only=False):
    """(dotted name inside serpette | None, top package outside | None) of each import of a module."""
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _split(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            base, outside = _split(node.module)
            yield from (
                [(f"{base}.{a.name}".lstrip("."), None) for a in node.names]
                if base is not None
                else [(None, outside)]
            )
        elif isinstance(node, ast.ImportFrom):
            here = ["serpette", *([] if name == "__init__" else name.split("."))]
            up = node.level - (is_package or name == "__init__")
            base = here[1 : len(here) - up] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join([*base, alias.name]), None


def _split(dotted):
    first, _, rest = dotted.partition(".")
    return (rest, None) if first == "serpette" else (None, first)


def faults_of_rooms(found):
    for name, (tree, is_package) in found.items():
        room = name.split(".")[0]
        if room not in PLAN:
            yield f"{name}: the room {room!r} is not in the plan"
            continue
        for inside, _ in imports(name, tree, is_package):
            other = inside.split(".")[0] if inside else None
            if other in PLAN and other != room and other not in PLAN[room]:
                yield f"{name} imports {inside}"


def faults_of_methods(found):
    for room in METHOD_ROOMS:
        names = [n for n in found if n.rpartition(".")[0] == room]
        for name in names:
            tree, is_package = found[name]
            for inside, outside in imports(name, tree, is_package):
                if outside and outside not in METHOD_TOP | METHOD_LAZY:
                    yield f"{name} imports {outside}"
                if inside is not None and inside.split(".")[0] not in GROUND - {"registry"}:
                    yield f"{name} imports serpette.{inside}"
            for _, outside in imports(name, tree, is_package, top_only=True):
                if outside in METHOD_LAZY:
                    yield f"{name} imports {outside} at its top, not inside the function that needs it"


def test_imports_point_one_way():
    assert list(faults_of_rooms(modules())) == []


def test_method_files_stand_alone():
    assert list(faults_of_methods(modules())) == []


def test_there_is_something_to_read():
    found = modules()
    assert {"types", "registry", "cli", "scorers", "scorers.dlc", "data.selectors"} <= set(found)
    assert found["scorers"][1] and not found["scorers.dlc"][1]


@pytest.mark.parametrize(
    "name, source",
    [
        ("scorers.x", "from .dlc import DLC"),
        ("scorers.x", "from . import dlc"),
        ("scorers.x", "from ..data import observe"),
        ("scorers.x", "import serpette.data.observe"),
        ("scorers.x", "from serpette import zoo"),
        ("scorers.x", "def f():\n    import transformers"),
        ("scorers.x", "import sklearn.cluster"),
        ("data.selectors.x", "from .flex_rand import FlexRand"),
        ("data.selectors.x", "from ..observe import observe"),
        ("data.x", "from ..pipeline import run"),
        ("data.x", "from .. import rows"),
        ("rows.x", "from ..weights import pruner"),
        ("zoo.x", "from ..data import observe"),
        ("attic", "import torch"),
    ],
)
def test_each_wrong_import_is_found(name, source):
    found = {name: (ast.parse(source), False)}
    assert [*faults_of_rooms(found), *faults_of_methods(found)]


@pytest.mark.parametrize(
    "name, source",
    [
        ("scorers.x", "import torch\nfrom ..types import Signals\ndef f():\n    from sklearn import cluster"),
        ("data.selectors.x", "from ...types import uniform_of\nimport math"),
        ("data.x", "from ..scorers import registry\nfrom .store import ChunkStore"),
        ("pipeline", "from .data import pruner\nfrom . import report"),
    ],
)
def test_each_right_import_passes(name, source):
    found = {name: (ast.parse(source), False)}
    assert [*faults_of_rooms(found), *faults_of_methods(found)] == []
