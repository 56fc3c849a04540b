"""Serpette: fine-tuning made cheap by pruning data, trainable rows and weights: score, select, cut."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import scorers, zoo
    from .adviser import advise
    from .data import selectors
    from .data.dynamic import DynamicPruning
    from .data.observe import observe
    from .data.proxy import FineTune, Probe
    from .data.pruner import DataPruner, Selection, score, select
    from .data.scores import Scores
    from .data.while_training import ScoreWhileTraining
    from .pipeline import run
    from .recipe import Recipe
    from .rows import RowConfig, rank_rows, to_lora
    from .types import Scorer, Selector, Signals
    from .weights import PruneConfig, Pruner, attach, prune, shrink

_HOMES = {
    "DataPruner": ".data.pruner",
    "DynamicPruning": ".data.dynamic",
    "FineTune": ".data.proxy",
    "Probe": ".data.proxy",
    "PruneConfig": ".weights",
    "Pruner": ".weights",
    "Recipe": ".recipe",
    "RowConfig": ".rows",
    "ScoreWhileTraining": ".data.while_training",
    "Scorer": ".types",
    "Scores": ".data.scores",
    "Selection": ".data.pruner",
    "Selector": ".types",
    "Signals": ".types",
    "advise": ".adviser",
    "attach": ".weights",
    "observe": ".data.observe",
    "prune": ".weights",
    "rank_rows": ".rows",
    "run": ".pipeline",
    "score": ".data.pruner",
    "scorers": ".scorers",
    "select": ".data.pruner",
    "selectors": ".data.selectors",
    "shrink": ".weights",
    "to_lora": ".rows",
    "zoo": ".zoo",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    # imported on first use: `serpette --help` need not wait for torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name], __name__)
    return module if name in ("scorers", "selectors", "zoo") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
