"""What a training step of the Trainer shows of its examples: labels, logits, losses, and the loss's scale.

Nothing is run twice: hooks look at the forward and backward passes that train the model.
Letters: n examples of a batch, C classes, T tokens, V words.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from .features import find_head
from .instructions import IGNORED
from .language import is_causal_lm
from .passes import Part

_HOOKED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
PROBES = 8  # response tokens of an example from which the scale of the loss is read


@dataclass
class Visit:
    """One batch of training, on the model's device."""

    part: Part
    task: str  # "classification", "regression", "causal-lm" or "multi-label"
    labels: Tensor
    logits: Tensor  # without a graph
    losses: Tensor  # (n,) float32


def task_of(model: nn.Module, labels: Tensor, logits: Tensor, who: str) -> str:
    """What the model is trained for, by its class, its outputs and the labels.

    Raises:
        ValueError: labels for each token of something else than a causal language model.
    """
    if is_causal_lm(model):
        return "causal-lm"
    if logits.ndim != 2:
        raise ValueError(
            f"{who} cannot tell the loss of an example from logits of shape {tuple(logits.shape)} of "
            f"{type(model).__name__}; classifiers, regressions and causal language models are supported"
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "regression" or logits.shape[1] == 1:
        return "regression"
    return "multi-label" if labels.is_floating_point() else "classification"


def example_losses(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """(n,) float32 mean loss of each example: over its classes, outputs or response tokens; NaN without any.

    >>> example_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "classification")
    tensor([0.6931])
    """
    if task == "classification":
        return cross_entropy(logits.float(), labels, reduction="none")
    if task == "regression":
        return (logits.float().flatten(1) - labels.float().reshape(len(logits), -1)).square().mean(1)
    if task == "multi-label":
        return binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(1)
    losses = []
    for z_TV, y_T in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one by one: V is large
        counted = y_T != IGNORED
        losses.append(
            cross_entropy(z_TV[counted].float(), y_T[counted])
            if counted.any()
            else z_TV.new_tensor(torch.nan).float()
        )
    return torch.stack(losses)


def loss_scale(gradient: Tensor, visit: Visit, fine_n: Tensor) -> tuple[Tensor, Tensor]:
    """(c, misfit): the Trainer's loss is c times the sum of the examples' (tokens') losses, by its gradient.

    g = c (softmax - onehot) for a cross-entropy and g = 2 c (f - y) for a squared error; mean, accumulation,
    number of tokens and a GradScaler are all in c. The misfit, max |g - c d| / max |g|, is near 0 if so.

    Args:
        gradient: of the Trainer's loss, as `visit.logits`.
        fine_n: (n,) the examples that count.
    """
    z, y, g = visit.logits[fine_n], visit.labels[fine_n], gradient[fine_n]
    if visit.task == "causal-lm":
        places = [(y_T[1:] != IGNORED).nonzero()[:PROBES, 0] for y_T in y]
        z, g = (torch.cat([v_TV[t] for v_TV, t in zip(v, places, strict=True)]) for v in (z, g))
        y = torch.cat([y_T[t + 1] for y_T, t in zip(y, places, strict=True)])
    z, g = z.float(), g.float()
    if visit.task == "regression":
        d = 2 * (z.flatten(1) - y.float().reshape(len(z), -1))
        g = g.reshape(d.shape)
    else:
        d = z.softmax(1) - one_hot(y, z.shape[1])
    square = (d * d).sum()
    if not len(d) or not bool(square > 0):
        return torch.ones((), device=g.device), torch.zeros((), device=g.device)
    c = (g * d).sum() / square
    return c, (g - c * d).abs().max() / g.abs().max().clamp(min=1e-30)


class Watch:
    """Adds up the seconds of `with watch:` blocks; on CUDA those of the device, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device, self._seconds = device, 0.0
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            self._start: Any = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._pairs.append((self._start, end))
        else:
            self._seconds += time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """So far; waits for the device."""
        if self._pairs:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._pairs) / 1000
            self._pairs = []
        return self._seconds


class Visits:
    """Hooks on the model that the Trainer trains; one forward pass in training mode is one batch.

    Args:
        model: as the Trainer gives it to its callbacks; with a peft adapter or without.
        before: called with the keyword inputs before the forward pass.
        after: called with the `Visit` after it; may return a function of the gradient of the loss with
            respect to the logits, which may return another gradient in its place.
        part: says what the batch is made of.
        idle: called where the model runs something else, or a batch that is refused.

    Raises:
        ValueError: by `check`, if the forward pass had no labels or logits or another number of examples
            than `part` says, or if the model ran twice in one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        who: str,
        part: Callable[[], Part],
        before: Callable[[Mapping], None],
        after: Callable[[Visit], Callable[[Tensor], Tensor | None] | None],
        idle: Callable[[], None] = lambda: None,
    ):
        self.who, self.part, self.before, self.after, self.idle = who, part, before, after, idle
        self.task: str | None = None
        self.open = False  # between the start of a batch and its forward pass
        self.closed: Callable[[], None] = lambda: None  # called by `close`
        self._fault: ValueError | None = None
        self._seen: Tensor | None = None
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        self.inner: nn.Module = inner
        # peft's wrapper calls either its tuner, which passes the call on to `forward`, or the base model
        tuner = model.base_model if inner is not model else None
        hooked = [inner] if tuner is None or tuner is inner else [inner, tuner]
        self._handles: list[Any] = []
        left = _HOOKED.get(inner, lambda: None)()  # by a training that was interrupted
        if left is not None:
            left.close()
        _HOOKED[inner] = weakref.ref(self)
        for module in hooked:
            self._handles.append(module.register_forward_pre_hook(self._pre, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._post, with_kwargs=True))  # type: ignore[arg-type]
        # accelerate casts what a model under autocast returns: its logits are no part of the loss then
        self._tapped: Tensor | None = None
        self._cast = "_original_forward" in vars(inner)
        if self._cast:
            outputs = getattr(inner, "get_output_embeddings", lambda: None)()
            head = outputs if outputs is not None else find_head(inner)
            if head is not None:
                self._handles.append(head.register_forward_hook(self._tap))

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._tapped = [], None, None
        self.closed()

    def begin(self) -> None:
        """A batch starts."""
        self.open, self._seen, self._fault = True, None, None

    def check(self) -> None:
        """A batch has ended: raises what was wrong. Only the Trainer asks, so left hooks raise nothing."""
        if self._fault is not None:
            raise self._fault

    def _tap(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if module.training and torch.is_tensor(output):
            self._tapped = output

    def _pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and self.open and torch.is_grad_enabled():
            self.before(kwargs)
        elif not self.open:
            self.idle()

    def _post(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not self.open:
            if logits is not None and logits is self._seen:
                return  # the outer one of two hooks
            if self._seen is not None:
                self._fault = ValueError(
                    f"the model runs twice in one training batch, and {self.who} can only tell one loss for "
                    "each example; train with a loss that runs it once"
                )
            return
        self.open, self._seen = False, logits
        try:
            self._look(logits, kwargs.get("labels"))
        except ValueError as error:
            self._fault = error
            self.idle()

    def _look(self, logits: Any, labels: Any) -> None:
        if logits is None or labels is None:
            missing = "labels" if labels is None else "logits"
            raise ValueError(
                f"{self.who} needs the {missing} of a training batch, which the model's forward pass did not "
                f"{'get' if labels is None else 'return'}; train without "
                + ("label_smoothing_factor and compute_loss_func, which take the labels away"
                   if labels is None else "a fused loss (use_liger_kernel) and with return_dict=True")
            )  # fmt: skip
        if self.task is None:
            self.task = task_of(self.inner, labels, logits, self.who)
        part = self.part()
        if len(labels) != len(part.rows) or len(logits) != len(part.rows):
            raise ValueError(
                f"{self.who} expected {len(part.rows)} examples in a training batch and saw {len(labels)}; "
                "a collator that drops, packs or adds examples is not supported"
            )
        with torch.no_grad():
            losses = example_losses(logits.detach(), labels, self.task)
        change = self.after(Visit(part, self.task, labels, logits.detach(), losses))
        if change is not None:
            source = self._tapped if self._cast else logits
            if source is None or not source.requires_grad:
                raise ValueError(
                    f"{self.who} cannot reach the gradient of the logits of {type(self.inner).__name__}; "
                    "train without mixed precision, or with a LoRA"
                )
            source.register_hook(change)
