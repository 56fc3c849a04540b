"""Cut models: sizes, outputs and losses against what is done by hand; nothing changes; time is kept."""

import copy

import pytest
import torch
from torch import nn

from serpette.adviser import weights
from serpette.adviser.head import cross_fitted
from serpette.adviser.weights import Cut, cuts, outputs_of, predicted_losses, sensitivities
from serpette.data.features import Reader
from serpette.data.language import response_losses
from serpette.evaluate import paired_difference
from serpette.weights import prune, shrink
from serpette.weights.packed import sizes_of
from serpette.zoo import tiny

TASKS = {"vit": "classification", "bert": "regression", "llama": "causal-lm"}
N = 10


def reader_of(kind, n=N):
    if kind in ("vit", "resnet"):
        images, labels = torch.rand(n, 3, 32, 32), torch.zeros(n, dtype=torch.long)
        return lambda picks: {"pixel_values": images[picks], "labels": labels[picks]}
    ids = torch.randint(3, 100, (n, 9))
    labels = torch.where(torch.arange(9) < 4, -100, ids) if kind == "llama" else torch.zeros(n)
    mask = torch.ones_like(ids)
    return lambda picks: {"input_ids": ids[picks], "attention_mask": mask[picks], "labels": labels[picks]}


def by_hand(model, sparsity):
    pruned = copy.deepcopy(model)
    return shrink(pruned, prune(pruned, "magnitude", sparsity, pattern="structured", progress=False).masks_)


@pytest.fixture
def clock(monkeypatch):
    """One second passes each time somebody looks, and nothing is timed."""
    now = iter(range(10**6))
    monkeypatch.setattr(weights, "perf_counter", lambda: float(next(now)))
    asked = []

    def compared(before, after, inputs, sizes, seconds):
        asked.append((list(sizes), seconds, {name: len(value) for name, value in inputs(sizes[-1]).items()}))
        cost = {"parameters": 8, "file_bytes": 4}
        speed = {size: {"time_ratio": 0.5, "interval": (0.4, 0.8)} for size in sizes}
        return {"before": cost, "after": {"parameters": 2, "file_bytes": 3}, "speed": speed}

    monkeypatch.setattr(weights, "compare_cost", compared)
    return asked


@pytest.mark.parametrize("kind", TASKS)
def test_a_cut_is_the_model_made_smaller_by_hand(kind, monkeypatch):
    monkeypatch.setattr(weights, "TIMED_SECONDS", 0.05)
    model, read = tiny(kind).train(), reader_of(kind)
    before = copy.deepcopy(model)
    options = {"task": TASKS[kind], "batch_size": 4}
    found = cuts(model, read, N, **options, sparsities=[0.5, 0.25], batch_sizes=[1])
    assert [cut.sparsity for cut in found] == [0.5, 0.25]
    for cut in found:
        small = by_hand(before, cut.sparsity).eval()
        count = sum(p.numel() for p in small.parameters())
        assert cut.parameters == count / sum(p.numel() for p in before.parameters()) < 1
        assert cut.file == sizes_of(small).dense_bytes / sizes_of(before).dense_bytes < 1
        inputs = read(list(range(N)))
        with torch.no_grad():
            if kind == "llama":
                hand = torch.stack(response_losses(small, inputs), 1)
            else:
                inputs.pop("labels")
                hand = Reader(small)(inputs)[0]
        torch.testing.assert_close(cut.outputs, hand)
        (timing,) = cut.timings
        assert timing["batch_size"] == 1
        assert 0 < timing["low"] <= timing["speedup"] <= timing["high"]
    assert found[0].parameters < found[1].parameters
    sensitivities(model, read, N, **options)
    assert repr(model) == repr(before) and model.training
    for (name, value), (_, old) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, old), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", TASKS)
def test_a_cut_of_nothing_costs_nothing(kind):
    model, read = tiny(kind), reader_of(kind, 40)
    dense = outputs_of(model, read, 40, task=TASKS[kind])
    (cut,) = cuts(model, read, 40, task=TASKS[kind], sparsities=[0.0], batch_sizes=[1, 3])
    assert (cut.parameters, cut.file) == (1, 1) and torch.equal(cut.outputs, dense)
    assert cut.timings == [{"batch_size": b, "speedup": 1, "low": 1, "high": 1} for b in (1, 3)]
    classes = 3 if kind == "vit" else 0
    labels = torch.arange(40) % 3 if classes else torch.arange(40.0)
    ((loss, low, high),) = predicted_losses([cut], dense, labels, classes, task=TASKS[kind])
    assert loss == 0 and low <= 0 <= high


def test_the_loss_of_accuracy_is_that_of_a_loop(generator):
    labels = torch.arange(90) % 3
    dense = torch.eye(3)[labels] + 0.4 * torch.randn(90, 3, generator=generator)
    poor = dense + torch.randn(90, 3, generator=generator)
    found = predicted_losses([cut_of(poor), cut_of(dense)], dense, labels, 3, task="classification", seed=4)
    right = []
    for features in (dense, poor):
        outputs = cross_fitted(features, labels, 3, seed=4)
        right.append([int(outputs[i].argmax() == labels[i]) for i in range(90)])
    lost = sum(a - b for a, b in zip(*right, strict=True)) / 90
    assert found[0][0] == pytest.approx(100 * lost) and lost > 0.05
    assert found[0] == pytest.approx([100 * value for value in paired_difference(*right)])
    assert found[1][0] == 0


