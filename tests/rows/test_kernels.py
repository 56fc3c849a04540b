"""The autograd functions against finite differences, and what they save."""

import pytest
import torch
from models import Net, adapted
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import gradcheck

from serpette.rows.kernels import AddAt, FrozenWithRows, MaskRows

INPUTS, OUTPUTS, ROWS, COLUMNS, T = 6, 5, 2, 3, 7


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_frozen_with_rows(rows, columns, bias, shape):
    W, b = double(OUTPUTS, INPUTS).detach(), double(OUTPUTS).detach()
    at, columns_at = torch.tensor([1, 4]), torch.tensor([0, 2, 5])
    x = double(*shape, INPUTS)
    A, a = (double(ROWS, INPUTS), double(ROWS) if bias else None) if rows else (None, None)
    B = double(OUTPUTS, COLUMNS) if columns else None

    def run(x, A, a, B):
        if A is not None and B is not None:
            B = MaskRows.apply(B, at)
        return FrozenWithRows.apply(x, W, b if bias else None, A, a, at, B, columns_at, False)

    def dense(x, A, a, B):
        V, c = W.clone(), b.clone() if bias else None
        if B is not None:
            V[:, columns_at] += B
        if A is not None:  # the crossing belongs to the rows
            V[at] = W[at] + A
            if B is not None:  # a zero there, as the layer holds it
                V = V.clone()
        if a is not None:
            c[at] += a
        return torch.nn.functional.linear(x, V, c)

    if B is not None and A is not None:
        B.data[at] = 0
    torch.testing.assert_close(run(x, A, a, B), dense(x, A, a, B), rtol=1e-12, atol=1e-12)
    given = [v for v in (x, A, a, B) if v is not None]
    g = torch.randn(*shape, OUTPUTS, dtype=torch.float64)
    found = torch.autograd.grad(run(x, A, a, B), given, g)
    expected = torch.autograd.grad(dense(x, A, a, B), given, g)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if not (rows and columns):  # finite differences move the crossing too, which is masked on purpose
        assert gradcheck(lambda *given: run(*_fill(given, (x, A, a, B))), given)


def _fill(given, like):
    given = iter(given)
    return [None if v is None else next(given) for v in like]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_add_at(dim):
    index = torch.tensor([0, 2])
    y = double(3, 4, 3)
    delta = double(*(2 if d == dim % 3 else n for d, n in enumerate(y.shape)))
    assert gradcheck(lambda y, delta: AddAt.apply(y, delta, index, dim), (y, delta))
    expected = y.index_add(dim, index, delta)
    torch.testing.assert_close(AddAt.apply(y, delta, index, dim), expected, rtol=0, atol=0)


def test_mask_rows():
    B = double(4, 2)
    (found,) = torch.autograd.grad(MaskRows.apply(B, torch.tensor([1, 3])).sum(), B)
    assert found.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_second_derivatives_are_refused():
    x = double(2, INPUTS)
    A = double(ROWS, INPUTS)
    y = FrozenWithRows.apply(
        x, double(OUTPUTS, INPUTS).detach(), None, A, None, torch.tensor([0, 1]), None, None, False
    )
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# -- what is saved for the backward pass


def saved_bytes(model, x, autocast=False):
    """Bytes of unique storages that autograd keeps, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held, alive = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own and t.is_floating_point():
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
    assert y.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", ["additive", "live"])
@pytest.mark.parametrize("frozen_input", [True, False])
def test_saved_bytes_of_linear(autocast, kernel, frozen_input):
    size = 2 if autocast else 4
    net = Net(nn.Linear(64, 96))

    def saved(model):
        # made inside the model, as the output of an earlier layer is
        x = torch.randn(T, 64, requires_grad=not frozen_input) * 1
        return saved_bytes(model, x, autocast)

    rows, columns, both = (adapted(net, r=8, modes=m, kernel=kernel) for m in ("rows", "columns", "both"))
    assert saved(rows) == T * 64 * size
    assert saved(columns) == T * 8 * size
    assert saved(both) == T * (64 + 8) * size
    if not frozen_input:
        assert saved(rows.requires_grad_(False)) == 0 == saved(columns.requires_grad_(False))
        assert saved(both.requires_grad_(False)) == 0


def test_saved_bytes_of_lora_beside():
    net = Net(nn.Linear(64, 96))
    x = torch.randn(T, 64, requires_grad=True) * 1
    plain, dropped = (
        get_peft_model(Net(nn.Linear(64, 96)), LoraConfig(r=8, target_modules=["layer"], lora_dropout=p))
        for p in (0.0, 0.1)
    )
    assert saved_bytes(adapted(net, r=8), x) == T * 64 * 4
    assert saved_bytes(plain, x) == T * (64 + 8) * 4
    assert saved_bytes(dropped, x) > 1.9 * T * 64 * 4


def test_saved_bytes_of_convolution():
    x = torch.randn(2, 8, 10, 10, requires_grad=True) * 1
    size = x.numel() * 4
    net = Net(nn.Conv2d(8, 16, 3, padding=1, bias=False))
    floor = saved_bytes(net.requires_grad_(False), x)
    assert floor == size, "torch's own convolution keeps its input even where it is frozen"
    assert saved_bytes(adapted(net, r=4), x) == floor
    assert saved_bytes(adapted(net, r=4, modes="columns"), x) == floor + size // 2
    # of a grouped one nothing of the activations, but the weight with the changes in it
    grouped = Net(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    assert saved_bytes(adapted(grouped, r=2), x) == floor + 8 * 9 * 4
