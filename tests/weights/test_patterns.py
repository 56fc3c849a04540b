from itertools import product

import numpy as np
import pytest
import torch

from serpette.weights.patterns import NM, Unstructured, count_of, lowest, lowest_per_row, pattern_of


def lowest_by_sorting(values, k):
    joined = np.concatenate([v.double().numpy().ravel() for v in values])
    cut = np.zeros(len(joined), bool)
    cut[np.argsort(joined, kind="stable")[:k]] = True
    parts = np.split(cut, np.cumsum([v.numel() for v in values])[:-1])
    return [torch.from_numpy(part).view(v.shape) for part, v in zip(parts, values, strict=True)]


CASES = {
    "normal": lambda: [torch.randn(7, 11), torch.randn(3), torch.randn(2, 3, 5) * 1e-3],
    "many ties": lambda: [torch.randint(-2, 3, (9, 8)).float(), torch.randint(-2, 3, (40,)).float()],
    "all equal": lambda: [torch.ones(5, 5), torch.ones(4)],
    "tiny and huge": lambda: [torch.randn(60) * 10.0 ** torch.randint(-44, 38, (60,)), torch.zeros(3)],
    "infinite": lambda: [torch.tensor([1.0, -torch.inf, torch.inf, 0.0]), torch.tensor([-torch.inf, 2.0])],
    "signed zeros": lambda: [torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45])],
    "neighbours": lambda: [(torch.arange(-40, 40, dtype=torch.int32) + (129 << 23)).view(torch.float32)],
    "negative neighbours": lambda: [-(torch.arange(70, dtype=torch.int32) + (5 << 16)).view(torch.float32)],
    "half": lambda: [torch.randn(30).half(), torch.randn(30).bfloat16()],
    "strided": lambda: [torch.randn(6, 9).t(), torch.randn(10)[::2]],
    "empty": lambda: [torch.randn(0, 4), torch.randn(5)],
}


@pytest.mark.parametrize("case", CASES)
def test_lowest_equals_a_stable_sort(case):
    whole = CASES[case]()
    halves = [part for v in whole for part in (v.flatten()[:1], v.flatten()[1:])]  # no quickselect of one
    for values, k in product((whole, halves), range(sum(v.numel() for v in whole) + 1)):
        found = lowest(values, k)
        assert all(f.dtype == torch.bool and f.shape == v.shape for f, v in zip(found, values, strict=True))
        for f, expected in zip(found, lowest_by_sorting(values, k), strict=True):
            assert torch.equal(f, expected), k


def test_parts_of_a_large_tensor_are_put_together(monkeypatch):
    values, importance = [torch.randint(0, 9, (6, 8)).float(), torch.rand(5)], {"a": torch.rand(6, 8)}
    groups = NM(2, 4)(importance, {}, 0.5)["a"]
    monkeypatch.setattr("serpette.weights.patterns.CHUNK", 7)
    for k in range(54):
        assert all(map(torch.equal, lowest(values, k), lowest_by_sorting(values, k)))
    assert torch.equal(NM(2, 4)(importance, {}, 0.5)["a"], groups)


def test_lowest_refuses_nan_by_name_and_wrong_counts():
    values = [torch.ones(2), torch.tensor([1.0, torch.nan])]
    with pytest.raises(ValueError, match="'second' has NaN"):
        lowest(values, 1, ["first", "second"])
    with pytest.raises(ValueError, match=r"values\[1\]"):
        lowest(values, 1)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=rf"k={k} must be in \[0, 2\]"):
            lowest(values[:1], k)


