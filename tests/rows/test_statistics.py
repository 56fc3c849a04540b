import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from serpette.importance import registry
from serpette.rows.neurons import neuron_stats
from serpette.rows.statistics import observe_neurons

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 1e-3, "atol": 1e-7}  # transformers takes the loss of a language model in float32
ALL = {"contribution", "labels", "input_norms"}


class RMSNorm(nn.Module):
    """As in language models; Gemma's multiplies by 1 + weight."""

    def __init__(self, n, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(n)), offset

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.offset + self.weight)


class Around(nn.Module):
    """x -> layer -> pooled -> classes; `shape` is that of one example."""

    def __init__(self, layer, shape, integers=0):
        super().__init__()
        self.layer, self.shape, self.integers = layer, shape, integers
        self.before = nn.Identity() if integers else nn.Linear(5, math.prod(shape))
        with torch.no_grad():
            out = layer(torch.zeros(2, *shape).long() if integers else torch.randn(2, *shape))
        self.head = nn.Linear(out[0].numel(), 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        if self.integers:
            x = (x[:, :4].abs() * 100).long() % self.integers
        else:
            x = self.before(x).view(-1, *self.shape)
        return self.head(self.drop(self.layer(x)).tanh().flatten(1))


def conv1d_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 4)


def batch_norm(make=nn.BatchNorm2d):
    norm = make(4)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return randomised(norm)


def randomised(norm):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear on tokens": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear on a map": (lambda: nn.Linear(4, 6, bias=False), (3, 2, 4)),
    "Conv1D of GPT-2": (conv1d_of_gpt2, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (4, 5, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1), (4, 7, 6)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), (4,)),
    "embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=2), (4,)),
    "layer norm": (lambda: randomised(nn.LayerNorm(4)), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4, eps=1e-6), (3, 4)),
    "RMS norm of a model": (lambda: RMSNorm(4), (3, 4)),
    "RMS norm of Gemma": (lambda: RMSNorm(4, 1.0), (3, 4)),
    "group norm": (lambda: randomised(nn.GroupNorm(2, 4)), (4, 3, 3)),
    "batch norm": (batch_norm, (4, 3, 3)),
    "batch norm on features": (lambda: batch_norm(nn.BatchNorm1d), (4,)),
}
COLUMNS = [n for n in LAYERS if "norm" not in n and "grouped" not in n and "depthwise" not in n]


