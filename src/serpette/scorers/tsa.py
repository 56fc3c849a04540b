r"""TSA: the natural-gradient length of an example in the subspace that LoRA can move in.

    s(z) = g(z)' H^-1 g(z)          g, H: gradient and Fisher matrix of all LoRA factors, K-FAC by layer
    S_B = tr[ Sd^-1 G A' (A Sx A')^-1 A G' ]      S_A = tr[ (B' Sd B)^-1 B' G Sx^-1 G' B ]

G = sum over tokens of delta x' is one example's gradient of the merged weight, Sx = E[x x'] and
Sd = E[delta delta'] over tokens. "LoPrune: an efficient data pruning for LoRA-based fine-tuning of vision
transformer", CVPR 2026, algorithm 1. `tsa` is the mean of S_B and S_A over the layers.
`tsa_joint` counts what both can reach once: S_A + S_B - |(B' Sd B)^-1/2 B' G A' (A Sx A')^-1/2|^2, the
exact quadratic form of the layer's tangent space, averaged over the layers.

Differs: the moments are frozen before any example is scored. Those of the paper start at I and move while
they score, so the score tells the position in the stream (`statistics="paper"` does that). The damping is
relative to the mean eigenvalue of each factor, since those of Sd are near 1e-5. Tokens of one example are
summed before they are squared, as a gradient is. S_A is left out of a layer whose B is still 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kfac import Moments, pseudo_root, squared_lengths
from ..lora_gradients import LayerGradients, LoraLayer
from ..types import EVERY_TASK, Signals

Statistics = Literal["sampled", "two_pass", "running", "paper"]
DAMPING, PAPER_DAMPING = 0.1, 1e-3
WORDS: dict[str, tuple] = {
    "statistics": ("sampled", "two_pass", "running", "paper"),
    "normalise": (None, "tokens", "mean_loss"),
}

NO_GRADIENT = (
    "all gradients of the LoRA factors are zero: the loss does not depend on them, "
    "or every example is fitted exactly; score an earlier state of the model"
)


@dataclass(frozen=True)
class TSAReading:
    """The blocks S_B, S_A and what they share, (N, layers, 3); the options are those of `TSA`."""

    statistics: Statistics = "sampled"
    damping: float = DAMPING
    sample: int = 1024
    tokens: int | None = 8
    beta: float = 0.05
    refresh: int = 32
    normalise: Literal["tokens", "mean_loss"] | None = None
    warmup_steps: int | None = None
    warmup_learning_rate: float = 1e-3
    epochs: int = 1
    share_inputs: bool = True

    def reader(self, layers: Sequence[LoraLayer]) -> TSAReader:
        """A new reader for the layers of a model."""
        return TSAReader(self, layers)


class TSA:
    """Natural-gradient length in LoRA's subspace: high = hard, or the example moves the adapter much.

    Needs a peft model with a LoRA that trains. Costs one forward and one backward pass of each example, and
    the same of the sample for the moments.

    Args:
        statistics: `"sampled"`: moments over `sample` examples drawn by a hash of their ids, then frozen
            (default: independent of the order, cheap); `"two_pass"`: over all examples, the reference;
            `"running"`: a bias-corrected moving average over the examples as they come, for scoring while
            training: depends on the order; `"paper"`: as printed, for reproduction: biased by position.
        damping: added to each factor before the projection, relative to its mean eigenvalue; default 0.1.
            With 1e-3 examples in the sample score lower than those that are not, since the moments know
            their directions. In `"paper"` it is absolute, default 1e-3.
        joint: count what A and B can both reach once (`tsa_joint`).
        sample: examples for the moments.
        tokens: at most so many tokens of an example feed the moments, evenly spaced; None: all. A few of each
            are cheaper and favour the sample less. Scores always see all tokens.
        beta: weight of a new batch in the moving averages.
        refresh: batches between two factorisations in `"running"` (at first after 1, 2, 4, ... batches).
        normalise: `"tokens"` divides by the number of tokens, `"mean_loss"` by its square: the loss of
            a sequence is a sum and favours long ones.
        warmup_steps: steps of AdamW before the scoring, taken back afterwards, in batches of 16 in an order
            by ids; default: 32 if every B is 0, else none. A fresh LoRA has B = 0, its head knows nothing.
        warmup_learning_rate: of these steps.
        epochs: scoring passes, with one epoch of training between two; the score is their mean.
        share_inputs: layers with one input (q, k, v) share its moments.

    Raises:
        ValueError: an unknown word, a number out of range.

    Example:
        >>> TSA(statistics="two_pass", damping=1e-2).reading.damping
        0.01
    """

    name = "tsa"
    needs: frozenset[str] = frozenset()
    tasks = EVERY_TASK

    def __init__(
        self,
        statistics: Statistics = "sampled",
        damping: float | None = None,
        joint: bool = False,
        sample: int = 1024,
        tokens: int | None = 8,
        beta: float = 0.05,
        refresh: int = 32,
        normalise: Literal["tokens", "mean_loss"] | None = None,
        warmup_steps: int | None = None,
        warmup_learning_rate: float = 1e-3,
        epochs: int = 1,
        share_inputs: bool = True,
    ):
        if damping is None:
            damping = PAPER_DAMPING if statistics == "paper" else DAMPING
        for option, value in (("statistics", statistics), ("normalise", normalise)):
            if value not in WORDS[option]:
                raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, WORDS[option]))}")
        for option, value, fine, limit in (
            ("damping", damping, 0 <= damping < float("inf"), f"0 or more; {DAMPING} is usual"),
            ("sample", sample, sample >= 1, "at least 1; 1,024 is usual"),
            ("tokens", tokens, tokens is None or tokens >= 1, "at least 1, or None for all"),
            ("beta", beta, 0 < beta <= 1, "in (0, 1]; 0.05 is usual"),
            ("refresh", refresh, refresh >= 1, "at least 1"),
            ("warmup_steps", warmup_steps, warmup_steps is None or warmup_steps >= 0, "0 or more, or None"),
            ("warmup_learning_rate", warmup_learning_rate, warmup_learning_rate > 0, "above 0"),
            ("epochs", epochs, epochs >= 1, "at least 1"),
        ):
            if not fine:
                raise ValueError(f"{option}={value!r} must be {limit}")
        self.statistics: Statistics = statistics
        self.damping, self.joint, self.sample, self.tokens, self.beta = damping, joint, sample, tokens, beta
        self.refresh, self.normalise, self.epochs, self.share_inputs = (
            refresh,
            normalise,
            epochs,
            share_inputs,
        )
        self.warmup_steps, self.warmup_learning_rate = warmup_steps, warmup_learning_rate
        self.reading = TSAReading(
            statistics, damping, sample, tokens, beta, refresh, normalise,
            warmup_steps, warmup_learning_rate, epochs, share_inputs,
        )  # fmt: skip

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64; a pure number, the loss cancels in g' H^-1 g."""
        return blocks_to_score(signals.reading(self.reading, self.name), self.joint)


