"""Masks against torch.nn.utils.prune, exact fractions, nesting, and weights that come back."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from serpette.data.features import find_head
from serpette.masking import LOW_DISCREPANCY, MaskedPath, maskable
from serpette.scorers import DLC
from serpette.types import PathSpec
from serpette.zoo import tiny


def weights(model, names):
    modules = dict(model.named_modules())
    return {name: modules[name].weight.detach().clone() for name in names}


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_layer_masks_equal_torch_prune(kind):
    model = tiny(kind)
    head = find_head(model)
    names = maskable(model, head)
    spec = PathSpec(LOW_DISCREPANCY)
    masked = MaskedPath(model, spec, head)
    for p, share in enumerate(spec.points):
        twin = copy.deepcopy(model)
        for name in names:
            module = twin.get_submodule(name)
            prune.l1_unstructured(module, "weight", amount=int(module.weight.numel() * share))
        with masked.at(p):
            ours = weights(model, names)
        for name, theirs in weights(twin, names).items():
            assert torch.equal(ours[name], theirs), (name, share)


def test_official_path_equals_chained_global_pruning():
    model = tiny("vit")
    head = find_head(model)
    names = maskable(model, head)
    scorer = DLC(variant="official")
    masked = MaskedPath(model, scorer.path, head)
    twin = copy.deepcopy(model)
    pairs = [(twin.get_submodule(name), "weight") for name in names]
    total = sum(module.weight.numel() for module, _ in pairs)
    for n in range(1, 50):
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.02)
        if n in (1, 5, 25, 49):
            with masked.at(n):
                ours = weights(model, names)
            different = sum(int((ours[name] != w).sum()) for name, w in weights(twin, names).items())
            assert different <= n, "the chained form rounds once a step: at most one weight a step differs"
            kept = sum(int((w != 0).sum()) for w in ours.values()) / total
            assert kept == pytest.approx(0.98**n, abs=1e-3)


def test_threshold_is_exact_where_floats_are_not():
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 101).reshape(10, 10))
    model = nn.Sequential(layer, nn.Linear(10, 2))
    assert int(100 * 0.58) == 57  # what this test is about
    with MaskedPath(model, PathSpec((Fraction(0), Fraction("0.58"))), model[1]).at(1):
        assert int((layer.weight == 0).sum()) == 58


def test_a_three_by_three_by_hand():
    layer = nn.Linear(3, 3, bias=False)
    W = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0], [7.0, -8.0, 9.0]])
    layer.weight.data = W.clone()
    model = nn.Sequential(layer, nn.Linear(3, 2))
    with MaskedPath(model, PathSpec((Fraction(0), Fraction(1, 2))), model[1]).at(1):
        # floor(9/2) = 4: tau is the element 4 counted from 0, |w| = 5; everything below it goes
        assert layer.weight.tolist() == [[0, 0, 0], [0, 5, -6], [7, -8, 9]]
    assert torch.equal(layer.weight, W)


def test_masks_are_nested_and_weights_come_back_after_an_error():
    model = tiny("vit")
    head = find_head(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = PathSpec(LOW_DISCREPANCY)
    masked = MaskedPath(model, spec, head)
    zeros = {}
    for p, share in enumerate(spec.points):
        with masked.at(p):
            zeros[share] = torch.cat(
                [(w == 0).flatten() for w in weights(model, maskable(model, head)).values()]
            )
    ascending = sorted(zeros)
    for less, more in zip(ascending, ascending[1:], strict=False):
        assert not (zeros[less] & ~zeros[more]).any()
    with pytest.raises(KeyboardInterrupt), masked.at(3):
        raise KeyboardInterrupt
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_left_untouched():
    vit = tiny("vit")
    names = list(maskable(vit, find_head(vit)))
    assert names and not [n for n in names if "patch" in n or "classifier" in n or "norm" in n]
    assert len(names) == len({id(p) for p in maskable(vit, find_head(vit)).values()})
    resnet = tiny("resnet")
    stem = next(name for name, m in resnet.named_modules() if isinstance(m, nn.Conv2d))
    assert stem in maskable(resnet, find_head(resnet)), "a 7x7 stem is a convolution, not a patch embedding"


def test_random_masks_depend_on_their_seed_only():
    model = tiny("vit")
    points = (Fraction(0), Fraction(1, 2))

    def zeros(seed):
        with MaskedPath(model, PathSpec(points, principle="random", seed=seed), find_head(model)).at(1):
            return torch.cat([(p == 0).flatten() for p in maskable(model, find_head(model)).values()])

    assert torch.equal(zeros(0), zeros(0))
    assert not torch.equal(zeros(0), zeros(1))


def test_nothing_to_mask_is_an_error():
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="hidden layers"):
        MaskedPath(model, PathSpec((Fraction(0),)), model[0])
