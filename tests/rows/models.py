"""Layers and tiny models that train rows, and their slow twin: a dense model with masked gradients."""

import copy
import warnings

import torch
from peft import get_peft_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from serpette.rows import RowConfig
from serpette.rows.layer import row_layers


class GPT2Linear(Conv1D):
    """GPT-2's, with a bias that is not zero."""

    def __init__(self):
        super().__init__(12, 8)
        nn.init.normal_(self.bias)


GPT2Linear.__name__ = "Conv1D"


def image(channels=8):
    return torch.randn(3, channels, 6, 5)


def tokens():
    return torch.randint(0, 11, (4, 6))


# name -> (layer, input); float inputs get a gradient too
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), lambda: torch.randn(3, 5, 8)),
    "linear without bias": (lambda: nn.Linear(8, 12, bias=False), lambda: torch.randn(5, 8)),
    "linear, one example": (lambda: nn.Linear(8, 12), lambda: torch.randn(8)),
    "linear, strided input": (lambda: nn.Linear(8, 12), lambda: torch.randn(8, 5, 3).transpose(0, 2)),
    "linear, expanded input": (
        lambda: nn.Linear(8, 12, bias=False),
        lambda: torch.randn(1, 3, 8).expand(4, 3, 8).transpose(0, 1),
    ),
    "gpt2": (GPT2Linear, lambda: torch.randn(3, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2), lambda: torch.randn(3, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), image),
    "conv2d unbatched": (lambda: nn.Conv2d(8, 12, 3), lambda: torch.randn(8, 6, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(8, 12, (3, 2), dilation=2, padding=2, bias=False), image),
    "conv2d same": (lambda: nn.Conv2d(8, 12, (3, 5), padding="same"), image),
    "conv2d circular": (lambda: nn.Conv2d(8, 12, 3, padding=2, padding_mode="circular"), image),
    "conv2d reflect": (lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"), image),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 3, stride=2, groups=4), image),
    "conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="replicate"), image),
    "conv1d multiplier": (lambda: nn.Conv1d(4, 12, 3, groups=4), lambda: torch.randn(4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: torch.randn(2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(11, 8), tokens),
    "embedding, padding": (lambda: nn.Embedding(11, 8, padding_idx=3), tokens),
    "embedding, scaled": (lambda: Gemma3TextScaledWordEmbedding(11, 8, 0, embed_scale=2.5), tokens),
    "layer norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(3, 5, 8)),
    "layer norm without bias": (lambda: nn.LayerNorm(8, bias=False), lambda: torch.randn(5, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), lambda: torch.randn(3, 5, 8)),
    "rms norm of llama": (lambda: LlamaRMSNorm(8), lambda: torch.randn(3, 5, 8)),
    "rms norm of gemma": (lambda: GemmaRMSNorm(8), lambda: torch.randn(3, 5, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 8), image),
    "batch norm 1d": (lambda: nn.BatchNorm1d(8), lambda: torch.randn(6, 8)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(8), image),
}


class Net(nn.Module):
    """One layer to be adapted, and another before and behind it that are not."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def make_net(name, dtype=torch.float64):
    """The layer in a model, with all of its numbers random."""
    layer, x = LAYERS[name][0](), LAYERS[name][1]()
    with torch.no_grad():
        for key, value in layer.state_dict().items():
            if value.is_floating_point() and key != "embed_scale":
                value.copy_(torch.rand_like(value) + 0.5 if key == "running_var" else torch.randn_like(value))
    if x.is_floating_point():
        x = x.to(dtype).requires_grad_()
    return Net(layer).to(dtype), x


def adapted(net, copied=True, **options):
    """The row model of a copy of `net`; r=2 unless told otherwise."""
    config = RowConfig(**{"r": None if "fraction" in options else 2, "target_modules": ["layer"], **options})
    return get_peft_model(copy.deepcopy(net) if copied else net, config)


def randomise(model, adapter=None, scale=0.1):
    """Gives the changes values, as training would."""
    with torch.no_grad():
        for _, layer in row_layers(model):
            for held in (layer.rows_weight, layer.rows_bias, layer.rows_columns):
                for name, value in held.items():
                    if adapter in (None, name):
                        value.normal_(std=scale)
    return model


def trained_masks(model, adapter="default"):
    """{name of a parameter of the model without adapter: 1 where it trains}."""
    masks = {}
    for name, layer in row_layers(model):
        base = layer.get_base_layer()
        masks[f"{name}.weight"] = mask = torch.zeros_like(base.weight)
        first = mask.t() if getattr(layer, "transposed", False) else mask
        if adapter in layer.rows_index:
            first[layer.rows_index[adapter]] = 1
            if adapter in layer.rows_bias:
                masks[f"{name}.bias"] = torch.zeros_like(base.bias)
                masks[f"{name}.bias"][layer.rows_index[adapter]] = 1
        if adapter in layer.rows_column_index:
            first[:, layer.rows_column_index[adapter]] = 1
        if getattr(base, "padding_idx", None) is not None:
            first[base.padding_idx] = 0
    return masks


class DenseTwin:
    """A dense copy that moves only where a mask is 1; `decay` pulls towards its first weights."""

    def __init__(self, net, masks, optimizer, decay=0.0):
        self.net, self.masks = copy.deepcopy(net).requires_grad_(True), masks
        self.start = {k: v.detach().clone() for k, v in self.net.named_parameters()}
        self.optimizer, self.decay = optimizer(self.net.parameters()), decay

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, value in self.net.named_parameters():
                value.grad *= self.masks.get(name, torch.zeros_like(value))
                value -= self.decay * (value - self.start[name])
        self.optimizer.step()


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
