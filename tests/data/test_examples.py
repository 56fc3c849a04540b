"""Bad input is named; whatever holds examples has one face."""

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

import serpette
from serpette.data.examples import Examples, check_labels
from serpette.data.features import Reader, find_head
from serpette.data.observe import observe
from serpette.zoo import tiny


def mlp(classes=3, inputs=4):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))


def pairs(n=30, classes=3):
    return TensorDataset(torch.randn(n, 4), torch.arange(n) % classes)


def vectors(n=12, **columns):
    return datasets.Dataset.from_dict({"x": np.random.default_rng(0).normal(size=(n, 4)).tolist(), **columns})


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="empty"):
        Examples(pairs(0))


def test_duplicate_ids_are_named():
    with pytest.raises(ValueError, match=r"'7'.*more than once.*'id'"):
        Examples(vectors(id=["7"] * 2 + [f"a{i}" for i in range(10)], label=[0, 1] * 6))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], r"id 'b' is missing"),
        ([0, float("nan")], r"id 'b' is missing"),
        ([0, "cat"], r"'cat'.*id 'b'.*class_encode_column"),
        ([0, 0.5], r"0\.5.*id 'b'.*class index.*regression"),
        ([0, 3], r"label=3.*id 'b'.*0\.\.2.*num_labels"),
        ([0, -1], r"label=-1.*id 'b'.*unlabelled"),
        ([0, float("inf")], r"id 'b' must be finite"),
        ([0, [1, 2]], r"id 'b' must be a single number"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, ["a", "b"], 3, "classification")


def test_good_labels():
    raw = [0, 1.0, True, np.int64(2), torch.tensor(1)]
    assert check_labels(raw, list("abcde"), 3, "classification").tolist() == [0, 1, 1, 2, 1]
    assert check_labels([1, 0.5], list("ab"), 0, "regression").dtype == torch.float32
    with pytest.raises(ValueError, match="finite"):
        check_labels([float("inf")], ["a"], 0, "regression")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_an_input_is_named(bad):
    x = torch.zeros(10, 4)
    x[6, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity.*id '6'"):
        serpette.score(mlp(), TensorDataset(x, torch.arange(10) % 3), "dlc", batch_size=4, progress=False)


def test_the_wrong_number_of_classes():
    with pytest.raises(ValueError, match=r"label=3.*0\.\.2.*num_labels"):
        serpette.score(mlp(3), pairs(30, 5), "dlc", progress=False)
    named = vectors(label=[0] * 12).cast_column("label", datasets.ClassLabel(names=list("abcde")))
    with pytest.raises(ValueError, match=r"has 3 classes, the data set 5.*num_labels=5"):
        observe(mlp(3), Examples(named), progress=False)


def test_a_model_without_features():
    class Flat(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"Flat has no Linear.*features="):
        Reader(Flat())
    features = observe(
        mlp(), Examples(pairs(9)), features=lambda model, inputs: inputs["x"] * 2, progress=False
    ).signals.embeddings
    assert features is not None and features.shape == (9, 4)
    with pytest.raises(ValueError, match=r"features='3' is not a module"):
        Reader(mlp(), features="3")
    assert observe(mlp(), Examples(pairs(9)), features="1", progress=False).signals.embeddings.shape == (9, 8)


def test_a_data_set_that_streams():
    with pytest.raises(ValueError, match="from_list"):
        Examples(x for x in range(3))


def test_rows_without_an_input():
    with pytest.raises(ValueError, match=r"no input found.*columns label, note"):
        serpette.score(
            mlp(), datasets.Dataset.from_dict({"label": [0, 1, 2], "note": [{"by": 1}] * 3}), "dlc"
        )


def test_text_without_a_tokenizer():
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]})
    with pytest.raises(ValueError, match="tokenizer"):
        serpette.score(tiny("bert"), data, "dlc", progress=False)


def tokenized(n=12):
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 60, size=4 + i % 5).tolist() for i in range(n)]
    return datasets.Dataset.from_dict(
        {
            "id": [f"t{i}" for i in range(n)],
            "text": ["words"] * n,
            "idx": list(range(n)),
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "label": [i % 3 for i in range(n)],
        }
    )


def word_tokenizer():
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *[f"w{i}" for i in range(60)]])}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]")


