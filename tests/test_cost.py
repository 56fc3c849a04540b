"""Seconds, memory and FLOPs against what is known beforehand."""

import json
import threading
import time

import pytest
import torch
from torch import nn

from serpette.cost import forward_flops, hardware, measure, train_flops, versions


def test_measure_sees_time_and_a_passing_peak():
    with measure() as idle:
        pass
    with measure() as cost:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)  # 64 MiB, gone before the block ends
        time.sleep(0.12)
        del block
    assert 0.1 < cost.seconds < 5 and idle.seconds < 0.1
    assert cost.peak_bytes - idle.peak_bytes > 50 * 2**20
    assert not [t for t in threading.enumerate() if t.name == "serpette-memory"]


def test_measure_lets_errors_through_and_still_measures():
    with pytest.raises(RuntimeError, match="inside"):
        with measure() as cost:
            time.sleep(0.01)
            raise RuntimeError("inside")
    assert cost.seconds >= 0.01 and cost.peak_bytes > 0
    assert not [t for t in threading.enumerate() if t.name == "serpette-memory"]


def test_measure_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with measure("cuda") as cost:
        torch.ones(32 * 2**20, dtype=torch.uint8, device="cuda")
    assert cost.peak_bytes >= 32 * 2**20 and cost.seconds > 0
    assert "gpu" in hardware("cuda")


def test_versions_and_hardware_are_json():
    found, machine = versions(), hardware()
    assert {"python", "torch", "serpette"} <= set(found)
    assert set(machine) == {"cpu", "cores", "threads", "memory_bytes", "device"}
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28 and machine["cpu"]
    json.dumps([found, machine])


def attention_blocks(batch, tokens, width, hidden):
    """FLOPs of one transformer block: four projections, two products of attention, two of the MLP."""
    products = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    return 2 * batch * products


def test_flops_of_a_vision_transformer_with_its_attention():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                          patch_size=14, mlp_ratio=2, num_labels=3)  # fmt: skip
    model, images = Dinov2ForImageClassification(config), torch.zeros(2, 3, 28, 28)
    embed, head = 2 * 2 * 4 * (3 * 14 * 14) * 32, 2 * 2 * 64 * 3
    assert forward_flops(model, images) == 2 * attention_blocks(2, 5, 32, 64) + embed + head
    assert forward_flops(model, {"pixel_values": images}) == forward_flops(model, images)


def test_flops_of_bert_with_its_attention():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
        )
    )
    inputs = {
        "input_ids": torch.ones(2, 6, dtype=torch.long),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    forward = 2 * attention_blocks(2, 6, 32, 64) + 2 * 2 * (32 * 32 + 32 * 2)
    assert forward_flops(model, inputs) == forward
    inputs["labels"] = torch.tensor([0, 1])
    assert train_flops(model, inputs) == 3 * forward  # backward: two products for each of the forward pass


def test_train_flops_of_frozen_parts_and_nothing_changes():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    model[3].eval()
    x = torch.randn(5, 8)
    first, last = 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
    state, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    assert forward_flops(model, (x,)) == first + last
    assert train_flops(model, x) == 2 * first + 3 * last  # no gradient for the input
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert train_flops(model, x) == first + 2 * last
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(seed, torch.random.get_rng_state())
    assert [m.training for m in model] == [True, True, True, False]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        train_flops(model, x)
