"""LESS against cosines of autograd's own per-example gradients."""

import datasets as hf
import pytest
import torch
from peft import LoraConfig, get_peft_model

from serpette import score
from serpette.evaluate import spearman
from serpette.scorers import LESS
from serpette.zoo import tiny

N = 18


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny("vit"), LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    ).eval()
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    side = model.config.image_size
    x, y = torch.randn(N, 3, side, side, generator=g), torch.arange(N) % 3
    data = hf.Dataset.from_dict(
        {"id": [f"e{i}" for i in range(N)], "pixel_values": x.numpy(), "label": y.tolist()}
    )
    return model, data.with_format("torch"), x, y


def gradients(model, x, y):
    """(N, D) of the LoRA factors, one backward pass an example."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixel_values=x[i : i + 1]).logits, y[i : i + 1])
        loss.backward()
        rows.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n]))
    model.zero_grad()
    return torch.stack(rows)


def test_projection_keeps_the_cosines(job):
    model, data, x, y = job
    unit = torch.nn.functional.normalize(gradients(model, x, y).double(), dim=1)
    target = torch.nn.functional.normalize(unit[[2, 5]].sum(0), dim=0)
    exact = unit @ target
    found = score(model, data, LESS(target=["e2", "e5"], dim=60000), batch_size=5).values["less"]
    assert (found - exact).abs().max() < 0.06  # the error of a projection to p numbers falls with 1/sqrt(p)
    assert spearman(found, exact) > 0.97
    assert found.argmax() in (2, 5)


def test_same_for_any_order_and_batch_size(job):
    model, data, _, _ = job
    less = LESS(target=["e0"], dim=512)
    a = score(model, data, less, batch_size=4)
    b = score(model, data.select(range(N - 1, -1, -1)), less, batch_size=7)
    torch.testing.assert_close(a.values["less"], b.values["less"].flip(0), rtol=1e-4, atol=1e-5)


def test_a_data_set_as_target(job, tmp_path):
    model, data, _, _ = job
    plain = data.with_format(None).select([2, 5])
    plain.to_parquet(tmp_path / "target.parquet")
    from_file = LESS(target=str(tmp_path / "target.parquet"), target_split="train", dim=512)
    a = score(model, data, from_file, batch_size=6)
    b = score(model, data, LESS(target=["e2", "e5"], dim=512), batch_size=6)
    torch.testing.assert_close(a.values["less"], b.values["less"], rtol=1e-4, atol=1e-5)


def test_resumed_run_has_the_same_bits(job, tmp_path):
    model, data, _, _ = job
    less = LESS(target=["e1"], dim=256, warmup_steps=2)
    a = score(model, data, less, batch_size=4, out=tmp_path / "a")
    chunk = sorted((tmp_path / "a" / "observed").glob("*[0-9].safetensors"))[-1]
    chunk.unlink()
    b = score(model, data, less, batch_size=4, out=tmp_path / "a")
    assert torch.equal(a.values["less"], b.values["less"])


def test_bad_targets(job):
    model, data, _, _ = job
    with pytest.raises(ValueError, match=r"target=\(\) must say"):
        score(model, data, LESS())
    with pytest.raises(ValueError, match="'e99' is not among the examples"):
        score(model, data, LESS(target=["e99"]))
    with pytest.raises(ValueError, match="dim=0 must be at least 1"):
        LESS(target=["e1"], dim=0)