def test_what_the_trainer_takes():
    model, tokenizer, data = tiny("bert"), word_tokenizer(), tokenized()
    padded = serpette.score(
        model, data, "dlc", data_collator=DataCollatorWithPadding(tokenizer), progress=False
    ).values["dlc"]
    by_class = serpette.score(model, data, "dlc", processing_class=tokenizer, progress=False).values["dlc"]
    one_by_one = serpette.score(model, data, "dlc", batch_size=1, progress=False).values["dlc"]
    torch.testing.assert_close(padded, one_by_one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_class, one_by_one, rtol=1e-4, atol=1e-4)


def test_a_collator_that_reads_raw_rows():
    pictures = [Image.fromarray(np.full((32, 32, 3), 7 * i, np.uint8)) for i in range(9)]
    data = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2] * 3}).cast_column(
        "image", datasets.Image()
    )

    def collate(rows):
        pixels = [torch.from_numpy(np.asarray(row["image"]).copy()).permute(2, 0, 1) / 255 for row in rows]
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor([row["label"] for row in rows])}

    assert (
        len(serpette.score(tiny("vit"), data, "dlc", data_collator=collate, progress=False).values["dlc"])
        == 9
    )
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    rows = TensorDataset(x, y)

    def pairs_collate(items):
        return torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])

    a = serpette.score(mlp_ := mlp(), rows, "dlc", data_collator=pairs_collate, progress=False).values["dlc"]
    torch.testing.assert_close(a, serpette.score(mlp_, rows, "dlc", progress=False).values["dlc"])


def test_a_table_of_numbers():
    table = {f"column{i}": np.random.default_rng(i).normal(size=12).tolist() for i in range(4)}
    scores = serpette.score(
        mlp(), datasets.Dataset.from_dict({**table, "label": [0, 1, 2] * 4}), "dlc", progress=False
    )
    assert len(scores.values["dlc"]) == 12


def test_weights_in_bfloat16():
    model = mlp()
    full = serpette.score(model, pairs(), "dlc", progress=False)
    half = serpette.score(model.bfloat16(), pairs(), "dlc", progress=False)
    assert half.values["dlc"].shape == full.values["dlc"].shape


def test_a_head_wider_than_the_data():
    scores = serpette.score(mlp(1000), pairs(30, 2), ["dlc", "ssp", "entropy"], progress=False)
    assert scores.signals.num_classes == 2 and scores.values["ssp"].max() > 0


@pytest.mark.parametrize("what", ["digits", datasets.DatasetDict()])
def test_a_name_is_not_a_data_set(what):
    with pytest.raises(ValueError, match=r"one split with its rows.*open_dataset"):
        Examples(what)


def test_many_faces_give_the_same_scores():
    model = mlp()
    x, y = torch.randn(24, 4), torch.arange(24) % 3

    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return {"x": x[i], "label": int(y[i])}

    table = datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})
    faces = [
        TensorDataset(x, y),
        table,
        table.with_format("torch"),
        Dicts(),
        [(x[i], int(y[i])) for i in range(24)],
    ]
    first, *others = [serpette.score(model, face, "dlc", progress=False).values["dlc"] for face in faces]
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_the_head_is_found(kind):
    model = tiny(kind, num_labels=5)
    assert find_head(model).out_features == 5
    assert find_head(model.base_model) is None
    assert find_head(mlp()).out_features == 3


def test_a_backbone_without_a_head_gives_pooled_features():
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]] * 3, "label": [0, 1] * 3})
    backbone = tiny("bert").base_model
    signals = observe(backbone, Examples(data), progress=False).signals
    with torch.no_grad():
        hidden = backbone(input_ids=torch.tensor(data["input_ids"][:])).last_hidden_state
    torch.testing.assert_close(signals.embeddings, hidden.mean(1), rtol=1e-4, atol=1e-5)
    assert signals.num_classes == 2


def test_padding_is_left_out_of_the_mean():
    backbone = tiny("bert").base_model
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    reader = Reader(backbone)
    with torch.no_grad():
        padded, _ = reader({"input_ids": ids, "attention_mask": mask})
        plain, _ = reader({"input_ids": ids[:, :3], "attention_mask": mask[:, :3]})
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
