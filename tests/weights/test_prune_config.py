"""Settings, their limits, and the steps at which weights are scored and cut."""

import pytest
import torch
from lora_nets import lora_net, net, tune

from serpette.importance import Movement, Random
from serpette.weights import PruneConfig, Pruner, attach
from serpette.weights.patterns import count_of
from serpette.weights.schedules import sparsity_at


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
        ({"sparsity": 50}, r"sparsity=50 must be .*did you mean 0.5"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"scope": "row"}, "scope='row' must be 'layer' or 'global'"),
        ({"targets": "heads"}, "targets='heads'"),
        ({"mask_grad": "true"}, "mask_grad='true'"),
        ({"every_k": 0}, "every_k=0"),
        ({"average": 1.0}, "average=1.0"),
        ({"round_to": 0}, "round_to=0"),
        ({"steps": 0}, "steps=0"),
        ({"start": 0.6, "end": 0.4}, "start=0.6 and end=0.4"),
        ({"schedule": "cubik"}, "cubic"),
        ({"pattern": "unstructred"}, "unstructured"),
        ({"pattern": "4:2"}, "pattern 4:2 must have 0 < n < m"),
        ({"pattern": "2:4", "sparsity": 0.6}, "must be 0.5 for the pattern 2:4"),
        ({"shrink": True}, "shrink=True needs pattern='structured'"),
        ({"importance": "lora_prun"}, "lora_prune"),
    ],
)
def test_outside_the_limits(settings, error):
    with pytest.raises(ValueError, match=error):
        PruneConfig(**settings)
    with pytest.raises(ValueError, match=error):
        Pruner(**settings)


def test_an_importance_of_neurons_alone_names_those_of_weights():
    from serpette.importance import registry

    alone = sorted(n for n, cls in registry.items() if not hasattr(cls, "of_weights"))
    assert alone
    for name in alone:
        with pytest.raises(ValueError, match=f"importance '{name}' does not rank single weights.*lora_prune"):
            PruneConfig(name)


def test_the_seed_reaches_the_importance_and_an_object_is_taken_as_it_is():
    assert PruneConfig("random", seed=7).method().seed == 7
    mine = Random(seed=3)
    assert PruneConfig(mine, seed=7).method() is mine
    with pytest.raises(ValueError, match="not both"):
        Pruner(PruneConfig(), sparsity=0.3)
    with pytest.raises(ValueError, match="not both"):
        Pruner(PruneConfig(), pattern="2:4")


@pytest.mark.parametrize("steps, k", [(20, 1), (199, 1), (300, 3), (1000, 10), (100_000, 10)])
def test_every_k_follows_the_length(steps, k):
    assert PruneConfig().interval(steps) == k
    assert PruneConfig(every_k=7).interval(steps) == 7


