"""TSA against a dense Fisher matrix, kronfluence and a hand case; what must not change it, and what does."""

import datasets
import numpy as np
import oracles_lora as slow
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn

import serpette
from serpette.scorers import TSA, TSAJoint
from serpette.zoo import tiny

TARGETS = r".*\.(query|q_proj|value|v_proj|fc1|output\.dense|classifier)"
EXACT = {"statistics": "two_pass", "tokens": None}


def with_lora(model, targets=TARGETS, double=True, B=True, **options):
    config = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **options})
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    g = torch.Generator().manual_seed(0)
    for _, weight in slow.factors(model) if B else ():
        weight.data = torch.randn(weight.shape, generator=g) * 0.1
    return (model.double() if double else model).eval()


def images(n=24, size=32, seed=0):
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    rows = {"id": [f"im{i}" for i in range(n)], "pixel_values": x.numpy(), "label": [i % 3 for i in range(n)]}
    return datasets.Dataset.from_dict(rows).with_format("torch")


@pytest.fixture(scope="module")
def vit():
    return with_lora(tiny("vit"))


@pytest.fixture(scope="module")
def data():
    return images()


def score(model, data, *scorers, **options):
    """[(N,)] of the scorers, in the order of the ids."""
    scores = serpette.score(model, data, list(scorers), progress=False, **options)
    order = np.argsort(scores.signals.ids)
    return [scores.values[scorer.name][order] for scorer in scorers]


def close(a, b, rtol=2e-6):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_equal_to_the_dense_fisher_matrix(vit, data, damping):
    options = {**EXACT, "damping": damping}
    single, joint = score(vit, data.remove_columns("id"), TSA(**options), TSAJoint(**options), batch_size=7)
    batches = [{"pixel_values": x[None].double()} for x in data["pixel_values"][:]]
    expected = slow.tsa(vit, batches, data["label"][:], damping)
    order = np.argsort(np.arange(len(data)).astype(str))
    close(single, expected[0][order])
    close(joint, expected[1][order])
    assert (joint <= 2 * single * (1 + 1e-6)).all() and (joint >= single * (1 - 1e-6)).all()


def sentences(n=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"id": f"s{i:02d}", "input_ids": rng.integers(5, 90, size=3 + i % 8).tolist(), "label": i % 3}
        for i in range(n)
    ]