def made(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return Around(make(), shape, 7 if "embedding" in name else 0).double()


def data(n=12):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return x, torch.tensor([0, 2, 1, 2, 2, 0, 1, 1, 2, 0, 2, 2])[:n]


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def observed(model, loader, needs=("contribution",), **options):
    options = {"loss": cross_entropy, **options}
    return observe_neurons(model, loader, {"layer": model.layer}, frozenset(needs), **options)["layer"]


def matrix(layer, value):
    """(n, f, ...) of a weight or its gradient."""
    value = value.detach()
    return value.T if type(layer).__name__ == "Conv1D" else value[:, None] if value.ndim == 1 else value


def weight_of(layer):
    return matrix(layer, layer.weight + getattr(layer, "offset", 0.0))


def slow_contribution(model, x, y, classes=3):
    """Mean over the examples of each class, one backward pass an example: w * dL/dw, (T, n, f, ...)."""
    found = []
    for t in range(classes):
        rows = []
        for i in (y == t).nonzero()[:, 0]:
            (g,) = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.layer.weight)
            rows.append(weight_of(model.layer) * matrix(model.layer, g))
        found.append(torch.stack(rows).mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("name", LAYERS)
def test_contribution_by_class_against_weight_gradients(name):
    model = made(name)
    x, y = data()
    stats = observed(model, batches(x, y, 5), ALL)
    expected = slow_contribution(model.eval(), x, y).flatten(2).sum(2)
    torch.testing.assert_close(stats.contribution, expected, **EXACT)
    assert stats.counts.tolist() == [3, 3, 6] and stats.labelled and expected.abs().max() > 1e-3
    torch.testing.assert_close(stats.weight(), weight_of(model.layer).flatten(1), **EXACT)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_against_weight_gradients(name):
    model = made(name)
    x, y = data()
    needs = ALL | {"elementwise"}
    stats = observed(model, [(x, y)], needs, columns={"layer"}).columns
    gradients = slow_contribution(model.eval(), x, y).transpose(1, 2)  # (T, f, n, ...)
    torch.testing.assert_close(stats.contribution, gradients.flatten(2).sum(2), **EXACT)
    torch.testing.assert_close(stats.weight(), weight_of(model.layer).transpose(0, 1).flatten(1), **EXACT)
    mean = (gradients * torch.tensor([3, 3, 6]).view(3, *[1] * (gradients.ndim - 1))).sum(0) / 12
    torch.testing.assert_close(stats.elementwise, mean.abs().flatten(1).sum(1), **EXACT)
    assert torch.broadcast_shapes(stats.input_norms.shape, stats.weight().shape) == stats.weight().shape


@pytest.mark.parametrize("name", LAYERS)
def test_contribution_is_what_scaling_the_neuron_does(name):
    """d/ds L(s w_i) at s = 1, by central differences."""
    model = made(name).eval()
    x, y = data()
    stats = observed(model, [(x, y)], num_classes=0)
    assert stats.contribution.shape[0] == 1 and not stats.labelled
    weight = model.layer.weight
    offset, h = getattr(model.layer, "offset", 0.0), 1e-5
    for i in range(len(stats)):
        losses = []
        for s in (1 + h, 1 - h):
            given = weight.detach().clone()
            with torch.no_grad():
                row = weight.T[i] if type(model.layer).__name__ == "Conv1D" else weight[i : i + 1]
                row.copy_((row + offset) * s - offset)
                losses.append(float(cross_entropy(model(x), y)))
                weight.copy_(given)
        expected = (losses[0] - losses[1]) / (2 * h)
        if i == getattr(model.layer, "padding_idx", None):
            assert stats.contribution[0, i] == 0
            continue
        assert float(stats.contribution[0, i]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_elementwise_within_one_batch(name):
    model = made(name)
    x, y = data()
    stats = observed(model, [(x, y)], {"elementwise"})
    model.eval()
    (g,) = torch.autograd.grad(cross_entropy(model(x), y), model.layer.weight)
    expected = (weight_of(model.layer) * matrix(model.layer, g)).abs().flatten(1).sum(1)
    torch.testing.assert_close(stats.elementwise, expected, **EXACT)
    assert stats.contribution is None and stats.input_norms is None
    halves = [observed(model, [(x[s], y[s])], {"elementwise"}).elementwise for s in (slice(8), slice(8, 12))]
    mean = (8 * halves[0] + 4 * halves[1]) / 12
    torch.testing.assert_close(observed(model, batches(x, y, 8), {"elementwise"}).elementwise, mean, **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_input_norms_against_what_the_weights_multiply(name):
    """The derivative of an output by a weight is what that weight multiplies."""
    model = made(name).eval()
    x, y = data()
    stats = observed(model, batches(x, y, 5), {"input_norms"})
    seen = []
    handle = model.layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    weight = model.layer.weight
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model.layer, {"weight": w}, (seen[0],)), weight.detach()
    )
    squares = jacobian.square().sum(tuple(range(jacobian.ndim - weight.ndim)))
    # an output reads one row; the others' derivatives are 0. An embedding has D outputs of one weight each
    expected = matrix(model.layer, squares).flatten(1).sqrt()
    if name == "embedding with padding":
        stats.input_norms[2] = 0  # counted, but torch gives it no derivative
    torch.testing.assert_close(stats.input_norms.expand_as(expected), expected, **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_neither_batch_size_nor_order_nor_frozen_parameters_matter(name):
    model = made(name)
    x, y = data()
    base = observed(model, [(x, y)], ALL)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    model.requires_grad_(False)
    for size in (1, 5):
        other = observed(model, batches(x[order], y[order], size), ALL)
        for field in ("contribution", "input_norms"):
            torch.testing.assert_close(getattr(other, field), getattr(base, field), **EXACT)
        assert torch.equal(other.counts, base.counts)


def test_by_hand():
    """One example, loss = outputs times 1, 2, 3, summed: w_i . dL/dw_i = c_i (w_i . x)."""
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 1, 1]]))
        layer.bias.fill_(7)
    loader = [(torch.tensor([[1.0, -2, 3]]), torch.zeros(1))]
    stats = observe_neurons(
        layer, loader, {"l": layer}, {"contribution", "input_norms", "elementwise"}, columns={"l"},
        loss=lambda out, y: (out * torch.tensor([1.0, 2, 3])).sum(1).mean(),
    )["l"]  # fmt: skip
    assert stats.contribution.tolist() == [[1, -8, 6]] and stats.counts.tolist() == [1]
    assert stats.elementwise.tolist() == [1, 8, 3 + 6 + 9]
    assert stats.input_norms.tolist() == [1, 2, 3]
    assert stats.columns.contribution.tolist() == [[1 + 3, -8 - 6, 9]]
    assert registry["wanda"]()(stats).tolist() == [1, 4, 6]
    assert registry["wanda"]()(stats.columns).tolist() == [2, 6, 3]
    assert registry["taylor"]()(stats).tolist() == [1, 8, 6]


