"""The layers whose weights are pruned, LoRA or plain: found in a model, read for an importance, and cut.

O outputs, I inputs (of a convolution: of its patch).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ..lora_gradients import lora_layers
from ..tracing import ATTENTION
from ..types import LayerStats
from .groups import Targets
from .masked import MaskedLora, MaskGrad, masked_class
from .sequential import check_dropout

PREFIX = re.compile(r"^base_model\.model\.")
SQUARES = "input_squares"


def plain_name(name: str) -> str:
    """The name of a module once peft's wrapping is gone."""
    return PREFIX.sub("", name)


class PrunedLayer:
    """One layer that is pruned: peft's LoRA layer, swapped for a masked one, or a plain layer.

    Args:
        name: in `model.named_modules()`.
        module: a LoRA layer, `nn.Linear`, `nn.Conv2d` or GPT-2's Conv1D.
        mask_grad: see `serpette.weights.masked`.
    """

    def __init__(self, name: str, module: nn.Module, mask_grad: MaskGrad = "ste"):
        self.name, self.module, self.state = plain_name(name), module, dict[str, Tensor]()
        self.lora = hasattr(module, "lora_A")
        self._cut: Tensor | None = None
        self.products: Tensor | None = None
        self._hooks: list[Any] = []
        if self.lora:
            if not isinstance(module, MaskedLora):
                module.__class__ = masked_class(type(module))
            self.masked.mask_grad = mask_grad

    @property
    def masked(self) -> MaskedLora:
        """The module as a masked LoRA layer."""
        assert isinstance(self.module, MaskedLora)
        return self.module

    @property
    def base(self) -> nn.Module:
        """The layer without its LoRA."""
        return self.module.get_base_layer() if self.lora else self.module  # type: ignore[operator]

    @property
    def patch(self) -> int:
        """Columns of an input channel: 1, of a convolution its kernel's size."""
        weight = self.base.weight
        return weight[0, 0].numel() if isinstance(self.base, nn.Conv2d) else 1  # type: ignore[index]

    def frozen(self) -> Tensor:
        """The layer's own weight (O, I), a view that can be written to unless it is quantised."""
        if self.lora:
            return self.masked.frozen()
        weight = self.module.weight.detach()  # type: ignore[union-attr]
        return weight.t() if type(self.module).__name__ == "Conv1D" else weight.flatten(1)  # type: ignore

    def weight(self) -> Tensor:
        """What the layer computes with (O, I), in float32 or wider; zero where it is cut."""
        weight = self.masked.weight() if self.lora else self.frozen()
        return weight if weight.dtype == torch.float64 else weight.float()

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.frozen().shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.base.weight.device  # type: ignore[union-attr,return-value]

    # what an importance sees

    @property
    def collecting(self) -> bool:
        """Whether the backward pass keeps dL/dW."""
        return self.lora and self.masked.collect

    def collect(self, on: bool) -> None:
        """From now on the backward pass keeps dL/dW; what it kept is dropped."""
        if self.lora:
            self.masked.collect, self.masked.gradient = on, None

    def stats(self, needs: Iterable[str], gradient_scale: float = 1.0) -> LayerStats | None:
        """What `needs` asks for, gradients over `gradient_scale`; None where there is no such gradient."""
        stats = LayerStats(self.name, self.weight, state=self.state, input_norms=self._norms())
        if self.lora:
            A, B = self.masked.factors()
            stats.base = lambda: self.masked.frozen().to(A.dtype)
            stats.A, stats.B = A.detach(), B.detach()
            stats.scale, stats.sequential = self.masked.scale, self.masked.sequential
        if "lora" in needs:
            if not self.lora:
                return None
            name = self.masked.adapter()
            for field, factor in (("grad_A", "lora_A"), ("grad_B", "lora_B")):
                weight = getattr(self.module, factor)[name].weight
                if weight.grad is None:
                    return None
                setattr(stats, field, weight.grad.detach().flatten(1).to(A.dtype))
        if "gradient" in needs:
            gradient = self.masked.gradient if self.lora else self._own_gradient()
            if gradient is None:
                return None
            stats.gradient = gradient if gradient_scale == 1 else gradient / gradient_scale
        return stats

    def _own_gradient(self) -> Tensor | None:
        gradient: Tensor | None = self.module.weight.grad  # type: ignore[assignment,union-attr]
        if gradient is None:
            return None
        wide = gradient.detach().float() if gradient.dtype != torch.float64 else gradient.detach()
        return wide.t() if type(self.module).__name__ == "Conv1D" else wide.flatten(1)

    def watch_inputs(self) -> None:
        """From now on the norms of what goes in are added up, of whatever passes through the layer."""

        def look(x_NI: Tensor) -> None:
            squares = x_NI.double().square().sum(0)
            self.state[SQUARES] = self.state[SQUARES] + squares if SQUARES in self.state else squares

        self._watch(look)

    def watch_products(self) -> None:
        """From now on `products` adds up X^T X (I, I), float32, of what goes in."""

        def look(x_NI: Tensor) -> None:
            products = x_NI.float().t() @ x_NI.float()
            self.products = products if self.products is None else self.products + products

        self._watch(look)

    def _watch(self, look: Callable[[Tensor], None]) -> None:
        if odd := _odd_convolution(self.base):
            raise ValueError(
                f"the convolution {self.name!r} has {odd}, by which its inputs cannot be told; "
                f"exclude=[{self.name!r}], or use an importance without inputs"
            )

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, conv = args[0].detach(), self.base
            if isinstance(conv, nn.Conv2d):
                x = unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # type: ignore
            look(x.reshape(-1, x.shape[-1]))

        self._hooks.append(self.module.register_forward_pre_hook(hook))

    def _norms(self) -> Tensor | None:
        return self.state[SQUARES].sqrt() if SQUARES in self.state else None

    # what is cut

    @property
    def cut(self) -> Tensor:
        """(O, I) bool, True where a weight is removed."""
        cut = self.masked.cut if self.lora else self._cut
        if cut is not None:
            return cut
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device)

    def remove(self, cut: Tensor) -> None:
        """Removes the weights `cut` (O, I); those removed before stay so."""
        if self.lora:
            self.masked.cut = cut
            self.masked.zero_cut()
        else:
            self._cut = cut
            self.zero()

    def remove_lines(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Removes whole `rows` (O,) and `columns` (I,), bool; before them no others than these."""
        lines = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if rows is not None:
            lines |= rows[:, None]
        if columns is not None:
            lines |= columns
        if not self.lora or self.masked.keeps_base:
            return self.remove(lines)
        self.masked.cut_rows, self.masked.cut_columns = rows, columns
        self.masked.zero_cut()

    def forget_cut(self) -> None:
        """What was cut has left the layer."""
        self._cut = None
        if self.lora:
            self.masked.cut = self.masked.cut_rows = self.masked.cut_columns = None

    def zero(self, *args: Any) -> None:
        """Zeroes what is cut in a plain layer, unseen by autograd: an optimizer may have moved it."""
        if self._cut is not None:
            weight = self.module.weight.data  # type: ignore[union-attr]
            cut = self._cut.t() if type(self.module).__name__ == "Conv1D" else self._cut
            weight.masked_fill_(cut.view(weight.shape), 0)  # type: ignore[operator]

    def keep_zero(self) -> None:
        """From now on a plain layer is zeroed before each forward pass."""
        if not self.lora:
            self._hooks.append(self.module.register_forward_pre_hook(self.zero))

    def release(self) -> None:
        """Takes the hooks off and drops what was collected; what is cut stays so."""
        self.zero()
        self.collect(False)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.state.clear()
        self.products = None


def pruned_layers(
    model: nn.Module,
    targets: Targets = "both",
    exclude: Sequence[str] = (),
    mask_grad: MaskGrad = "ste",
) -> list[PrunedLayer]:
    """The layers of `model` that are pruned, in its order: those with LoRA, or without LoRA the plain ones.

    Where some are inside blocks (any `nn.ModuleList`), only those; else LoRA layers wherever they are, or all
    plain ones but the last linear layer. Embeddings, heads, norms and biases are never pruned.

    Args:
        targets: `"attention"`, `"ffn"` (what is not attention) or `"both"`.
        exclude: names, parts of names or patterns (`*.0.*`) of modules that are left alone.

    Raises:
        ValueError: nothing left, a `lora_dropout`, tied weights, several active adapters, DoRA, layers that
            are pruned already, and what else cannot be pruned; names it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if any(hasattr(module, "lora_A") for module in model.modules()):
        head = _head(model)
        found = [(layer.name, model.get_submodule(layer.name)) for layer in lora_layers(model)]
        found = [(name, m) for name, m in found if m.get_base_layer() is not head]  # type: ignore[operator]
        blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        inside = {id(m) for block in blocks for m in block.modules()}
        found = [(name, m) for name, m in found if id(m) in inside] or found
        for name, module in found:
            _check_lora(plain_name(name), module)
    else:
        found = [(names[id(m)], m) for m in _plain_layers(model)]
    everything = found
    if targets != "both":
        found = [(n, m) for n, m in found if bool(ATTENTION.fullmatch(n)) == (targets == "attention")]
    for pattern in exclude:
        hit = [n for n, _ in everything if _matches(plain_name(n), pattern)]
        if not hit:
            raise ValueError(
                f"exclude={pattern!r} matches no layer that is pruned; they are "
                + ", ".join(plain_name(n) for n, _ in everything[:3])
                + ("..." if len(everything) > 3 else "")
            )
        found = [(n, m) for n, m in found if n not in hit]
    if not found:
        raise ValueError(
            f"targets={targets!r} and exclude={list(exclude)} leave no layer of {type(model).__name__} to "
            "prune; name less"
        )
    _check_tied(model, found)
    return [PrunedLayer(name, module, mask_grad) for name, module in found]


def _matches(name: str, pattern: str) -> bool:
    return pattern in name if not set(pattern) & set("*?[") else fnmatch.fnmatch(name, pattern)


def _head(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head: Any = get() if get else None
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head


def _plain_layers(model: nn.Module) -> list[nn.Module]:
    def weights(root: nn.Module) -> list[nn.Module]:
        kinds = (nn.Linear, nn.Conv2d)
        return [m for m in root.modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]

    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = {id(m): m for block in blocks for m in weights(block)}
    head = _head(model)
    if inside:
        return [m for m in inside.values() if m is not head]
    layers = weights(model)
    last = next((m for m in reversed(layers) if isinstance(m, nn.Linear)), None)
    return [m for m in layers if m is not last and m is not head]


def _check_lora(name: str, module: Any) -> None:
    check_dropout(name, module)
    adapter = module.active_adapters[0]
    if module.lora_B[adapter].bias is not None:
        raise ValueError(
            f"the LoRA of {name!r} has a bias (lora_bias=True), which pruning does not know; leave it off"
        )
    if getattr(module, "cut", None) is not None:
        raise ValueError(
            f"{name!r} is pruned already; merge first (merge_and_unload) and give the result a new LoRA, or "
            "resume from a checkpoint"
        )
    base = module.get_base_layer()
    if odd := _odd_convolution(base):
        raise ValueError(f"the convolution {name!r} has {odd}; leave it out of target_modules")


def _odd_convolution(base: Any) -> str | None:
    """What makes `base` a convolution whose inputs are not the patches that `unfold` finds."""
    if not isinstance(base, nn.Conv2d):
        return None
    odd = {
        "groups": base.groups > 1,
        "padding": isinstance(base.padding, str),
        "padding_mode": base.padding_mode != "zeros",
    }
    return next((f"{name}={getattr(base, name)!r}" for name, found in odd.items() if found), None)


def _check_tied(model: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "lora_" not in name and isinstance(getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(module.weight), []).append(plain_name(name))
    for name, module in found:
        base: Any = module.get_base_layer() if hasattr(module, "lora_A") else module  # type: ignore[operator]
        shared = {n.removesuffix(".base_layer") for n in owners.get(id(base.weight), [])}
        others = sorted(shared - {plain_name(name)})
        if others:
            raise ValueError(
                f"{plain_name(name)!r} shares its weight with {', '.join(map(repr, others))}; "
                f"leave it alone: exclude=[{plain_name(name)!r}]"
            )
