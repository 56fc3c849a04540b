import json
import re

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from serpette import zoo
from serpette.data.examples import Examples, check_labels
from serpette.data.sources import encode_labels, open_dataset, open_model

ROWS = [{"text": f"row {i}", "label": i % 3} for i in range(12)]


@pytest.fixture
def rows():
    kinds = hf.Features({"text": hf.Value("string"), "label": hf.ClassLabel(names=["a", "b", "c"])})
    return hf.Dataset.from_list(ROWS, features=kinds)


def write(path, kind):
    frame = hf.Dataset.from_list(ROWS)
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame.to_csv(path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        path.write_text(json.dumps(ROWS))


def image_folder(root, classes=("cat", "dog"), each=3):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.full((8, 8), 40 * c + i, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_zoo_names():
    assert len(open_dataset("digits", limit=20)) == 20
    assert "test" not in open_dataset("digits", "test", limit=5)["id"]
    assert open_dataset("digits", limit=20)["id"] == zoo.load_dataset("digits", limit=20)["id"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_files(tmp_path, kind, as_folder):
    write(tmp_path / f"rows.{kind}", kind)
    found = open_dataset(str(tmp_path) if as_folder else tmp_path / f"rows.{kind}")
    assert [{"text": r["text"], "label": r["label"]} for r in found] == ROWS
    assert found["id"] == [str(i) for i in range(12)]


def test_ids_do_not_move_under_a_limit(tmp_path):
    write(tmp_path / "rows.csv", "csv")
    part = open_dataset(tmp_path / "rows.csv", limit=5, seed=3)
    assert len(part) == 5 and all(r["text"] == f"row {r['id']}" for r in part)
    assert part["id"] == open_dataset(tmp_path / "rows.csv", limit=5, seed=3)["id"]
    assert part["id"] != open_dataset(tmp_path / "rows.csv", limit=5, seed=4)["id"]


def test_own_ids_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "label": 1}\n{"id": "y", "label": 0}\n')
    assert open_dataset(tmp_path / "a.jsonl")["id"] == ["x", "y"]


def test_a_folder_of_files_by_split(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert open_dataset(tmp_path)["text"] == ["train-0.jsonl", "train-1.jsonl"]
    assert open_dataset(tmp_path, "val")["text"] == ["validation.jsonl"]
    with pytest.raises(ValueError, match="split='test' does not exist in .* it has train, validation"):
        open_dataset(tmp_path, "test")


def test_a_name_may_say_the_split(tmp_path):
    write(tmp_path / "test.csv", "csv")
    write(tmp_path / "rows.csv", "csv")
    image_folder(tmp_path / "pets" / "val")
    assert len(open_dataset(tmp_path / "test.csv", "test")) == len(open_dataset(tmp_path / "test.csv")) == 12
    assert len(open_dataset(tmp_path / "pets" / "val", "validation")) == 6
    for path in ("rows.csv", "pets/val"):  # else a run would test on what it was trained on
        with pytest.raises(ValueError, match="split='test' does not exist"):
            open_dataset(tmp_path / path, "test")


def test_saved_to_disk(tmp_path, rows):
    rows.save_to_disk(tmp_path / "one")
    assert len(open_dataset(tmp_path / "one")) == 12
    hf.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "two")
    assert len(open_dataset(tmp_path / "two", "test")) == 3
    with pytest.raises(ValueError, match="split='dev' does not exist in .* it has train, test"):
        open_dataset(tmp_path / "two", "dev")


def test_image_folder(tmp_path):
    images = open_dataset(image_folder(tmp_path / "pets"))
    assert images["id"] == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    assert images.features["label"].names == ["cat", "dog"] and images["label"] == [0, 0, 0, 1, 1, 1]
    assert np.asarray(images[4]["image"])[0, 0] == 41
    undecoded = images.cast_column("image", hf.Image(decode=False))
    assert undecoded[0]["image"]["path"].endswith("cat/0.png")
    assert set(np.bincount(open_dataset(tmp_path / "pets", limit=4)["label"])) == {2}


def test_image_folder_with_splits(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", each=1)
    assert len(open_dataset(tmp_path)) == 6 and len(open_dataset(tmp_path, "validation")) == 2
    assert open_dataset(tmp_path, "val")["id"] == ["cat/0.png", "dog/0.png"]
    with pytest.raises(ValueError, match="split='test' does not exist"):
        open_dataset(tmp_path, "test")


def test_a_broken_image_is_not_opened_here(tmp_path):
    image_folder(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "9.png").write_bytes(b"not an image")
    assert len(open_dataset(tmp_path / "pets")) == 7


def test_an_image_beside_the_classes(tmp_path):
    image_folder(tmp_path / "pets")
    Image.new("L", (4, 4)).save(tmp_path / "pets" / "loose.png")
    with pytest.raises(ValueError, match="'loose.png' lies beside the class folders"):
        open_dataset(tmp_path / "pets")


def test_objects(rows):
    assert open_dataset(rows)["text"] == rows["text"]
    assert set(np.bincount(open_dataset(rows, limit=6)["label"])) == {2}
    both = hf.DatasetDict(train=rows, test=rows.select(range(2)))
    assert len(open_dataset(both, "test")) == 2
    with pytest.raises(ValueError, match="the DatasetDict; it has train, test"):
        open_dataset(both, "dev")


def test_torch_datasets():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    assert open_dataset(data) is data and open_dataset(data, limit=10) is data
    part = open_dataset(data, limit=4)
    assert isinstance(part, Subset) and len(part) == 4 and part.indices == sorted(set(part.indices))
    assert part.indices == open_dataset(data, limit=4).indices != open_dataset(data, limit=4, seed=1).indices


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json", "folder", "dataset", "torch"])
def test_nothing_in_it(tmp_path, rows, kind):
    if kind == "parquet":
        rows.select([]).to_parquet(tmp_path / "a.parquet")
    elif kind in ("csv", "jsonl"):
        (tmp_path / f"a.{kind}").write_text("")
    elif kind == "json":
        (tmp_path / "a.json").write_text("[]")
    sources = {"folder": tmp_path, "dataset": rows.select([]), "torch": TensorDataset(torch.zeros(0))}
    with pytest.raises(ValueError, match="has no examples"):
        open_dataset(sources.get(kind, tmp_path / f"a.{kind}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashion-mnst", "is not in the zoo; did you mean 'fashion-mnist'"),
        ("./nowhere", "'./nowhere' does not exist"),
        ("nowhere.csv", "'nowhere.csv' does not exist"),
        ("owner/name", "'owner/name' is no local path, and the hub did not give it"),
        (42, "source=<int> must be a name, a path"),
    ],
)
def test_unknown_sources(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(source)


def test_unreadable_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match="'a.jsonl' cannot be read: line 2 is not JSON"):
        open_dataset(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="'a.parquet' cannot be read"):
        open_dataset(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="must end in .parquet, .csv, .jsonl, .json"):
        open_dataset(tmp_path / "a.txt")


def test_options_are_for_the_zoo(rows):
    with pytest.raises(ValueError, match=r"options \['target'\] only apply"):
        open_dataset(rows, target="rating")


def test_hub(monkeypatch, rows):
    asked = []

    def fake(repo, config=None, **kwargs):
        asked.append((repo, config, kwargs))
        return hf.DatasetDict(train=rows)

    monkeypatch.setattr(hf, "load_dataset", fake)
    assert len(open_dataset("owner/name")) == 12 and len(open_dataset("owner/name:sub", limit=3)) == 3
    assert asked == [("owner/name", None, {}), ("owner/name", "sub", {})]
    with pytest.raises(ValueError, match="split='test' does not exist in owner/name; it has train"):
        open_dataset("owner/name", "test")


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("vit", "ViTForImageClassification"),
        ("resnet", "ResNetForImageClassification"),
        ("bert", "BertForSequenceClassification"),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_models_from_a_folder(tmp_path, kind, cls):
    model = zoo.tiny(kind)
    model.save_pretrained(tmp_path)
    found, processor = open_model(tmp_path)
    assert type(found).__name__ == cls and processor is None and not found.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in found.state_dict().items())


def test_a_new_head_follows_from_the_seed(tmp_path):
    zoo.tiny("vit").save_pretrained(tmp_path)
    a, b, c = (open_model(tmp_path, num_labels=7, seed=s)[0] for s in (0, 0, 1))
    assert a.num_labels == 7 and a.classifier.weight.shape == (7, 32)
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)
    body = zoo.tiny("vit").state_dict()
    assert all(torch.equal(v, body[k]) for k, v in a.state_dict().items() if not k.startswith("classifier"))


