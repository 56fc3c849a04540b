r"""EfficientNet-Lite0 for transformers: inverted bottlenecks, BatchNorm, ReLU6, no squeeze-and-excitation.

    block(x) = x + project(depthwise(expand(x)))        (the sum only where the shapes agree)

Tan and Le 2019, arXiv 1905.11946; the Lite variant is from the TPU repository of its authors.
Differs from the original: no stochastic depth while training.
Letters: B batch, H and W pixels, C channels of a layer.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

#          repeats, kernel, stride, expansion, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PretrainedConfig):
    """Sizes of the network: `stages` of (repeats, kernel, stride, expansion, channels out)."""

    model_type = "efficientnet_lite"

    def __init__(
        self, stages=STAGES, stem_channels=32, hidden_size=1280, image_size=224, dropout=0.2, **kwargs
    ):
        self.stages = [list(stage) for stage in stages]
        self.stem_channels, self.hidden_size = stem_channels, hidden_size
        self.image_size, self.dropout = image_size, dropout
        super().__init__(**kwargs)


class SameConv2d(nn.Conv2d):
    """A convolution whose output is ceil(input / stride) wide; odd padding goes to the right and below."""

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding) if any(padding) else input)


def _unit(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True):
    layers = {
        "conv": SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False),
        "norm": nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.01),
    }
    unit = nn.Sequential()
    for name, layer in layers.items():
        unit.add_module(name, layer)
    if activate:
        unit.add_module("act", nn.ReLU6())
    return unit


class InvertedBottleneck(nn.Module):
    """Expand with 1x1, filter each channel, project back with 1x1."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        c = c_in * expansion
        self.expand = _unit(c_in, c, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _unit(c, c, kernel, stride, groups=c)
        self.project = _unit(c, c_out, 1, activate=False)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    """Initialisation and naming that both heads share."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)  # type: ignore[arg-type]
            nn.init.ones_(module.running_var)  # type: ignore[arg-type]
            nn.init.zeros_(module.num_batches_tracked)  # type: ignore[arg-type]


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """The network without a head. `pooler_output` is (B, 1280), the mean over the last feature map."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = _unit(3, config.stem_channels, 3, 2)
        self.blocks = nn.ModuleList()
        c = config.stem_channels
        for repeats, kernel, stride, expansion, c_out in config.stages:
            for i in range(repeats):
                self.blocks.append(InvertedBottleneck(c, c_out, kernel, stride if i == 0 else 1, expansion))
                c = c_out
        self.head = _unit(c, config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **kwargs):
        x = self.stem(pixel_values)  # (B, 32, H/2, W/2)
        for block in self.blocks:
            x = block(x)
        x = self.head(x)  # (B, 1280, H/32, W/32)
        pooled = x.mean(dim=(2, 3))  # (B, 1280)
        if not return_dict:
            return x, pooled
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=x, pooler_output=pooled)


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """The network with dropout and a linear `classifier`; a regression with `problem_type="regression"`."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.backbone = EfficientNetLiteModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True, **kwargs):
        pooled = self.backbone(pixel_values).pooler_output
        logits = self.classifier(self.dropout(pooled))  # (B, num_labels)
        loss = None
        if labels is not None:
            if self.config.problem_type == "regression":
                loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
            else:
                loss = F.cross_entropy(logits, labels)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def from_original_name(name: str) -> str:
    """`_blocks.3._bn1.weight` of the published checkpoint -> `backbone.blocks.3.depthwise.norm.weight`."""
    if name.startswith("_fc."):
        return "classifier." + name.removeprefix("_fc.")
    inside = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    outside = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        block, layer, tensor = match.groups()
        return f"backbone.blocks.{block}.{inside[layer]}.{tensor}"
    layer, tensor = name.split(".")
    return f"backbone.{outside[layer]}.{tensor}"


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModelForImageClassification.register(
    EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True
)