def test_the_loss_of_a_regression_is_that_of_its_r2(generator):
    x = torch.randn(80, 4, generator=generator)
    targets = x.sum(1) + 7
    poor = x + torch.randn(80, 4, generator=generator)
    ((loss, low, high),) = predicted_losses([cut_of(poor)], x, targets, 0, task="regression")
    r2 = []
    for features in (x, poor):
        residual = ((cross_fitted(features, targets, 0)[:, 0] - targets) ** 2).sum()
        r2.append(float(1 - residual / ((targets - targets.mean()) ** 2).sum()))
    assert loss == pytest.approx(100 * (r2[0] - r2[1]), rel=1e-4)
    assert 10 < low < loss < high


def test_the_loss_of_a_language_model_is_in_nats():
    dense = torch.tensor([[1.0, 7], [2.0, 3], [4.0, 5]])
    rise = torch.tensor([[0.5, 0], [1.0, 0], [0.0, 0]])
    ((loss, low, high),) = predicted_losses([cut_of(dense + rise)], dense, None, 0, task="causal-lm")
    half = 4.30265 * 0.5 / 3**0.5  # of Student's t with 2 degrees of freedom
    assert (loss, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-5)


def cut_of(outputs):
    return Cut(0.5, 0.5, 0.5, [], outputs)


@pytest.mark.parametrize("kind", TASKS)
def test_the_sensitivity_of_a_layer_is_that_of_the_layer_cut_by_hand(kind):
    model, read = tiny(kind), reader_of(kind)
    for weight in model.parameters():
        weight.data *= 15 if weight.ndim == 2 else 1  # as they are, nearly nothing depends on them
    found = sensitivities(model, read, N, task=TASKS[kind], batch_size=4, sparsity=0.75)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name]
    assert [one["name"] for one in found] == layers
    dense = outputs_of(model, read, N, task=TASKS[kind])
    for one in (found[0], found[-1]):
        cut = copy.deepcopy(model)
        weight = cut.get_submodule(one["name"]).weight.data
        small = weight.abs().flatten().argsort()[: weight.numel() * 3 // 4]
        weight.view(-1)[small] = 0
        changed = outputs_of(cut, read, N, task=TASKS[kind])
        if kind == "llama":
            hand = (changed - dense)[:, 0].mean()
        else:
            hand = ((changed - dense) ** 2).sum() / ((dense - dense.mean(0)) ** 2).sum()
        assert one["losses"] == {"0.75": pytest.approx(float(hand), rel=1e-3)}
        assert abs(hand) > 1e-3


def test_layers_are_drawn_where_time_is_short(clock):
    """A reading takes a second; two are spent on the dense model."""
    options = {"task": "classification", "seed": 3}
    model, read = tiny("vit"), reader_of("vit")
    whole = {one["name"]: one for one in sensitivities(model, read, N, **options, seconds=100)}
    drawn = [sensitivities(model, read, N, **options, seconds=s) for s in (0, 3, 7)]
    assert [len(found) for found in drawn] == [1, 1, 5] and len(whole) == 12
    assert all(one == whole[one["name"]] for found in drawn for one in found)
    order = [*whole]
    assert [one["name"] for one in drawn[2]] == sorted((o["name"] for o in drawn[2]), key=order.index)
    other = sensitivities(model, read, N, task="classification", seed=4, seconds=7)
    assert [one["name"] for one in other] != [one["name"] for one in drawn[2]]


@pytest.mark.parametrize("seconds, done", [(0, 1), (5, 1), (8, 2), (11, 2), (12, 3), (100, 3)])
def test_sparsities_that_do_not_fit_are_left_out(seconds, done, clock):
    """Each look at the clock takes a second, and each sparsity three."""
    model, read = tiny("vit"), reader_of("vit")
    found = cuts(model, read, N, task="classification", seconds=seconds, batch_sizes=[1])
    assert [cut.sparsity for cut in found] == [0.25, 0.5, 0.75][:done]
    assert all(cut.parameters == 0.25 and cut.file == 0.75 for cut in found)
    assert found[0].timings == [{"batch_size": 1, "speedup": 2, "low": 1.25, "high": 2.5}]


def test_a_batch_that_takes_too_long_is_not_timed(clock):
    """An example takes a tenth of a second, a comparison 16 forward passes or more."""
    model, read = tiny("vit"), reader_of("vit")
    for seconds, sizes, timed in ((50, [1], 3), (51.3, [1, 8], 3), (1, [1], 0.25)):
        cuts(model, read, N, task="classification", sparsities=[0.5], batch_sizes=[1, 8], seconds=seconds)
        assert clock[-1] == (sizes, timed, {"pixel_values": sizes[-1]})


def test_more_inputs_than_examples_repeat_them(clock):
    cuts(tiny("vit"), reader_of("vit", 3), 3, task="classification", sparsities=[0.5], batch_sizes=[8])
    assert clock[-1][0] == [8] and clock[-1][2] == {"pixel_values": 8}


def test_a_model_that_cannot_be_cut_says_why():
    with pytest.raises(ValueError, match="heads or channels|traced"):
        net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2))
        cuts(net, lambda picks: {"x": torch.zeros(len(picks), dtype=torch.long)}, 4, task="classification")


def test_other_importances_see_the_examples():
    model, read = tiny("llama"), reader_of("llama")
    options = {"task": "causal-lm", "sparsities": [0.5], "batch_sizes": [1], "seconds": 1}
    wanda = cuts(model, read, N, **options, importance="wanda")[0]
    assert wanda.parameters == cuts(model, read, N, **options)[0].parameters
