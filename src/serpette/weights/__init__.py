"""Pruning the weights while LoRA tunes them (`Pruner`) or at once (`prune`); the smaller model (`shrink`)."""

from .config import PruneConfig
from .groups import Group, find_groups
from .load import load, save_shrunk
from .oneshot import prune
from .pruner import Pruner, attach
from .sequential import sequential, to_parallel
from .shrink import shrink
from .state import restore

__all__ = [
    "Group", "PruneConfig", "Pruner", "attach", "find_groups", "load", "prune", "restore", "save_shrunk",
    "sequential", "shrink", "to_parallel",
]  # fmt: skip