@pytest.mark.parametrize("start, end", [(0.1, 0.3), (0.0, 0.0), (0.0, 0.7), (0.25, 0.45), (0.3, 0.1)])
@pytest.mark.parametrize("steps", [10, 20, 100, 333])
@pytest.mark.parametrize("every_k", [None, 1, 7])
def test_cuts_lie_inside_the_window_and_end_at_the_final_sparsity(start, end, steps, every_k):
    config = PruneConfig("lora_prune", 0.5, start=start, end=end, every_k=every_k)
    scores, cuts = config.plan(steps)
    shares = [config.at(t, steps) for t in cuts]
    assert set(cuts) <= set(scores)
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 0.5
    assert all(start * steps <= t for t in cuts)
    assert cuts[-1] <= -(-round((1 - end) * steps, 9) // 1)  # nothing is cut in the last share of the steps
    assert all(t % (config.interval(steps)) == 0 for t in cuts[:-1])
    before = [t for t in scores if t < cuts[0]]
    assert all(t >= cuts[0] - 30 for t in before)  # three time constants of 10 steps
    assert cuts[0] <= 30 or config.interval(steps) > 1 or len(before) == 30


def test_what_learns_scores_from_the_first_step_and_what_looks_at_weights_only_cuts():
    assert PruneConfig("movement").plan(500)[0][0] == 5
    scores, cuts = PruneConfig("magnitude").plan(500)
    assert scores == cuts
    assert PruneConfig("lora_prune").plan(500)[0][0] == 25  # the first cut is at 55
    assert PruneConfig("lora_prune", 0.0).plan(500)[1] == []


def test_steps_of_the_schedule_count_also_for_the_interval_and_the_average():
    config = PruneConfig("lora_prune", 0.5, steps=20)
    assert config.plan(5000) == PruneConfig("lora_prune", 0.5).plan(20)
    model, data = lora_net(), []
    pruner = attach(model, config, 5000)
    parameter = model.base_model.model.blocks[0].mlp.fc1
    name = "blocks.0.mlp.fc1"
    for _ in range(2):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        pruner.step()
        data.append(pruner._averages[name].clone())
    value = pruner.method.of_weights(pruner._layers[name].stats({"lora"}))
    torch.testing.assert_close(data[0], 0.1 * value)
    torch.testing.assert_close(data[1], 0.19 * value)
    assert parameter is pruner._layers[name].module
    pruner.step_ = 14
    pruner.finish()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
def test_exact_counts_at_each_cut(scope, schedule):
    model, seen = lora_net(), []
    config = PruneConfig("lora_prune", 0.37, scope=scope, schedule=schedule)

    def look(step, pruner):
        counts = {n: (int((~m).sum()), m.numel()) for n, m in pruner.masks_.items()}
        due = sparsity_at(step, 20, 0.37, schedule=schedule)
        if scope == "layer":
            assert all(k == count_of(due, size) for k, size in counts.values())
        else:
            assert sum(k for k, _ in counts.values()) == count_of(due, sum(s for _, s in counts.values()))
        assert all(len(v) <= 20 for v in pruner.history_)
        seen.append(due)

    pruner, _ = tune(model, config, each=look)
    assert pruner.history_ == [(t, s) for t, s in enumerate(seen, 1) if s > 0 and t <= 14]
    assert seen[0] == 0 and seen[13] == seen[-1] == 0.37
    if scope == "global":
        assert len(set(pruner.sparsity_.values())) > 1
    assert len(pruner.sparsity_) == 12 and "head" not in pruner.sparsity_


def test_every_k_cuts_at_its_steps_and_at_the_last_one():
    pruner, _ = tune(lora_net(), PruneConfig("lora_prune", 0.5, every_k=4))
    assert [t for t, _ in pruner.history_] == [4, 8, 12, 14]
    assert set(pruner.sparsity_.values()) == {0.5}
    assert set(pruner.seconds_) == {"scoring", "cutting"} and all(v > 0 for v in pruner.seconds_.values())


def test_warned_before_the_first_step():
    with pytest.warns(UserWarning, match="steps=100, the training 20: it will end before sparsity 0.5"):
        attach(lora_net(), PruneConfig(steps=100), 20)
    with pytest.warns(UserWarning, match="leaves 1 to cut in, at every_k=50; train longer"):
        attach(lora_net(), PruneConfig(every_k=50), 20)


def test_warned_when_the_training_ends_before_the_last_cut():
    pruner = attach(lora_net(), PruneConfig("magnitude"), 20)
    for _ in range(10):
        pruner.step()
    with pytest.warns(UserWarning, match="ended after step 10, before the last cut at 14: the sparsity"):
        pruner.finish()


@pytest.mark.parametrize("steps", [0, -3, 2.5, "20"])
def test_steps_must_be_a_count(steps):
    with pytest.raises(ValueError, match="must be the number of optimizer steps"):
        attach(net(), PruneConfig("magnitude"), steps)


def test_plain_values_of_a_configuration():
    import json

    config = PruneConfig(Movement(), 0.3, exclude="fc1")
    assert config.exclude == ("fc1",)
    assert json.loads(json.dumps(config.to_dict()))["importance"] == "movement"
    assert PruneConfig("pst").to_dict() == PruneConfig("pst").to_dict()
    assert PruneConfig("pst", seed=1).to_dict()["options"]["seed"] == "1"
