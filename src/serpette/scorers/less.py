r"""LESS: how far an example's LoRA gradient points towards the task one wants to be good at.

    score(z) = cos( R g(z), mean over targets t of R g(t) / |R g(t)| )

g: gradient of the LoRA factors; R: a random projection that keeps inner products on average. Xia et al. 2024,
"LESS: selecting influential data for targeted instruction tuning", arXiv 2402.04333, section 4.

Differs: the projection works on the long side of each factor by itself (Gaussian, I -> p for A and O -> p for
B), so it costs p (I + O) numbers a layer, not `dim` times all LoRA weights. The plain gradient stands for
Adam's preconditioned one. Several checkpoints are `epochs` of training on all examples, each with the same
weight. One target set; the paper takes the maximum over several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..lora_gradients import LayerGradients, LoraLayer
from ..types import EVERY_TASK, Signals


@dataclass(frozen=True)
class LESSReading:
    """Cosine to the target direction, (N, 1); the options are those of `LESS`."""

    target: Any
    target_split: str = "test"
    target_limit: int | None = 64
    dim: int = 4096
    seed: int = 0
    warmup_steps: int | None = None
    warmup_learning_rate: float = 1e-3
    epochs: int = 1

    def reader(self, layers: Sequence[LoraLayer]) -> LESSReader:
        """A new reader for the layers of a model."""
        return LESSReader(self, layers)


class LESS:
    """Likeness to a target set by LoRA gradients: high = picked sooner (not harder).

    Needs a peft model with a LoRA that trains; costs one forward and one backward pass of each example and of
    each target.

    Args:
        target: what one wants to be good at: the ids of some of the examples, or the name or path of a data
            set (as for `serpette.data.sources.open_dataset`) with the same columns. Not the test set.
        target_split, target_limit: which part of that data set; 64 examples show the direction.
        dim: numbers a gradient is projected to, about; the paper has 8,192.
        seed: of the projection.
        warmup_steps, warmup_learning_rate, epochs: as in `TSA`.

    Raises:
        ValueError: no target, a number out of range.

    Example:
        >>> LESS(target=["17", "23"]).reading.target
        ('17', '23')
    """

    name = "less"
    needs: frozenset[str] = frozenset()
    tasks = EVERY_TASK

    def __init__(
        self,
        target: str | Sequence[str] = (),
        target_split: str = "test",
        target_limit: int | None = 64,
        dim: int = 4096,
        seed: int = 0,
        warmup_steps: int | None = None,
        warmup_learning_rate: float = 1e-3,
        epochs: int = 1,
    ):
        for option, value, fine, limit in (
            ("dim", dim, dim >= 1, "at least 1; 4,096 is usual"),
            ("target_limit", target_limit, target_limit is None or target_limit >= 1, "at least 1, or None"),
            ("warmup_steps", warmup_steps, warmup_steps is None or warmup_steps >= 0, "0 or more, or None"),
            ("warmup_learning_rate", warmup_learning_rate, warmup_learning_rate > 0, "above 0"),
            ("epochs", epochs, epochs >= 1, "at least 1"),
        ):
            if not fine:
                raise ValueError(f"{option}={value!r} must be {limit}")
        self.target, self.target_split, self.target_limit = target, target_split, target_limit
        self.dim, self.seed, self.epochs = dim, seed, epochs
        self.warmup_steps, self.warmup_learning_rate = warmup_steps, warmup_learning_rate
        self.reading = LESSReading(
            target if isinstance(target, str) else tuple(map(str, target)), target_split, target_limit,
            dim, seed, warmup_steps, warmup_learning_rate, epochs,
        )  # fmt: skip

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64 in [-1, 1]; 0 for an example without a gradient."""
        return signals.reading(self.reading, self.name).double().flatten(1)[:, 0]


class LESSReader:
    """Projects the gradients of the targets (stage `"targets"`), then of the examples (`"scores"`)."""

    sample = 0  # no moments are wanted

    def __init__(self, reading: LESSReading, layers: Sequence[LoraLayer]):
        self.reading, self.layers = reading, layers
        self.direction: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._projections: dict[tuple[int, int], Tensor] = {}
        r = sum(2 * len(layer.factors[0]) for layer in layers)
        self.width = max(1, reading.dim // r)  # p

    @property
    def target(self) -> Any:
        """What the targets are, while they are still to be read."""
        if not self.reading.target:
            raise ValueError(
                "target=() must say what the examples are to be like: ids of some of them, or a data set"
            )
        return self.reading.target if self.direction is None else None

    def begin(self, examples: int, device: torch.device, offsets: Tensor, input_of: Sequence[int]) -> None:
        """Announces a batch of n examples."""
        self._parts: dict[int, Tensor] = {}
        self._examples, self._device = examples, device

    def layer(self, seen: LayerGradients) -> None:
        """One layer's gradients of the batch."""
        g_B_nOr, g_A_nrI = seen.factors()
        sketch_B = g_B_nOr.mT @ self._projection(seen.index, 0, g_B_nOr)
        sketch_A = g_A_nrI @ self._projection(seen.index, 1, g_A_nrI.mT)
        self._parts[seen.index] = torch.cat([sketch_B.flatten(1), sketch_A.flatten(1)], 1) * seen.scale

    def batch(self) -> Tensor:
        """(n, 1): the cosines."""
        assert self.direction is not None
        return (self._unit_gradients() @ self.direction)[:, None]

    def count_targets(self) -> None:
        """Adds the batch's gradients, at length 1, to the target direction."""
        self._sum = self._sum + self._unit_gradients().sum(0)

    def finish_targets(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Ends the stage of the targets.

        Raises:
            ValueError: every target's gradient was zero.
        """
        total = torch.as_tensor(self._sum)
        total = total if reduce is None else reduce(total)
        if not bool(total.norm() > 0):
            raise ValueError(
                "all gradients of the targets are zero: they give no direction; give other targets"
            )
        self.direction = total / total.norm()

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` goes on."""
        assert self.direction is not None, "finish_targets comes first"
        return {"direction": self.direction}

    def load(self, held: dict[str, Tensor]) -> None:
        """Takes over the state of another reader of the same reading and layers."""
        self.direction = held["direction"]

    def _unit_gradients(self) -> Tensor:
        """(n, D) projected gradients at length 1, without the layers that have none in any example."""
        flat = torch.cat([self._parts[index] for index in sorted(self._parts)], 1)
        return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)

    def _projection(self, index: int, side: int, like_nDr: Tensor) -> Tensor:
        """(D, p) Gaussian, the same for one seed, layer and side."""
        if (index, side) not in self._projections:
            name = f"{self.reading.seed}/{self.layers[index].name}/{side}"
            key = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "little")
            size = (like_nDr.shape[1], self.width)
            gaussian = torch.randn(size, generator=torch.Generator().manual_seed(key)) / self.width**0.5
            self._projections[index, side] = gaussian.to(like_nDr)
        return self._projections[index, side]
