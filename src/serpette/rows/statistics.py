r"""Statistics of every neuron of many layers, from one pass over the data and without a weight gradient.

    w_i . dL/dw_i = sum over positions of g_i (out_i - b_i),   g = dL/d out          (neuron i)
    sum over i of w_ij dL/dw_ij = sum over positions of x_j dL/dx_j                  (column j)

for a layer that is linear in its weights; dL/dx through this layer only. A forward pass and a backward pass
to the activations are enough, so all parameters may be frozen or quantised; the paper (SPSFT 2024, Eq. 6)
takes weight gradients.
Letters: B examples of a batch, n neurons or columns, f weights of each, T classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import near
from ..types import NeuronStats
from .neurons import Layer, neuron_stats, wide

FIELDS = ("contribution", "labels", "elementwise", "input_norms")
CONTRIBUTION = frozenset({"contribution", "labels"})
IGNORED = -100  # labels of tokens that no loss counts


def observe_neurons(
    model: nn.Module,
    loader: Iterable[Any],
    modules: Mapping[str, nn.Module],
    needs: Collection[str],
    *,
    columns: Collection[str] = (),
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    num_classes: int | None = None,
    progress: bool = True,
) -> dict[str, NeuronStats]:
    """Statistics of the neurons of `modules`, by one forward and backward pass over `loader`.

    The model runs in evaluation mode with every parameter frozen, and is left as it was. Beside what the
    backward pass keeps anyway, the outputs of `modules` are held, and of `columns` the inputs.

    The numbers do not depend on the order of the examples or the batch size, but `elementwise`, which is the
    mean over batches of each batch's value.

    Args:
        model: runs `loader`'s batches.
        loader: of dicts, where the loss is `model(**batch).loss`, or of (inputs, labels).
        modules: layers inside `model` by name, see `neuron_stats`. A layer used several times counts each
            use; a weight that two modules share counts in each for itself, but in `elementwise` for both.
        needs: of `"contribution"`, `"labels"`, `"elementwise"`, `"input_norms"`. With class labels,
            `contribution` is kept for each class, T x n float64 a layer. `input_norms` alone takes forward
            passes alone, and leaves out padding that `attention_mask` marks.
        columns: names among `modules` whose columns are observed, too.
        loss: (output, labels) -> mean over the examples of the batch, for (inputs, labels) or instead of the
            model's own. A loss of labels (B, T), of which -100 do not count, is the mean over counted tokens,
            of a causal LM after its shift.
        num_classes: T; default the model's `config.num_labels`, else the highest label + 1. 0: the labels are
            no classes.
        progress: a bar on a terminal.

    Raises:
        ValueError: no data, no loss, labels that are missing where needed or out of range, a loss or gradient
            that is not finite, weight gradients of a quantised layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> batches = [(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))]
        >>> stats = observe_neurons(
        ...     net, batches, {"up": net[0]}, {"contribution"}, loss=nn.functional.cross_entropy
        ... )
        >>> stats["up"].contribution.shape, stats["up"].counts.tolist()
        (torch.Size([2, 3]), [2, 2])
    """
    for need in needs:
        if need not in FIELDS:
            raise ValueError(f"needs={need!r} is unknown{near(need, FIELDS)}")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must be at least 1, or 0 for labels that are no classes")
    for name in columns:
        if name not in modules:
            raise ValueError(f"columns={name!r} is none of the modules{near(name, modules)}")
    with ExitStack() as stack:
        stack.enter_context(_undisturbed(model))
        watch = _Watch(model, modules, frozenset(needs), frozenset(columns), loss, num_classes)
        stack.callback(watch.remove)
        watch.attach()
        number = 0
        for number, batch in enumerate(_shown(loader, progress), 1):
            watch.batch(batch, number)
        if not number:
            raise ValueError(
                "loader is empty: no importance can be told without an example; give one batch or more"
            )
        return watch.result()


class _Watch:
    """Hooks on the layers, and the sums that they fill."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        needs: frozenset[str],
        columns: frozenset[str],
        loss: Callable[[Any, Any], Tensor] | None,
        num_classes: int | None,
    ):
        self.model, self.needs, self.columns, self.loss = model, needs, columns, loss
        self.layers = {name: Layer(name, module) for name, module in modules.items()}
        for name in columns:
            self.layers[name].check_columns()
        self.backward = bool(needs - {"input_norms"})
        self.shifted = any(type(m).__name__.endswith(("ForCausalLM", "LMHeadModel")) for m in model.modules())
        self.num_classes = _classes_of(model) if num_classes is None else num_classes
        self.sums: dict[tuple[str, str], Tensor] = {}  # (what, layer) -> sum; a column's layer ends with ":"
        self.counts = torch.zeros(1, dtype=torch.int64)
        self.labelled: bool | None = None
        self.copied: set[str] = set()  # layers whose output or input the model changes in place
        self._handles: list[Any] = []

    def attach(self) -> None:
        for name, layer in self.layers.items():
            _ = layer.offset  # runs a norm once, which no hook must see
            self._handles.append(layer.module.register_forward_pre_hook(self._input_hook(name, layer)))
            if self.needs & CONTRIBUTION or (layer.kind == "norm" and "input_norms" in self.needs):
                self._handles.append(layer.module.register_forward_hook(self._output_hook(name, layer)))
        if "elementwise" in self.needs:
            by_weight: dict[nn.Parameter, list[str]] = {}
            for name, layer in self.layers.items():
                if layer.quantised:
                    raise ValueError(
                        f"elementwise needs the weight gradient of {name!r}, which is quantised; use 'taylor'"
                    )
                by_weight.setdefault(layer.module.weight, []).append(name)
            for weight, names in by_weight.items():
                weight.requires_grad_(True)
                self._handles.append(weight.register_post_accumulate_grad_hook(self._weight_hook(names)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def batch(self, batch: Any, number: int) -> None:
        """Runs one batch."""
        batch = moved(batch, self._device)
        inputs, labels = parts(batch)
        self._mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        self._batch_size = _batch_size(inputs)
        if not self.backward:
            with torch.no_grad():
                _call(self.model, inputs)
            return
        self._classes, counts = self._count(labels, number)
        self._units = int(counts.sum())
        self._totals: list[tuple[str, Tensor]] = []
        if not self._units:
            return  # not one token that counts
        with torch.enable_grad():
            loss = self._forward(batch, inputs, labels)
            changed = {name for name, held, version in self._kept if held._version != version}
            if changed:
                self.copied |= changed
                loss = self._forward(batch, inputs, labels)
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss has shape {tuple(loss.shape)} and must be one number, the mean over the "
                    "batch; let loss= reduce with 'mean'"
                )
            if not bool(loss.isfinite()):
                raise ValueError(f"batch {number} of the loader: the loss is {loss.item()}; {_WAY_OUT}")
            self._kept = []
            if not loss.requires_grad:
                raise ValueError(
                    "the loss depends on none of the modules; name layers that the model uses, and let it "
                    "run with gradients"
                )
            loss.backward()
        self._check_finite(number)
        self.counts = _grown(self.counts, len(counts)) + _grown(counts, len(self.counts))

    def result(self) -> dict[str, NeuronStats]:
        if self.backward and not int(self.counts.sum()):
            raise ValueError(
                "no label of the loader counts (all are -100), so there is no loss; check the labels"
            )
        found = {}
        for name, layer in self.layers.items():
            found[name] = stats = neuron_stats(name, layer.module, name in self.columns)
            self._fill(stats, name)
            if stats.columns is not None:
                self._fill(stats.columns, name + ":")
            if "input_norms" in self.needs:
                norms = self.sums["input_norms", name].sqrt()
                stats.input_norms = norms
                if layer.kind == "conv":
                    stats.input_norms = norms.repeat_interleave(layer.neurons // len(norms), 0)
                if stats.columns is not None:
                    stats.columns.input_norms = layer.norms_by_column(norms)
        return found

    def _fill(self, stats: NeuronStats, name: str) -> None:
        n, counts = len(stats), self.counts.to(self._device)

        def total(what: str, *size: int) -> Tensor:  # zeros where the loss does not depend on the layer
            zeros = torch.zeros(size, dtype=torch.float64, device=self._device)
            return self.sums.get((what, name), zeros)

        if self.needs & CONTRIBUTION:
            value = _grown(total("contribution", len(counts), n), len(counts))
            stats.contribution = value / counts.clamp(min=1)[:, None]
            stats.counts, stats.labelled = counts, bool(self.labelled)
        if "elementwise" in self.needs:
            stats.elementwise = total("elementwise", n) / counts.sum()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _forward(self, batch: Any, inputs: Any, labels: Tensor | None) -> Tensor:
        self._kept: list[tuple[str, Tensor, int]] = []
        if self.loss is not None:
            return self.loss(_call(self.model, inputs), labels)
        loss = getattr(_call(self.model, batch), "loss", None) if isinstance(batch, Mapping) else None
        if loss is None:
            raise ValueError(
                "there is no loss: give batches with labels to a model that computes its loss from them, or "
                "loss=, such as torch.nn.functional.cross_entropy"
            )
        return loss

    def _count(self, labels: Tensor | None, number: int) -> tuple[Tensor | None, Tensor]:
        """(B,) classes or None, and the examples of each class; or, of (B, T) labels, how many count."""
        if labels is not None and labels.is_floating_point():
            labels = None  # targets: examples without a class
        classes = labels if labels is not None and labels.ndim == 1 and self.num_classes != 0 else None
        if classes is None and "labels" in self.needs:
            raise ValueError(f"batch {number} of the loader has no class labels, which are needed; {_LABELS}")
        if self.labelled not in (None, classes is not None):
            raise ValueError(f"batch {number} of the loader differs from those before in having class labels")
        self.labelled = classes is not None
        if classes is None:
            if labels is None or labels.ndim == 1:
                return None, torch.tensor([self._batch_size])
            counted = labels[:, 1:] if self.shifted else labels
            return None, (counted != IGNORED).sum().cpu()[None]
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or (self.num_classes and high >= self.num_classes):
            raise ValueError(
                f"batch {number} of the loader has the label {low if low < 0 else high}, outside of "
                f"[0, {self.num_classes or 'number of classes'}); mend the labels, or "
                f"num_classes={self.num_classes}"
            )
        return classes, torch.bincount(classes, minlength=self.num_classes or 1).cpu()

    def _input_hook(self, name: str, layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            x = args[0]
            if layer.kind != "norm":
                self._add_squares(name, layer, x)
            if name not in self.columns or layer.kind == "embedding" or not torch.is_grad_enabled():
                return None
            held = self._hold(name, x)
            # a name of its own, whose gradient comes through this layer alone
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            x.register_hook(lambda g: self._arrived(name + ":", wide(g) * wide(held), layer.dim))
            return (x, *args[1:])

        return hook

    def _output_hook(self, name: str, layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if layer.kind == "norm":
                self._add_squares(name, layer, output)
            if not (torch.is_grad_enabled() and self.needs & CONTRIBUTION):
                return None
            held = self._hold(name, output)
            if not output.requires_grad:  # frozen up to here; cloned, since a leaf cannot be changed in place
                output = output.detach().requires_grad_().clone()
            if layer.kind == "embedding" and len(output) == 1 and self._classes is not None:
                # one row of positions for all examples: each gets its own, so that gradients stay apart
                output = output.expand(self._batch_size, *output.shape[1:]).clone()
            tokens = args[0] if layer.kind == "embedding" else None
            output.register_hook(lambda g: self._reduce(name, layer, g, held, tokens))
            return output

        return hook

    def _weight_hook(self, names: list[str]) -> Callable:
        def hook(weight: nn.Parameter) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            with torch.no_grad():
                for name in names:
                    layer = self.layers[name]
                    product = (wide(layer.weight()) * wide(layer.neuron_first(gradient))).abs_()
                    self._totals.append((name, product.sum()))
                    self._add("elementwise", name, product.flatten(1).sum(1) * self._units)
                    if name in self.columns:
                        by_column = product.transpose(0, 1).flatten(1).sum(1)
                        self._add("elementwise", name + ":", by_column * self._units)

        return hook

    def _hold(self, name: str, value: Tensor) -> Tensor:
        value = value.detach()
        if name in self.copied:
            return value.clone()
        self._kept.append((name, value, value._version))
        return value

    def _reduce(self, name: str, layer: Layer, g: Tensor, out: Tensor, tokens: Tensor | None) -> None:
        product = layer.contributions(g.detach(), out)
        if tokens is None:
            self._arrived(name, product, -1)
            return
        tokens = tokens.expand(product.shape[:-1])
        if layer.module.padding_idx is not None:  # torch gives it no gradient
            product = product.masked_fill((tokens == layer.module.padding_idx)[..., None], 0)
        if name in self.columns:
            self._arrived(name + ":", product, -1)
        value = product.sum(-1)
        self._totals.append((name, value.sum()))
        classes = torch.zeros(len(value), dtype=torch.int64, device=value.device)
        if self._classes is not None:
            self._check_examples(name, tuple(value.shape))
            classes = self._classes.repeat_interleave(len(value) // self._batch_size)
        T, n = self._rows(), layer.neurons
        sums = torch.zeros(T * n, dtype=torch.float64, device=value.device)
        sums.index_add_(
            0, (classes.view(-1, *[1] * (tokens.ndim - 1)) * n + tokens).flatten(), value.flatten().double()
        )
        self._add("contribution", name, sums.view(T, n) * self._units)

    def _arrived(self, name: str, product: Tensor, dim: int) -> None:
        """Adds g (out - b), or g x, whose neurons are in `dim`, to the sums of the examples' classes."""
        product = product.detach().movedim(dim, -1)
        value = product.flatten(1, -2).sum(1) if product.ndim > 2 else product  # (B or more, n)
        self._totals.append((name, value.sum()))
        if self._classes is None:
            sums = value.sum(0, keepdim=True, dtype=torch.float64)
        else:
            self._check_examples(name, tuple(product.shape))
            value_Bn = value.view(self._batch_size, -1, value.shape[1]).sum(1)
            sums = torch.zeros(self._rows(), value.shape[1], dtype=torch.float64, device=value.device)
            sums.index_add_(0, self._classes, value_Bn.double())
        self._add("contribution", name, sums * self._units)

    def _check_examples(self, name: str, shape: tuple[int, ...]) -> None:
        """An output must begin with the examples, of each as many rows, to be told apart by class."""
        B = self._batch_size
        if shape[0] % B or (len(shape) > 2 and shape[0] != B == shape[1]):
            raise ValueError(
                f"{name.rstrip(':')!r} puts out {shape} for {B} examples, which cannot be told apart; "
                "leave the layer out, or give num_classes=0 for one mean over all examples"
            )

    def _rows(self) -> int:
        return 1 if self._classes is None else self.num_classes or int(self._classes.max()) + 1

    def _add(self, what: str, name: str, value: Tensor) -> None:
        value = value.double()
        held = self.sums.get((what, name))
        if held is None:
            self.sums[what, name] = value
        elif len(held) >= len(value):
            held[: len(value)] += value
        else:
            value[: len(held)] += held
            self.sums[what, name] = value

    @torch.no_grad()
    def _add_squares(self, name: str, layer: Layer, x: Tensor) -> None:
        if "input_norms" not in self.needs:
            return
        x, mask = x.detach(), self._mask
        if layer.kind == "embedding" and len(x) == 1:  # one row of positions for all examples
            x = x.expand(self._batch_size, *x.shape[1:])
        tokens = None if mask is None or layer.kind == "conv" or mask.shape != x.shape[:2] else mask.bool()
        self._add("input_norms", name, layer.squares(x, tokens))

    def _check_finite(self, number: int) -> None:
        if not self._totals:
            return
        fine = torch.stack([total.double() for _, total in self._totals]).isfinite()
        if not bool(fine.all()):
            name = self._totals[int((~fine).nonzero()[0])][0].rstrip(":")
            raise ValueError(
                f"batch {number} of the loader: the gradient at {name!r} is not finite; {_WAY_OUT}"
            )


_WAY_OUT = "look at that batch, or load the model in float32 or bfloat16 if it is in float16"
_LABELS = (
    "give whole numbers of shape (B,) as batch['labels'] or as the second of (inputs, labels), "
    "and no num_classes=0"
)


def _grown(value: Tensor, size: int) -> Tensor:
    """`value` with zeros appended to `size` rows."""
    missing = size - len(value)
    return value if missing <= 0 else torch.cat([value, value.new_zeros(missing, *value.shape[1:])])


def _classes_of(model: nn.Module) -> int | None:
    """Of a transformers classifier; 0 of a regression; None where the model does not say."""
    config = getattr(model, "config", None)
    if getattr(config, "problem_type", None) == "regression":
        return 0
    number = getattr(config, "num_labels", None)
    return 0 if number == 1 else number


def moved(value: Any, device: torch.device) -> Any:
    """The tensors in dicts, lists and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def parts(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels or None) of a batch."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(f"loader gives {type(batch).__name__}; it must give dicts or (inputs, labels)")


def _batch_size(inputs: Any) -> int:
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    return len(inputs)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _shown(loader: Iterable[Any], progress: bool) -> Iterator[Any]:
    """The batches, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    if not progress or not Console().is_terminal:
        yield from loader
        return
    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    yield from track(loader, "observing neurons", total=total, transient=True)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, everything frozen; then modes, flags, gradients and the random state as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for parameter, _, _ in flags:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag, gradient in flags:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
