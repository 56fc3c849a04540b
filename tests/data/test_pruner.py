"""DataPruner and its functions: manners, exact totals, tasks, bad options, a table that comes back."""

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import serpette
from serpette import DataPruner, FineTune, Probe
from serpette.data.scores import Scores


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def blobs(n=120, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centre = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]])
    return TensorDataset(centre[y] + torch.randn(n, 4, generator=g), y)


@pytest.fixture(scope="module")
def regressor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def line(n=120):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, 0] * 2 + x[:, 1])


def test_fit_transform_and_what_is_learnt(model):
    data = blobs()
    pruner = DataPruner("dlc", select="flex_rand", keep=0.3, seed=1, progress=False)
    small = pruner.fit_transform(model, data)
    assert len(small) == len(pruner.indices_) == len(pruner.ids_) == 36
    assert pruner.scores_.shape == (120,) and torch.isfinite(pruner.scores_).all()
    assert pruner.ids_.tolist() == [str(i) for i in pruner.indices_.tolist()]
    labels = data.tensors[1][pruner.indices_]
    assert torch.bincount(labels).tolist() == [12, 12, 12]
    assert 0.05 <= pruner.selector_.gamma <= 0.95 and len(pruner.searched_) == 19
    assert {"decoding", "unmasked", "path", "dlc", "search", "selection"} <= set(pruner.cost_["seconds"])
    assert pruner.cost_["peak_bytes"] > 0 and pruner.cost_["passes"] >= 4
    again = DataPruner("dlc", select="flex_rand", keep=0.3, seed=1, progress=False).fit(model, data)
    assert torch.equal(again.indices_, pruner.indices_)
    other = DataPruner("dlc", select="flex_rand", keep=0.3, seed=2, progress=False).fit(model, data)
    assert not torch.equal(other.indices_, pruner.indices_)
    assert "dlc" in repr(pruner) and "0.3" in repr(pruner)


def scorers_of(task):
    """Names of those that have a meaning there and need no LoRA."""
    known = serpette.scorers.registry.items()
    return [name for name, cls in known if task in cls.tasks and not hasattr(cls(), "reading")]


@pytest.mark.parametrize("scorer", scorers_of("classification"))
@pytest.mark.parametrize("select", ["top_hard", "random"])
def test_every_scorer_by_name_meets_the_total(model, scorer, select):
    pruner = DataPruner(scorer, select=select, keep=0.25, progress=False, proxy=Probe(epochs=3, seeds=2))
    assert len(pruner.fit(model, blobs()).indices_) == 30


@pytest.mark.parametrize("select", sorted(serpette.selectors.registry))
@pytest.mark.parametrize("per_class", [True, False, "equal"])
@pytest.mark.parametrize("keep", [0.1, 0.33, 1.0])
def test_every_selector_by_name_meets_the_total(model, scored, select, per_class, keep):
    selection = serpette.select(scored, select, keep, per_class=per_class)
    assert len(selection.rows) == len(set(selection.rows.tolist())) == serpette.data.budget.count(120, keep)


@pytest.fixture(scope="module")
def scored(model):
    return serpette.score(model, blobs(), "dlc", progress=False)


def test_the_subset_does_not_depend_on_the_order_of_the_rows(model):
    x, y = blobs().tensors
    table = datasets.Dataset.from_dict(
        {"id": [f"r{i:03d}" for i in range(120)], "x": x.tolist(), "label": y.tolist()}
    )
    shuffled = table.shuffle(seed=3)
    for scorer in ("dlc", "herding", "forgetting"):
        a = DataPruner(scorer, keep=0.2, progress=False).fit(model, table)
        b = DataPruner(scorer, keep=0.2, progress=False).fit(model, shuffled)
        assert sorted(a.ids_) == sorted(b.ids_), scorer
        assert sorted(b.transform(shuffled)["id"]) == sorted(a.ids_)


