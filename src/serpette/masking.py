r"""A learning path made of masked copies of one model, without copying the model.

    M_r(W) = [ |W| >= tau_r ],   tau_r = element floor(r n m), counted from 0, of the sorted |W|

Jiang et al. 2025 (DLC), appendix B. Masks are nested, so one uint8 level per weight describes the
whole path: the number of points that keep it. Untouched: biases, norms, embeddings, the patch
embedding, the head, LoRA factors. BatchNorm statistics are not recalibrated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from hashlib import blake2b
from math import floor

import numpy as np
import torch
from torch import Tensor, nn

from .types import PathSpec

# The share of weights of each matrix that is masked. Neighbours such as 0 and 2 % agree at once and
# would stop an adaptive path too early, so the points come in a low-discrepancy order (base 2).
LOW_DISCREPANCY = tuple(
    Fraction(*p) for p in [(0, 1), (1, 2), (1, 4), (3, 4), (1, 8), (5, 8), (3, 8), (7, 8), (1, 16), (9, 16)]
)


def maskable(model: nn.Module, head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Weight matrices on the learning path, by module name; a weight that is tied appears once."""
    head_modules = set(head.modules()) if head is not None else set()
    weights: dict[str, nn.Parameter] = {}
    seen = set()
    for name, module in model.named_modules():
        # transformers' Conv1D is a Linear stored transposed; it is not an nn.Linear
        is_matrix = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"
        if not is_matrix or module in head_modules or "lora_" in name or _is_patch_embedding(module):
            continue
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or id(weight) in seen:
            continue
        seen.add(id(weight))
        weights[name] = weight
    return weights


def _is_patch_embedding(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.kernel_size[0] > 1
        and module.in_channels <= 4  # it reads pixels, not features
    )


class MaskedPath:
    """The models of `spec.points`, one at a time: inside `at(p)` the weights of `model` are masked.

    Costs one byte a weight for the levels, and one copy of the masked matrices while inside `at`.

    Raises:
        ValueError: if the model has no weight matrix to mask.
    """

    def __init__(self, model: nn.Module, spec: PathSpec, head: nn.Module | None = None):
        self.points = spec.points
        self._ascending = sorted(set(spec.points))
        weights = maskable(model, head)
        if not weights:
            raise ValueError(
                f"{type(model).__name__} has no floating-point Linear or Conv weight to mask but its head; "
                "a learning path needs a model with hidden layers: choose a scorer that needs no path"
            )
        magnitudes = {name: _magnitude(name, w, spec) for name, w in weights.items()}
        if spec.scope == "global":
            shared = _thresholds(torch.cat([m.flatten() for m in magnitudes.values()]), self._ascending)
        self._levels: list[tuple[nn.Parameter, Tensor]] = []
        for name, weight in weights.items():
            taus = shared if spec.scope == "global" else _thresholds(magnitudes[name], self._ascending)
            magnitude = magnitudes.pop(name)
            level = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
            for tau in taus:
                level += magnitude >= tau  # w is kept at the ascending points 0 .. level-1
            self._levels.append((weight, level))

    @contextmanager
    def at(self, point: int) -> Iterator[None]:
        """The model with point `point` of the path in place; the weights come back on the way out."""
        share = self.points[point]
        if share == 0:
            yield
            return
        rank = self._ascending.index(share)
        originals = [weight.data for weight, _ in self._levels]
        try:
            for weight, level in self._levels:
                # 0 or 1 in the weight's dtype, then times it in place: thrice as fast as w * (level > rank)
                weight.data = torch.gt(level, rank, out=torch.empty_like(weight.data)).mul_(weight.data)
            yield
        finally:
            for (weight, _), original in zip(self._levels, originals, strict=True):
                weight.data = original


def _magnitude(name: str, weight: Tensor, spec: PathSpec) -> Tensor:
    if spec.principle == "l1":
        return weight.detach().abs().float()
    key = int.from_bytes(blake2b(f"{spec.seed}/{name}".encode(), digest_size=7).digest(), "little")
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(key)).to(weight.device)


def _thresholds(magnitude: Tensor, ascending: list[Fraction]) -> Tensor:
    """tau_r for each r. The product is exact: in floats 0.58 x 100 floors to 57."""
    flat = magnitude.flatten()
    # numpy's sort is several times faster than torch's on the CPU; one serves all points
    ordered = flat.sort().values if flat.is_cuda else torch.from_numpy(np.sort(flat.numpy()))
    return ordered[[floor(flat.numel() * r) for r in ascending]]
