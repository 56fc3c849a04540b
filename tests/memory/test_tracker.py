"""Bytes kept for the backward pass, as formulas; and bytes alive, by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from serpette.memory import LiveBytes, saved_bytes
from serpette.memory.shapes import without_memory
from serpette.rows import RowConfig

T, IN, OUT, R = 24, 40, 56, 8
INDEX = 8 * R  # positions are int64


class Frozen(nn.Module):
    """A linear layer inside a model: its input needs a gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.layer(x)


def saved(model):
    return saved_bytes(model, torch.zeros(T, IN, requires_grad=True))


def with_rows(**options):
    return get_peft_model(Frozen(), RowConfig(r=R, target_modules=["layer"], **options))


def with_lora(dropout=0.0, **options):
    config = LoraConfig(r=R, target_modules=["layer"], lora_dropout=dropout, **options)
    return get_peft_model(Frozen(), config)


def test_linear_under_each_tuner():
    assert saved(Frozen().requires_grad_(False)) == 0
    assert saved(Frozen()) == T * IN * 4
    # the rows' and columns' positions are buffers of the model, so they do not count
    assert saved(with_rows()) == T * IN * 4
    assert saved(with_rows(modes="columns")) == T * R * 4
    assert saved(with_rows(modes="both")) >= T * IN * 4  # columns could be had from the whole x
    assert saved(with_lora()) == T * IN * 4 + T * R * 4  # x for A, A x for B
    assert saved(with_lora().requires_grad_(False)) == 0


def test_dropout_keeps_a_second_input_and_its_mask():
    model = with_lora(0.1).train()
    extra = saved(model) - T * R * 4
    assert extra == T * IN * 4 + T * IN * 4  # the dropped-out input and a mask of floats; not x
    with without_memory("cuda"):  # a mask of bytes
        assert saved(with_lora(0.1).train()) - T * R * 4 == T * IN * 4 + T * IN
    assert saved(model.eval()) == T * IN * 4 + T * R * 4


def test_a_storage_counts_once_and_whole():
    class Twice(nn.Module):
        def forward(self, x):
            half = x[: T // 2]
            return half * half.exp()  # keeps half (of x), and exp

    assert saved_bytes(Twice(), torch.zeros(T, IN, requires_grad=True)) == T * IN * 4 + T // 2 * IN * 4


def test_what_is_detached_is_not_kept():
    class Detached(nn.Module):
        def forward(self, x):
            return x * (x.exp() * x).sum().detach()  # keeps the sum, and exp only until it is detached

    assert saved_bytes(Detached(), torch.zeros(T, IN, requires_grad=True)) == 4


def test_checkpointing_keeps_the_input_of_the_block():
    class Block(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.inner, self.way = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN)), way

        def forward(self, x):
            x = x * 1
            return self.inner(x) if self.way is None else checkpoint(self.inner, x, use_reentrant=self.way)

    assert saved(Block(None)) == T * (IN + OUT + OUT) * 4
    assert saved(Block(False)) == saved(Block(True)) == T * IN * 4


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = a.view(10, 10)  # the same storage
        c = a + 1
        assert live.now == 800
        del a
        assert live.now == 800  # b still looks into it
        del b, c
        assert (live.now, live.peak) == (0, 800)
        live.restart()
        torch.zeros(10)
        assert live.peak == 40


def test_live_bytes_of_what_was_there_before():
    x = torch.zeros(100)
    live = LiveBytes()
    live.hold([x, x[1:]])
    with live:
        x.add_(1)  # in place: nothing new
        assert live.now == 400


@pytest.mark.parametrize("kind", ["dict", "tuple", "tensor"])
def test_forms_of_a_batch(kind):
    batch = {"dict": {"x": torch.zeros(T, IN)}, "tuple": (torch.zeros(T, IN),), "tensor": torch.zeros(T, IN)}
    assert saved_bytes(Frozen(), batch[kind]) == T * IN * 4
