"""What the ablation reads off the backward pass beside `TSA`: other spaces, other inverses, their own time.

Letters: N examples, n of a batch, L layers, T tokens, I inputs, O outputs, r rank, E scoring epochs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serpette.lora_gradients import LayerGradients
from serpette.scorers import TSA
from serpette.scorers.tsa import TSAReader, TSAReading, blocks_to_score
from serpette.types import EVERY_TASK, Signals

SPENT: dict[str, float] = {}  # CPU seconds inside each reader


@dataclass(frozen=True)
class Named:
    """A reading of `TSA` under a name, whose reader says what it took; `kind` says what is read."""

    name: str
    inner: TSAReading
    kind: str = "tsa"

    @property
    def warmup_steps(self) -> int | None:
        return self.inner.warmup_steps

    @property
    def warmup_learning_rate(self) -> float:
        return self.inner.warmup_learning_rate

    @property
    def epochs(self) -> int:
        return self.inner.epochs

    @property
    def statistics(self) -> str:
        return self.inner.statistics

    def reader(self, layers: Sequence[Any]) -> TSAReader:
        """A new one for each state of the adapter; the k-th of `epochs` fills the k-th column."""
        kinds = {"tsa": Timed, "epochs": OneEpoch, "full": FullSpace, "factors": Factors}
        return kinds[self.kind](self, layers)


class Timed(TSAReader):
    """`TSAReader` with a clock."""

    def __init__(self, named: Named, layers: Sequence[Any]):
        super().__init__(named.inner, layers)
        self.named = named

    def layer(self, seen: LayerGradients) -> None:
        start = time.process_time()
        super().layer(seen)
        SPENT[self.named.name] = SPENT.get(self.named.name, 0.0) + time.process_time() - start

    def finish(self, reduce: Any = None) -> None:
        start = time.process_time()
        super().finish(reduce)
        SPENT[self.named.name] = SPENT.get(self.named.name, 0.0) + time.process_time() - start


class OneEpoch(Timed):
    """(n, L, 3, E): the blocks of one scoring epoch in its column, 0 elsewhere."""

    made: dict[Named, int] = {}

    def __init__(self, named: Named, layers: Sequence[Any]):
        super().__init__(named, layers)
        self.epoch = self.made.get(named, 0) % named.epochs
        self.made[named] = self.made.get(named, 0) + 1

    def batch(self) -> Tensor:
        blocks = super().batch()
        columns = blocks.new_zeros(*blocks.shape, self.named.epochs)
        columns[..., self.epoch] = blocks * self.named.epochs
        return columns


class FullSpace(Timed):
    """K-FAC of the whole matrix: tr[Sd^-1 G Sx^-1 G'] by the T x T products of whitened tokens, exact."""

    def _score(self, seen: LayerGradients) -> None:
        inputs, outputs = self.inputs.get(self.input_of[seen.index]), self.outputs.get(seen.index)
        if inputs is None or outputs is None or inputs.root is None or outputs.root is None:
            return
        x_nTI, delta_nTO = seen.x_nTI @ inputs.root, seen.delta_nTO @ outputs.root
        form_n = ((x_nTI @ x_nTI.mT) * (delta_nTO @ delta_nTO.mT)).sum((1, 2))
        self.blocks_nL3[:, seen.index, 0] = form_n


class Factors(Timed):
    """(n, L, r (I + O)): the gradients of A and B themselves; no moments."""

    @property
    def sample(self) -> int:
        return 0

    def __init__(self, named: Named, layers: Sequence[Any]):
        super().__init__(named, layers)
        self.stage = "scores"

    def begin(self, examples: int, *about: Any) -> None:
        super().begin(examples, *about)
        sizes = [sum(layer.sizes) * len(layer.factors[0]) for layer in self.layers]
        self.gradients = torch.zeros(examples, len(sizes), max(sizes))

    def _score(self, seen: LayerGradients) -> None:
        GA_nOr, BG_nrI = seen.factors()
        both = torch.cat([GA_nOr.flatten(1), BG_nrI.flatten(1)], 1)
        self.gradients[:, seen.index, : both.shape[1]] = both

    def batch(self) -> Tensor:
        return self.gradients


class Variant(TSA):
    """`TSA` with a name of its own, and a clock."""

    def __init__(self, name: str, kind: str = "tsa", joint: bool = False, **options: Any):
        super().__init__(joint=joint, **options)
        self.name, self.kind = name, kind
        self.reading = Named(name, replace(self.reading), kind)  # type: ignore[assignment]


class ByEpoch:
    """The score of one scoring epoch of a `Variant` of the kind `"epochs"`; the score is a mean of these."""

    needs: frozenset[str] = frozenset()
    tasks = EVERY_TASK

    def __init__(self, variant: Variant, epoch: int):
        self.name, self.reading, self.epoch = f"epoch_{epoch + 1}", variant.reading, epoch

    def __call__(self, signals: Signals) -> Tensor:
        return blocks_to_score(signals.reading(self.reading, self.name)[..., self.epoch])


class ExactInverse:
    """g' (F + lambda)^-1 g with the Fisher matrix F of each layer's A and B together, mean over layers.

    By the Gram matrix K of the examples: the diagonal of K (K / N + lambda)^-1, lambda = `damping` times the
    mean of F's N largest eigenvalues. Undamped it is N for every example wherever r (I + O) >= N.
    """

    needs: frozenset[str] = frozenset()
    tasks = EVERY_TASK

    def __init__(self, name: str, variant: Variant, damping: float):
        self.name, self.reading, self.damping = name, variant.reading, damping

    def __call__(self, signals: Signals) -> Tensor:
        start = time.process_time()
        g_NLD = signals.reading(self.reading, self.name)
        N, L, _ = g_NLD.shape
        score_N = torch.zeros(N, dtype=torch.float64)
        for layer in range(L):
            g_ND = g_NLD[:, layer].double()
            values_N, vectors_NN = torch.linalg.eigh(g_ND @ g_ND.T)
            values_N = values_N.clamp(min=0)
            shrunk_N = values_N / (values_N / N + self.damping * values_N.mean() / N)
            score_N += (vectors_NN.square() * shrunk_N).sum(1) / L
        SPENT[self.name] = SPENT.get(self.name, 0.0) + time.process_time() - start
        return score_N
