"""Which weights are cut, given the importance of each and a sparsity: anywhere, or m - n of each m inputs.

Letters: O outputs, I inputs of a layer, k weights to cut. A cut is a bool tensor, True where removed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..registry import near

Scope = Literal["layer", "global", "row"]
HALF = 1 << 16  # a float32 is selected by its upper, then by its lower 16 bits
CHUNK = 1 << 18  # values at a time on a CPU: three times as fast as 10 M at once, which leave its caches
LARGEST = torch.finfo(torch.float32).max


class Pattern(Protocol):
    """Chooses cuts. `check` says before the training whether `sparsity` can be reached with these shapes."""

    def check(self, sparsity: float, shapes: Mapping[str, Sequence[int]]) -> None: ...

    def __call__(
        self, importances: Mapping[str, Tensor], cut: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, Tensor]: ...


def count_of(sparsity: float, size: int) -> int:
    """How many of `size` weights a sparsity means, halves rounded up.

    >>> count_of(0.5, 3), count_of(0.145, 100)
    (2, 15)
    """
    return math.floor(Fraction(str(float(sparsity))) * size + Fraction(1, 2))


def lowest(values: Sequence[Tensor], k: int, names: Sequence[str] | None = None) -> list[Tensor]:
    """Where the k lowest of all the values lie, over all the tensors together; of equal ones the first.

    Exact, without sorting and without joining the tensors: two histograms over the upper and the lower half
    of the float32 bits give the k-th lowest value; of one tensor on the CPU numpy's quickselect. Values are
    compared as float32; -0.0 equals 0.0.

    Args:
        values: tensors of any shapes, without NaN; read three times.
        k: how many, from 0 to the number of values.
        names: of the tensors, for the error.

    Returns:
        Bool tensors of the same shapes, True at exactly k places.

    Raises:
        ValueError: when a value is NaN, or k is out of its limits.

    >>> lowest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 2)
    [tensor([False,  True]), tensor([ True, False])]
    """
    total = sum(v.numel() for v in values)
    if not 0 <= k <= total:
        raise ValueError(f"k={k} must be in [0, {total}], the number of values")
    for position, value in enumerate(values):
        _refuse_nan(value, names[position] if names else f"values[{position}]")
    if k == 0:
        return [torch.zeros_like(v, dtype=torch.bool) for v in values]
    if total == values[0].numel() and values[0].device.type == "cpu":  # several times faster there
        threshold = float(np.partition(values[0].detach().float().flatten().numpy(), k - 1)[k - 1])
    else:
        threshold = _kth_lowest(values, k)
    cuts = [(value.float() < threshold).contiguous() for value in values]
    missing = k - sum(int(cut.sum()) for cut in cuts)
    for cut, value in zip(cuts, values, strict=True):
        if missing:
            tied = (value.float() == threshold).flatten().nonzero()[:missing, 0]
            cut.view(-1)[tied] = True
            missing -= len(tied)
    return cuts


def _kth_lowest(values: Sequence[Tensor], k: int) -> float:
    """By two histograms, over the upper and the lower half of the bits."""
    upper = torch.zeros(HALF, dtype=torch.long)
    for value in values:
        for part in _parts(value):
            upper += torch.bincount((_ordered_bits(part) >> 16) + HALF // 2, minlength=HALF).cpu()
    bin, rank = _bin_of(upper, k)
    base = (bin - HALF // 2) << 16
    smallest = _float_of(base)
    largest = _float_of(-2 if base == -HALF else base | (HALF - 1))  # -1 means -0.0, which counts as 0.0
    lower = torch.zeros(HALF, dtype=torch.long)
    for value in values:
        for part in _parts(value):
            inside = part[(part >= smallest) & (part <= largest)]
            lower += torch.bincount(_ordered_bits(inside) & (HALF - 1), minlength=HALF).cpu()
    bin, _ = _bin_of(lower, rank)
    return _float_of(base | bin)


def lowest_per_row(values: Tensor, k: int, name: str = "values") -> Tensor:
    """Where the k lowest of (O, I) lie, equally many in each row; what is left over goes to the first rows.

    >>> lowest_per_row(torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]]), 3)
    tensor([[False,  True,  True],
            [False, False,  True]])
    """
    rows = len(values)
    _refuse_nan(values, name)
    if not 0 <= k <= values.numel():
        raise ValueError(f"k={k} must be in [0, {values.numel()}], the number of values")
    cut = torch.zeros_like(values, dtype=torch.bool)
    each, more = divmod(k, rows)
    for part, count in ((slice(0, more), each + 1), (slice(more, rows), each)):
        block = values[part].float()
        if count and len(block):
            threshold = block.kthvalue(count, dim=1, keepdim=True).values
            below, tied = block < threshold, block == threshold
            missing = count - below.sum(1, keepdim=True)
            cut[part] = below | (tied & (tied.cumsum(1) <= missing))
    return cut


class Unstructured:
    """Any weights, the least important first.

    Args:
        scope: the sparsity holds in each `"layer"`, in each `"row"` (Wanda's comparison group), or
            `"global"`ly over all of them together; then the layers' importances must be comparable.

    Example:
        >>> importance = {"fc": torch.tensor([[4.0, 3.0], [2.0, 1.0]])}
        >>> Unstructured()(importance, {}, sparsity=0.25)["fc"]
        tensor([[False, False],
                [False,  True]])
    """

    def __init__(self, scope: Scope = "layer"):
        self.scope: Scope = _known_scope(scope, ("layer", "global", "row"))

    def check(self, sparsity: float, shapes: Mapping[str, Sequence[int]]) -> None:
        """ValueError for a sparsity outside [0, 1)."""
        _check_sparsity(sparsity)

    def __call__(
        self, importances: Mapping[str, Tensor], cut: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, Tensor]:
        """Cuts of each layer; they contain the old ones, even where these are more than `sparsity` asks for.

        Args:
            importances: (O, I) of each layer, high = keep; what stands at cut weights does not matter.
            cut: earlier cuts, bool (O, I) of each layer; a layer that is not in it has none.
            sparsity: share of the weights to be cut in all, in [0, 1); counts are rounded half up.

        Raises:
            ValueError: when an importance is NaN, or the sparsity is out of its limits.
        """
        _check_sparsity(sparsity)
        ready = _Ready(importances, cut)
        return _cut(ready, {n: v.numel() for n, v in importances.items()}, cut, sparsity, self.scope)


class NM:
    """At most n of each m consecutive inputs stay, as sparse tensor cores need it (2:4).

    Below the final sparsity 1 - n/m, the weights that are cut come from the m - n least important of each
    group, the least important over the layer first.

    Args:
        n, m: 0 < n < m.
        scope: where the order over the groups is taken on the way, `"layer"` or `"global"`; the end is the
            same.

    Example:
        >>> NM(2, 4)({"fc": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}, {}, sparsity=0.5)["fc"]
        tensor([[False, False,  True,  True]])
    """

    def __init__(self, n: int, m: int, scope: Scope = "layer"):
        if not 0 < n < m:
            raise ValueError(f"pattern {n}:{m} must have 0 < n < m: n of each m weights stay, as in '2:4'")
        self.n, self.m = n, m
        self.scope: Scope = _known_scope(scope, ("layer", "global"))

    def check(self, sparsity: float, shapes: Mapping[str, Sequence[int]]) -> None:
        """ValueError when the final sparsity is not 1 - n/m, or m does not divide a layer's inputs."""
        final = 1 - self.n / self.m
        if not math.isclose(sparsity, final, abs_tol=1e-6):
            raise ValueError(f"sparsity={sparsity} must be {final:g} for the pattern {self.n}:{self.m}")
        for name, shape in shapes.items():
            self._check_shape(name, shape)

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        if shape[1] % self.m:
            raise ValueError(
                f"layer {name!r} has {shape[1]} inputs, which {self.m} does not divide, as the pattern "
                f"{self.n}:{self.m} needs; exclude the layer or use pattern='unstructured'"
            )

    def __call__(
        self, importances: Mapping[str, Tensor], cut: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, Tensor]:
        """As `Unstructured`, with at most m - n cuts in each group.

        Raises:
            ValueError: also when `sparsity` is above 1 - n/m, m does not divide a layer's inputs, or the old
                cuts break the pattern.
        """
        _check_sparsity(sparsity)
        final = 1 - self.n / self.m
        if sparsity > final + 1e-6:
            raise ValueError(
                f"sparsity={sparsity} must be at most {final:g}, which the pattern {self.n}:{self.m} ends at"
            )
        ready = _Ready(importances, cut)
        for name, value in zip(importances, ready, strict=True):
            self._check_shape(name, value.shape)
            _refuse_nan(value, name)
            if name in cut and int(cut[name].view(-1, self.m).sum(1).max()) > self.m - self.n:
                raise ValueError(
                    f"layer {name!r} has groups of {self.m} with more than {self.m - self.n} cuts already; "
                    f"the pattern {self.n}:{self.m} cannot go on from another one"
                )
            ready.spared[name] = self._rank_in_group(value) >= self.m - self.n
        return _cut(ready, {n: v.numel() for n, v in importances.items()}, cut, sparsity, self.scope)

    def _rank_in_group(self, value: Tensor) -> Tensor:
        ranks = []
        for part in value.reshape(-1, self.m).split(CHUNK):
            groups = part.t().contiguous()  # (m, G): m vectors to compare in pairs
            rank = torch.zeros(groups.shape, dtype=torch.uint8, device=value.device)
            for i in range(self.m):
                for j in range(i + 1, self.m):
                    later_first = groups[j] < groups[i]  # of equal ones the lower index comes first
                    rank[i] += later_first
                    rank[j] += ~later_first
            ranks.append(rank.t())
        return torch.cat(ranks).view(value.shape)


def pattern_of(name: str, scope: Scope = "layer") -> Unstructured | NM:
    """`"unstructured"` or any `"n:m"`; ValueError with near names for an unknown one.

    >>> pattern_of("2:4").m
    4
    """
    if name == "unstructured":
        return Unstructured(scope)
    if n_m := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(n_m[1]), int(n_m[2]), scope)
    raise ValueError(f"unknown pattern {name!r}{near(name, ['unstructured', 'structured', '2:4', '4:8'])}")


