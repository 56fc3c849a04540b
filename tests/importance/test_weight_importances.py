"""Importance of single weights, against dense formulas in float64 and the gradients of a small model."""

import copy
import math

import pytest
import torch
from torch.nn.functional import mse_loss

from serpette.importance import (
    PST,
    LoraPrune,
    LoraPruneSeq,
    Magnitude,
    Movement,
    OriginalGradient,
    Random,
    SoftMovement,
    Taylor,
    Wanda,
    weights,
)
from serpette.types import LayerStats, WeightImportance

FIELDS = {
    "lora": ("A", "B", "grad_A", "grad_B", "base"),
    "gradient": ("gradient",),
    "input_norms": ("input_norms",),
    "hessian": ("hessian",),
}
TENSORS = ("A", "B", "grad_A", "grad_B", "gradient", "input_norms", "hessian")


def complete(rows=5, columns=7, r=2, sequential=False, dtype=torch.float64, seed=0, name="fc"):
    """A LoRA layer after a backward pass through a loss, every field filled in."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale, x, target, W0 = 0.5, normal(40, columns), normal(40, rows), normal(rows, columns)
    A, B = normal(r, columns).requires_grad_(), normal(columns if sequential else rows, r).requires_grad_()
    W = W0 + scale * (W0 @ B @ A if sequential else B @ A)
    W.retain_grad()
    mse_loss(x @ W.T, target).backward()
    tensors = A, B, A.grad, B.grad, W.grad, W0, W
    A, B, gA, gB, G, W0, W = (t.detach().to(dtype) for t in tensors)
    return LayerStats(
        name, lambda: W, lambda: W0, A, B, gA, gB, scale, sequential, G, x.norm(dim=0), 2 * x.T @ x
    )


def of_weights(method, stats):
    if hasattr(method, "update"):
        method.update(stats)
    return method.of_weights(stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(weights))
def test_contract(name, dtype):
    """A finite number a weight, from what it declares alone; nothing that it was given is changed."""
    method = weights[name]()
    stats = complete(sequential=name == "lora_prune_seq", dtype=dtype)
    assert isinstance(method, WeightImportance) and method.name == name
    assert isinstance(method.weight_needs, frozenset) and method.weight_needs <= set(FIELDS)
    before, rng = copy.deepcopy([getattr(stats, f) for f in TENSORS]), torch.get_rng_state()
    weight, base = stats.weight().clone(), stats.base().clone()
    scores = of_weights(method, stats)
    assert scores.shape == weight.shape and scores.is_floating_point() and bool(scores.isfinite().all())
    assert scores.dtype == {"random": torch.float32, "obs": torch.float64}.get(name, dtype)
    assert all(torch.equal(a, getattr(stats, f)) for a, f in zip(before, TENSORS, strict=True))
    assert torch.equal(weight, stats.weight()) and torch.equal(base, stats.base())
    assert torch.equal(rng, torch.get_rng_state())

    again = method.of_weights(stats)
    assert torch.equal(scores, again)
    again.fill_(-1)  # the caller may work in place
    assert torch.equal(scores, method.of_weights(stats))

    declared = [f for need in method.weight_needs for f in FIELDS[need]]
    bare = LayerStats("fc", stats.weight, scale=stats.scale, sequential=stats.sequential)
    for field in declared:
        setattr(bare, field, getattr(stats, field))
    assert torch.equal(scores, of_weights(method, bare))
    for field in {*declared} - ({"base"} if name == "lora_prune" else set()):
        lacking = copy.copy(bare)
        lacking.state = {}
        setattr(lacking, field, None)
        with pytest.raises(ValueError, match=rf"importance '{name}' needs '{field}' of layer 'fc'"):
            of_weights(method, lacking)


def stepped(stats, cross):
    """W before minus after a step of gradient descent on A and B with learning rate 1, entry by entry."""
    A, B, gA, gB, W0 = stats.A, stats.B, stats.grad_A, stats.grad_B, stats.base()
    G = torch.zeros_like(W0)
    if stats.sequential:
        B, gB = W0 @ B, W0 @ gB
    for i in range(W0.shape[0]):
        for j in range(W0.shape[1]):
            for k in range(A.shape[0]):
                G[i, j] += B[i, k] * A[k, j] - (B[i, k] - gB[i, k]) * (A[k, j] - gA[k, j])
                G[i, j] += 0 if cross else gB[i, k] * gA[k, j]
    return stats.scale * G


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_lora_prune_is_the_change_of_the_weight_in_a_step(sequential, cross):
    stats = complete(sequential=sequential)
    method = LoraPruneSeq(cross=cross) if sequential else LoraPrune(cross=cross)
    expected = (stepped(stats, cross) * stats.weight()) ** 2
    torch.testing.assert_close(method.of_weights(stats), expected)


def test_sequential_is_the_parallel_lora_of_the_product():
    """With B_eff = W0 B, which a step moves by W0 gB."""
    stats = complete(sequential=True)
    parallel = copy.copy(stats)
    parallel.B, parallel.grad_B = stats.base() @ stats.B, stats.base() @ stats.grad_B
    parallel.sequential = False
    torch.testing.assert_close(LoraPruneSeq().of_weights(stats), LoraPrune().of_weights(parallel))


def test_sequential_before_an_orthogonal_layer_has_the_gradients_of_the_parallel_one():
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    Q, x, target = torch.linalg.qr(normal(6, 6))[0], normal(30, 6), normal(30, 6)
    A, B = normal(2, 6), normal(6, 2)
    found = []
    for sequential in (True, False):
        a, b = A.clone().requires_grad_(), (B if sequential else Q @ B).clone().requires_grad_()
        y = (x + 0.5 * x @ a.T @ b.T) @ Q.T if sequential else x @ Q.T + 0.5 * x @ a.T @ b.T
        mse_loss(y, target).backward()
        W = Q + 0.5 * Q @ B @ A
        stats = LayerStats("fc", lambda W=W: W, lambda: Q, A, b.detach(), a.grad, b.grad, 0.5, sequential)
        found.append((LoraPruneSeq() if sequential else LoraPrune()).of_weights(stats))
    torch.testing.assert_close(*found)


def test_equation_10_as_printed():
    stats = complete(rows=7, sequential=True)
    A, B, gA, gB = stats.A, stats.B, stats.grad_A, stats.grad_B
    G = stats.scale * (gB @ A + B @ gA - gB @ gA) * stats.base()
    literal = LoraPruneSeq(literal=True).of_weights(stats)
    torch.testing.assert_close(literal, (G * stats.weight()) ** 2)
    assert not torch.allclose(literal, LoraPruneSeq().of_weights(stats), rtol=0.5)
    with pytest.raises(ValueError, match=r"literal=True.* 'fc' is \(5, 7\); leave it at False"):
        LoraPruneSeq(literal=True).of_weights(complete(sequential=True))


def test_a_lora_on_the_wrong_side_is_refused():
    with pytest.raises(ValueError, match="'fc' stands before it; use 'lora_prune_seq'"):
        LoraPrune().of_weights(complete(sequential=True))
    with pytest.raises(ValueError, match="'fc' stands beside it; use 'lora_prune'"):
        LoraPruneSeq().of_weights(complete())


def ranks_agree(one, two):
    """Spearman's correlation."""
    ranks = [s.flatten().argsort().argsort().double() for s in (one, two)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_lora_prune_ranks_as_the_gradient_it_stands_for():
    """With full rank and orthonormal factors it is the gradient; with rank 2 of 24 a projection of it."""
    stats = complete(rows=24, columns=24, r=24)
    Q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[
        0
    ]
    stats.A, stats.B = Q, Q.T.clone()
    stats.grad_B, stats.grad_A = stats.gradient @ Q.T, Q @ stats.gradient
    true = OriginalGradient().of_weights(stats)
    assert ranks_agree(LoraPrune(cross=False).of_weights(stats), true) > 0.999999
    narrow = complete(rows=24, columns=24, r=2)
    agreement = ranks_agree(LoraPrune().of_weights(narrow), OriginalGradient().of_weights(narrow))
    assert 0.3 < agreement < 0.95
    assert agreement > ranks_agree(Random().of_weights(narrow), OriginalGradient().of_weights(narrow)) + 0.2


def test_a_loss_scale_spoils_the_ranking_through_the_cross_term():
    """The trap of fp16: with gradients 1024 times too large, gB gA is what is ranked."""
    stats = complete(rows=24, columns=24)
    scaled = copy.copy(stats)
    scaled.grad_A, scaled.grad_B = stats.grad_A * 1024, stats.grad_B * 1024
    right, first_order = LoraPrune().of_weights(stats), LoraPrune(cross=False).of_weights(stats)
    assert ranks_agree(LoraPrune().of_weights(scaled), right) < 0.8
    torch.testing.assert_close(LoraPrune(cross=False).of_weights(scaled), first_order * 1024**2)
    cross = (stats.scale * (stats.grad_B @ stats.grad_A) * stats.weight()) ** 2
    assert ranks_agree(LoraPrune().of_weights(scaled), cross) > 0.99
    tiny = copy.copy(stats)
    tiny.grad_A, tiny.grad_B = stats.grad_A / 1024, stats.grad_B / 1024
    assert ranks_agree(LoraPrune().of_weights(tiny), first_order) > 0.999


def test_the_scale_of_lora_counts_between_layers():
    stats = complete()
    halved = copy.copy(stats)
    halved.scale = stats.scale / 2
    torch.testing.assert_close(LoraPrune().of_weights(stats), 4 * LoraPrune().of_weights(halved))


def test_gradient_scores_are_the_change_of_the_loss_without_a_weight():
    """Against finite differences: the loss with a weight moved towards zero by a millionth of itself."""
    g = torch.Generator().manual_seed(0)
    x, target, W, V = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((30, 4), (30,), (3, 4), (1, 3))
    )

    def loss(W):
        return mse_loss((torch.tanh(x @ W.T) @ V.T)[:, 0], target)

    leaf = W.clone().requires_grad_()
    loss(leaf).backward()
    stats = LayerStats("fc", lambda: W, gradient=leaf.grad)
    change = torch.empty_like(W)
    for i in range(3):
        for j in range(4):
            less, more = W.clone(), W.clone()
            less[i, j] *= 1 - 1e-6
            more[i, j] *= 1 + 1e-6
            change[i, j] = (loss(more) - loss(less)) / 2e-6
    near = {"rtol": 1e-5, "atol": 1e-9}
    torch.testing.assert_close(OriginalGradient().of_weights(stats), change**2, **near)
    torch.testing.assert_close(Taylor().of_weights(stats), change.abs(), **near)
    torch.testing.assert_close(of_weights(Movement(), stats), -change, **near)


