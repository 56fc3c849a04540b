from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from trainers import ByHand, close, model, orders, rows, same, train

from serpette import DynamicPruning
from serpette.data.passes import Loader, Stream
from serpette.data.visits import Visits
from serpette.types import uniform_of

N = 37


def drawing(r=0.5, passes=8, anneal=0.125, n=1000):
    """A callback as it is in training, without a Trainer."""
    callback = DynamicPruning(r=r, anneal=anneal)
    callback._loader = Loader(n, 4, -(-n // 4), 1, 1, 0, True, aligned=1)
    callback._ids, callback._device = np.array([str(i) for i in range(n)]), torch.device("cpu")
    callback._passes, callback._planned = Fraction(passes), passes * 250
    callback._stream = Stream(callback._loader, 0, callback._draw)
    callback._begin(None, None, None)  # type: ignore[arg-type]
    return callback


def test_expected_weight_of_every_example_is_one():
    callback, draws = drawing(passes=4000, n=200), 500
    callback.losses_ = torch.arange(200.0)
    total, easy = torch.zeros(200), torch.arange(200) < 100
    for number in range(1, draws + 1):
        kept, weights = callback._draw(number)
        total[kept] += weights
        assert torch.equal(weights, torch.where(easy[kept], 2.0, 1.0))
        assert set(range(100, 200)) <= set(kept.tolist())  # nothing above the mean is left out
    mean = total / draws
    assert (mean[~easy] == 1).all()
    assert (mean[easy] - 1).abs().max() < 5 / draws**0.5  # a weight of 0 or 2 has standard deviation 1
    assert abs(float(mean[easy].mean()) - 1) < 5 / (100 * draws) ** 0.5


def test_first_pass_and_the_last_ones_are_full():
    callback = drawing(passes=16)
    callback.losses_ = torch.arange(1000.0)
    sizes = [len(callback._draw(number)[0]) for number in range(16)]
    assert [size == 1000 for size in sizes] == [True] + [False] * 13 + [True] * 2
    assert sizes[1] == pytest.approx(750, abs=60)


def test_draw_follows_the_ids_and_not_the_rows():
    one, other = drawing(), drawing()
    turned = torch.arange(1000).flip(0)
    one.losses_, other.losses_ = torch.arange(1000.0), torch.arange(1000.0)[turned]
    other._ids = other._ids[turned.numpy()]
    assert set(one._ids[one._draw(3)[0]]) == set(other._ids[other._draw(3)[0]])


def test_not_yet_seen_and_broken_losses_stay():
    callback = drawing()
    callback.losses_ = torch.full((1000,), torch.inf)
    callback.losses_[:10], callback.losses_[10] = torch.arange(10.0), torch.nan
    kept, weights = callback._draw(1)
    assert set(range(5, 1000)) <= set(kept.tolist()) and len(kept) < 1000
    assert (weights[kept >= 5] == 1).all()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_equals_a_loop_by_hand(tmp_path, accumulation):
    data, epochs = rows(N), 4
    callback = DynamicPruning(seed=5, ids=data)
    trained, diary = train(
        tmp_path, callback, data, num_train_epochs=epochs, gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )  # fmt: skip
    # once more: batches of 4 from one stream; a Trainer epoch is 10 batches and its last step is shorter
    hand, ids = ByHand(model(), data, diary.scaled), np.array(data.with_format(None)["id"])
    losses, position, steps, unit_left = torch.full((N,), torch.inf), 0, 0, 10
    stream, weights, ends = [], [], []

    def draw(number):
        kept, w = torch.arange(N), torch.ones(N)
        if 0 < number < 3:
            easy = losses < losses[torch.isfinite(losses)].double().mean()
            kept = (~(easy & (uniform_of(ids, 5 * 1_000_003 + number) < 0.5))).nonzero()[:, 0]
            w = torch.where(easy, 2.0, 1.0)
        order = orders(N, 5, number, kept)
        stream.extend(order.tolist())
        weights.extend(w[order].tolist())
        ends.append(len(stream))

    while len(ends) < epochs or position < ends[epochs - 1]:
        in_step = min(accumulation, unit_left)
        unit_left -= in_step
        starts = [position]
        for _ in range(in_step):
            starts.append(min(starts[-1] + 4, N) if starts[-1] < N else starts[-1] + 4)
        # the loader reads one batch ahead within a Trainer epoch, and so draws the next pass early
        while len(stream) < starts[-1] + (4 if unit_left and starts[-1] >= N else 0):
            draw(len(ends))
        parts = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        batches = [(torch.tensor(stream[part]), torch.tensor(weights[part])) for part in parts]
        for (batch, _), found in zip(batches, hand.step(batches), strict=True):
            losses[batch] = found
        position, steps, unit_left = starts[-1], steps + 1, unit_left or 10
    assert len(diary.rates) == steps
    assert callback.kept_ == [b - a for a, b in zip([0, *ends], ends, strict=False)][:epochs]
    assert min(callback.kept_) < N
    assert close(trained, hand.net)


def test_rate_reaches_zero_at_the_last_step_and_passes_have_their_share(tmp_path):
    data = rows(N)
    callback = DynamicPruning(seed=5)
    _, diary = train(
        tmp_path, callback, data, num_train_epochs=5, eval_strategy="epoch", save_strategy="epoch"
    )
    assert diary.rates[-1] == 0 and min(diary.rates[:-1]) > 0
    assert diary.rates == sorted(diary.rates, reverse=True)
    assert diary.rates[9] == pytest.approx(3e-3 * 4 / 5)  # the first of five passes
    evaluated = [event for event in diary.events if event[0] == "evaluate"]
    assert len(evaluated) == 5 and evaluated[0][1:] == (10, 1.0) and evaluated[-1][2] == 5.0
    assert [e[1] for e in evaluated] == [e[1] for e in diary.events if e[0] == "save"]
    assert callback.kept_[0] == callback.kept_[-1] == N and len(callback.kept_) == 5
    assert callback.share_ == sum(callback.kept_) / (5 * N) < 1
    assert evaluated[-1][1] == 10 + -(-(sum(callback.kept_) - N) // 4)  # no step beyond the last pass
    assert torch.isfinite(callback.losses_).all() and callback.cost_["hook_seconds"] > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resumed_run_has_the_same_bits(tmp_path, accumulation):
    data = rows(N)
    options = {"num_train_epochs": 5, "gradient_accumulation_steps": accumulation}
    whole, every = DynamicPruning(seed=5), 5 if accumulation == 1 else 2
    one, diary = train(
        tmp_path, whole, data, model(dropout=0.1), save_strategy="steps", save_steps=every, **options
    )
    for step in (every, 2 * every, 4 * every):  # in the first pass, at its end, in a pruned one
        again = DynamicPruning(seed=5)
        other, rest = train(
            tmp_path, again, data, model(dropout=0.1), resume=tmp_path / f"checkpoint-{step}", **options
        )
        assert same(one, other), step
        assert torch.equal(whole.losses_, again.losses_) and whole.kept_ == again.kept_
        assert rest.rates == diary.rates[step:]


def test_max_steps_are_kept_and_the_end_is_full(tmp_path):
    callback = DynamicPruning(anneal=0.5)
    _, diary = train(tmp_path, callback, rows(N), max_steps=30)
    assert len(diary.rates) == 30 and diary.rates[-1] == 0
    assert callback.kept_[0] == N and callback.kept_[1] < N and callback.kept_[-1] == N


def test_gradient_is_weighted_under_autocast_without_a_lora():
    net = model(lora=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(net)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    stream = Stream(Loader(4, 4, 1, 1, 1, 0, False), 0, lambda number: (torch.arange(4), None))
    visits = Visits(net, "test", lambda: stream.batch(0), lambda inputs: None, lambda visit: torch.zeros_like)
    net.train()
    visits.begin()
    prepared(input_ids=torch.arange(4, 20).reshape(4, 4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)
    visits.close()
    net.zero_grad()
    prepared(input_ids=torch.arange(4, 20).reshape(4, 4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert net.classifier.weight.grad.any()


def test_causal_language_model(tmp_path):
    callback = DynamicPruning()
    train(tmp_path, callback, rows(N, "llama"), model("llama"), num_train_epochs=4)
    assert min(callback.kept_) < N and callback.losses_.max() < 6


def test_warns_when_no_pass_is_left_to_prune():
    with pytest.warns(UserWarning, match="leaves nothing out in 2 epochs"):
        drawing(passes=2)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "info_bach"}, "did you mean 'info_batch'"),
        ({"r": 1.0}, r"r=1.0 must be in \[0, 1\)"),
        ({"r": -0.1}, "r=-0.1 must be in"),
        ({"anneal": 2}, "anneal=2 must be in"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        DynamicPruning(**options)
