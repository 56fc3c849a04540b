"""Tiny random models of each family, an input for each, and zeros that fit their heads and channels."""

import copy

import torch
import transformers as hf
from torch import nn

from serpette.weights.groups import base_layer, find_groups
from serpette.zoo.tiny_models import make

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**WIDE, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}


def dinov2(**options):
    config = hf.Dinov2Config(**WIDE, mlp_ratio=3, image_size=32, patch_size=8, num_labels=3, **options)
    return hf.Dinov2ForImageClassification(config).eval()


def causal(name, **options):
    config = getattr(hf, f"{name}Config")(**{**TEXT, "num_key_value_heads": 2, **options})
    return getattr(hf, f"{name}ForCausalLM")(config).eval()


FAMILIES = {
    "vit": lambda: make("vit"),
    "dinov2": dinov2,
    "dinov2 swiglu": lambda: dinov2(use_swiglu_ffn=True),
    "bert": lambda: make("bert"),
    "llama": lambda: make("llama"),
    "mistral": lambda: causal("Mistral"),
    "qwen2": lambda: causal("Qwen2"),
}


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """Inverted residual: expand, depthwise, gate, project, with batch norms."""

    def __init__(self, width, wide):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2, self.gate = nn.BatchNorm2d(wide), Gate(wide)
        self.project, self.bn3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.bn2(self.depthwise(self.bn1(self.expand(x)).relu())).relu()
        return x + self.bn3(self.project(self.gate(y)))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(Block(12, 24), Block(12, 16))
        self.head = nn.Conv2d(12, 10, 3)
        self.classifier = nn.Linear(10 * 4 * 4, 3)

    def forward(self, x):
        x = self.head(self.blocks(self.bn(self.stem(x)).relu())).relu()
        return self.classifier(x.flatten(1))


def cnn():
    model = CNN()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL_IMAGES = IMAGES[:, :, :6, :6].clone()
TOKENS = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def inputs_of(model):
    if isinstance(model, CNN):
        return {"x": SMALL_IMAGES}
    return {"pixel_values": IMAGES} if hasattr(model.config, "patch_size") else {"input_ids": TOKENS}


def answer(model):
    with torch.no_grad():
        out = model(**inputs_of(model))
    return out if torch.is_tensor(out) else out.logits


def scramble(model):
    """The same model with weights of a size at which every head and channel can be seen in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


def masked(model, cuts, example_inputs=None):
    """A copy of `model` in which the columns that read the units `cuts` {group: [unit]} are zero."""
    model = copy.deepcopy(model)
    for group in find_groups(model, example_inputs=example_inputs):
        for member in group.members:
            if member.side == "columns":
                weight = base_layer(model.get_submodule(member.module)).weight
                with torch.no_grad():
                    weight[:, member.index[cuts.get(group.name, [])].flatten()] = 0
    return model
