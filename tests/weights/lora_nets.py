"""A tiny transformer with grouped heads, plain or with LoRA, and a loop that tunes it."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from serpette.weights import attach

WIDTH, HEADS, KV_HEADS, HEAD = 16, 4, 2, 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = HEAD
        self.q_proj, self.o_proj = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KV_HEADS * HEAD) for _ in range(2))

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, -1, HEAD).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        p = (q @ k.mT / HEAD**0.5).softmax(-1)
        return self.o_proj((p @ v).transpose(1, 2).reshape(n, t, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(), MLP()

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """(N, T, 16) -> 3 classes; its linear layers are wide enough for 2:4."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 3)

    def forward(self, x, labels=None):
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(1))
        return ModelOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def lora(model, trained=False, targets=ALL, **options):
    """`model` with LoRA; `trained`: with B that is not zero."""
    torch.manual_seed(1)
    made = get_peft_model(
        model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": targets} | options))
    )
    if trained:
        for name, p in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return made


def lora_net(dtype=torch.float64, **options):
    return lora(net(dtype), **options).to(dtype)


def batch(n=12, dtype=torch.float64, seed=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    return {"x": x, "labels": torch.arange(n) % 3}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, data):
    loss = model(**data).loss
    loss.backward()
    return loss.item()


def tune(model, config, steps=20, optimizer=None, data=None, each=None, finish=True):
    """(pruner, losses) of a plain loop; `each(step, pruner)` is called before the optimizer's step."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2)
    dtype = next(model.parameters()).dtype
    pruner, losses = attach(model, config, steps, optimizer), []
    for step in range(1, steps + 1):
        losses.append(backward(model, data or batch(dtype=dtype)))
        pruner.step(optimizer)
        if each:
            each(step, pruner)
        optimizer.step()
        optimizer.zero_grad()
    return pruner.finish() if finish else pruner, losses


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
