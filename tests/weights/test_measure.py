from itertools import combinations, cycle
from math import comb

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from serpette.cost import forward_flops
from serpette.weights.measure import compare_cost, cost_of, median_interval, sensitivity, sparsity_by_layer
from serpette.weights.packed import save_packed
from serpette.zoo import tiny_models


class Clock:
    """A time that only the models' runs make pass."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("serpette.weights.measure.time", clock)
    return clock


class Slow(nn.Sequential):
    """Takes the next of `seconds`, over and over, and logs its runs."""

    def __init__(self, clock=None, *seconds):
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.clock, self.seconds, self.log = clock or Clock(), cycle(seconds or (1.0,)), []

    def forward(self, x):
        self.log.append((self.clock.now, len(x), self.training, torch.is_grad_enabled()))
        self.clock.now += next(self.seconds)
        return super().forward(x)


def inputs(batch):
    return torch.zeros(batch, 4)


def test_cost_of_a_small_model():
    model = Slow().train()
    with torch.no_grad():
        model[0].weight[:3] = 0
    cost = cost_of(model, inputs, batch_sizes=[1, 3], seconds=0)
    assert cost["parameters"] == 24 + 6 + 12 + 2
    assert cost["nonzero_parameters"] == cost["parameters"] - 12
    assert (cost["prunable_weights"], cost["nonzero_prunable_weights"]) == (24, 12)  # not the last layer
    assert cost["flops_per_example"] == 2 * (24 + 12)
    assert cost["file_bytes"] == 4 * cost["parameters"]
    assert cost["packed_bytes"] == cost["file_bytes"] - 4 * 24 + 24 // 8 + 4 * 12
    assert set(cost["latency_seconds"]) == {1, 3}
    assert cost["examples_per_second"][3] == pytest.approx(3 / cost["latency_seconds"][3])
    assert model.training and not any(training or grad for _, _, training, grad in model.log)
    assert {size for _, size, *_ in model.log} == {1, 3}


def test_latency_is_the_median_without_the_warm_up(clock):
    model = Slow(clock, 50, 50, 1, 2, 9, 3, 4, 3)
    assert cost_of(model, inputs, [4], seconds=0)["latency_seconds"] == {4: 3}
    assert cost_of(Slow(clock, 2.0), inputs, [4], seconds=0)["examples_per_second"] == {4: 2}


def test_seconds_are_spent(clock):
    model = Slow(clock, 1.0)
    cost_of(model, inputs, [3], seconds=9.5)
    assert len([1 for _, size, *_ in model.log if size == 3]) == 2 + 10


def test_tied_weights_count_once(tmp_path):
    model = tiny_models.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight

    def tokens(batch):
        return {"input_ids": torch.ones(batch, 4, dtype=torch.long)}

    cost = cost_of(model, tokens, [1], seconds=0)
    assert cost["parameters"] == sum(p.numel() for p in set(model.parameters()))
    sizes = save_packed(model, tmp_path / "model")
    assert (cost["file_bytes"], cost["packed_bytes"]) == (sizes.dense_bytes, sizes.packed_bytes)
    assert cost["flops_per_example"] == forward_flops(
        model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    )


def test_models_are_timed_in_turns(clock):
    one, two = Slow(clock), Slow(clock)
    compare_cost(one, two, inputs, [2], seconds=0)
    runs = sorted((t, who) for who, model in (("one", one), ("two", two)) for t, n, *_ in model.log if n == 2)
    assert [who for _, who in runs[4:]] == ["one", "two", "two", "one"] * 3


@pytest.mark.parametrize(
    "before, after, ratio, faster",
    [
        ([4.0], [2.0], 0.5, True),
        ([2.0], [4.0], 2.0, False),
        ([2.0], [2.0], 1.0, None),
        ([4.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 5.0], 0.75, None),  # 1 of 6 the other way
    ],
)
def test_faster_only_where_the_interval_excludes_1(clock, before, after, ratio, faster):
    result = compare_cost(Slow(clock, *before), Slow(clock, *after), inputs, [1], seconds=0)
    speed = result["speed"][1]
    assert (speed["time_ratio"], speed["faster"]) == (ratio, faster)
    assert speed["interval"] == (min(after) / before[0], max(after) / before[0])
    assert result["before"]["latency_seconds"][1] == before[0]
    assert result["after"]["latency_seconds"][1] == after[0]


def test_a_drift_of_the_machine_is_no_speed_up(clock):
    class Drifting(Slow):
        def forward(self, x):
            self.clock.now += self.clock.now / 10
            return super().forward(x)

    speed = compare_cost(Drifting(clock), Drifting(clock), inputs, [1], seconds=0)["speed"][1]
    assert speed["faster"] is None and speed["interval"][0] < 1 < speed["interval"][1]


@pytest.mark.parametrize("n", [6, 7, 8, 9, 15, 16, 40])
def test_interval_of_the_median_by_counting(n):
    low, high = median_interval(list(range(n))[::-1])
    assert low + high == n - 1
    inside = sum(comb(n, below) for below in range(low + 1, high + 1))
    assert inside / 2**n >= 0.95 > (inside - comb(n, low + 1) - comb(n, high)) / 2**n


def test_interval_covers_the_median_of_all_orders():
    # six fair coins: all on one side of the median in 2 of 64 cases
    misses = sum(len(below) in (0, 6) for k in range(7) for below in combinations(range(6), k))
    assert misses / 64 < 0.05 and median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    with pytest.raises(ValueError, match="give 6 or more"):
        median_interval([1.0] * 5)


def test_sparsity_by_layer():
    model = Slow()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    assert sparsity_by_layer(model) == {"0": 0.25}


def test_a_lora_must_be_merged():
    model = get_peft_model(Slow(), LoraConfig(target_modules=["0"]))
    for measure in (sparsity_by_layer, lambda m: cost_of(m, inputs, [1], 0), lambda m: sensitivity(m, float)):
        with pytest.raises(ValueError, match="merge_and_unload"):
            measure(model)
    assert sparsity_by_layer(model.merge_and_unload()) == {"0": 0.0}


def test_sensitivity_prunes_one_layer_at_a_time_and_puts_it_back():
    model = tiny_models.make("vit")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    names = list(sparsity_by_layer(model))[:2]
    seen = []

    def evaluate(m):
        seen.append({name: share for name, share in sparsity_by_layer(m).items() if share})
        return len(seen)

    found = sensitivity(model, evaluate, sparsities=[0.25, 0.5], layers=names)
    assert seen == [{}, {names[0]: 0.25}, {names[0]: 0.5}, {names[1]: 0.25}, {names[1]: 0.5}]
    assert found == {"unpruned": 1.0, "layers": {names[0]: {0.25: 2, 0.5: 3}, names[1]: {0.25: 4, 0.5: 5}}}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_sensitivity_takes_importances_and_puts_back_when_it_fails():
    model = Slow()
    original = model[0].weight.detach().clone()

    def evaluate(m):
        if (m[0].weight == 0).any():
            assert (m[0].weight[-3:] == 0).all() and (m[0].weight[:3] != 0).all()
            raise RuntimeError("out of memory")
        return 0.0

    importance = -torch.arange(24.0).view(6, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        sensitivity(model, evaluate, [0.5], importances={"0": importance})
    assert torch.equal(model[0].weight, original)


def test_sensitivity_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown layer '1'"):
        sensitivity(Slow(), lambda m: 0.0, layers=["1"])
    with pytest.raises(ValueError, match="importances has no layer '0'"):
        sensitivity(Slow(), lambda m: 0.0, importances={})