def test_magnitude_random_and_wanda():
    stats = complete()
    assert torch.equal(Magnitude().of_weights(stats), stats.weight().abs())
    assert torch.equal(Magnitude(of="base").of_weights(stats), stats.base().abs())
    plain = LayerStats("fc", stats.weight)
    assert torch.equal(Magnitude(of="base").of_weights(plain), stats.weight().abs())
    with pytest.raises(ValueError, match="of='sum' must be 'merged' or 'base'"):
        Magnitude(of="sum")
    expected = [
        [abs(float(w)) * float(n) for w, n in zip(row, stats.input_norms, strict=True)]
        for row in stats.weight()
    ]
    torch.testing.assert_close(Wanda().of_weights(stats), torch.tensor(expected, dtype=torch.float64))
    assert Wanda.per_row

    large = [complete(rows=60, columns=60, name=name) for name in ("a", "b")]
    one, two = (Random().of_weights(stats) for stats in large)
    assert not torch.equal(one, two) and not torch.equal(one, Random(seed=1).of_weights(large[0]))
    assert float(one.mean()) == pytest.approx(0.5, abs=0.02) and abs(ranks_agree(one, two)) < 0.05
    assert len(one.unique()) > 3590


def test_movement_sums_over_the_steps():
    method, expected = Movement(), 0
    with pytest.raises(ValueError, match="'movement' has seen no gradient of layer 'fc'"):
        method.of_weights(complete())
    state = {}
    for seed in range(3):
        stats = complete(seed=seed)
        stats.state = state
        method.update(stats)
        expected = expected - stats.gradient * stats.weight()
    torch.testing.assert_close(method.of_weights(stats), expected)
    assert list(state) == ["movement"]


