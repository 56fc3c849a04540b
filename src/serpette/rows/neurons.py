"""What a neuron is in each kind of layer: where it stands in the output, what its weights are and multiply.

Letters: n neurons (rows), f inputs (columns) of each, taps of a convolution's kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..types import NeuronStats


def neuron_stats(name: str, module: nn.Module, columns: bool = False) -> NeuronStats:
    """The weights of a layer, nothing observed: enough for `magnitude` and `random`.

    Args:
        name: goes into the ids of the neurons.
        module: Linear (quantised by bitsandbytes, too), GPT-2's Conv1D, a convolution, Embedding, or a norm
            with a 1-D weight. Of norms that multiply by 1 + weight (Gemma's), the weight here is that sum.
        columns: with the layer's columns.

    Raises:
        ValueError: another kind of layer; columns of a norm or a grouped convolution.

    Example:
        >>> stats = neuron_stats("up", nn.Linear(3, 5), columns=True)
        >>> len(stats), stats.weight().shape, stats.columns.weight().shape
        (5, torch.Size([5, 3]), torch.Size([3, 5]))
    """
    layer = Layer(name, module)
    ids = np.array([f"{name}.{i}" for i in range(layer.neurons)])
    stats = NeuronStats(lambda: wide(layer.weight()).flatten(1), ids)
    if columns:
        layer.check_columns()
        ids = np.array([f"{name}:{j}" for j in range(layer.inputs)])
        stats.columns = NeuronStats(lambda: wide(layer.weight()).transpose(0, 1).flatten(1), ids)
    return stats


class Layer:
    """What kind of layer a module is, where its neurons are, and its weight (n, f, ...)."""

    def __init__(self, name: str, module: Any):
        self.name, self.module = name, module
        self.kind = _kind(module)
        if self.kind is None:
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, whose neurons are not known; leave it out: linear "
                "layers, convolutions, embeddings and norms with one weight a channel have them"
            )
        self.dim = -1  # of the output, where its neurons are
        if self.kind == "conv":
            self.dim = -1 - len(module.kernel_size)
        elif isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
            self.dim = 1
        elif self.kind == "norm" and type(module).__name__.endswith("2d"):  # timm's LayerNorm2d
            self.dim = 1
        self._offset: float | None = None

    @property
    def transposed(self) -> bool:
        return type(self.module).__name__ == "Conv1D"  # GPT-2's

    @property
    def sizes(self) -> tuple[int, ...]:
        """(n, f, ...)"""
        if self.kind == "linear" and not self.transposed:
            return self.module.out_features, self.module.in_features  # a quantised weight may be packed
        shape = tuple(self.module.weight.shape)
        return shape[::-1] if self.transposed else shape

    @property
    def neurons(self) -> int:
        return self.sizes[0]

    @property
    def inputs(self) -> int:
        return self.sizes[1]

    @property
    def quantised(self) -> bool:
        weight = self.module.weight
        return not weight.is_floating_point() or hasattr(weight, "quant_state")

    def weight(self) -> Tensor:
        """(n, f, ...) in its own type; (n, 1) of a norm."""
        weight = self.module.weight.detach()
        if self.quantised:  # nn.Linear of bitsandbytes, 4 or 8 bits
            from peft.utils.integrations import dequantize_module_weight

            return dequantize_module_weight(self.module).detach()
        return self.neuron_first(weight + self.offset if self.kind == "norm" else weight)

    def neuron_first(self, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as (n, f, ...)."""
        return weight.t() if self.transposed else weight[:, None] if self.kind == "norm" else weight

    @property
    def offset(self) -> float:
        """What a norm adds to its weight before it multiplies: 1 in Gemma's, else 0."""
        if self._offset is None:
            self._offset = 0.0
            if self.kind == "norm" and type(self.module).__name__.endswith("RMSNorm"):
                weight = self.module.weight.detach()
                with torch.no_grad():
                    gain = self.module(torch.ones_like(weight)[None])[0]
                self._offset = float((gain - weight).float().mean().round())
        return self._offset

    def check_columns(self) -> None:
        if self.kind == "norm" or (self.kind == "conv" and self.module.groups > 1):
            raise ValueError(
                f"{self.name!r} ({type(self.module).__name__}) has no columns: a norm has one weight a "
                "channel, and an input of a grouped convolution reaches its group only; rank its rows"
            )

    def squares(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Sums of squares of what the weights multiply: (f,), (n, 1) or, of a convolution, (groups, f taps).

        x: the input; of a norm, the output, which is weight times what it multiplies.
        """
        if self.kind == "embedding":  # a token multiplies 1 each time that it occurs
            return torch.bincount(_unpadded(x, mask).flatten(), minlength=self.neurons)[:, None]
        x = wide(x)
        if self.kind == "norm":
            squares = (
                _unpadded(self.without_bias(x), mask).square().flatten(0, -2).sum(0, dtype=torch.float64)
            )
            return (squares[:, None] / self.weight().double().square()).nan_to_num(0, 0, 0)
        if self.kind == "conv":
            return self._conv_squares(x)
        return _unpadded(x, mask).square().flatten(0, -2).sum(0, dtype=torch.float64)

    def _conv_squares(self, x: Tensor) -> Tensor:
        """The gradient of a convolution's weight where each output has gradient 1 and the inputs are x^2."""
        module, groups = self.module, self.module.groups
        with torch.enable_grad():
            w = torch.zeros(groups, *self.sizes[1:], dtype=x.dtype, device=x.device, requires_grad=True)
            (found,) = torch.autograd.grad(module._conv_forward(x.square(), w, None).sum(), w)
        return found.flatten(1).double()  # (groups, f taps)

    def norms_by_column(self, norms: Tensor) -> Tensor:
        """What broadcasts to the transposed weight (f, n taps)."""
        if self.kind == "embedding":
            return norms.T
        f = self.inputs
        return norms.view(f, 1, -1).expand(-1, self.neurons if self.kind == "conv" else 1, -1).flatten(1)

    def contributions(self, g: Tensor, out: Tensor) -> Tensor:
        """Products g (out - bias), neurons last."""
        return wide(g.movedim(self.dim, -1)) * self.without_bias(wide(out))

    def without_bias(self, out: Tensor) -> Tensor:
        """The output less its bias, neurons last."""
        out, bias = out.movedim(self.dim, -1), getattr(self.module, "bias", None)
        return out if bias is None else out - bias.detach().to(out)


def _kind(module: Any) -> str | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
        return "linear"  # a quantised one
    return "norm" if getattr(getattr(module, "weight", None), "ndim", 0) == 1 else None


def wide(value: Tensor) -> Tensor:
    """Half precision as float32."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x[mask]