@pytest.mark.parametrize(
    "values", [torch.randn(5, 7), torch.randint(0, 3, (5, 7)).float(), torch.zeros(4, 3)]
)
def test_rows_lose_equally_many_and_the_first_rows_the_rest(values):
    rows, columns = values.shape
    for k in range(values.numel() + 1):
        cut = lowest_per_row(values, k)
        counts = [k // rows + (row < k % rows) for row in range(rows)]
        expected = [lowest_by_sorting([v], c)[0] for v, c in zip(values, counts, strict=True)]
        assert torch.equal(cut, torch.stack(expected))


@pytest.mark.parametrize("k", [-1, 5])
def test_rows_refuse_wrong_counts(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        lowest_per_row(torch.ones(2, 2), k)


@pytest.mark.parametrize("sparsity, size, count", [(0.5, 5, 3), (0.145, 100, 15), (0.0, 9, 0)])
def test_counts_are_rounded_half_up(sparsity, size, count):
    assert count_of(sparsity, size) == count


def layers():
    return {"a": torch.rand(8, 16), "b": torch.rand(4, 8) * 10}


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_unstructured_counts(scope):
    cut = Unstructured(scope)(layers(), {}, 0.5)
    if scope == "global":
        assert sum(int(c.sum()) for c in cut.values()) == 80
        assert cut["a"].float().mean() > 0.5 > cut["b"].float().mean()
    else:
        assert {name: int(c.sum()) for name, c in cut.items()} == {"a": 64, "b": 16}
    if scope == "row":
        assert all((c.sum(1) == c.shape[1] // 2).all() for c in cut.values())


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured("layer"),
        Unstructured("row"),
        Unstructured("global"),
        NM(2, 4),
        NM(2, 4, "global"),
        NM(4, 8),
    ],
)
def test_cuts_are_nested_under_changing_importances(pattern):
    cut, sizes = {}, 160
    for sparsity in (0.0, 0.1, 0.23, 0.23, 0.4, 0.5):
        importances = layers()
        for name, old in cut.items():
            importances[name][old] = torch.nan  # what stands at a cut weight means nothing
        new = pattern(importances, cut, sparsity)
        assert all((new[name] | ~old).all() for name, old in cut.items())
        expected = (
            count_of(sparsity, sizes)
            if pattern.scope == "global"
            else sum(count_of(sparsity, v.numel()) for v in importances.values())
        )
        assert sum(int(c.sum()) for c in new.values()) == expected
        cut = new


def test_infinite_importances_do_not_bring_a_cut_weight_back():
    importance = {"a": torch.tensor([[-torch.inf, -torch.inf, 1.0, torch.inf]])}
    old = {"a": torch.tensor([[False, False, False, True]])}
    assert Unstructured()(importance, old, 0.5)["a"].tolist() == [[True, False, False, True]]
    assert NM(2, 4)(importance, old, 0.25)["a"].tolist() == [[False, False, False, True]]


def test_a_lower_sparsity_keeps_the_old_cuts():
    old = {"a": torch.ones(2, 2, dtype=torch.bool)}
    assert Unstructured()({"a": torch.rand(2, 2)}, old, 0.25)["a"].all()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (1, 2), (2, 3)])
def test_n_m_at_its_end_cuts_the_lowest_of_each_group(n, m):
    for value in (torch.rand(5, 24), torch.randint(0, 2, (5, 24)).float()):
        cut = NM(n, m)({"a": value}, {}, 1 - n / m)["a"]
        for group, found in zip(value.view(-1, m), cut.view(-1, m), strict=True):
            assert torch.equal(found, lowest_by_sorting([group], m - n)[0])


def test_n_m_on_the_way_takes_the_lowest_candidates():
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [2.5, 9.0, 9.0, 9.0]])
    cut = NM(2, 4)({"a": value}, {}, 0.25)["a"]  # 3 of 12; 3.0 and 4.0 are spared in their group
    assert cut.tolist() == [[True, True, False, False], [False] * 4, [True, False, False, False]]


def test_n_m_refusals():
    value = {"mlp.fc": torch.rand(2, 6)}
    with pytest.raises(ValueError, match="layer 'mlp.fc' has 6 inputs"):
        NM(2, 4)(value, {}, 0.5)
    with pytest.raises(ValueError, match="layer 'mlp.fc' has 6 inputs"):
        NM(2, 4).check(0.5, {"mlp.fc": (2, 6)})
    for sparsity in (0.4, 0.6):
        with pytest.raises(ValueError, match=f"sparsity={sparsity} must be 0.5"):
            NM(2, 4).check(sparsity, {})
    NM(1, 3).check(0.6666667, {"a": (1, 6)})
    with pytest.raises(ValueError, match="must be at most 0.5"):
        NM(2, 4)({"a": torch.rand(2, 8)}, {}, 0.6)
    with pytest.raises(ValueError, match="more than 2 cuts already"):
        NM(2, 4)({"a": torch.rand(1, 4)}, {"a": torch.tensor([[True, True, True, False]])}, 0.5)
    with pytest.raises(ValueError, match="'a' has NaN"):
        NM(2, 4)({"a": torch.full((1, 4), torch.nan)}, {}, 0.5)
    with pytest.raises(ValueError, match="0 < n < m"):
        NM(4, 4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_sparsity_limits(sparsity):
    for call in (
        lambda: Unstructured().check(sparsity, {}),
        lambda: Unstructured()(layers(), {}, sparsity),
        lambda: NM(2, 4)(layers(), {}, sparsity),
    ):
        with pytest.raises(ValueError, match=f"sparsity={sparsity} must be in"):
            call()


def test_factory():
    assert isinstance(pattern_of("unstructured", "global"), Unstructured)
    assert pattern_of("unstructured", "global").scope == "global"
    made = pattern_of("4:8")
    assert isinstance(made, NM) and (made.n, made.m) == (4, 8)
    with pytest.raises(ValueError, match="did you mean 'unstructured'"):
        pattern_of("unstructred")
    with pytest.raises(ValueError, match="unknown scope 'layers'; did you mean 'layer'"):
        pattern_of("unstructured", "layers")
    with pytest.raises(ValueError, match="unknown scope 'row'"):
        pattern_of("2:4", "row")
