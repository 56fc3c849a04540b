import itertools
import math

import pytest
import torch

from serpette.data.passes import Loader, Stream, drive
from serpette.data.visits import Visit, example_losses, loss_scale

GRID = list(itertools.product((5, 8, 37), (1, 3, 4), (1, 2, 3), (1, 2), (1, 2)))


def loader(n, batch, accumulation, processes, aligned, rank=0):
    batches = math.ceil(math.ceil(n / batch) / processes)
    return Loader(n, batch, batches, accumulation, processes, rank, True, aligned)


@pytest.mark.parametrize("n, batch, accumulation, processes, aligned", GRID)
def test_positions_are_those_of_a_walk_through_the_training(n, batch, accumulation, processes, aligned):
    numbers = loader(n, batch, accumulation, processes, aligned)
    position, batches, step, ends = 0, 0, 0, {}
    for unit in range(aligned + 2):
        assert numbers.start_of(unit) == position
        # a whole epoch: all rows once; in several processes, and after it, whole batches
        left = n if unit < aligned and processes == 1 else numbers.batches * batch * processes
        for i in range(numbers.batches):
            assert numbers.position_after(batches) == position
            read = min(left, batch * processes)
            position, left, batches = position + read, left - read, batches + 1
            if (i + 1) % accumulation == 0 or i + 1 == numbers.batches:
                step += 1
                assert numbers.batches_after(step) == batches
                ends[step] = position
        assert left == 0 and step == (unit + 1) * numbers.steps
    for wanted in range(1, position + 1):
        assert numbers.steps_to(wanted) == min(s for s, end in ends.items() if end >= wanted)


@pytest.mark.parametrize("n, batch, accumulation, processes, aligned", GRID[::3])
def test_every_pass_holds_its_rows_once_whoever_reads_them(n, batch, accumulation, processes, aligned):
    kept = torch.arange(0, n, 2)
    streams = [
        Stream(
            loader(n, batch, accumulation, processes, aligned, rank),
            7,
            lambda number: (torch.arange(n) if number < aligned else kept, None),
        )
        for rank in range(processes)
    ]
    numbers, seen = streams[0].loader, []
    for unit in range(aligned + 2):
        listed = []
        for stream in streams:
            stream.unit = unit
            listed.append(list(stream))  # every process goes through all rows, and accelerate deals them out
        assert all(rows == listed[0] for rows in listed)
        dealt = []
        for i in range(unit * numbers.batches, (unit + 1) * numbers.batches):
            for stream in streams:
                part = stream.batch(i)
                dealt += part.rows.tolist()
                seen += part.rows[part.fresh].tolist()
                assert 0 < len(part.rows) <= batch
        assert dealt == listed[0]
    for number in range(aligned):
        assert sorted(seen[number * n : (number + 1) * n]) == list(range(n))
    later = seen[aligned * n :]
    for start in range(0, len(later) - len(kept) + 1, len(kept)):
        assert sorted(later[start : start + len(kept)]) == kept.tolist()


def test_orders_differ_by_pass_and_seed_and_a_pass_that_was_put_back_is_the_same():
    numbers = loader(37, 4, 1, 1, 1)
    streams = [Stream(numbers, seed, lambda number: (torch.arange(37), None)) for seed in (0, 0, 1)]
    one, again, other = ([stream.at(p).rows.tolist() for p in (0, 37, 74)] for stream in streams)
    assert one == again and one != other and len({tuple(rows) for rows in one}) == 3
    fresh = Stream(numbers, 0, streams[0].draw)
    fresh.put(2, 74, torch.arange(37), None)
    assert fresh.at(80).rows.tolist() == one[2] and fresh.at(111).number == 3
    streams[0].forget(74)
    assert sorted(streams[0].passes) == [2]


def test_schedule_is_asked_for_the_moment_and_can_be_set_back():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    old = drive(scheduler, lambda step: step * 10 / 4, "test")
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.75, 0.5, 0.25, 0.0]
    assert scheduler.state_dict()["lr_lambdas"] == [None]  # nothing of ours in a checkpoint
    scheduler.lr_lambdas = old
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
    with pytest.warns(UserWarning, match="OneCycleLR counts steps"):
        drive(torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5), lambda step: step, "test")


def test_losses_of_each_example():
    z, y = torch.randn(3, 4), torch.tensor([0, 3, 1])
    wanted = torch.stack([-z[i].log_softmax(0)[y[i]] for i in range(3)])
    assert torch.allclose(example_losses(z, y, "classification"), wanted)
    assert example_losses(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), "regression").tolist() == [
        1,
        4,
    ]
    both = example_losses(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), "regression")
    assert both.tolist() == [5]
    multi = example_losses(torch.zeros(2, 3), torch.ones(2, 3), "multi-label")
    assert torch.allclose(multi, torch.full((2,), 2.0).log())
    z, y = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, -100], [-100] * 5])
    found = example_losses(z, y, "causal-lm")
    wanted = -(z[0, 1].log_softmax(0)[3] + z[0, 2].log_softmax(0)[4]) / 2
    assert torch.allclose(found[0], wanted) and torch.isnan(found[1])


@pytest.mark.parametrize("task", ["classification", "regression", "causal-lm"])
def test_scale_is_read_off_the_gradient_and_a_foreign_loss_shows(task):
    if task == "classification":
        z, y = torch.randn(6, 4), torch.randint(4, (6,))
    elif task == "regression":
        z, y = torch.randn(6, 1), torch.randn(6)
    else:
        z, y = torch.randn(6, 5, 7), torch.randint(7, (6, 5))
        y[:, :2] = -100
    z.requires_grad_()
    visit = Visit(None, task, y, z.detach(), torch.zeros(6))  # type: ignore[arg-type]
    factor = torch.ones(()) if task != "causal-lm" else (y[:, 1:] != -100).sum(1).float()  # sum over tokens
    fine = torch.ones(6, dtype=torch.bool)
    for scale in (1.0, 1 / 6, 65536.0):
        (g,) = torch.autograd.grad((example_losses(z, y, task) * factor).sum() * scale, z)
        c, misfit = loss_scale(g, visit, fine)
        assert float(c) == pytest.approx(scale, rel=1e-4) and misfit < 1e-4
    (g,) = torch.autograd.grad((example_losses(z, y, task) * torch.arange(1.0, 7.0)).sum(), z)
    assert loss_scale(g, visit, fine)[1] > 0.1
    g[5] = torch.nan
    assert torch.isfinite(loss_scale(g, visit, torch.arange(6) < 5)[0])