def adam(parameters, gradients_of, steps, learning_rate):
    """torch's Adam on copies of `parameters`, with the gradients that `gradients_of` returns for them."""
    parameters = [p.clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        gradients_of(step, *parameters).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def test_soft_movement_is_adam_on_the_penalised_scores():
    method, state, seen = SoftMovement(regularization=2.0, learning_rate=0.1), {}, []
    for seed in range(30):
        stats = complete(seed=seed % 4)
        stats.state = state
        method.update(stats)
        seen.append(stats.gradient * stats.weight())

    def penalised(step, S):
        return (S * seen[step]).sum() + 2.0 * S.sigmoid().mean()

    (S,) = adam([torch.zeros(5, 7, dtype=torch.float64)], penalised, 30, 0.1)
    torch.testing.assert_close(method.of_weights(stats), S)
    for tau in (0.05, 0.5, 0.9):
        method.threshold = tau
        assert torch.equal(method.keeps(stats), S.sigmoid() > tau)


def test_soft_movement_finds_its_sparsity():
    """Weights that training holds away from zero stay, the others fall under the threshold; more of them as
    the regularization rises, none at the start."""
    pull = torch.tensor([[-1e-2, 1e-2, 0.0, -1e-4]])
    kept = []
    for regularization in (0.0, 0.1, 10.0):
        method = SoftMovement(regularization=regularization)
        stats = LayerStats("fc", lambda: torch.ones(1, 4), gradient=pull)
        assert bool(method.keeps(stats).all())
        for _ in range(60):
            method.update(stats)
        kept.append(method.keeps(stats)[0].tolist())
    assert kept == [[True, False, True, True], [True, False, False, False], [False] * 4]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"threshold": 1}, r"threshold=1 must be in \(0, 1\)"),
        ({"regularization": -1}, "regularization=-1 must be 0 or more"),
        ({"learning_rate": 0}, "learning_rate=0 must be above 0"),
    ],
)
def test_soft_movement_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        SoftMovement(**options)