class _Ready(Sequence[Tensor]):
    """Importances as they are compared, made one at a time: cut weights are lowest, spared ones highest."""

    def __init__(self, importances: Mapping[str, Tensor], cut: Mapping[str, Tensor]):
        self.names, self.importances, self.cut = list(importances), importances, cut
        self.spared: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position):
        name = self.names[position]
        value = self.importances[name].float().clamp(-LARGEST, LARGEST)
        if name in self.spared:
            value.masked_fill_(self.spared[name], math.inf)
        if name in self.cut:
            value.masked_fill_(self.cut[name], -math.inf)
        return value

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))


def _cut(
    ready: _Ready, sizes: Mapping[str, int], cut: Mapping[str, Tensor], sparsity: float, scope: Scope
) -> dict[str, Tensor]:
    names = ready.names
    if scope == "global":
        found = lowest(ready, count_of(sparsity, sum(sizes.values())), names)
    elif scope == "layer":
        found = [lowest([v], count_of(sparsity, sizes[n]), [n])[0] for n, v in zip(names, ready, strict=True)]
    else:
        found = [
            lowest_per_row(v, count_of(sparsity, sizes[n]), n) for n, v in zip(names, ready, strict=True)
        ]
    return {n: f | cut[n] if n in cut else f for n, f in zip(names, found, strict=True)}


