"""The masked product and its gradients, against the same written in plain autograd."""

import copy

import pytest
import torch
from lora_nets import batch, lora, lora_net, trained
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import conv2d, linear
from transformers.pytorch_utils import Conv1D

from serpette.memory import saved_bytes
from serpette.weights.layers import PrunedLayer
from serpette.weights.masked import MASK_GRADS, SAMPLED

ROWS, COLUMNS, R = 6, 10, 3


def layer_of(base, cut=0.5, mask_grad="exact", dtype=torch.float64, **options):
    """A masked LoRA layer with B that is not zero, cut at random."""
    model = lora(nn.Sequential(base.to(dtype)), trained=True, targets=["0"], r=R, **options).to(dtype)
    layer = PrunedLayer("0", model.base_model.model[0], mask_grad)
    if cut:
        layer.remove(torch.rand(layer.shape, generator=torch.Generator().manual_seed(5)) < cut)
    return layer


def factors(layer):
    name = layer.masked.adapter()
    return layer.module.lora_A[name].weight, layer.module.lora_B[name].weight


class Straight(torch.autograd.Function):
    """Multiplies by a mask; the gradient does not see it."""

    @staticmethod
    def forward(ctx, W, M):
        return W * M

    @staticmethod
    def backward(ctx, dW):
        return dW, None


def twin(layer, x, W0, mask_grad, product=linear):
    """z and [dx, gA, gB, gb] for dz = cos(index), where W0 is the uncut weight."""
    A, B = (p.detach().clone().requires_grad_() for p in factors(layer))
    x, bias = x.detach().requires_grad_(), layer.base.bias.detach().requires_grad_()
    M = (~layer.cut).to(x)
    W = W0 + layer.masked.scale * (B.flatten(1) @ A.flatten(1))
    z = product(x, M * W, bias)
    dz = seed_of(z)
    if mask_grad == "exact":
        return z, torch.autograd.grad(z, [x, A, B, bias], dz)
    through = product(x, Straight.apply(W, M), bias)
    gA, gB = torch.autograd.grad(through, [A, B], dz, retain_graph=True)
    dx, gb = torch.autograd.grad(z, [x, bias], dz)
    return z, (dx, gA, gB, gb)


def seed_of(z):
    return torch.arange(z.numel(), dtype=z.dtype).cos().view(z.shape)


def ours(layer, x):
    layer.base.bias.requires_grad_()
    x = x.detach().requires_grad_()
    z = layer.module(x)
    return z, torch.autograd.grad(z, [x, *factors(layer), layer.base.bias], seed_of(z))