def test_transform_goes_by_id(model):
    x, y = blobs().tensors
    table = datasets.Dataset.from_dict(
        {"id": [f"r{i:03d}" for i in range(120)], "x": x.tolist(), "label": y.tolist()}
    )
    pruner = DataPruner(keep=0.2, progress=False).fit(model, table)
    assert sorted(pruner.transform(table.shuffle(seed=1))["id"]) == sorted(pruner.ids_)
    with pytest.raises(ValueError, match="lacks the example with id"):
        pruner.transform(table.remove_columns("id").add_column("id", [f"q{i}" for i in range(120)]))


def test_gamma_from_disk_is_gamma_in_process(model, tmp_path):
    for seed in range(4):
        scores = serpette.score(model, blobs(seed=seed), "dlc", out=tmp_path / str(seed), progress=False)
        here = serpette.select(scores, "flex_rand", 0.2)
        there = serpette.select(Scores.load(tmp_path / str(seed)), "flex_rand", 0.2)
        assert here.searched == there.searched and torch.equal(here.rows, there.rows)


def test_the_probe_of_a_regression_stands_outliers(regressor):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=g) ** 5
    y = 1000 + 50 * torch.randn(400, generator=g)
    scores = serpette.score(
        regressor, TensorDataset(x, y), ["el2n", "optimisation_complexity"], progress=False
    )
    residual = scores.signals.logits[:, 0] - y
    assert residual.var() < 1.2 * y.var(), "no worse than the mean, whatever the features"
    assert torch.isfinite(scores.values["el2n"]).all()


def test_objects_made_with_their_options(model):
    pruner = DataPruner(
        serpette.scorers.DLC(variant="official", points=[0, 0.3]),
        select=serpette.selectors.FlexRand(gamma=0.2),
        keep=0.5,
        progress=False,
    ).fit(model, blobs())
    assert pruner.searched_ == [] and pruner.cost_["passes"] == 2 and pruner.selector_.gamma == 0.2


def test_a_regression(regressor):
    for scorer, cls in serpette.scorers.registry.items():
        if scorer in scorers_of("regression"):
            pruner = DataPruner(scorer, keep=0.3, progress=False).fit(regressor, line())
            assert len(pruner.indices_) == 36
        elif "regression" not in cls.tasks:
            with pytest.raises(ValueError, match=f"'{scorer}' has no meaning in a regression.*dlc"):
                DataPruner(scorer, progress=False).fit(regressor, line())
    with pytest.raises(ValueError, match="per_class=False"):
        DataPruner(per_class=True, progress=False).fit(regressor, line())


def test_the_task_can_be_overridden(regressor):
    # two outputs, but the targets are numbers
    wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="class index; for a regression say"):
        DataPruner(progress=False).fit(wide, line())
    assert len(DataPruner(task="regression", progress=False).fit(wide, line()).indices_) == 36


@pytest.mark.parametrize("keep", [0, 1.3, -0.1, float("nan"), "0.3", True])
def test_keep_outside_its_range(model, keep):
    with pytest.raises(ValueError, match="keep"):
        DataPruner(keep=keep, progress=False).fit(model, blobs())


def test_keep_too_small_for_one_of_each_class(model):
    with pytest.raises(ValueError, match="per_class=False"):
        DataPruner(keep=0.01, select="top_hard", progress=False).fit(model, blobs())
    assert (
        len(
            DataPruner(keep=0.01, select="top_hard", per_class=False, progress=False)
            .fit(model, blobs())
            .indices_
        )
        == 1
    )


