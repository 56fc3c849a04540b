"""Recomputation: the same gradients to the bit, and what is not kept, as a formula."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from serpette.memory import LiveBytes, recompute, saved_bytes, step_memory
from serpette.rows import RowConfig

T, D, F, LAYERS = 12, 32, 48, 2


def llama(seed=0):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=T, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).double()


def bert(seed=0):
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=T, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).double()


def batch_of(model):
    ids = torch.arange(2 * T).view(2, T) % 50
    causal = model.get_output_embeddings() is not None
    return {"input_ids": ids, "labels": ids if causal else torch.tensor([0, 1])}


LINEARS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
LINEARS["bert"] = ["query", "key", "value", "output.dense", "intermediate.dense"]


def tune(model, how):
    targets = LINEARS["llama" if hasattr(model, "lm_head") else "bert"]
    if how == "rows":
        return get_peft_model(model, RowConfig(r=4, target_modules=targets))
    if how == "lora":
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


def gradients(model, batch):
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("how", ["rows", "lora", "full"])
def test_gradients_are_equal_to_the_bit(make, how):
    model = tune(make(), how)
    batch = batch_of(model)
    plain, kept = gradients(model, batch), saved_bytes(model, batch)
    with recompute(model):
        again = gradients(model, batch)
        assert len(plain) == len(again) > 4
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        assert saved_bytes(model, batch) < kept
    assert saved_bytes(model, batch) == kept


def test_what_a_llama_with_rows_no_longer_keeps():
    model = tune(llama().float(), "rows")
    batch, tokens = batch_of(model), 2 * T * 4
    kept = saved_bytes(model, batch)
    with recompute(model, gated=False):
        assert kept - saved_bytes(model, batch) == (LAYERS * 2 - 1) * tokens * D  # not the first
    with recompute(model, norms=False):
        assert kept - saved_bytes(model, batch) == LAYERS * 2 * tokens * F  # act(gate) and the product


def test_the_peak_of_a_step_falls_too():
    model = tune(llama(), "rows")
    batch = batch_of(model)
    plain = step_memory(model, batch, "sgd")
    with recompute(model):
        less = step_memory(model, batch, "sgd")
    assert less.activations < plain.activations and less.peak < plain.peak


def test_several_readers_share_one_computation():
    norm = nn.LayerNorm(8)
    calls = []
    forward = norm.forward
    norm.forward = lambda x: calls.append(1) or forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = norm, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.norm(x)
            return self.q(x) + self.k(x)

    net = Net()
    with recompute(net):
        out = net(torch.randn(4, 8)).sum()
        assert len(calls) == 1
        out.backward()
    assert len(calls) == 2


def test_another_use_of_the_four_parts_is_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)

    net = Other()
    with recompute(net), pytest.raises(ValueError, match="gated=False"):
        net(torch.randn(4, 8))
    net(torch.randn(4, 8)).sum().backward()  # nothing is left behind


def test_a_model_without_such_modules_is_refused():
    with pytest.raises(ValueError, match="no norm and no gated MLP"):
        recompute(nn.Linear(3, 3))


def test_a_norms_input_changed_in_place_is_noticed():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with recompute(net):
        out = net(x).sum()
        x.add_(1)
        with pytest.raises(RuntimeError, match="in place|inplace"):
            out.backward()


def test_a_forward_pass_without_a_backward_pass_leaves_nothing():
    model = tune(llama(), "rows")
    batch = batch_of(model)
    with recompute(model), LiveBytes() as live:
        model(**batch)
        first = live.now  # what the model keeps for itself
        for _ in range(3):
            model(**batch)
        assert live.now == first


def test_what_autograd_keeps_is_still_watched():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Sigmoid())
    with recompute(net):
        out = net(torch.randn(4, 8))
        out.add_(1)
        with pytest.raises(RuntimeError, match="in place|inplace"):
            out.sum().backward()


def test_autocast_is_the_same_in_the_second_computation():
    net = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    found = []
    for use in (False, True):
        handle = recompute(net) if use else None
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).float().sum()
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters()])
        if handle:
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