def _parts(value: Tensor) -> Iterator[Tensor]:
    flat = value.flatten()
    return (part.float() for part in (flat.split(CHUNK) if flat.device.type == "cpu" else [flat]))


def _ordered_bits(value: Tensor) -> Tensor:
    """int32 in the same order as the float32 values (N,)."""
    bits = (value + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a negative float is the larger the smaller its bits


def _float_of(ordered: int) -> float:
    bits = ordered if ordered >= 0 else ordered ^ 0x7FFFFFFF
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()
    # bits beyond infinity are those of NaN: a bin that begins or ends there begins or ends at infinity
    return value if not math.isnan(value) else math.copysign(math.inf, ordered)


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th lowest (from 1), and its rank inside that bin."""
    running = histogram.cumsum(0)
    bin = int(torch.searchsorted(running, k))
    return bin, k - (int(running[bin - 1]) if bin else 0)


def _refuse_nan(value: Tensor, name: str) -> None:
    if value.numel() and bool(value.min().isnan()):
        raise ValueError(
            f"the importance of layer {name!r} has NaN; look for a loss or a gradient that is not finite: "
            "lower the learning rate, or train in bfloat16 instead of float16"
        )


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1): it is the share of the weights to be cut")


def _known_scope(scope: Scope, known: Sequence[str]) -> Scope:
    if scope not in known:
        raise ValueError(f"unknown scope {scope!r}{near(scope, known)}")
    return scope
