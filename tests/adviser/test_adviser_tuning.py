"""Ways to tune: their memory is that of the memory tool, predicted seconds follow FLOPs, and time is kept."""

import copy

import pytest
import torch
from torch import nn

from serpette.adviser import tuning
from serpette.adviser.tuning import WAYS, tunings
from serpette.cost import forward_flops, train_flops
from serpette.memory.compare import Setup, compare, tuned
from serpette.memory.steps import StepMemory
from serpette.zoo import tiny

CLASSES = torch.tensor([0, 1, 2, 0])


def batch_of(kind, tokens=12):
    if kind in ("vit", "resnet"):
        return {"pixel_values": torch.rand(4, 3, 32, 32), "labels": CLASSES}
    ids = torch.randint(3, 100, (4, tokens))
    return {"input_ids": ids, "labels": CLASSES if kind == "bert" else ids}


@pytest.fixture
def clock(monkeypatch):
    """One second passes each time somebody looks."""
    now = iter(range(10**6))
    monkeypatch.setattr(tuning, "perf_counter", lambda: float(next(now)))


def shallow(kind):
    """With one layer, for what takes long."""
    model = tiny(kind)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(module, name, child[:1])
    return model


def setup_of(name):
    way, _, checkpointing = name.partition(", ")
    return Setup(**WAYS[way], r=2, checkpointing=bool(checkpointing))


@pytest.fixture
def quick(monkeypatch):
    """Predictions without the work: the memory of nobody knows what, 30 FLOPs, 10 of them forward."""
    memory = StepMemory(*range(1, 11))
    monkeypatch.setattr(tuning, "_predicted", lambda *args: (memory, 30, 10))


@pytest.mark.parametrize("kind, way", [("vit", "full"), ("llama", "columns")])
def test_memory_is_that_of_the_memory_tool(kind, way, clock, monkeypatch):
    monkeypatch.setattr(tuning, "WAYS", {way: WAYS[way]})
    model, batch = shallow(kind), batch_of(kind)
    setups = [setup_of(way), setup_of(f"{way}, checkpointing")]
    rows = compare(copy.deepcopy(model), setups, tokens=12, batch_size=4, device="cpu")["rows"]
    for seconds in (0, 10**6):
        found = tunings(model, batch, rank=2, seconds=seconds)
        assert [t.measured for t in found] == [True, seconds > 0]
        assert [t.peak_bytes for t in found] == [row["peak"] for row in rows]
        assert [t.trainable_parameters for t in found] == [row["parameters"] for row in rows]


def test_the_ways(clock):
    found = tunings(tiny("bert"), batch_of("bert"), rank=2, seconds=10**6)
    assert [t.name for t in found] == [*WAYS, *(f"{name}, checkpointing" for name in WAYS)]
    assert [(t.method, t.modes) for t in found[:5]] == [
        ("lora", None),
        ("rows", "rows"),
        ("rows", "columns"),
        ("lora", None),
        ("full", None),
    ]
    assert [t.freeze_attention for t in found] == ["without" in t.name for t in found]
    assert [t.checkpointing for t in found] == ["checkpointing" in t.name for t in found]
    by_name = {t.name: t for t in found}
    assert by_name["full"].trainable_parameters == sum(p.numel() for p in tiny("bert").parameters())
    assert by_name["full, checkpointing"].peak_bytes < by_name["full"].peak_bytes
    assert by_name["columns"].peak_bytes < by_name["rows"].peak_bytes < by_name["LoRA"].peak_bytes


def test_predicted_seconds_follow_the_flops(clock, monkeypatch):
    monkeypatch.setattr(tuning, "WAYS", {name: WAYS[name] for name in ("LoRA", "full")})
    model, batch = shallow("vit"), batch_of("vit")
    seconds = {t.name: t.step_seconds for t in tunings(model, batch, rank=2, seconds=0)}

    def flops(name):
        return train_flops(tuned(copy.deepcopy(model), setup_of(name)), batch)

    assert seconds["LoRA"] == 1
    assert seconds["full"] == pytest.approx(flops("full") / flops("LoRA"))
    assert seconds["full"] > 1.2
    forward = forward_flops(tuned(copy.deepcopy(model), setup_of("full")), batch)
    assert seconds["full, checkpointing"] == pytest.approx(
        (flops("full, checkpointing") + forward) / flops("LoRA")
    )


