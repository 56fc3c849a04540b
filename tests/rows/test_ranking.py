import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from serpette.importance import LoraPrune, QMTaylor, neurons
from serpette.rows import RowConfig
from serpette.rows.neurons import neuron_stats
from serpette.rows.ranking import initial_rows, rank_rows, top
from serpette.rows.statistics import observe_neurons


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 6, padding_idx=0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(self.norm(self.down(self.up(self.tokens(ids)).relu())).mean(1))


def data():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (12, 4), generator=g)
    y = torch.arange(12) % 3
    return list(zip(ids.split(5), y.split(5), strict=True))


def adapted(**options):
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["tokens", "up", "down", "norm"], **options}
    return get_peft_model(Net(), RowConfig(**options))


def chosen(model, columns=False, adapter="default"):
    net, found = model.get_base_model(), {}
    for name in ("tokens", "up", "down", "norm"):
        held = getattr(getattr(net, name), "rows_column_index" if columns else "rows_index", {})
        if adapter in held:
            found[name] = held[adapter].tolist()
    return found


def test_top_takes_the_lower_of_equals_and_never_the_padding():
    assert top(torch.tensor([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]
    assert top(torch.tensor([9.0, 3, 3, 3, 0]), 2, never=0).tolist() == [1, 2]
    assert top(torch.tensor([9.0, 3]), 2, never=0).tolist() == [1]
    assert top(torch.zeros(3), 0).tolist() == []


def test_initial_rows():
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0], [0, 1], [2, 2]]))
    assert initial_rows(layer, 2, "magnitude").tolist() == [0, 2]
    assert initial_rows(layer, 1, "magnitude", columns=True).tolist() == [0]
    tokens = nn.Embedding(3, 2, padding_idx=1)
    nn.init.ones_(tokens.weight)
    assert initial_rows(tokens, 2, "magnitude").tolist() == [0, 2]
    wide = nn.Linear(2, 400)
    one, again, other, named = (
        initial_rows(wide, 40, "random", seed, name=name)
        for seed, name in ((0, ""), (0, ""), (1, ""), (0, "up"))
    )
    assert one.dtype == torch.int64 and torch.equal(one, again) and bool((one.diff() > 0).all())
    assert not torch.equal(one, other) and not torch.equal(one, named)


@pytest.mark.parametrize("importance", sorted(neurons))
def test_rows_are_those_of_the_importance_of_the_bare_model(importance):
    model = adapted(modes={"up": "both", "down": "columns"})
    torch.manual_seed(0)
    net = Net()
    modules = {name: getattr(net, name) for name in ("tokens", "up", "down", "norm")}
    method = neurons.make(importance)
    stats = observe_neurons(
        net, data(), modules, method.needs or {"input_norms"}, loss=cross_entropy, columns={"up", "down"}
    )
    scores = rank_rows(model, data(), importance, loss=cross_entropy)
    expected = {name: top(method(stats[name]), 2, 0 if name == "tokens" else None) for name in modules}
    del expected["down"]
    assert chosen(model) == {name: rows.tolist() for name, rows in expected.items()}
    columns = {name: top(method(stats[name].columns), 2).tolist() for name in ("up", "down")}
    assert chosen(model, columns=True) == columns
    assert set(scores) == {"tokens", "up", "norm", "up:columns", "down:columns"}
    torch.testing.assert_close(scores["up"], method(stats["up"]))
    assert model.peft_config["default"].importance == importance
    counts = {name: count[:2] for name, count in model.peft_config["default"].counts.items()}
    assert counts == {"tokens": [2, 0], "up": [2, 2], "down": [0, 2], "norm": [2, 0]}
    assert not any(layer.trained("default") for layer in net.modules() if hasattr(layer, "trained"))


def test_an_own_importance_and_the_seed_of_random():
    class Last:
        name, needs = "last", frozenset()

        def __call__(self, stats):
            return torch.arange(len(stats)).double()

    model = adapted()
    rank_rows(model, importance=Last())
    assert chosen(model) == {"tokens": [7, 8], "up": [10, 11], "down": [3, 4], "norm": [3, 4]}
    picks = []
    for seed in (None, 0, 1):
        rank_rows(model, importance="random", seed=seed)
        picks.append(chosen(model))
    assert picks[0] == picks[1] != picks[2]