def same(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tokens(n=24, columns=COLUMNS, dtype=torch.float64):
    return torch.randn(2, n // 2, columns, dtype=torch.float64).to(dtype)


def weight_of(base):
    weight = base.weight.detach().clone()
    return weight.t() if isinstance(base, Conv1D) else weight.flatten(1)


BASES = {
    "linear": lambda: nn.Linear(COLUMNS, ROWS),
    "Conv1D": lambda: nn.init.normal_((made := Conv1D(ROWS, COLUMNS)).weight) is None or made,
}


def base_of(kind):
    torch.manual_seed(0)
    return BASES[kind]().double()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("mask_grad", ["exact", "ste"])
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_plain_autograd(kind, mask_grad, rslora):
    base = base_of(kind)
    W0 = weight_of(base)
    options = {"fan_in_fan_out": kind == "Conv1D", "use_rslora": rslora, "lora_alpha": 7}
    layer = layer_of(base, mask_grad=mask_grad, **options)
    assert layer.masked.scale == pytest.approx(7 / R**0.5 if rslora else 7 / R)
    x = tokens()
    same(ours(layer, x), twin(layer, x, W0, mask_grad))


def test_the_modes_differ_where_something_is_cut_and_nowhere_else():
    for cut, alike in ((0.5, False), (0.0, True)):
        found = {}
        for mode in MASK_GRADS:
            layer = layer_of(base_of("linear"), cut, mode)
            found[mode] = ours(layer, torch.ones(1, 16, COLUMNS, dtype=torch.float64))[1][1]
        for mode in ("ste", "cv"):
            assert torch.allclose(found[mode], found["exact"]) == alike or mode == "cv"


@pytest.mark.parametrize("mask_grad", ["exact", "ste"])
def test_gradcheck(mask_grad):
    layer = layer_of(base_of("linear"), mask_grad=mask_grad)
    A, B = factors(layer)
    if mask_grad == "exact":

        def run(x, A_, B_):
            A.data, B.data = A_, B_
            return torch.func.functional_call(
                layer.module, {"lora_A.default.weight": A_, "lora_B.default.weight": B_}, (x,)
            )

        arguments = [t.detach().clone().requires_grad_() for t in (tokens(4), A, B)]
        assert torch.autograd.gradcheck(run, arguments)
    else:  # only the gradient of x is that of the function
        assert torch.autograd.gradcheck(layer.module, (tokens(4).requires_grad_(),))


@pytest.mark.parametrize("n", [2 * SAMPLED, 5 * SAMPLED, 2 * SAMPLED + 6])
def test_cv_is_unbiased(n):
    base, x = base_of("linear"), tokens(n)
    W0 = weight_of(base)
    layer = layer_of(base, mask_grad="cv")
    _, (dx, gA, gB, gb) = twin(layer, x, W0, "exact")
    found = []
    for offset in range(SAMPLED):
        layer.masked.offset = offset
        found.append(ours(layer, x)[1])
        torch.testing.assert_close(found[-1][0], dx)
    torch.testing.assert_close(torch.stack([f[1] for f in found]).mean(0), gA)
    torch.testing.assert_close(torch.stack([f[2] for f in found]).mean(0), gB)
    assert not torch.allclose(found[0][1], gA)
    ste = twin(layer, x, W0, "ste")[1][1]
    assert not torch.allclose(found[0][1], ste)


def test_cv_of_fewer_tokens_than_it_samples_is_exact():
    base, x = base_of("linear"), tokens(SAMPLED - 2)
    W0 = weight_of(base)
    layer = layer_of(base, mask_grad="cv")
    same(ours(layer, x), twin(layer, x, W0, "exact"))


@pytest.mark.parametrize("mask_grad", MASK_GRADS)
def test_whole_rows_and_columns_have_the_exact_gradient_in_each_mode(mask_grad):
    base, x = base_of("linear"), tokens()
    W0 = weight_of(base)
    layer = layer_of(base, 0, mask_grad)
    layer.remove_lines(torch.arange(ROWS) % 3 == 0, torch.arange(COLUMNS) % 2 == 1)
    assert int(layer.cut.sum()) == 2 * COLUMNS + 4 * 5
    same(ours(layer, x), twin(layer, x, W0, "exact"))
    assert torch.equal(layer.masked.frozen() == 0, layer.cut)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"stride": 2, "padding": (1, 0), "dilation": (2, 1)},
    ],
)
def test_convolution(how):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), **how).double()
    W0 = weight_of(conv)
    layer = layer_of(conv)

    def product(x, W, bias):
        return conv2d(x, W.view(5, 3, 3, 2), bias, **how)

    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    same(ours(layer, x), twin(layer, x, W0, "exact", product))


def test_collected_gradient_is_that_of_the_unmasked_product():
    base, x = base_of("linear"), tokens()
    for mode in MASK_GRADS:
        layer = layer_of(copy.deepcopy(base), mask_grad=mode)
        alone = ours(layer, x)[1]
        layer.collect(True)
        for a, b in zip(ours(layer, x)[1], alone, strict=True):
            torch.testing.assert_close(a, b)
        W = (layer.masked.weight() * ~layer.cut).requires_grad_()
        z = linear(x, W, layer.base.bias)
        (G,) = torch.autograd.grad(z, W, seed_of(z))
        torch.testing.assert_close(layer.masked.gradient.double(), G, rtol=1e-5, atol=1e-5)
        ours(layer, x)
        torch.testing.assert_close(layer.masked.gradient.double(), 2 * G, rtol=1e-5, atol=1e-5)


