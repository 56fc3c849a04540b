"""Whole attention heads and channels: their importance, and how many of each group stay.

    importance of unit k = sum of the importances of all weights in its rows and columns

Ma et al. 2023, "LLM-Pruner", arXiv 2305.11627, Section 3.2 (summation); the structured form of LoRAPrune (its
later version) sums likewise. Being a sum, it is averaged over the steps unit by unit, which needs no tensor
of the size of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..types import LayerStats
from .groups import Group, Member, find_groups
from .layers import PrunedLayer, plain_name
from .patterns import count_of, lowest
from .shrink import possible_units, slice_


class Units:
    """The units of the `groups` of a model, and which of them are left.

    Args:
        groups: of `find_groups`.
        layers: the model's layers by their plain name, of those that the groups name.
        round_to: channels that stay are a multiple of it; one head at least stays. In the scope `"layer"`
            both are also a number that the model's configuration can say.
        scope: `"layer"`: as many units go in each group, so that groups of one size keep one size;
            `"global"`: the least important of all groups of a kind go first.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        layers: Mapping[str, PrunedLayer],
        round_to: int = 8,
        scope: str = "layer",
    ):
        self.groups, self.layers, self.scope = list(groups), layers, scope
        self.cut = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}
        self._whole = list(groups)  # as they were before any unit left the model
        self._shapes = {name: layer.shape for name, layer in layers.items()}
        self._left = {g.name: torch.arange(g.units) for g in groups}
        self._possible = {g.name: possible_units(model, g, round_to, scope == "global") for g in groups}

    def sums(self, importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(units,) float64 of each group: the `importances` (O, I) of its members' weights, of those given.

        Raises:
            ValueError: no member of a group has an importance.
        """
        sums = {}
        for group in self.groups:
            named = [(plain_name(member.module), member) for member in group.members]
            parts = [
                lines(m, self.layers[name], importances[name]) for name, m in named if name in importances
            ]
            if not parts:
                raise ValueError(
                    f"no layer of {group.name!r} has the gradients by which it would be pruned; put LoRA on "
                    "one of its layers, or exclude them"
                )
            sums[group.name] = torch.stack(parts).sum(0)
        return sums

    def choose(self, sums: Mapping[str, Tensor], sparsity: float) -> bool:
        """Marks the units that go at `sparsity`, those of the lowest sums; True if there are new ones.

        What was cut before stays so. Of the units that there were at first the share that stays is rounded
        up.
        """
        before = sum(int(cut.sum()) for cut in self.cut.values())
        ready = {n: v.masked_fill(self.cut[n], -torch.inf).float() for n, v in sums.items()}
        for alike in _alike(self.groups, self.scope):
            whole = sum(len(self._left[g.name]) for g in alike), sum(self._units(g) for g in alike)
            count = max(0, count_of(sparsity, whole[1]) - (whole[1] - whole[0]))
            for group, going in zip(alike, lowest([ready[g.name] for g in alike], count), strict=True):
                wanted = group.units - int(going.sum())
                kept = next(n for n in (*self._possible[group.name], group.units) if n >= wanted)
                self.cut[group.name] |= lowest([ready[group.name]], group.units - kept)[0]
        return sum(int(cut.sum()) for cut in self.cut.values()) > before

    def _units(self, group: Group) -> int:
        return next(g.units for g in self._whole if g.name == group.name)

    def apply(self) -> None:
        """Removes the marked units from the layers."""
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        for name, sides in self._lines(self.groups, self.cut, shapes).items():
            layer = self.layers[name]
            layer.remove_lines(*(None if side is None else side.to(layer.device) for side in sides))

    def _lines(
        self, groups: Sequence[Group], cut: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, list[Tensor | None]]:
        """{layer: [rows (O,) or None, columns (I,) or None]}, True where a unit is cut."""
        found: dict[str, list[Tensor | None]] = {}
        for group in groups:
            for member in group.members:
                name = plain_name(member.module)
                if name not in self.layers:
                    continue  # a norm: its channels are cut where they are read
                side, patch = int(member.side == "columns"), 1
                if side:
                    patch = self.layers[name].patch
                mask = found.setdefault(name, [None, None])[side]
                if mask is None:
                    mask = found[name][side] = torch.zeros(shapes[name][side], dtype=torch.bool)
                index = member.index[cut[group.name]].flatten()
                mask[(index[:, None] * patch + torch.arange(patch)).flatten()] = True
        return found

    def leave(self, model: nn.Module, targets: Any, optimizer: Any) -> dict[str, Tensor]:
        """Takes the marked units out of the `model`; {group: (units,) bool, what stayed of what it had}."""
        kept = {name: ~cut for name, cut in self.cut.items()}
        slice_(model, self.groups, kept, optimizer)
        for name, keep in kept.items():
            self._left[name] = self._left[name][keep]
        self.groups = [g for g in find_groups(model, targets) if g.name in kept]
        self.cut = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in self.groups}
        for layer in self.layers.values():
            layer.forget_cut()
        return kept

    def masks(self) -> dict[str, Tensor]:
        """{layer: (O, I) bool, True where a weight stays}, in the shapes that the layers had at first."""
        cut = {}
        for group in self._whole:
            cut[group.name] = torch.ones(group.units, dtype=torch.bool)
            cut[group.name][self._left[group.name][~self.cut[group.name]]] = False
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}
        for name, (rows, columns) in self._lines(self._whole, cut, self._shapes).items():
            if rows is not None:
                masks[name][rows] = False
            if columns is not None:
                masks[name][:, columns] = False
        return masks


class Importances(Mapping[str, Tensor]):
    """Importances of layers, each made when it is asked for."""

    def __init__(self, make: Callable[[LayerStats], Tensor], stats: dict[str, LayerStats]):
        self._make, self._stats = make, stats

    def __getitem__(self, name: str) -> Tensor:
        return self._make(self._stats[name])

    def __contains__(self, name: object) -> bool:
        return name in self._stats

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)


def lines(member: Member, layer: PrunedLayer, importance: Tensor) -> Tensor:
    """(units,) float64: the sum of `importance` (O, I) over the rows or columns of each unit."""
    if member.side == "rows":
        sums = importance.sum(1, dtype=torch.float64)
    else:
        sums = importance.sum(0, dtype=torch.float64).view(-1, layer.patch).sum(1)
    return sums.cpu()[member.index].sum(1)


def _alike(groups: Sequence[Group], scope: str) -> list[list[Group]]:
    """Groups that are ranked together: of one kind, or in the scope `"layer"` each alone."""
    if scope == "layer":
        return [[group] for group in groups]
    kinds = dict.fromkeys(group.kind for group in groups)
    return [[g for g in groups if g.kind == kind] for kind in kinds]
