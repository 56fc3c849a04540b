import pytest
import torch

from serpette import zoo
from serpette.zoo.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    SameConv2d,
    from_original_name,
)


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert", "llama"])
def test_tiny_models_learn_from_their_seed(kind):
    a, b, c = zoo.tiny(kind), zoo.tiny(kind), zoo.tiny(kind, seed=1)
    state_a, state_b, state_c = a.state_dict(), b.state_dict(), c.state_dict()
    assert all(torch.equal(state_a[k], state_b[k]) for k in state_a)
    assert any(not torch.equal(state_a[k], state_c[k]) for k in state_a)
    assert not a.training and a.num_parameters() < 30_000


@pytest.mark.parametrize(
    ("kind", "inputs"), [("vit", "pixel_values"), ("resnet", "pixel_values"), ("bert", "input_ids")]
)
def test_tiny_classifiers_run_and_learn(kind, inputs):
    model = zoo.tiny(kind, num_labels=5)
    x = torch.randn(2, 3, 32, 32) if inputs == "pixel_values" else torch.randint(1, 100, (2, 7))
    out = model(**{inputs: x}, labels=torch.tensor([0, 4]))
    assert out.logits.shape == (2, 5)
    out.loss.backward()


def test_tiny_llama_has_grouped_heads():
    model = zoo.tiny("llama")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (32, 32) and attention.k_proj.weight.shape == (16, 32)
    assert model(torch.randint(3, 100, (2, 5))).logits.shape == (2, 5, 100)


@pytest.mark.parametrize("size", [7, 8, 15])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (1, 1)])
def test_same_padding_by_hand(size, kernel, stride):
    layer = SameConv2d(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    padded = torch.zeros(size + total, size + total, dtype=torch.float64)
    padded[total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x[0, 0]
    expected = torch.empty(out, out, dtype=torch.float64)
    for i in range(out):
        for j in range(out):
            window = padded[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            expected[i, j] = (window * layer.weight[0, 0]).sum()
    torch.testing.assert_close(layer(x)[0, 0], expected)


def small_lite(**fields):
    stages = [(1, 3, 1, 1, 4), (2, 3, 2, 6, 8)]
    return EfficientNetLiteConfig(stages=stages, stem_channels=4, hidden_size=16, **fields)


def test_lite_survives_saving(tmp_path):
    from transformers import AutoModelForImageClassification

    model = EfficientNetLiteForImageClassification(small_lite(num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)


def test_lite_regression_loss():
    model = EfficientNetLiteForImageClassification(small_lite(num_labels=1, problem_type="regression")).eval()
    x, y = torch.randn(4, 3, 32, 32), torch.randn(4)
    out = model(x, labels=y)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - y) ** 2).mean())


def test_every_published_name_has_a_place():
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    assert len(model.backbone.blocks) == 16 and model.num_parameters() == 4_652_008
    ours = set(model.state_dict())
    for name in ("_conv_stem.weight", "_bn0.running_var", "_conv_head.weight", "_bn1.bias", "_fc.weight"):
        assert from_original_name(name) in ours
    for layer in ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"):
        assert from_original_name(f"_blocks.15.{layer}.weight") in ours
