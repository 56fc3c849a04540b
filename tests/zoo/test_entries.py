"""Every entry that is in the user's cache; `serpette fetch NAME` brings the others."""

import re

import numpy as np
import pytest
import torch

from serpette import zoo
from serpette.zoo.corpora import take

pytestmark = pytest.mark.zoo


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("SERPETTE_OFFLINE", "1")


@pytest.fixture
def need():
    def check(name):
        if not zoo.is_cached(name):
            pytest.skip(f"{name} is not cached; run `serpette fetch {name}`")

    return check


def test_the_catalogue_is_complete():
    entries = {**zoo.models(), **zoo.datasets()}
    assert sorted(zoo.models()) == ["efficientnet-lite0", "minilm-l6", "smollm2-135m", "vit-s"]
    assert sorted(zoo.datasets()) == ["digits", "fashion-mnist", "lee-news", "mmlu-cot", "movie-snippets"]
    for name, entry in entries.items():
        assert entry.name == name and entry.description and entry.licence
        for source in entry.sources:
            assert str(source)
            for member in source.members:
                assert member.sha256 is None or re.fullmatch("[0-9a-f]{64}", member.sha256)
            if type(source).__name__ == "Package":
                assert re.fullmatch("[0-9a-f]{64}", source.sha256) and "==" in source.requirement
                assert all(member.sha256 for member in source.members)


def test_vit(need):
    need("vit-s")
    model = zoo.load_model("vit-s", num_labels=10, layers=8)
    assert type(model).__name__ == "Dinov2ForImageClassification" and not model.training
    assert model.num_parameters() == 14_451_466 and model.dtype == torch.float32
    image = zoo.load_dataset("digits", limit=1)[0]["image"]  # grey, 8x8
    pixels = zoo.load_processor("vit-s")([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 84, 84)
    with torch.no_grad():
        assert model(pixel_values=pixels).logits.shape == (1, 10)


def test_vit_positions_are_interpolated_as_the_model_would(need):
    need("vit-s")
    from transformers import Dinov2Model

    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        ours = zoo.load_model("vit-s", image_size=56, layers=2)
        theirs = Dinov2Model.from_pretrained(zoo.cache_dir() / "vit-s", num_hidden_layers=2).eval()
        assert ours.embeddings.position_embeddings.shape == (1, 1 + 16, 384)
        torch.testing.assert_close(ours(x).last_hidden_state, theirs(x).last_hidden_state)


def test_vit_survives_saving(need, tmp_path):
    need("vit-s")
    model = zoo.load_model("vit-s", num_labels=3, layers=1, image_size=56)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)


def test_heads_follow_from_the_seed(need):
    need("vit-s")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (zoo.load_model("vit-s", num_labels=3, layers=1, seed=s).classifier.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0.015 < a.std().item() < 0.025
    assert torch.equal(torch.get_rng_state(), state)


def test_lite0_knows_a_flower(need):
    need("efficientnet-lite0")
    from PIL import Image
    from sklearn.datasets import load_sample_image

    model, processor = (
        zoo.load_model("efficientnet-lite0", task="classification"),
        zoo.load_processor("efficientnet-lite0"),
    )
    with torch.no_grad():
        logits = model(
            **processor([Image.fromarray(load_sample_image("flower.jpg"))], return_tensors="pt")
        ).logits
    assert logits.shape == (1, 1000) and int(logits.argmax()) == 985  # daisy: ImageNet has no dahlia


def test_lite0_heads(need):
    need("efficientnet-lite0")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert zoo.load_model("efficientnet-lite0")(x).pooler_output.shape == (2, 1280)
    model = zoo.load_model("efficientnet-lite0", num_labels=4)
    out = model(pixel_values=x, labels=torch.tensor([0, 3]))
    assert out.logits.shape == (2, 4) and out.loss.requires_grad
    assert isinstance(model.classifier, torch.nn.Linear) and model.num_parameters() == 3_376_132


def test_minilm(need):
    need("minilm-l6")
    from transformers import BertForSequenceClassification, BertModel

    tokenizer = zoo.load_processor("minilm-l6")
    batch = tokenizer(["a good film", "a very good movie", "tax law"], return_tensors="pt", padding=True)
    bare = zoo.load_model("minilm-l6")
    assert isinstance(bare, BertModel)
    with torch.no_grad():
        h_BTD = bare(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    e_BD = torch.nn.functional.normalize((h_BTD * mask).sum(1) / mask.sum(1))
    assert e_BD[0] @ e_BD[1] > 0.7 > 0.4 > e_BD[0] @ e_BD[2]
    rating = zoo.load_model("minilm-l6", task="regression")
    assert isinstance(rating, BertForSequenceClassification) and rating.config.problem_type == "regression"
    assert rating.num_labels == 1


def test_smollm2(need):
    need("smollm2-135m")
    tokenizer, model = zoo.load_processor("smollm2-135m"), zoo.load_model("smollm2-135m")
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**batch).logits[0, -1].argmax()) == " Paris"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert tokenizer.pad_token is not None