def test_a_class_with_one_example(model):
    x, y = blobs().tensors
    y = y.clone()
    y[y == 2] = 0
    y[5] = 2
    pruner = DataPruner(keep=0.1, progress=False).fit(model, TensorDataset(x, y))
    assert len(pruner.indices_) == 12 and 5 in pruner.indices_.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "dcl"}, "did you mean 'dlc'"),
        ({"select": "flexrand"}, "did you mean 'flex_rand'"),
        ({"proxy": "prob"}, "did you mean 'probe'"),
        ({"on_bad": "skip"}, "set_aside"),
        ({"scorer": "forgetting", "proxy": "model"}, "history.*proxy='probe'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        DataPruner(progress=False, **options).fit(model, blobs())


def test_transform_before_fit_and_of_another_data_set(model):
    pruner = DataPruner(progress=False)
    with pytest.raises(ValueError, match="not fitted"):
        pruner.transform(blobs())
    with pytest.raises(ValueError, match="60 rows.*120"):
        pruner.fit(model, blobs()).transform(blobs(60))


def test_scores_come_back_from_disk(model, tmp_path):
    scores = serpette.score(model, blobs(), ["dlc", "el2n"], out=tmp_path, progress=False)
    table = pq.read_table(tmp_path / "scores.parquet")
    points = [c for c in table.column_names if c.startswith("dlc@")]
    assert table.column_names[:3] == ["id", "label", "score:dlc"] and len(points) == scores.cost["passes"]
    mean = sum(table[c].to_numpy() for c in points) / len(points)
    assert table["score:dlc"].to_numpy() == pytest.approx(mean)
    loaded = Scores.load(tmp_path)
    for name in ("dlc", "el2n"):
        assert torch.equal(loaded.values[name], scores.values[name])
        a = serpette.select(loaded, serpette.selectors.FlexRand(gamma=0.4), 0.3, scorer=name)
        b = serpette.select(scores, serpette.selectors.FlexRand(gamma=0.4), 0.3, scorer=name)
        assert torch.equal(a.rows, b.rows)
    with pytest.raises(ValueError, match="not among the scores"):
        loaded.of("dlcc")
    with pytest.raises(ValueError, match="serpette score"):
        Scores.load(tmp_path / "nothing")


def test_a_fine_tuned_proxy_records_each_visit(model):
    data = blobs(60)
    scores = serpette.score(
        model,
        data,
        ["forgetting", "optimisation_complexity", "el2n"],
        proxy=FineTune(epochs=4, learning_rate=0.05),
        progress=False,
    )
    history = scores.signals.history
    assert history is not None and history.shape == (4, 60, 3)
    assert history.abs().sum(2).min() > 0, "every example was visited in every epoch"
    first, last = (torch.nn.functional.cross_entropy(h, data.tensors[1]) for h in (history[0], history[-1]))
    assert last < first, "it learns"
    before = model[0].weight.clone()
    assert torch.equal(before, model[0].weight), "a copy was tuned"


def test_the_probe_learns_and_ignores_the_order(model):
    scores = serpette.score(model, blobs(), ["entropy", "el2n"], progress=False)
    signals = scores.signals
    assert (signals.logits.argmax(1) == signals.labels).float().mean() > 0.7
    assert signals.early_logits.shape == (5, 120, 3)
    order = torch.randperm(120)
    again = Probe().train(signals.subset(order))
    torch.testing.assert_close(again.logits, signals.logits[order], rtol=1e-4, atol=1e-4)


def test_the_search_never_sees_the_held_out_labels(model):
    from serpette.data.search import _validation, search

    signals = serpette.score(model, blobs(), "dlc", progress=False).signals
    seen = []

    def scorer(part):
        seen.append(set(part.ids.tolist()))
        return part.embeddings[:, 0].double()

    best, table = search(serpette.selectors.FlexRand(), signals, scorer, 0.3, True, seed=0)
    assert len(seen) == 1 and len(seen[0]) == 96, "a fifth is held out of the scores and the pools"
    assert max(v for _, v in table) == dict(table)[f"flex_rand(gamma={best.gamma})"]
    held = _validation(signals.labels, 3)
    assert torch.bincount(signals.labels[held]).tolist() == [8, 8, 8]