def test_pst_is_adam_on_the_factors_of_the_scores():
    method, seen = PST(alpha1=0.5, alpha2=2.0, rank=3, learning_rate=0.01), []
    stats, state = complete(), {}
    assert torch.equal(method.of_weights(stats), stats.weight().abs())
    first = copy.copy(stats)
    first.gradient = torch.zeros_like(stats.gradient)
    method.update(first)  # a gradient of zero moves nothing and only draws A_s
    start = [first.state[f].clone() for f in ("A", "B", "R", "C")]
    assert not any(bool(f.any()) for f in start[1:]) and float(start[0].std()) == pytest.approx(1, abs=0.4)
    g = torch.Generator().manual_seed(0)
    for seed in range(6):
        stats = complete(seed=seed)
        stats.state, stats.gradient = state, torch.randn(5, 7, generator=g, dtype=torch.float64)
        method.update(stats)
        seen.append(stats.gradient * stats.weight())

    def scores(A, B, R, C):
        return 0.5 * A @ B + 2.0 * (R[:, None] + C[None, :])

    factors = adam(start, lambda step, *f: (scores(*f) * seen[step]).sum(), 6, 0.01)
    torch.testing.assert_close(method.of_weights(stats), stats.weight().abs() + scores(*factors))


def test_pst_draws_by_name_and_seed():
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
        stats = complete(name=name)
        PST(seed=seed).update(stats)
        A = stats.state["A"]
        assert torch.equal(drawn.setdefault((name, seed), A), A) and A.shape == (5, 8)
    assert len({float(A[0, 0]) for A in drawn.values()}) == 3
    for options, match in (
        ({"rank": 0}, "rank=0 must be"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
    ):
        with pytest.raises(ValueError, match=match):
            PST(**options)


@pytest.mark.parametrize("name", ["movement", "soft_movement", "pst"])
def test_what_was_learnt_survives_a_round_trip_of_the_state(name, tmp_path):
    from safetensors.torch import load_file, save_file

    method, stats = weights[name](), complete()
    method.update(stats)
    save_file(stats.state, tmp_path / "state.safetensors")
    resumed = copy.copy(stats)
    resumed.state = load_file(tmp_path / "state.safetensors")
    fresh = weights[name]()
    for each, at in ((method, stats), (fresh, resumed)):
        each.update(at)
    assert torch.equal(method.of_weights(stats), fresh.of_weights(resumed))