def test_fashion_mnist(need):
    need("fashion-mnist")
    train, test = zoo.load_dataset("fashion-mnist"), zoo.load_dataset("fashion-mnist", "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.features["label"].names[0] == "T-shirt/top" and train[0]["label"] == 9
    image = train[0]["image"]
    assert image.size == (28, 28) and image.mode == "L" and int(np.asarray(image).sum()) == 76247
    assert set(np.bincount(train["label"][:])) == {6000}
    assert set(train["id"][:]).isdisjoint(test["id"][:])


def test_a_limit_keeps_ids_and_balance(need):
    need("fashion-mnist")
    small, large = (zoo.load_dataset("fashion-mnist", limit=n) for n in (103, 500))
    assert len(small) == 103 and set(np.bincount(small["label"][:])) == {10, 11}
    assert set(small["id"][:]) <= set(large["id"][:])
    label_of = dict(zip(large["id"][:], large["label"][:], strict=True))
    assert [label_of[i] for i in small["id"][:]] == list(small["label"][:])
    assert zoo.load_dataset("fashion-mnist", limit=103, seed=1)["id"][:] != small["id"][:]


def test_movie_snippets(need):
    need("movie-snippets")
    label, rating = zoo.load_dataset("movie-snippets"), zoo.load_dataset("movie-snippets:rating")
    assert label.features["label"].names == ["negative", "positive"]
    by_id = dict(zip(rating["id"][:], rating["label"][:], strict=True))
    assert all(
        abs(by_id[i]) >= 0.5 and (by_id[i] > 0) == bool(y)
        for i, y in zip(label["id"][:], label["label"][:], strict=True)
    )
    assert (
        rating.features["label"].dtype == "float32" and -4 <= min(by_id.values()) and max(by_id.values()) <= 4
    )
    assert len(zoo.load_dataset("movie-snippets", "all", target="rating")) == 10_605
    assert set(rating["id"][:]).isdisjoint(zoo.load_dataset("movie-snippets:rating", "test")["id"][:])


def test_mmlu_cot(need):
    need("mmlu-cot")
    pairs = zoo.load_dataset("mmlu-cot", "all")
    assert len(pairs) == 282 and len(set(pairs["subject"][:])) == 57 and len(set(pairs["id"][:])) == 282
    assert all(p and not p.startswith("Q:") for p in pairs["prompt"][:])
    assert all("answer is" in r for r in pairs["response"][:])


def test_lee_news(need):
    need("lee-news")
    news = zoo.load_dataset("lee-news", "all")
    assert len(news) == 300 and len(set(news["id"][:])) == 300
    assert sum(len(text.split()) for text in news["text"][:]) > 59_000


def test_digits_splits_share_nothing():
    parts = {split: set(zoo.load_dataset("digits", split)["id"][:]) for split in ("train", "test", "all")}
    assert parts["train"].isdisjoint(parts["test"]) and parts["train"] | parts["test"] == parts["all"]
    assert len(parts["all"]) == 1797 and 0.75 < len(parts["train"]) / 1797 < 0.85


@pytest.mark.parametrize("limit", [1, 7, 10, 13, 99, 1443, 10**6])
def test_a_limit_is_met_exactly(limit):
    digits = zoo.load_dataset("digits", limit=limit)
    assert len(digits) == min(limit, 1444)
    full = np.bincount(zoo.load_dataset("digits")["label"][:])
    share = np.bincount(digits["label"][:], minlength=10)
    assert np.all(np.abs(share - full * len(digits) / full.sum()) < 1)


def test_the_order_of_the_rows_does_not_change_the_choice():
    digits = zoo.load_dataset("digits")
    turned = digits.select(range(len(digits) - 1, -1, -1))
    assert sorted(take(digits, 50)["id"][:]) == sorted(take(turned, 50)["id"][:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.load_model("vits"), "did you mean 'vit-s'"),
        (lambda: zoo.load_model("vit-s", layer=3), "no option 'layer'; did you mean 'layers'"),
        (lambda: zoo.load_model("vit-s", image_size=100), "multiple of 14, at least 14; try 98"),
        (lambda: zoo.load_model("vit-s", task="classification"), "num_labels=None must be given"),
        (
            lambda: zoo.load_model("vit-s", task="causal-lm"),
            "must be one of None, classification, regression",
        ),
        (lambda: zoo.load_model("minilm-l6", num_labels=0), "num_labels=0 must be"),
        (lambda: zoo.load_dataset("digit"), "did you mean 'digits'"),
        (
            lambda: zoo.load_dataset("digits", "val"),
            "split='val' does not exist in digits; it has train, test, all",
        ),
        (lambda: zoo.load_dataset("digits", limit=0), "limit=0 must be"),
        (lambda: zoo.load_dataset("digits:x"), "has no variants"),
        (lambda: zoo.load_dataset("digits", target="x"), "no option 'target'"),
        (lambda: zoo.is_cached("x"), "unknown name 'x'"),
        (lambda: zoo.tiny("vid"), "did you mean 'vit'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_layers_beyond_the_depth(need):
    need("vit-s")
    with pytest.raises(ValueError, match="layers=13 must be a whole number from 1 to 12"):
        zoo.load_model("vit-s", layers=13)


def test_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPETTE_CACHE", str(tmp_path))
    assert not zoo.is_cached("vit-s") and zoo.is_cached("digits")
    with pytest.raises(zoo.ZooError, match="serpette fetch vit-s"):
        zoo.load_model("vit-s")
