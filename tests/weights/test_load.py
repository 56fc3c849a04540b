import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, IMAGES, SMALL_IMAGES, answer, cnn, masked, scramble
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from serpette.weights.groups import find_groups
from serpette.weights.load import load, save_shrunk
from serpette.weights.shrink import shrink, slice_
from serpette.zoo.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

FRESH = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    held = torch.load(folder + "/expected.pt", weights_only=True)
    model = getattr(transformers, held.pop("class")[0]).from_pretrained(folder).eval()
    with torch.no_grad():
        answer = model(**{name: tensor for name, tensor in held.items() if name != "logits"}).logits
    torch.testing.assert_close(answer, held["logits"], rtol=1e-5, atol=1e-5)
"""


def zeroed(family):
    model = scramble(FAMILIES[family]())
    return masked(model, {g.name: list(range(g.units // 2)) for g in find_groups(model)})


def test_stock_transformers_loads_it_in_a_fresh_process(tmp_path):
    from families import inputs_of

    folders = []
    for family in ("vit", "dinov2", "llama", "qwen2"):
        model, folder = zeroed(family), tmp_path / family
        shrink(model).save_pretrained(folder)
        expected = {"class": [type(model).__name__], "logits": answer(model), **inputs_of(model)}
        torch.save(expected, folder / "expected.pt")
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, ragged, tmp_path):
    model = zeroed(family)
    with torch.no_grad():  # the second layer keeps more
        for group in find_groups(model)[2:]:
            last = group.members[-1]
            model.get_submodule(last.module).weight[:, last.index[0]] = 0.1
    small = shrink(model, ragged=ragged, round_to=1)
    note = save_shrunk(small, tmp_path)
    assert note["stock"] == small.shrunk["stock"] == (not (tmp_path / "shrunk.json").exists())
    assert not note["stock"] or not ragged
    again = load(tmp_path)
    assert type(again) is type(small) and not again.training
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-5)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors"}
    assert save_shrunk(again, tmp_path / "again")["stock"] == note["stock"]


def test_a_folder_that_stock_cannot_load_says_so(tmp_path):
    save_shrunk(shrink(zeroed("bert")), tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        FAMILIES["bert"]().from_pretrained(tmp_path)
    note = json.loads((tmp_path / "shrunk.json").read_text())
    assert not note["stock"] and "BertForSequenceClassification" in note["reason"]


def test_what_was_cut_while_training_is_saved_as_well(tmp_path):
    model = get_peft_model(FAMILIES["llama"](), LoraConfig(r=2, target_modules="all-linear"))
    groups = find_groups(model)
    slice_(model, groups, {g.name: torch.arange(g.units) < g.units // 2 for g in groups})
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_shrunk(model, tmp_path)
    merged = model.merge_and_unload()
    assert save_shrunk(merged, tmp_path) == {"stock": True, "reason": ""}
    torch.testing.assert_close(answer(load(tmp_path)), answer(merged), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_of_transformers(tmp_path):
    model = cnn()
    groups = find_groups(model, example_inputs=SMALL_IMAGES)
    model = masked(model, {g.name: [0, 1] for g in groups}, SMALL_IMAGES)
    small = shrink(model, round_to=1, example_inputs=SMALL_IMAGES)
    note = save_shrunk(small, tmp_path)
    assert not note["stock"] and not small.shrunk["stock"]
    torch.testing.assert_close(answer(load(tmp_path, cnn())), answer(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"load\(folder, model\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="which ViTForImageClassification has not"):
        load(tmp_path, FAMILIES["vit"]())


def test_a_family_whose_configuration_has_no_width_of_heads(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=8)
    model = scramble(CLIPVisionModelWithProjection(config)).eval()
    groups = find_groups(model)
    model = masked(model, {g.name: list(range(2 if g.kind == "heads" else 32)) for g in groups})
    small = shrink(model)
    assert not small.shrunk["stock"]
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (4, 32)
    assert "head_dim" not in small.config.to_dict()
    assert find_groups(small, "attention")[0].units == 2
    save_shrunk(small, tmp_path)
    with torch.no_grad():
        first, second = (m(IMAGES).image_embeds for m in (load(tmp_path), model))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=3
    )
    return ResNetForImageClassification(config)


def efficientnet_lite():
    stages = [[1, 3, 1, 1, 8], [2, 3, 2, 4, 8]]
    config = EfficientNetLiteConfig(stages, stem_channels=8, hidden_size=16, num_labels=3)
    return EfficientNetLiteForImageClassification(config)


@pytest.mark.parametrize("make", [resnet, efficientnet_lite])
def test_a_traced_model_with_a_configuration(make, tmp_path):
    model, images = make().eval(), torch.randn(1, 3, 32, 32)
    groups = find_groups(model, example_inputs=images)
    model = masked(model, {g.name: [0] for g in groups}, images)
    small = shrink(model, round_to=1, example_inputs=images)
    assert not save_shrunk(small, tmp_path)["stock"]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["EvilModel"], "model_type": "vit"}))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="EvilModel"):
        load(tmp_path)
    (tmp_path / "shrunk.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load(tmp_path)


def test_a_note_sets_nothing_but_sizes(tmp_path):
    save_shrunk(shrink(zeroed("bert")), tmp_path)
    note = json.loads((tmp_path / "shrunk.json").read_text())
    next(iter(note["layers"].values()))["sizes"]["forward"] = 3
    (tmp_path / "shrunk.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="forward = 3"):
        load(tmp_path)