def test_only_the_new_rows_train_and_they_train():
    model = adapted(r=3).train()
    given = {n: p.requires_grad for n, p in model.named_parameters()}
    rank_rows(model, data(), "taylor", loss=cross_entropy)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == given and model.training
    assert not any(p.grad is not None for p in model.parameters())
    for ids, y in data():
        cross_entropy(model(ids), y).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if "rows_weight" in n}


def test_global_scope_shares_the_parameters_out():
    """Scores over their mean: up 12 rows of 6 weights, down 5 rows of 12."""

    class Given:
        name, needs = "given", frozenset()

        def __call__(self, stats):
            if "up" in str(stats.ids[0]):
                return torch.tensor([1.0] * 10 + [60, 50])  # relative: 0.1, 6, 5
            return torch.tensor([1.0, 2, 3, 4, 0]) * 1e6  # 0.5, 1, 1.5, 2, 0

    model = adapted(r=2, target_modules=["up", "down"])  # 2 x 6 + 2 x 12 = 36 parameters
    rank_rows(model, importance=Given(), scope="global")
    assert chosen(model) == {"up": [10, 11], "down": [2, 3]}  # 18 certain, then 6 of up, 12 of down
    model = adapted(r=1, target_modules=["up", "down"])  # 18 parameters: one row each
    rank_rows(model, importance=Given(), scope="global")
    assert chosen(model) == {"up": [10], "down": [3]}
    model = adapted(r=4, target_modules=["up", "down"])  # 72: 18, 6, 12, 12, 12 = 60, then rows of up
    rank_rows(model, importance=Given(), scope="global")
    assert chosen(model) == {"up": [0, 1, 10, 11], "down": [0, 1, 2, 3]}
    counts = model.peft_config["default"].counts
    assert [counts["up"][0], counts["down"][0]] == [4, 4]


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "wanda"])
def test_global_scope_keeps_the_number_of_parameters(importance):
    model = adapted(r=3, modes={"up": "both", "down": "columns"})
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rank_rows(model, data(), importance, loss=cross_entropy, scope="global")
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert before - 12 < after <= before
    assert 0 not in chosen(model)["tokens"] and all(chosen(model).values())
    assert all(chosen(model, columns=True).values())


@pytest.mark.parametrize("kernel", ["additive", "live"])
def test_a_trained_adapter_is_only_forgotten_when_told_to(kernel):
    model = adapted(target_modules=["up"], kernel=kernel)
    net = model.get_base_model()
    rank_rows(model, data(), "taylor", loss=cross_entropy)
    given = chosen(model)
    with torch.no_grad():
        net.up.rows_weight["default"].add_(5)
    model(data()[0][0])
    with pytest.raises(ValueError, match="adapter 'default' has been trained .'up'.*reset=True"):
        rank_rows(model, data(), "taylor", loss=cross_entropy)
    rank_rows(model, data(), "taylor", loss=cross_entropy, reset=True)
    assert chosen(model) == given and not net.up.trained("default")


def test_a_second_adapter_and_a_trained_one_beside_it():
    model = adapted(target_modules=["up"])
    with torch.no_grad():
        model.get_base_model().up.rows_weight["default"].add_(1)
    model.add_adapter("other", RowConfig(r=3, target_modules=["up"]))
    rank_rows(model, data(), "taylor", adapter="other", loss=cross_entropy)
    torch.manual_seed(0)
    net = Net()
    (stats,) = observe_neurons(net, data(), {"up": net.up}, {"contribution"}, loss=cross_entropy).values()
    assert chosen(model, adapter="other")["up"] == top(neurons["taylor"]()(stats), 3).tolist()
    assert model.get_base_model().up.trained("default") and len(chosen(model)["up"]) == 2