def padded(items):
    longest = max(len(item["input_ids"]) for item in items)
    ids, mask = torch.zeros(2, len(items), longest).long()
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = torch.as_tensor(item["input_ids"])
        mask[row, : len(item["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def bert():
    return with_lora(tiny("bert"))


def test_padding_is_in_no_moment(bert):
    rows = sentences()
    options = {**EXACT, "damping": 0.01}
    found = score(
        bert, datasets.Dataset.from_list(rows), TSA(**options), TSAJoint(**options), data_collator=padded
    )
    batches = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]
    expected = slow.tsa(bert, batches, torch.tensor([row["label"] for row in rows]), 0.01)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("normalise, power", [("tokens", 1), ("mean_loss", 2)])
def test_normalised_by_the_tokens_that_are_there(normalise, power):
    bert = with_lora(tiny("bert"), r".*\.(query|value)")  # the pooled layers have one token
    rows = sentences()
    options = {**EXACT, "damping": 0.01}
    data = datasets.Dataset.from_list(rows)
    (plain,) = score(bert, data, TSA(**options), data_collator=padded)
    (divided,) = score(bert, data, TSA(normalise=normalise, **options), data_collator=padded)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    close(divided, plain / lengths**power)


class OneToken(nn.Module):
    """h = W x with a fixed head: what the body's gradient is can be written down."""

    def __init__(self, inputs=4, outputs=3):
        super().__init__()
        self.body, self.head = nn.Linear(inputs, outputs, bias=False), nn.Linear(outputs, 3, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


def pairs(x, y):
    return torch.utils.data.TensorDataset(x, y)


def test_one_token_by_hand():
    """A product of two Mahalanobis forms, as the paper writes it."""
    model = with_lora(OneToken(), ["body"])
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=g).double(), torch.arange(30) % 3
    (found,) = score(model, pairs(x, y), TSA(**EXACT, damping=0.1), batch_size=8)
    p = model(x).softmax(1).detach()
    delta = (p - torch.eye(3).double()[y]) @ model.base_model.model.head.weight.detach()
    A, B = (w.detach() for w in slow.factors(model)[0])
    Sx, Sd = x.T @ x / 30, delta.T @ delta / 30
    Sx, Sd = (
        Sx + 0.1 * Sx.trace() / 4 * torch.eye(4).double(),
        Sd + 0.1 * Sd.trace() / 3 * torch.eye(3).double(),
    )

    def mahalanobis(rows, S):
        return (rows * torch.linalg.solve(S, rows.T).T).sum(1)

    S_B = mahalanobis(delta, Sd) * mahalanobis(x @ A.T, A @ Sx @ A.T)
    S_A = mahalanobis(delta @ B, B.T @ Sd @ B) * mahalanobis(x, Sx)
    close(found, ((S_B + S_A) / 2)[np.argsort(np.arange(30).astype(str))])


@pytest.mark.parametrize("sizes", [(300, 3), (4, 260)])
def test_wide_layers(sizes):
    """From 256 on the whitening goes in pieces."""
    model = with_lora(OneToken(*sizes), ["body"])
    x, y = (
        torch.randn(20, sizes[0], generator=torch.Generator().manual_seed(0)).double(),
        torch.arange(20) % 3,
    )
    options = {**EXACT, "damping": 0.1}
    found = score(model, pairs(x, y), TSA(**options), TSAJoint(**options))
    expected = slow.tsa(model, [{"x": row[None]} for row in x], y, 0.1)
    order = np.argsort(np.arange(20).astype(str))
    close(found[0], expected[0][order])
    close(found[1], expected[1][order])


class Tokens(nn.Module):
    """Tokens x (n, T, 5) that are mixed late, so that every moment is well away from singular."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(h.mean(1) + h[:, 0] * h[:, 1])


@pytest.mark.filterwarnings("ignore:`torch.cuda.amp:FutureWarning")
def test_equal_to_kronfluence(tmp_path):
    pytest.importorskip("kronfluence", reason="the oracle; `make install` fetches it")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    torch.manual_seed(1)
    model = with_lora(Tokens(), ["first", "second"], double=False)
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(150, 4, 5, generator=g), torch.randint(0, 3, (150,), generator=g)
    (narrow,) = score(model, pairs(x, y), TSA(**EXACT, damping=0.0))
    (found,) = score(model.double(), pairs(x, y), TSA(**EXACT, damping=0.0))

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.cross_entropy(model(batch[0].double()), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [n for n, _ in model.named_modules() if n.endswith(("lora_A.default", "lora_B.default"))]

    task, wide = Summed(), torch.float64
    analyzer = Analyzer(
        "a", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(tmp_path)
    )
    analyzer.fit_all_factors(
        "f", pairs(x, y), per_device_batch_size=50,
        factor_args=FactorArguments(
            strategy="kfac", use_empirical_fisher=True, activation_covariance_dtype=wide,
            gradient_covariance_dtype=wide, per_sample_gradient_dtype=wide, lambda_dtype=wide,
        ),
    )  # fmt: skip
    analyzer.compute_self_scores(
        "s", "f", pairs(x, y), per_device_train_batch_size=50,
        score_args=ScoreArguments(
            damping_factor=0.0, compute_per_module_scores=True, per_sample_gradient_dtype=wide,
            precondition_dtype=wide, score_dtype=wide,
        ),
    )  # fmt: skip
    modules = analyzer.load_self_scores("s")
    assert len(modules) == 4
    order = np.argsort(np.arange(150).astype(str))
    expected = torch.stack(list(modules.values())).mean(0)[order]
    close(found, expected, 1e-6)
    close(narrow, expected, 1e-5)


@pytest.mark.parametrize("statistics", ["sampled", "two_pass"])
def test_neither_order_nor_batches_change_it(vit, data, statistics):
    options = {"statistics": statistics, "sample": 10, "tokens": 5, "damping": 0.01}
    scorers = TSA(**options), TSAJoint(**options)
    base = score(vit, data, *scorers)
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    for other in (score(vit, data, *scorers, batch_size=5), score(vit, shuffled, *scorers, batch_size=1)):
        for a, b in zip(base, other, strict=True):
            close(a, b)


def test_padding_and_batches_of_texts_change_nothing(bert):
    data, options = datasets.Dataset.from_list(sentences()), {"sample": 15, "tokens": 3, "damping": 0.01}
    (alone,) = score(bert, data, TSA(**options), data_collator=padded, batch_size=1)
    (together,) = score(bert, data, TSA(**options), data_collator=padded, batch_size=20)
    close(alone, together)


def test_sharing_the_moments_of_one_input_changes_nothing():
    model = with_lora(tiny("vit"), "all-linear")
    a = score(model, images(), TSA(**EXACT, share_inputs=True))
    close(*a, *score(model, images(), TSA(**EXACT, share_inputs=False)))


def test_the_models_own_loss_is_never_used(vit, data, monkeypatch):
    inner = vit.get_base_model()
    (base,) = score(vit, data, TSA(**EXACT))
    monkeypatch.setattr(type(inner), "loss_function", lambda *_, **__: pytest.fail("the model's loss"))
    close(base, *score(vit, data, TSA(**EXACT)))


def test_only_the_product_of_scale_and_B_matters():
    """s B A is the same change of W, whether s is 5 / 2 or 1."""
    data, scores = images(), []
    for alpha in (5, 2):
        model = with_lora(tiny("vit"), lora_alpha=alpha)
        for _, B in slow.factors(model):
            B.data *= 5 / alpha
        scores += score(model, data, TSA(**EXACT, damping=0.01))
    close(*scores)


def rank_correlation(a, b):
    return float(spearmanr(a.numpy(), b.numpy())[0])


def tokens(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 5, generator=g) * (0.5 + torch.rand(n, 1, 1, generator=g))
    y = torch.randint(0, 3, (n,), generator=g)
    rows = {"id": [f"r{i:03d}" for i in range(n)], "x": x.numpy(), "label": y.tolist()}
    return datasets.Dataset.from_dict(rows).with_format("torch")


def small(B=True):
    return with_lora(Tokens(), ["first", "second"], B=B)


@pytest.fixture(scope="module")
def stream():
    """(model, 300 rows of tokens, the same in another order)"""
    data = tokens(300)
    return small(), data, data.select(np.random.default_rng(0).permutation(300))


def test_running_statistics_nearly_agree(stream):
    model, first, second = stream
    (exact,) = score(model, first, TSA(**EXACT))
    a, b = (score(model, d, TSA(statistics="running"), batch_size=16)[0] for d in (first, second))
    assert rank_correlation(a, b) >= 0.9 and rank_correlation(a, exact) >= 0.9
    assert not torch.allclose(a, b, rtol=1e-3), "they do depend on the order"


def test_a_sample_ranks_as_all_examples_do(stream):
    model, data, _ = stream
    (exact,) = score(model, data, TSA(**EXACT))
    (sampled,) = score(model, data, TSA(sample=100, tokens=2))
    assert 0.95 <= rank_correlation(sampled, exact) < 1


def test_as_printed_the_score_tells_the_position_in_the_stream(stream):
    model, data, _ = stream
    place = torch.arange(300)
    (paper,) = score(model, data, TSA(statistics="paper"), batch_size=8)
    (exact,) = score(model, data, TSA(**EXACT))
    (running,) = score(model, data, TSA(statistics="running"), batch_size=8)
    assert rank_correlation(paper, place) > 0.5
    assert abs(rank_correlation(exact, place)) < 0.15 and abs(rank_correlation(running, place)) < 0.2


def test_a_fresh_adapter_is_scored_by_B_alone():
    """S_A would need the inverse of B' Sd B = 0."""
    model, data = with_lora(tiny("vit"), B=False), images()
    options = {**EXACT, "damping": 0.01, "warmup_steps": 0}
    single, joint = score(model, data, TSA(**options), TSAJoint(**options))
    close(single, joint)
    blocks = serpette.score(model, data, TSA(**options), progress=False).signals.readings[
        TSA(**options).reading
    ]
    assert blocks[:, :, 1:].isnan().all() and not blocks[:, :, 0].isnan().any()
    batches = [{"pixel_values": x[None].double()} for x in data["pixel_values"][:]]
    expected, _ = slow.tsa(model, batches, data["label"][:], 0.01)  # the mean of S_B and 0
    close(single, 2 * expected[np.argsort(data["id"][:])])


def test_the_default_warm_up_moves_a_fresh_adapter_only():
    data, moved = tokens(), small()
    for model, differs in ((small(B=False), True), (moved, False)):
        (default,) = score(model, data, TSA(**EXACT))
        (without,) = score(model, data, TSA(**EXACT, warmup_steps=0))
        assert torch.allclose(default, without) != differs
    (stepped,) = score(moved, data, TSA(**EXACT, warmup_steps=3))
    assert not torch.allclose(stepped, without)
    turned = data.select(range(23, -1, -1))
    close(stepped, *score(moved, turned, TSA(**EXACT, warmup_steps=3), batch_size=5), 1e-5)


def test_epochs_are_averaged():
    """The second is scored after one more epoch: two batches of 16."""
    model, data, options = small(), tokens(), {**EXACT, "damping": 0.01}
    (both,) = score(model, data, TSA(**options, epochs=2, warmup_steps=1))
    (first,) = score(model, data, TSA(**options, warmup_steps=1))
    second = 2 * both - first
    assert (second > 0).all() and not torch.allclose(second, first, rtol=1e-3)
    assert rank_correlation(second, first) > 0.5


def test_scorers_do_not_see_each_other():
    model, data = small(B=False), tokens()
    several = TSA(**EXACT), TSAJoint(sample=5, tokens=4, warmup_steps=2)
    together = score(model, data, *several)
    for scorer, value in zip(several, together, strict=True):
        close(value, *score(model, data, scorer))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("statistics", "ema", r"statistics='ema' must be one of 'sampled', 'two_pass', 'running', 'paper'"),
        ("normalise", "length", r"normalise='length' must be one of None, 'tokens', 'mean_loss'"),
        ("damping", -1e-3, r"damping=-0\.001 must be 0 or more"),
        ("damping", float("nan"), r"damping=nan must be 0 or more"),
        ("sample", 0, r"sample=0 must be at least 1"),
        ("tokens", 0, r"tokens=0 must be at least 1, or None"),
        ("beta", 0, r"beta=0 must be in \(0, 1\]"),
        ("refresh", 0, r"refresh=0 must be at least 1"),
        ("warmup_steps", -1, r"warmup_steps=-1 must be 0 or more, or None"),
        ("warmup_learning_rate", 0.0, r"warmup_learning_rate=0\.0 must be above 0"),
        ("epochs", 0, r"epochs=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(option, value, message):
    with pytest.raises(ValueError, match=message):
        TSA(**{option: value})
