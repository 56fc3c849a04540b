r"""InfoBatch: examples that are learnt well are left out at random, the others of them count more.

    pass t:  P_t(n) = r if loss_n < mean loss, else 0          (probability of being left out)
             weight_n = 1 / (1 - r) if loss_n < mean loss, else 1

so that the expected gradient is that of all examples. The first pass and the last `anneal` of them are full.
Qin et al., "InfoBatch: lossless training speed up by unbiased dynamic data pruning", ICLR 2024,
arXiv 2303.04947, eq. 2 to 5.

Differs: each example is drawn by itself, by a hash of its id (the authors' code draws a fixed number);
losses are those of the last visit, and the few batches that are loaded ahead when a pass begins count with
the loss of the visit before. The gradient of the logits is rescaled, which is that of the weighted loss;
the loss that the Trainer logs is unweighted.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import near
from ..types import uniform_of
from .callback import PassesCallback, moment_of
from .visits import Visit, Watch

METHODS = ("info_batch",)


class DynamicPruning(PassesCallback):
    """A Trainer callback that leaves out, in each epoch anew, part of the examples with a small loss.

    Works with any model whose loss is a sum over its examples' logits: classifiers, regressions and causal
    language models, with LoRA or without, gradient accumulation, several processes, resume. Training takes
    `num_train_epochs` passes, which are shorter; with `max_steps` it takes so many steps.

    Args:
        method: `"info_batch"`.
        r: probability in [0, 1) that an example whose loss is below the mean is left out; 0.5 as in
            the paper.
        anneal: share of the passes, at the end, that are full, in [0, 1]: 0.125 as in the paper; rounded up.
        seed: of the order and of what is left out.
        ids: N ids or a data set with an `id` column, in the order of the training set, for the draw;
            default: the `id` column if the Trainer leaves it (remove_unused_columns=False), else row numbers.
        resume_from: the checkpoint that the Trainer resumes from, if it lies outside output_dir.

    Attributes:
        losses_: (N,) loss of each example at its last visit; infinite before the first.
        kept_: examples in each pass so far. `share_`: all of them over full passes.
        cost_: `hook_seconds`, what the weighting and the draws took.

    Raises:
        ValueError: unknown method, r or anneal out of range; when training starts: an order, a loss or
            a model that it cannot work with (the message says why); data or settings that changed on resume.

    Example:
        >>> DynamicPruning("info_batch", r=0.5).anneal
        0.125
    """

    kind = "dynamic"

    def __init__(
        self,
        method: str = "info_batch",
        r: float = 0.5,
        anneal: float = 0.125,
        seed: int = 0,
        ids: Any = None,
        resume_from: str | Path | None = None,
    ):
        super().__init__(seed, ids, resume_from)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}{near(method, METHODS)}")
        for name, value, fine, limit in (
            ("r", r, 0 <= r < 1, "in [0, 1), the probability of leaving an easy example out"),
            (
                "anneal",
                anneal,
                0 <= anneal <= 1,
                "in [0, 1], the share of the passes that are full at the end",
            ),
        ):
            if isinstance(value, bool) or not fine:
                raise ValueError(f"{name}={value!r} must be {limit}")
        self.method, self.r, self.anneal = method, r, anneal

    def _settings(self) -> dict[str, Any]:
        return {"method": self.method, "r": self.r, "anneal": self.anneal}

    def _aligned(self) -> int:
        return 1

    def _begin(self, args: Any, model: nn.Module, dataset: Any) -> None:
        self.losses_ = torch.full((self._loader.examples,), torch.inf)
        self.kept_: list[int] = []
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._seconds = 0.0
        self._watch = Watch(self._device)
        self._stop = self._loader.position_after(self._loader.batches_after(self._planned))
        if self._passes is not None and self._full_from() <= 1 and self.r:
            warnings.warn(
                f"DynamicPruning leaves nothing out in {float(self._passes):g} epochs: the first is full, "
                f"and so are the last {self.anneal:g} of them; train longer, or lower anneal",
                stacklevel=2,
            )

    def _full_from(self) -> int:
        """Number of the pass from which on all are full."""
        assert self._passes is not None
        return math.ceil(self._passes) - math.ceil(Fraction(str(self.anneal)) * self._passes)

    def _full(self, number: int) -> bool:
        if number == 0 or not self.r:
            return True
        if self._passes is not None:
            return number >= self._full_from()
        return self._stream.passes[number - 1].end >= (1 - Fraction(str(self.anneal))) * self._stop

    def _draw(self, number: int) -> tuple[Tensor, Tensor | None]:
        with Watch(torch.device("cpu")) as watch:
            self._flush()
            rows, weights = torch.arange(len(self.losses_)), None
            if not self._full(number):
                known_N = torch.isfinite(self.losses_)
                easy_N = known_N & (self.losses_ < self.losses_[known_N].double().mean())
                out_N = easy_N & (uniform_of(self._ids, self.seed * 1_000_003 + number) < self.r)
                rows = (~out_N).nonzero()[:, 0]
                weights = torch.where(easy_N, 1 / (1 - self.r), 1.0)[rows]
        self._seconds += watch.seconds
        self.kept_.append(len(rows))
        return rows, weights

    def _end(self) -> int | None:
        assert self._passes is not None
        last = self._stream.passes.get(math.ceil(self._passes) - 1)
        return None if last is None else last.start + self._last(len(last.rows))

    def _moment(self, step: int) -> float:
        assert self._passes is not None
        number, share = self._stream.progress(self._loader.position_after(self._loader.batches_after(step)))
        return moment_of(number + share, self._passes, self._planned)

    def _after(self, visit: Visit) -> Any:
        with self._watch:
            self._pending.append((visit.part.rows, visit.losses))
            weights = visit.part.weights
            if weights is None or bool((weights == 1).all()):
                return None
            w_n = weights.to(visit.logits.device)

        def weigh(gradient: Tensor) -> Tensor:
            with self._watch:
                return gradient * w_n.to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1))

        return weigh

    def _batch_done(self) -> None:
        if self._loader.processes > 1:  # every process draws the same passes from the losses of all
            mine = self._pending.pop()[1].contiguous()
            parts = [torch.empty_like(mine) for _ in range(self._loader.processes)]
            torch.distributed.all_gather(parts, mine)
            for rank, losses in enumerate(parts):
                self._pending.append((self._stream.batch(self._batches - 1, rank).rows, losses))

    def _flush(self) -> None:
        for rows, losses in self._pending:
            self.losses_.numpy()[rows.numpy()] = losses.float().cpu().numpy()
        self._pending = []

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._flush()
        tensors = {"losses": self.losses_}
        for number, held in self._stream.passes.items():
            code_N = torch.zeros(len(self.losses_), dtype=torch.uint8)  # 0: left out
            code_N[held.rows] = 1 if held.weights is None else 1 + (held.weights != 1).to(torch.uint8)
            tensors[f"pass/{number}"] = code_N
        starts = {str(number): held.start for number, held in self._stream.passes.items()}
        return tensors, {"starts": starts, "kept": self.kept_, "seconds": self._spent()}

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.losses_, self.kept_, self._seconds = tensors["losses"], facts["kept"], facts["seconds"]
        for number, start in sorted((int(n), s) for n, s in facts["starts"].items()):
            code_N = tensors[f"pass/{number}"]
            rows = code_N.nonzero()[:, 0]
            weights = torch.where(code_N == 2, 1 / (1 - self.r), 1.0)[rows]
            self._stream.put(number, start, rows, weights)

    def _spent(self) -> float:
        return self._seconds + self._watch.seconds

    @property
    def share_(self) -> float:
        """Examples trained on, over those of as many full passes."""
        return sum(self.kept_) / (len(self.kept_) * len(self.losses_))

    @property
    def cost_(self) -> dict[str, float]:
        """Seconds spent in hooks and draws, also by the runs before a resume."""
        return {"hook_seconds": self._spent()}

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the hooks off."""
        self._flush()
        if self._passes is not None:
            self.kept_ = self.kept_[: math.ceil(self._passes)]  # what is left over fills the last step
        super().on_train_end(args, state, control, **kwargs)
