"""Where the parts meet: a few small types, importing only torch and numpy.

Letters used everywhere: N examples, C classes, D features, P path points, T visits, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Task = Literal["classification", "regression", "causal-lm"]
PerClass = bool | Literal["proportional", "equal"]
CLASSIFICATION: frozenset[str] = frozenset({"classification"})
Chunk = tuple[Tensor, Tensor]
ANY_TASK: frozenset[str] = frozenset({"classification", "regression"})
EVERY_TASK: frozenset[str] = ANY_TASK | {"causal-lm"}


@dataclass(frozen=True)
class PathSpec:
    """A learning path made of masked copies of one model; equal specs share one observation.

    Args:
        points: shares of each weight matrix that are masked, in the order in which they are tried.
        scope: `"layer"` ranks the weights inside each matrix, `"global"` over all of them.
        principle: `"l1"` masks the smallest weights first, `"random"` an arbitrary order (`seed`).
        adaptive: stop adding points once the ranking of the examples no longer changes.
        tolerance: class-averaged Spearman correlation that counts as "no longer changes".
        min_points: an adaptive path has at least so many points.
        seed: of the `"random"` principle.
    """

    points: tuple[Fraction, ...]
    scope: Literal["layer", "global"] = "layer"
    principle: Literal["l1", "random"] = "l1"
    adaptive: bool = False
    tolerance: float = 0.99
    min_points: int = 4
    seed: int = 0


class PathFeatures:
    """Features of N examples under each model of a path, held in chunks so that memory stays flat.

    `chunks()` yields `(rows, features)`: rows (n,) int64 positions among the N examples, features
    (P, n, D) float32. Point 0 is the unmasked model. `curve` of an adaptive path: (points, rank
    correlation with one point less).
    """

    def __init__(
        self,
        points: tuple[Fraction, ...],
        chunks: Iterable[Chunk] | Callable[[], Iterable[Chunk]],
        curve: list[tuple[int, float]] | None = None,
    ):
        self.points, self._chunks, self.curve = points, chunks, curve or []

    def chunks(self) -> Iterator[Chunk]:
        chunks = self._chunks
        yield from chunks() if callable(chunks) else chunks

    def subset(self, rows: Tensor, total: int) -> PathFeatures:
        """The same path for `rows` (k,) of the `total` examples, renumbered 0..k-1 in that order."""
        position = torch.full((total,), -1, dtype=torch.long)
        position[rows] = torch.arange(len(rows))

        def chunks():
            for old_rows, features in self.chunks():
                new_rows = position[old_rows]
                held = new_rows >= 0
                if held.any():
                    yield new_rows[held], features[:, held]

        return PathFeatures(self.points, chunks, self.curve)


@dataclass
class Signals:
    """What was observed of N examples; a field that no scorer asked for is None.

    Args:
        ids: (N,) unique strings.
        labels: (N,) int64 class indices, or float32 targets in a regression; None in a causal LM.
        num_classes: C; 0 in a regression and in a causal LM.
        embeddings: (N, D) float32, pooled features of the pre-trained model.
        logits: (N, C) of a model or proxy that has been tuned on the examples; (N, 1) predictions
            in a regression.
        early_logits: (S, N, C) of S proxies (one a seed), early in their training.
        history: (T, N, C) logits at each of T visits during training.
        response_losses: (N,) mean loss over the response tokens of an instruction example, given its prompt.
        answer_losses: (N,) the same without the prompt.
        paths: features along each masked path that was asked for. In a causal LM a "feature" is the mean
            loss over the response tokens, D = 1.
        readings: what scorers read off the backward pass, `{scorer.reading: (N, ...)}`.
        task: by default told from `num_classes`.
        seed: for scorers with a random part; together with `ids` it makes them independent of the
            order of the examples.
    """

    ids: np.ndarray
    labels: Tensor | None = None
    num_classes: int = 0
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    early_logits: Tensor | None = None
    history: Tensor | None = None
    response_losses: Tensor | None = None
    answer_losses: Tensor | None = None
    paths: dict[PathSpec, PathFeatures] = field(default_factory=dict)
    readings: dict[Hashable, Tensor] = field(default_factory=dict)
    seed: int = 0
    task: Task = ""  # type: ignore[assignment] - filled in below

    def __post_init__(self):
        if not self.task:
            self.task = "classification" if self.num_classes else "regression"

    def __len__(self) -> int:
        return len(self.ids)

    def require(self, name: str, scorer: str) -> Tensor:
        """The signal `name`, or a ValueError that says who misses it and how to get it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"scorer {scorer!r} needs the signal {name!r}, which was not observed; "
                f"observe with needs={{{name!r}}} or let DataPruner do it"
            )
        return value

    def path(self, spec: PathSpec, scorer: str) -> PathFeatures:
        """The features along the path `spec`, or a ValueError that says how to get them."""
        if spec not in self.paths:
            raise ValueError(
                f"scorer {scorer!r} needs the features along its path, which were not observed; "
                "give the scorer to observe(model, examples, [scorer]) or let DataPruner do it"
            )
        return self.paths[spec]

    def reading(self, spec: Hashable, scorer: str) -> Tensor:
        """What was read off the backward pass for `spec`, or a ValueError that says how to get it."""
        if spec not in self.readings:
            raise ValueError(
                f"scorer {scorer!r} needs its readings of the LoRA gradients, which were not observed; "
                "give the scorer to observe(lora_model, examples, [scorer]) or let DataPruner do it"
            )
        return self.readings[spec]

    def subset(self, rows: Tensor) -> Signals:
        """The signals of `rows` (k,), in that order."""

        def take(value: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if value is None else value.index_select(dim, rows)

        return replace(
            self,
            ids=self.ids[rows.numpy()],
            labels=take(self.labels),
            embeddings=take(self.embeddings),
            logits=take(self.logits),
            early_logits=take(self.early_logits, 1),
            history=take(self.history, 1),
            response_losses=take(self.response_losses),
            answer_losses=take(self.answer_losses),
            readings={spec: value.index_select(0, rows) for spec, value in self.readings.items()},
            paths={spec: path.subset(rows, len(self)) for spec, path in self.paths.items()},
        )


@runtime_checkable
class Scorer(Protocol):
    """Value of each example. Higher = harder, or picked sooner.

    `needs` names fields of `Signals`, of which those count that the task has: labels and logits are not
    missed in a causal LM, response losses nowhere else. `tasks` says where the method has a meaning. A scorer
    never depends on the order of the examples. A scorer with a `path` (PathSpec) also has
    `along_path(signals) -> (P, N)`, and its score is the mean of that over the points. A scorer with a
    `reading` (see `Reading`) scores what that read off the backward pass of a LoRA model. A scorer with a
    `model` that is not None is given the signals of that model.
    """

    name: str
    needs: frozenset[str]
    tasks: frozenset[str]

    def __call__(self, signals: Signals) -> Tensor: ...


class Reading(Protocol):
    """What is read off the per-example gradients of the LoRA factors; equal readings are done once.

    Hashable. `reader(layers)` makes the object that reads: `begin` announces a batch to it, `layer` hands it
    each layer's gradients as the backward pass reaches it (`serpette.lora_gradients`), `batch` gives
    (n, ...); `sample` examples are shown to it first for its moments. What trains before the scoring is
    the reading's: `warmup_steps` (None: by the state of the LoRA), `warmup_learning_rate`, `epochs`.
    """

    warmup_steps: int | None
    warmup_learning_rate: float
    epochs: int

    def reader(self, layers: Sequence[Any]) -> Any: ...


@runtime_checkable
class Selector(Protocol):
    """Which k examples stay. `needs` is empty or `{"embeddings"}`.

    Returns k sorted positions (int64). A selector with an open hyperparameter has
    `candidates() -> list[Selector]`, among which a probe on a validation split chooses.
    """

    name: str
    needs: frozenset[str]

    def __call__(
        self, scores: Tensor, k: int, generator: torch.Generator, embeddings: Tensor | None = None
    ) -> Tensor: ...


@dataclass
class NeuronStats:
    """What was observed of one layer with n neurons of f inputs each; a field not asked for is None.

    A neuron is an output of a linear layer, a filter, a token of an embedding, a channel of a norm; in
    `columns`, an input feature or channel.

    Args:
        weight: gives (n, f) float32 or wider, made only when called: a quantised layer is dequantised there.
        ids: (n,) strings that stay the same from run to run.
        contribution: (T, n) float64, signed: w_i . dL/dw_i, mean over the examples of each of T classes, or
            of all of them (T = 1).
        counts: (T,) examples of each class; counted tokens where the loss is a mean over tokens.
        labelled: the T are classes.
        elementwise: (n,) float64, sum over j of |mean of w_ij dL/dw_ij|.
        input_norms: float64 L2 norms over all tokens or pixels, (f,), or what broadcasts to (n, f) where
            neurons read different inputs.
        columns: the same of the layer's columns, with `weight` transposed; None where not asked for.
    """

    weight: Callable[[], Tensor]
    ids: np.ndarray
    contribution: Tensor | None = None
    counts: Tensor | None = None
    labelled: bool = False
    elementwise: Tensor | None = None
    input_norms: Tensor | None = None
    columns: NeuronStats | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def require(self, name: str, importance: str) -> Tensor:
        """The field `name`, or a ValueError that says who misses it; `"labels"`: the counts of classes."""
        if name == "labels":
            name, value = "counts", self.counts if self.labelled else None
            missing = (
                "class labels, and the data has none; give whole numbers of shape (B,) as batch['labels'] or "
                "as the second of (inputs, labels), or use importance 'taylor'"
            )
        else:
            value = getattr(self, name)
            missing = f"{name!r}, which was not observed; rank_rows(model, loader, {importance!r}) does it"
        if value is None:
            raise ValueError(f"importance {importance!r} needs {missing}")
        return value


@runtime_checkable
class Importance(Protocol):
    """Importance of each neuron of a layer. Higher = more important.

    `needs` names what must be observed, of `"contribution"`, `"labels"`, `"elementwise"` and `"input_norms"`;
    empty = no data. It never depends on the order of the examples.
    """

    name: str
    needs: frozenset[str]

    def __call__(self, stats: NeuronStats) -> Tensor: ...


@dataclass
class LayerStats:
    """What is known of a layer's weights: O outputs, I inputs (of a convolution: of its patch), LoRA rank r.

    A field that was not asked for is None. Importances and gradients at weights that are cut already mean
    nothing.

    Args:
        name: of the module; the same from run to run.
        weight: gives (O, I) float32 or wider, what the layer computes with, zero where it is cut: W0 + s B A,
            or (sequential) W0 + s W0 B A, or the plain weight of a layer without LoRA.
        base: gives W0 (O, I); None in a layer without LoRA.
        A, B: LoRA factors (r, I) and (O, r), in a sequential LoRA (r, I) and (I, r); float32 or wider.
        grad_A, grad_B: dL/dA and dL/dB, without loss scale.
        scale: s of the LoRA.
        sequential: the LoRA stands before W0, not beside it.
        gradient: dL/dW (O, I) float32 or wider, of the unmasked product.
        input_norms: (I,) float64, L2 norm of each input over all tokens seen.
        hessian: (I, I) float64 or float32, 2 X^T X over all tokens seen.
        state: tensors that the importance keeps of this layer between steps; saved and restored with it.
    """

    name: str
    weight: Callable[[], Tensor]
    base: Callable[[], Tensor] | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None
    scale: float = 1.0
    sequential: bool = False
    gradient: Tensor | None = None
    input_norms: Tensor | None = None
    hessian: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def require(self, field: str, importance: str) -> Any:
        """The field, or a ValueError that says who misses it."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(
                f"importance {importance!r} needs {field!r} of layer {self.name!r}, which it has not"
            )
        return value


@runtime_checkable
class WeightImportance(Protocol):
    """Importance of each single weight of a layer. Higher = keep.

    `weight_needs` names what must be known, of `"lora"` (A, B and their gradients), `"gradient"`,
    `"input_norms"` and `"hessian"`; empty = the weights alone. `averaged`: its values are averaged over the
    steps before they are used; otherwise it is asked when weights are cut. An importance with
    `update(stats)` is given the layer at each scoring step and keeps what it learns in `stats.state`.
    """

    name: str
    weight_needs: frozenset[str]
    averaged: bool

    def of_weights(self, stats: LayerStats) -> Tensor: ...


def uniform_of(ids: np.ndarray, seed: int) -> Tensor:
    """(N,) float64 in [0, 1), a fixed pseudo-random number for each id and seed, whatever the order."""
    from hashlib import blake2b

    key = int(seed).to_bytes(8, "little", signed=True)
    digests = b"".join(blake2b(str(i).encode(), digest_size=8, key=key).digest() for i in ids)
    bits = np.frombuffer(digests, dtype="<u8") >> 11  # 53 bits: all that a float64 holds
    return torch.from_numpy(bits.astype(np.float64) / 2.0**53)
