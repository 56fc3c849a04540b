"""OBS against a slow twin that inverts the Hessian anew for each column."""

import math

import pytest
import torch

from serpette.importance import OBS
from serpette.types import LayerStats


def make(rows=6, columns=16, tokens=200, seed=0, dtype=torch.float64):
    """Weights, correlated inputs, and their Hessian."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ (mix + 2 * torch.eye(columns))
    return torch.randn(rows, columns, generator=g, dtype=dtype), x, (2 * x.T @ x).to(dtype)


def slow_obs(weight, hessian, blocks, choose, damping=0.01):
    """Column by column: `choose(scores of a block) -> cut`, then the surgeon's step with the inverse of what
    is left, which is made anew each time."""
    H, w = hessian.clone(), weight.clone()
    dead = H.diagonal() == 0
    mean = float(H.diagonal()[~dead].mean())
    for j in range(len(H)):
        H[j, j] = 1 if dead[j] else H[j, j] + damping * mean
    cut = torch.zeros_like(w, dtype=torch.bool)
    for start, stop in blocks:
        scores = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            scores[:, j - start] = w[:, j] ** 2 / H[j:, j:].inverse()[0, 0] * (not dead[j])
        cut[:, start:stop] = choose(scores, start, stop)
        for j in range(start, stop):
            inverse = H[j:, j:].inverse()
            for i in range(len(w)):
                if cut[i, j]:
                    w[i, j:] -= w[i, j] / inverse[0, 0] * inverse[0]
                    w[i, j] = 0
    return w, cut


def lowest_of(total, columns):
    def choose(scores, start, stop):
        count = total * stop // columns - total * start // columns
        cut = torch.zeros(scores.numel(), dtype=torch.bool)
        cut[scores.flatten().argsort(stable=True)[:count]] = True
        return cut.view_as(scores)

    return choose


def two_of_four(scores, start, stop):
    cut = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(len(scores)):
        for j in sorted(range(4), key=lambda j: (float(scores[i, j]), j))[:2]:
            cut[i, j] = True
    return cut


def error(x, one, two):
    return float((x @ (one - two).T).norm())


def test_scores_against_the_inverse_of_what_is_left():
    weight, _, hessian = make()
    stats = LayerStats("fc", lambda: weight, hessian=hessian)
    H = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    expected = [
        [float(weight[i, j]) ** 2 / float(H[j:, j:].inverse()[0, 0]) for j in range(16)] for i in range(6)
    ]
    torch.testing.assert_close(OBS().of_weights(stats), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.9])
def test_against_the_slow_twin(block, sparsity):
    weight, _, hessian = make()
    hessian[3], hessian[:, 3] = 0, 0  # an input that is always zero
    blocks = [(s, min(s + block, 16)) for s in range(0, 16, block)]
    total = math.floor(sparsity * 96 + 0.5)
    expected, cut_there = slow_obs(weight, hessian, blocks, lowest_of(total, 16))
    new, cut = OBS(block=block).reconstruct(weight, hessian, sparsity)
    assert torch.equal(cut, cut_there) and int(cut.sum()) == total
    torch.testing.assert_close(new, expected)
    assert not bool(new[cut].any()) and torch.equal(new[:, 3][~cut[:, 3]], weight[:, 3][~cut[:, 3]])


def test_two_of_four_against_the_slow_twin():
    weight, _, hessian = make()
    blocks = [(s, s + 4) for s in range(0, 16, 4)]
    expected, cut_there = slow_obs(weight, hessian, blocks, two_of_four)
    for block in (4, 10, 128):
        new, cut = OBS(block=block).reconstruct(weight, hessian, 0.5, nm=(2, 4))
        assert torch.equal(cut, cut_there) and bool((cut.view(6, 4, 4).sum(2) == 2).all())
        torch.testing.assert_close(new, expected)
    _, cut = OBS().reconstruct(weight, hessian, 0.75, nm=(1, 4))
    assert bool((cut.view(6, 4, 4).sum(2) == 3).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options, left",
    [({"sparsity": 0.5}, 0.8), ({"sparsity": 0.5, "nm": (2, 4)}, 0.8), ({"sparsity": 0.9}, 0.96)],
)
def test_compensation_pays(options, left, dtype):
    """Less error than the same mask without it, not less than the best that the mask allows."""
    weight, x, hessian = make(24, 256, 600, dtype=dtype)
    before = weight.clone(), hessian.clone()
    new, cut = OBS().reconstruct(weight, hessian, **options)
    assert torch.equal(before[0], weight) and torch.equal(before[1], hessian) and new.dtype == dtype
    assert int(cut.sum()) == math.floor(options["sparsity"] * 24 * 256 + 0.5)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for i, gone in enumerate(cut):
        best[i, ~gone] = torch.linalg.lstsq(x[:, ~gone], x @ weight[i].double()).solution
    new, weight = new.double(), weight.double()
    compensated, bare = error(x, weight, new), error(x, weight, weight.masked_fill(cut, 0))
    assert error(x, weight, best) < compensated < left * bare


def test_equal_scores_go_by_position_and_half_precision_comes_back():
    new, cut = OBS().reconstruct(torch.ones(2, 4, dtype=torch.bfloat16), torch.eye(4), 0.3)
    assert cut.tolist() == [[True, True, False, False], [False] * 4] and new.dtype == torch.bfloat16
    assert new.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    _, cut = OBS().reconstruct(torch.ones(1, 4), torch.zeros(4, 4), 0.5)
    assert cut.tolist() == [[True, True, False, False]], "no input was ever other than zero"


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
        ({"sparsity": 0.5, "hessian": torch.eye(3)}, r"hessian of shape \(3, 3\) must be \(16, 16\)"),
        ({"sparsity": 0.5, "nm": (2, 5)}, r"nm=\(2, 5\) needs 0 < n <= m and m that divides the 16 inputs"),
        ({"sparsity": 0.4, "nm": (2, 4)}, "sparsity=0.4 must be 0.5 where 2 of every 4 stay"),
        ({"sparsity": 0.5, "hessian": torch.full((16, 16), torch.nan)}, "Hessian of the layer is not finite"),
        ({"sparsity": 0.5, "hessian": -torch.eye(16)}, "not positive with damping=0.01.*raise the damping"),
    ],
)
def test_refuses(arguments, match):
    weight, _, hessian = make()
    with pytest.raises(ValueError, match=match):
        OBS().reconstruct(weight, **{"hessian": hessian, **arguments})


def test_arguments():
    with pytest.raises(ValueError, match="damping=0 must be above 0"):
        OBS(damping=0)
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        OBS(block=0)
    with pytest.raises(ValueError, match="Hessian of layer 'fc' is not finite"):
        OBS().of_weights(LayerStats("fc", lambda: torch.ones(1, 2), hessian=torch.full((2, 2), torch.nan)))