def test_the_head_of_the_checkpoint_stays_if_it_fits(tmp_path):
    zoo.tiny("bert", num_labels=4).save_pretrained(tmp_path)
    found, _ = open_model(tmp_path, task="classification", num_labels=4, seed=9)
    assert torch.equal(found.classifier.weight, zoo.tiny("bert", num_labels=4).classifier.weight)


def test_regression_from_a_folder(tmp_path):
    zoo.tiny("bert").save_pretrained(tmp_path)
    found, _ = open_model(tmp_path, task="regression")
    assert found.num_labels == 1 and found.config.problem_type == "regression"
    loss = found(torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0.5, -1.0])).loss
    assert loss.ndim == 0


def test_weights_that_are_missing_below_the_head_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    zoo.tiny("vit").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in state if "layer" in k and k.endswith("weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="1 weights below the head"):
        open_model(tmp_path)


def test_options_are_fields_of_the_configuration(tmp_path):
    zoo.tiny("vit").save_pretrained(tmp_path)
    assert open_model(tmp_path, hidden_dropout_prob=0.3)[0].config.hidden_dropout_prob == 0.3
    with pytest.raises(
        ValueError, match="no option 'hidden_dropout_prop' .* did you mean 'hidden_dropout_prob'"
    ):
        open_model(tmp_path, hidden_dropout_prop=0.3)


def test_the_processor_of_a_folder(tmp_path):
    from serpette.zoo.networks import IMAGENET, image_processor

    zoo.tiny("vit").save_pretrained(tmp_path)
    image_processor(32, **IMAGENET).save_pretrained(tmp_path)
    _, processor = open_model(tmp_path)
    assert processor([Image.new("L", (28, 28))], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_modules_are_returned_as_they_are():
    module = torch.nn.Linear(2, 2)
    assert open_model(module, task="classification", num_labels=2) == (module, None)


def test_remote_code_is_off(tmp_path, monkeypatch):
    import transformers

    seen = []
    real = transformers.AutoConfig.from_pretrained

    def spy(*args, **kwargs):
        seen.append(kwargs.get("trust_remote_code"))
        return real(*args, **kwargs)

    zoo.tiny("vit").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", spy)
    open_model(tmp_path)
    assert seen[0] is False


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("vits", {}, "did you mean 'vit-s'"),
        ("owner/name", {}, "model 'owner/name' has no readable config.json"),
        (3, {}, "model=<int> must be a name, a path or a torch.nn.Module"),
    ],
)
def test_unknown_models(source, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_model(source, **options)


def test_no_head_for_the_task(tmp_path):
    from transformers import T5Config

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "time_series_transformer", "prediction_length": 2})
    )
    with pytest.raises(ValueError, match="no classification head"):
        open_model(tmp_path, num_labels=2)
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="task='chess' must be"):
        open_model(tmp_path, task="chess")


def test_a_blank_label_is_missing_and_no_class(tmp_path):
    (tmp_path / "train.csv").write_text("id,text,label\nr1,good,pos\nr2,,neg\nr3,odd,\nr4,worse,  \n")
    opened = open_dataset(tmp_path / "train.csv")
    encoded = encode_labels(opened, "label")
    assert encoded.features["label"].names == ["neg", "pos"] and encoded["label"][:] == [1, 0, None, None]
    assert encoded["text"][1] == "", "a text may be empty"
    again = encode_labels(opened, "label", ["pos", "neg"])
    with pytest.raises(ValueError, match="label=None of the example with id 'r3' is missing"):
        check_labels(again["label"][:], again["id"][:], 2, "classification")
    blank = encode_labels(opened.remove_columns("label").add_column("label", [""] * 4), "label")
    with pytest.raises(ValueError, match="id 'r1' is missing"):
        Examples(blank).target()