def test_a_checkpointed_way_is_predicted_from_itself(clock, quick, monkeypatch):
    """Steps of rows are three times as slow as their FLOPs say; with checkpointing they stay so."""
    seconds = tuning._Steps.seconds

    def slow(steps):
        return seconds(steps) * (3 if "RowModel" in repr(type(steps.model.base_model)) else 1)

    monkeypatch.setattr(tuning._Steps, "seconds", slow)
    found = tunings(tiny("vit"), batch_of("vit"), rank=2, seconds=20)
    assert [t.measured for t in found] == [True] * 2 + [False] * 8
    by_name = {t.name: t.step_seconds for t in found}
    assert by_name["rows"] == 3
    assert by_name["rows, checkpointing"] == pytest.approx(3 * 4 / 3)
    assert by_name["LoRA, checkpointing"] == by_name["columns, checkpointing"] == pytest.approx(4 / 3)
    assert by_name["columns"] == 1


@pytest.mark.parametrize("seconds, ways", [(15, 1), (16, 2), (24, 2), (25, 3), (10**6, 10)])
def test_as_many_ways_are_run_as_fit(seconds, ways, clock, quick):
    """Each look at the clock takes a second: LoRA ends at 6, another way takes 9; 9.5 are wanted for it."""
    found = tunings(tiny("vit"), batch_of("vit"), rank=2, seconds=seconds)
    assert [t.measured for t in found] == [True] * ways + [False] * (10 - ways)


def test_a_way_that_is_quicker_to_run_than_to_predict_is_run(clock, quick, monkeypatch):
    looks, predicted = [], tuning._predicted

    def slow(*args):
        looks.extend(tuning.perf_counter() for _ in range(11))
        return predicted(*args)

    monkeypatch.setattr(tuning, "_predicted", slow)
    found = tunings(tiny("vit"), batch_of("vit"), rank=2, seconds=0)
    assert [t.measured for t in found] == [True, False] + [True] * 8


def test_steps_are_counted(clock, quick, monkeypatch):
    counts, make = [], tuning.make_optimizer

    def counting(name, parameters):
        optimizer, number = make(name, parameters), len(counts)
        assert isinstance(optimizer, torch.optim.AdamW) and name == "adamw"
        counts.append(0)

        def count(*args):
            counts[number] += 1

        optimizer.register_step_post_hook(count)
        return optimizer

    monkeypatch.setattr(tuning, "make_optimizer", counting)
    tunings(tiny("bert"), batch_of("bert"), rank=2, seconds=33)
    assert counts == [1 + 2 + 2 + 2, 1 + 2, 1 + 2]  # one makes the states; LoRA runs in turns with the others


def test_full_tuning_is_not_run_without_room(clock, quick, monkeypatch):
    model, batch = tiny("vit"), batch_of("vit")
    first = tunings(model, batch, rank=2, seconds=0)[0].peak_bytes
    for room, missing in ((2 * first, 9), (2 * first + 1000, 2)):
        monkeypatch.setattr(tuning, "_free", lambda device, room=room: room)
        found = tunings(model, batch, rank=2, seconds=10**6)
        not_run = [t.name for t in found if not t.measured]
        assert len(not_run) == missing
        assert missing != 2 or not_run == ["full", "full, checkpointing"]


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_nothing_is_changed(kind, clock):
    model, batch = tiny(kind).train(), batch_of(kind)
    before = copy.deepcopy(model)
    held = {name: value.clone() for name, value in batch.items()}
    draws = torch.get_rng_state()
    tunings(model, batch, rank=2, seconds=10**6)
    assert torch.equal(draws, torch.get_rng_state())
    assert all(torch.equal(held[name], value) for name, value in batch.items())
    assert repr(model) == repr(before) and model.training
    assert not getattr(model, "is_gradient_checkpointing", False)
    for (name, value), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(value, old) and value.requires_grad == old.requires_grad, name
        assert value.grad is None


def test_what_a_model_has_no_place_for_is_left_out(clock):
    cnn = tunings(tiny("resnet"), batch_of("resnet"), seconds=10**6)
    assert {t.name.partition(",")[0] for t in cnn} == {"full"}
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # of no library: no checkpointing
    found = tunings(net, {"input": torch.rand(3, 4)}, rank=2, seconds=10**6)
    assert [t.name for t in found] == ["LoRA", "rows", "columns", "full"]