def test_the_magnitude_of_a_module_is_that_of_its_stats():
    layer = nn.Conv2d(4, 6, 3)
    rows = initial_rows(layer, 3, "magnitude")
    assert rows.tolist() == top(layer.weight.detach().flatten(1).norm(dim=1), 3).tolist()
    columns = layer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    assert initial_rows(layer, 2, "magnitude", columns=True).tolist() == top(columns, 2).tolist()
    assert len(neuron_stats("c", layer)) == 6


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("one_shot", [False, True])
def test_dependent_rows_and_columns_are_summed_and_chosen_together(importance, one_shot):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    modules = {name: net[int(name)] for name in "0234"}
    stats = observe_neurons(
        net, loader, modules, {"contribution"}, loss=cross_entropy, columns={"0", "2", "4"}
    )
    method = neurons.make(importance)
    rows = {name: method(stats[name]) for name in modules}
    columns = {name: method(stats[name].columns) for name in "024"}
    hidden, normed = rows["0"] + columns["2"], rows["2"] + rows["3"] + columns["4"]
    model = get_peft_model(net, RowConfig(r=2, target_modules=["0", "2", "3", "4"], dependencies=True))
    rank_rows(model, iter(loader) if one_shot else loader, importance, loss=cross_entropy)
    expected = {
        "0": (top(hidden, 2), None),
        "2": (top(normed, 2), top(hidden, 2)),
        "3": (top(normed, 2), None),
        "4": (top(rows["4"], 2), top(normed, 2)),
    }
    for name, sides in expected.items():
        layer = net[int(name)]
        for held, index in zip((layer.rows_index, layer.rows_column_index), sides, strict=True):
            assert ("default" in held) == (index is not None)
            assert index is None or held["default"].tolist() == index.tolist()
    counts = {name: count[:2] for name, count in model.peft_config["default"].counts.items()}
    assert counts == {"0": [2, 0], "2": [2, 2], "3": [2, 0], "4": [2, 2]}


def test_a_layer_without_dependencies_is_ranked_alone():
    model = adapted(dependencies=True, target_modules=["tokens", "up", "down"])
    rank_rows(model, data())
    weight = model.get_base_model().tokens.base_layer.weight.detach()
    assert "tokens" not in chosen(model) or chosen(model)["tokens"] == top(weight.norm(dim=1), 2, 0).tolist()
    assert chosen(model)["up"] == chosen(model, columns=True)["down"]


@pytest.mark.parametrize("given", [{}, {"loader": data(), "scope": "global"}])
def test_dependencies_need_a_loader_and_scope_layer(given):
    with pytest.raises(ValueError, match="needs scope='layer' and a loader, whose first batch is traced"):
        rank_rows(adapted(dependencies=True), **given)
    with pytest.raises(ValueError, match="loader is empty: no dependency"):
        rank_rows(adapted(dependencies=True), [])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"importance": "tailor"}, "unknown importance 'tailor'; did you mean 'taylor'"),
        (
            {"importance": "lora_prune"},
            "'lora_prune' does not rank neurons; those that do: magnitude, qm_taylor",
        ),
        (
            {"importance": LoraPrune()},
            "'lora_prune' does not rank neurons; those that do: magnitude, qm_taylor",
        ),
        (
            {"importance": "taylor"},
            r"importance 'taylor' needs data; give rank_rows\(model, loader, 'taylor'\)",
        ),
        ({"adapter": "defualt"}, "adapter='defualt' is none.*did you mean 'default'"),
        ({"scope": "model"}, "scope='model' must be 'layer' or 'global'"),
        (
            {"importance": "qm_taylor", "loader": [(data()[0][0], torch.zeros(5))], "loss": cross_entropy},
            r"batch 1 of the loader has no class labels.*batch\['labels'\]",
        ),
        (
            {"importance": "qm_taylor", "loader": data(), "loss": cross_entropy, "num_classes": 5},
            "'qm_taylor' needs examples of each class, and 2 of 5 have none: 3, 4",
        ),
    ],
)
def test_bad_input(given, message):
    model = adapted()
    before = chosen(model)
    with pytest.raises(ValueError, match=message):
        rank_rows(model, **given)
    assert chosen(model) == before


def test_qm_taylor_may_ignore_classes_without_examples():
    model = adapted()
    rank_rows(model, data(), QMTaylor(missing="ignore"), loss=cross_entropy, num_classes=5)


def test_a_model_without_row_adapter_or_with_a_merged_one():
    with pytest.raises(ValueError, match="Net has no row adapter; make one with get_peft_model"):
        rank_rows(Net())
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="'tokens' is merged"):
        rank_rows(model)


def test_weights_that_are_not_finite():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().up.base_layer.weight[3, 1] = float("nan")
    with pytest.raises(ValueError, match="importance 'magnitude' of the rows of 'up' is not finite"):
        rank_rows(model)
