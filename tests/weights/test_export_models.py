import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from serpette.weights.export import semi_structured, to_onnx, why_not_semi_structured
from serpette.weights.patterns import NM
from serpette.zoo import tiny_models


class Tokens(nn.Module):
    """Mean of the embeddings of the tokens that count, with another argument between."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, input_ids, unused=None, attention_mask=None):
        x = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.head(x.sum(1) / attention_mask.sum(1, keepdim=True)), "states": x}


def tokens(batch, length=5):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(0, 11, (batch, length))}


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def run(path, names, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = inputs if isinstance(inputs, dict) else {session.get_inputs()[0].name: inputs}
    return [torch.from_numpy(o) for o in session.run(names, {k: v.numpy() for k, v in feed.items()})]


def test_a_pruned_model_computes_the_same_in_onnxruntime(tmp_path):
    import onnx
    from onnx import numpy_helper

    model = net().train()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    assert to_onnx(model, torch.randn(2, 4), tmp_path / "net.onnx") < 1e-6
    assert model.training and model[2].training
    x = torch.randn(7, 4)
    assert torch.allclose(run(tmp_path / "net.onnx", None, x)[0], model.eval()(x), atol=1e-6)
    stored = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer]
    assert sum(int((t == 0).sum()) for t in stored if t.ndim == 2) == 16


def test_inputs_and_outputs_keep_their_names(tmp_path):
    model = Tokens()
    to_onnx(model, tokens(2), tmp_path / "tokens.onnx")
    inputs = tokens(4, 9)
    expected = model(**inputs)
    for found, name in zip(run(tmp_path / "tokens.onnx", list(expected), inputs), expected, strict=True):
        assert torch.allclose(found, expected[name], atol=1e-6)


class Pretends(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x):
        return x + 2.5 if torch.compiler.is_compiling() else x * torch.nan if x.sum() > 1e4 else x


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    model, x = Pretends(), torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match=r"onnxruntime gives 3 where torch gives 0.5, .* tolerance=0.0001"):
        to_onnx(model, x, tmp_path / "net.onnx", dynamic=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="where torch gives nan"):
        to_onnx(model, x + 1e5, tmp_path / "net.onnx", dynamic=False, tolerance=1e9)


def test_onnx_refusals(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"parameter '0.weight' is torch.bfloat16, .* model.float\(\)"):
        to_onnx(net().bfloat16(), torch.randn(2, 4), path)
    with pytest.raises(ValueError, match="merge_and_unload"):
        to_onnx(get_peft_model(net(), LoraConfig(target_modules=["0"])), torch.randn(2, 4), path)
    one_token = tokens(3, 1)
    for inputs, name in [
        (torch.randn(1, 4), "0"),
        (one_token, "attention_mask"),
        ((torch.tensor(1.0),), "0"),
    ]:
        with pytest.raises(ValueError, match=f"example_inputs: '{name}' .* dynamic=False"):
            to_onnx(net(), inputs, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"to_onnx needs onnxruntime: pip install 'serpette\[onnx\]'"):
        to_onnx(net(), torch.randn(2, 4), path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", "bert", "llama"])
def test_real_architectures(tmp_path, kind):
    model = tiny_models.make(kind)
    inputs = tokens(2) if kind in ("bert", "llama") else {"pixel_values": torch.randn(2, 3, 32, 32)}
    assert to_onnx(model, inputs, tmp_path / "model.onnx") < 1e-5
    if kind == "llama":
        assert model.config.use_cache


def two_of_four(rows=32, columns=64, dtype=torch.bfloat16):
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        weight = linear.weight
        weight[NM(2, 4)({"w": weight.abs()}, {}, 0.5)["w"]] = 0
    return linear.to(dtype)


@pytest.mark.parametrize(
    "linear, reason",
    [
        (two_of_four(), None),
        (two_of_four(dtype=torch.float16), None),
        (two_of_four(dtype=torch.float32), "is torch.float32"),
        (two_of_four(rows=48), r"has shape (48, 64)"),
        (two_of_four(columns=32), r"has shape (32, 32)"),
        (nn.Linear(64, 32).bfloat16(), "is not 2:4 sparse"),
    ],
)
def test_why_not_semi_structured(linear, reason):
    found = why_not_semi_structured(linear)
    assert found is None if reason is None else reason in found


def test_semi_structured_refusals():
    with pytest.raises(ValueError, match="no linear layer can be converted .0 is not 2:4 sparse.*'2:4'"):
        semi_structured(nn.Sequential(nn.Linear(64, 32).bfloat16()), torch.zeros(1, 64))
    with pytest.raises(ValueError, match="layer '0' is on cpu, but 2:4 kernels need CUDA"):
        semi_structured(nn.Sequential(two_of_four()), torch.zeros(1, 64))


@pytest.fixture
def sparse_on_the_cpu(monkeypatch):
    """Lets the conversion run without a GPU: a dense "sparse" tensor, and times by the fixture's dict."""
    times = {"dense": 2.0, "sparse": [1.0]}

    def in_turns(models, inputs, runs):
        assert torch.equal(models[0](*inputs), models[1](*inputs))
        return [[times["dense"]] * runs, (times["sparse"] * runs)[:runs]]

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    monkeypatch.setattr("serpette.weights.measure.seconds_in_turns", in_turns)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    return times


def model_of_many():
    other = nn.Linear(64, 64).bfloat16(), nn.Linear(48, 2).bfloat16()
    return nn.Sequential(two_of_four(64), other[0], two_of_four(48), other[1])


@pytest.mark.parametrize("sparse, converted", [([1.0], True), ([3.0], False), ([1.0, 3.0], False)])
def test_only_what_is_surely_faster_is_converted(sparse_on_the_cpu, sparse, converted):
    sparse_on_the_cpu["sparse"] = sparse
    model = model_of_many()
    weight, x = model[0].weight, torch.randn(2, 64).bfloat16()
    expected = model(x)
    result = semi_structured(model, x)
    assert result["0"]["converted"] is converted and (model[0].weight is not weight) is converted
    assert result["0"]["reason"] == (None if converted else "is not faster")
    assert result["1"] == {"converted": False, "reason": "is not 2:4 sparse"}
    assert "(48, 64)" in result["2"]["reason"]
    assert torch.equal(model(x), expected)


def test_a_layer_without_kernel_or_input_stays(sparse_on_the_cpu, monkeypatch):
    def fail(weight):
        raise RuntimeError("unsupported GPU\nmore")

    model = nn.Sequential(two_of_four(64))
    model.spare = two_of_four()
    model.forward = lambda x: model[0](x)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", fail)
    result = semi_structured(model, torch.randn(2, 64).bfloat16())
    assert result["0"] == {"converted": False, "reason": "cannot run: unsupported GPU"}
    assert result["spare"]["reason"] == "is not used by example_inputs"


@pytest.mark.gpu
def test_semi_structured_on_a_gpu():
    model = nn.Sequential(two_of_four(4096, 4096), nn.ReLU(), two_of_four(48)).cuda()[:2]
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    expected = model(x)
    result = semi_structured(model, x)
    assert result["0"]["reason"] in (None, "is not faster")
    assert (model(x) - expected).abs().max() <= 0.02 * expected.abs().max()