def test_two_layers_in_place_and_used_twice():
    """The second layer runs twice, and what it puts out is changed in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x).relu_()
            y = self.b(x).mul_(2)
            return self.b(y).tanh_() + y

    model = Net().double()
    x, y = data()
    y = y.clamp(max=3)
    model.requires_grad_(False)
    modules = {"a": model.a, "b": model.b}
    stats = observe_neurons(
        model, batches(x, y, 4), modules, {"contribution"}, loss=cross_entropy, num_classes=0, columns={"b"}
    )
    model.requires_grad_(True)
    cross_entropy(model(x), y).backward()
    for name, module in modules.items():
        product = module.weight.detach() * module.weight.grad
        torch.testing.assert_close(stats[name].contribution[0], product.sum(1), **EXACT)
    torch.testing.assert_close(stats["b"].columns.contribution[0], product.sum(0), **EXACT)


def test_nothing_is_left_behind():
    model = made("conv2d").train()
    model.head.eval()
    model.head.weight.requires_grad_(False)
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    random = torch.get_rng_state()
    flags = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]

    def check():
        assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
        assert torch.equal(random, torch.get_rng_state())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["layer.weight"]
        assert bool((model.layer.weight.grad == 1).all())

    observed(model, loader, ALL | {"elementwise"}, columns={"layer"})
    check()
    with pytest.raises(ValueError, match="batch 1 of the loader: the loss is nan"):
        observed(model, [(x * math.nan, y)], ALL | {"elementwise"})
    check()


def test_regression_and_float_labels_have_no_classes():
    model = made("linear")
    x, y = data()
    stats = observed(model, batches(x, y.double(), 5), loss=lambda out, y: mse_loss(out[:, 0], y))
    model.eval()
    (g,) = torch.autograd.grad(mse_loss(model(x)[:, 0], y.double()), model.layer.weight)
    torch.testing.assert_close(stats.contribution[0], (model.layer.weight.detach() * g).sum(1), **EXACT)
    assert stats.counts.tolist() == [12] and not stats.labelled


def test_bfloat16():
    model = made("linear on tokens")
    x, y = data()
    base = observed(model, batches(x, y, 5), ALL)
    stats = observed(model.bfloat16(), batches(x.bfloat16(), y, 5), ALL)
    assert stats.contribution.dtype == torch.float64 and stats.weight().dtype == torch.float32
    error = (stats.contribution - base.contribution).norm() / base.contribution.norm()
    assert error < 0.05


# -- models of transformers


def test_a_language_model_weighs_batches_by_their_counted_tokens():
    from serpette.zoo import tiny

    model = tiny("llama").double().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (5, 9), generator=g)
    labels = ids.clone()
    for row, prompt in enumerate((1, 6, 3, 9, 7)):  # one example has no response at all
        labels[row, :prompt] = -100
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    modules |= {n: m for n, m in model.named_modules() if type(m).__name__ == "LlamaRMSNorm"}

    def run(size, order=range(5)):
        rows = torch.tensor(list(order)).split(size)
        loader = [{"input_ids": ids[r], "labels": labels[r]} for r in rows]
        return observe_neurons(model, loader, modules, {"contribution"})

    whole = run(5)
    counted = 8 + 3 + 6 + 0 + 2
    for other in (run(1), run(2, [4, 2, 0, 1, 3])):
        for name in modules:
            torch.testing.assert_close(other[name].contribution, whole[name].contribution, **SINGLE)
            assert other[name].counts.tolist() == [counted] and not other[name].labelled
    model.requires_grad_(True)
    model(input_ids=ids, labels=labels).loss.backward()
    for name, module in modules.items():
        if module in (model.model.embed_tokens, model.lm_head):
            continue
        product = weight_of(module) * matrix(module, module.weight.grad)
        torch.testing.assert_close(whole[name].contribution[0], product.flatten(1).sum(1), **SINGLE)


def test_a_classifier_with_positions_and_padding():
    """Position embeddings come as one row for all examples, and padding is in no norm of an input."""
    from serpette.zoo import tiny

    model = tiny("bert").double()
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 5, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8], [4, 9, 9, 0, 0, 0]])
    labels = torch.tensor([0, 2, 1, 0])
    modules = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}

    def run(size):
        loader = []
        for rows in torch.arange(4).split(size):
            longest = int((ids[rows] > 0).sum(1).max())
            part = ids[rows, :longest]
            loader.append({"input_ids": part, "attention_mask": (part > 0).long(), "labels": labels[rows]})
        return observe_neurons(model, loader, modules, {"contribution", "labels", "input_norms"})

    whole, single = run(4), run(1)
    for name in modules:
        torch.testing.assert_close(single[name].contribution, whole[name].contribution, **EXACT)
        torch.testing.assert_close(single[name].input_norms, whole[name].input_norms, **EXACT)
        assert whole[name].counts.tolist() == [2, 1, 1]
    model.requires_grad_(True)
    for t in range(3):
        rows = labels == t
        model.zero_grad()
        model(input_ids=ids[rows], attention_mask=(ids[rows] > 0).long(), labels=labels[rows]).loss.backward()
        for name, module in modules.items():
            product = weight_of(module) * matrix(module, module.weight.grad)
            torch.testing.assert_close(whole[name].contribution[t], product.flatten(1).sum(1), **EXACT)


def test_a_vision_transformer_and_a_residual_network():
    from serpette.zoo import tiny

    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    for kind in ("vit", "resnet"):
        model = tiny(kind).double()
        modules = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
        loader = [{"pixel_values": x[r], "labels": labels[r]} for r in torch.arange(6).split(4)]
        stats = observe_neurons(model, loader, modules, {"contribution"}, num_classes=0)
        model.requires_grad_(True)
        model(pixel_values=x, labels=labels).loss.backward()
        for name, module in modules.items():
            product = weight_of(module) * matrix(module, module.weight.grad)
            torch.testing.assert_close(stats[name].contribution[0], product.flatten(1).sum(1), **EXACT)


# -- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"needs": {"contributions"}}, "'contributions' is unknown; did you mean 'contribution'"),
        ({"loader": []}, "loader is empty"),
        ({"loader": ["text"]}, "loader gives str"),
        ({"loss": None}, "there is no loss"),
        ({"loss": lambda out, y: out.sum(1)}, r"the loss has shape \(12,\)"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": 2}, r"the label 2, outside of \[0, 2\)"),
        ({"num_classes": 0, "needs": {"labels"}}, r"no class labels.*batch\['labels'\]"),
        ({"columns": {"layers"}}, "columns='layers' is none of the modules; did you mean 'layer'"),
    ],
)
def test_bad_input(change, message):
    model = made("linear")
    x, y = data()
    given = {"loader": [(x, y)], "needs": {"contribution"}, **change}
    with pytest.raises(ValueError, match=message):
        observed(model, **given)


def test_bad_labels_and_layers():
    model = made("linear")
    x, y = data()
    with pytest.raises(ValueError, match="batch 2 of the loader has the label -100"):
        observed(model, [(x, y), (x, torch.full_like(y, -100))])
    with pytest.raises(ValueError, match="batch 2 of the loader differs"):
        observed(model, [(x, y), (x, y.double())], loss=lambda out, y: out.sum())
    with pytest.raises(ValueError, match="depends on none of the modules"):
        observe_neurons(model, [(x, y)], {"l": nn.Linear(2, 2)}, {"contribution"}, loss=cross_entropy)
    with pytest.raises(ValueError, match="'up' is a Tanh, whose neurons are not known"):
        neuron_stats("up", nn.Tanh())
    for layer in (nn.LayerNorm(4), nn.Conv2d(4, 4, 3, groups=2)):
        with pytest.raises(ValueError, match="'up'.*has no columns"):
            neuron_stats("up", layer, columns=True)


def test_a_gradient_that_is_not_finite_names_batch_and_layer():
    model = made("linear")
    x, y = data()

    def loss(out, y):
        return (out - out.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(ValueError, match="batch 1 of the loader: the gradient at 'layer' is not finite"):
        observed(model, [(x, y)], loss=loss)


def test_a_layer_that_reads_time_first_cannot_tell_examples_apart():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).sum(0)

    model, loader = TimeFirst(), [(torch.randn(3, 12, 5), torch.arange(3))]
    with pytest.raises(ValueError, match=r"'layer' puts out \(12, 3, 3\) for 3 examples.*num_classes=0"):
        observed(model, loader)
    assert observed(model, loader, num_classes=0).counts.tolist() == [3]