class TSAJoint(TSA):
    """`TSA(joint=True)`: the exact quadratic form of each layer; high = hard. Options as `TSA`."""

    name = "tsa_joint"

    def __init__(self, statistics: Statistics = "sampled", damping: float | None = None, **options: Any):
        super().__init__(statistics, damping, joint=True, **options)


def blocks_to_score(blocks_NL3: Tensor, joint: bool = False) -> Tensor:
    """(N,) from S_B, S_A and their common part; NaN: there is no such block (B = 0, no gradient)."""
    S_B, S_A, common = blocks_NL3.double().unbind(2)
    if bool(S_B.isnan().all()):  # moving statistics find out only here
        raise ValueError(NO_GRADIENT)
    if joint:
        return (S_B.nan_to_num(0) + S_A.nan_to_num(0) - common.nan_to_num(0))[:, ~S_B[0].isnan()].mean(1)
    return torch.cat([S_B, S_A], 1).nanmean(1)


class TSAReader:
    """Gathers the moments, then reads the blocks of each example; one for each state of the adapter.

    Stages: `"moments"` (not for running statistics, which have none), then `"scores"`. `model_moves`: the
    factors A and B change between batches, since the model is being trained.
    """

    model_moves = False

    def __init__(self, reading: TSAReading, layers: Sequence[LoraLayer]):
        self.reading, self.layers = reading, layers
        self.moving = reading.statistics in ("running", "paper")
        self.model_moves = self.moving
        self.stage = "scores" if self.moving else "moments"
        self.batches = 0
        self.input_of = list(range(len(layers)))
        self.inputs: dict[int, Moments] = {}
        self.outputs: dict[int, Moments] = {}
        # roots of (A Sx A')^-1 and (B' Sd B)^-1
        self._projected: dict[int, tuple[Tensor, Tensor | None]] = {}

    @property
    def sample(self) -> int | None:
        """Examples wanted for the moments: a number, None for all; 0 for a reader that has no such stage."""
        return {"sampled": self.reading.sample, "two_pass": None}.get(self.reading.statistics, 0)

    def begin(self, examples: int, device: torch.device, offsets: Tensor, input_of: Sequence[int]) -> None:
        """Announces a batch of n examples.

        Args:
            offsets: (n,) whole numbers, fixed for each example: which tokens feed the moments.
            input_of: number of each layer's input; empty where it is not known yet.
        """
        self.blocks_nL3 = torch.full((examples, len(self.layers), 3), torch.nan, device=device)
        self.offsets = offsets
        if self.reading.share_inputs and input_of:
            self.input_of = list(input_of)
        self._counted: set[int] = set()
        self.batches += 1

    def layer(self, seen: LayerGradients) -> None:
        """One layer's gradients of the batch."""
        if self.moving or self.stage == "moments":
            self._count(seen)
        if self.stage == "scores":
            if self.moving and self._due():
                self._factorise(seen.index)
            self._score(seen)

    def batch(self) -> Tensor:
        """(n, layers, 3): S_B, S_A and their common part of the batch's examples; NaN where there is none."""
        return self.blocks_nL3

    def finish(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Ends the stage of the moments.

        Args:
            reduce: sums a tensor over the processes.

        Raises:
            ValueError: every gradient was zero.
        """
        for moments in (*self.inputs.values(), *self.outputs.values()):
            if reduce is not None:
                moments.sum = reduce(moments.sum)
                moments.weight = float(reduce(torch.tensor(moments.weight, dtype=torch.float64)))
        for index in range(len(self.layers)):
            self._factorise(index)
            for moments in (self.inputs.get(self.input_of[index]), self.outputs.get(index)):
                if moments is not None:
                    moments.sum = moments.sum.new_zeros(0)  # the factor is enough
        if all(moments.factor is None for moments in self.outputs.values()):
            raise ValueError(NO_GRADIENT)
        self.stage = "scores"

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` goes on."""
        held = {"batches": torch.tensor(self.batches), "input_of": torch.tensor(self.input_of)}
        for side, of in (("input", self.inputs), ("output", self.outputs)):
            for index, m in of.items():
                held[f"{side}.{index}.sum"] = m.sum
                held[f"{side}.{index}.about"] = torch.tensor([m.weight, float(m.triangular)]).double()
                if m.factor is not None:
                    held[f"{side}.{index}.factor"] = m.factor
        return held

    def load(self, held: dict[str, Tensor]) -> None:
        """Takes over the state of another reader of the same reading and layers."""
        self.batches, self.input_of = int(held["batches"]), held["input_of"].tolist()
        self.stage = "scores"
        for side, of in (("input", self.inputs), ("output", self.outputs)):
            for key in held:
                if key.startswith(side) and key.endswith(".sum"):
                    m = of[int(key.split(".")[1])] = Moments(0, held[key])
                    m.sum, m.factor = held[key], held.get(key[:-3] + "factor")
                    m.weight, m.triangular = (
                        float(held[key[:-3] + "about"][0]),
                        bool(held[key[:-3] + "about"][1]),
                    )

    def _due(self) -> bool:
        k = self.batches
        paper = self.reading.statistics == "paper"
        return paper or k & (k - 1) == 0 or k % self.reading.refresh == 0

    def _count(self, seen: LayerGradients) -> None:
        reading, group = self.reading, self.input_of[seen.index]
        inputs = self.inputs.setdefault(group, Moments(seen.x_nTI.shape[2], seen.x_nTI))
        outputs = self.outputs.setdefault(seen.index, Moments(seen.raw_nTO.shape[2], seen.raw_nTO))
        if reading.statistics == "paper" and not outputs.weight:
            outputs.start_at_identity()
            if not inputs.weight:
                inputs.start_at_identity()
        chosen_nT = self._chosen(seen)
        beta = reading.beta if self.moving else None
        if group not in self._counted:
            self._counted.add(group)
            inputs.add(seen.x_nTI[chosen_nT], beta)
        outputs.add(seen.raw_nTO[chosen_nT] * seen.unit, beta)

    def _chosen(self, seen: LayerGradients) -> Tensor:
        """(n, T) bool: the tokens that feed the moments, at most `tokens` of an example."""
        n, T = seen.x_nTI.shape[:2]
        device = seen.x_nTI.device
        mask_nT = torch.ones(n, T, dtype=torch.bool, device=device) if seen.mask_nT is None else seen.mask_nT
        if self.reading.tokens is None:
            return mask_nT
        place_nT = mask_nT.cumsum(1) - 1  # padding on either side changes nothing
        stride_n1 = -(-mask_nT.sum(1, keepdim=True) // self.reading.tokens).clamp(max=-1)
        return mask_nT & ((place_nT + self.offsets.to(device)[:, None]) % stride_n1 == 0)

    def _factorise(self, index: int) -> None:
        relative = self.reading.statistics != "paper"
        for moments in (self.inputs.get(self.input_of[index]), self.outputs.get(index)):
            if moments is not None and (self.moving or moments.factor is None):
                moments.factorise(self.reading.damping, relative)

    def _score(self, seen: LayerGradients) -> None:
        inputs, outputs = self.inputs.get(self.input_of[seen.index]), self.outputs.get(seen.index)
        if inputs is None or outputs is None or inputs.factor is None or outputs.factor is None:
            return  # no gradient ever reached this layer
        if self.model_moves or seen.index not in self._projected:
            D_root = None if not bool(seen.B_Or.any()) else pseudo_root(outputs.projected(seen.B_Or.mT))
            self._projected[seen.index] = pseudo_root(inputs.projected(seen.A_rI)), D_root
        C_root, D_root = self._projected[seen.index]
        GA_nOr, BG_nrI = seen.factors()
        blocks_n3 = self.blocks_nL3[:, seen.index]
        per_n = self._normaliser(seen)
        blocks_n3[:, 0] = squared_lengths(C_root.mT @ GA_nOr.mT, outputs) * per_n
        if D_root is not None:
            blocks_n3[:, 1] = squared_lengths(D_root.mT @ BG_nrI, inputs) * per_n
            blocks_n3[:, 2] = (D_root.mT @ seen.both() @ C_root).flatten(1).square().sum(1) * per_n

    def _normaliser(self, seen: LayerGradients) -> Tensor | float:
        if self.reading.normalise is None:
            return 1.0
        n, T = seen.x_nTI.shape[:2]
        T_n = torch.full((n,), T, device=seen.x_nTI.device) if seen.mask_nT is None else seen.mask_nT.sum(1)
        return T_n.float() ** (-1 if self.reading.normalise == "tokens" else -2)