def test_rank_pattern_scales_each_layer_by_its_own_rank():
    model = lora_net(trained=True, rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 12})
    blocks = model.base_model.model.blocks
    fc1, fc2 = (PrunedLayer(n, m) for n, m in (("fc1", blocks[0].mlp.fc1), ("fc2", blocks[0].mlp.fc2)))
    assert (fc1.masked.scale, fc2.masked.scale) == (5 / 2, 12 / 3)
    for layer in (fc1, fc2):
        x, base = tokens(columns=layer.shape[1]), weight_of(layer.base)
        same(ours(layer, x), twin(layer, x, base, "exact"))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    """A bf16 base with fp32 factors, or all in fp32 under autocast: near the same in float64."""
    base = base_of("linear")
    wide = layer_of(copy.deepcopy(base))
    layer = layer_of(base, dtype=torch.float32)
    for mine, other in zip(factors(layer), factors(wide), strict=True):
        other.data.copy_(mine.data)
    x = tokens(dtype=torch.float32 if autocast else torch.bfloat16)
    if not autocast:
        layer.base.to(torch.bfloat16)
        layer.base.weight.data[layer.cut] = 0
    wide.base.weight.data.copy_(layer.base.weight.data)
    wide.base.bias.data.copy_(layer.base.bias.data)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, found = ours(layer, x)
    assert z.dtype == torch.bfloat16 and found[0].dtype == x.dtype
    assert [g.dtype for g in found[1:3]] == [torch.float32] * 2
    assert found[3].dtype == layer.base.bias.dtype
    for mine, other in zip((z, *found), (lambda z, g: (z, *g))(*ours(wide, x.double())), strict=True):
        error = (mine.double() - other).norm() / other.norm()
        assert error < 0.01, error


def test_gradient_checkpointing_changes_no_gradient():
    from torch.utils.checkpoint import checkpoint

    found = []
    for how in (None, True, False):
        model = lora_net(trained=True)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                layer = PrunedLayer(name, module, "exact")
                layer.remove(torch.arange(layer.shape[0] * layer.shape[1]).view(layer.shape) % 3 == 0)
                layer.collect(True)
        data = batch()
        if how is None:
            model(**data).loss.backward()
        else:
            x = data["x"].requires_grad_()
            net = model.base_model.model
            for block in net.blocks:
                x = checkpoint(block, x, use_reentrant=how)
            nn.functional.cross_entropy(net.head(x.mean(1)), data["labels"]).backward()
        collected = [m.gradient for m in model.modules() if hasattr(m, "gradient")]
        found.append([p.grad for p in trained(model)] + collected)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert len(found[0]) == 36


@pytest.mark.parametrize("mask_grad", MASK_GRADS)
def test_keeps_no_more_for_the_backward_pass_than_lora(mask_grad):
    x = torch.randn(64, COLUMNS)
    plain = get_peft_model(
        nn.Sequential(nn.Linear(COLUMNS, ROWS)), LoraConfig(r=R, target_modules=["0"])
    ).base_model.model
    layer = layer_of(nn.Linear(COLUMNS, ROWS), mask_grad=mask_grad, dtype=torch.float32)
    ours_, theirs = saved_bytes(nn.Sequential(layer.module), x), saved_bytes(plain, x)
    assert x.numel() * 4 == ours_ <= theirs == x.numel() * 4 + 64 * R * 4


def test_a_merged_or_disabled_adapter_is_peft_s_own():
    base, x = base_of("linear"), tokens()
    layer = layer_of(base)
    z = layer.module(x)
    layer.module.merge()
    torch.testing.assert_close(layer.module(x), z)
    assert torch.equal(layer.base.weight == 0, layer.cut)
    layer.module.unmerge()
    torch.testing.assert_close(layer.module(x), z)
    layer.module.enable_adapters(False)
    torch.testing.assert_close(layer.module(x), linear(x, layer.base.weight, layer.base.bias))
    assert torch.equal(layer.base.weight == 0, layer.cut)  # the pruned base, not the one of before


def test_state_and_pickle_know_nothing_of_the_mask():
    layer, plain = layer_of(base_of("linear")), layer_of(base_of("linear"), cut=0)
    assert list(layer.module.state_dict()) == list(plain.module.state_dict())
    again = copy.deepcopy(layer.module)
    x = tokens()
    assert torch.equal(again(x), layer.module(x))
    assert not list(layer.module.buffers())
