"""A row adapter as a LoRA adapter: the same outputs in stock peft, which never hears of serpette."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from models import GPT2Linear, adapted, make_net, randomise
from peft import PeftModel, TaskType, get_peft_model
from test_tuner import make, out, quietly, rows_of
from torch import nn

from serpette.rows import RowConfig, to_lora
from serpette.rows.layer import row_layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["rows", "columns", "both"])
@pytest.mark.parametrize("name", ["linear", "linear without bias", "gpt2", "conv1d", "conv2d", "embedding"])
def test_each_layer(name, mode, bias, tmp_path):
    net, x = make_net(name)
    model = randomise(adapted(net, modes=mode, train_bias=bias))
    if "conv" in name and mode != "rows":
        with pytest.raises(ValueError, match="cannot express trained columns"):
            to_lora(model, tmp_path)
        return
    assert to_lora(model, tmp_path) == tmp_path
    loaded = PeftModel.from_pretrained(net, tmp_path)
    loaded.base_model.cast_input_dtype_enabled = False
    torch.testing.assert_close(loaded(x).double(), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d grouped", "conv2d depthwise", "conv2d dilated", "conv2d circular"])
def test_convolutions_that_lora_has_not(name, tmp_path):
    net, _ = make_net(name)
    with pytest.raises(ValueError, match="'layer': LoRA in peft cannot express.*merge_and_unload"):
        to_lora(adapted(net), tmp_path)
    assert not list(tmp_path.iterdir())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(11, 8), GPT2Linear(), nn.LayerNorm(12)
        self.batch, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.batch(self.norm(self.first(self.words(x))).mean(1)))


def test_norms_are_saved_whole(tmp_path):
    net, x = Mixed().eval(), torch.randint(0, 11, (4, 5))
    model = get_peft_model(
        copy.deepcopy(net),
        RowConfig(
            r=2, target_modules=["words", "first", "norm", "batch"], train_bias=True, modules_to_save=["head"]
        ),
    ).eval()
    randomise(model)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.normal_()
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), to_lora(model, tmp_path))
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=1e-6, atol=1e-6)


def test_norms_alone_and_unknown_adapters_are_refused(tmp_path):
    net, _ = make_net("layer norm")
    model = adapted(net)
    with pytest.raises(ValueError, match="norms only"):
        to_lora(model, tmp_path)
    with pytest.raises(ValueError, match="did you mean 'default'"):
        to_lora(model, tmp_path, "defualt")


@pytest.mark.parametrize("kind", ["vit", "llama", "bert", "gpt2"])
def test_models_in_a_process_without_serpette(kind, tmp_path):
    base = make(kind)
    targets = {"vit": "all-linear", "gpt2": ["c_attn", "c_fc"]}.get(kind, "all-linear")
    options = {"task_type": TaskType.SEQ_CLS} if kind == "bert" else {}
    _, model = rows_of(kind, base, modes={".*0.*": "both"}, target_modules=targets, **options)
    randomise(model)
    quietly(base.save_pretrained, tmp_path / "base")
    to_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(out(loaded, kind), out(model, kind), rtol=1e-5, atol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(out(merged, kind), out(model, kind), rtol=1e-4, atol=1e-5)
    if kind != "llama":
        return
    torch.save(out(model, kind), tmp_path / "expected.pt")
    script = textwrap.dedent(f"""
        import sys, torch
        from transformers import LlamaForCausalLM
        from peft import PeftModel
        base = LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 100, (4, 8), generator=g)
        with torch.no_grad():
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-5, atol=1e-6)
        assert not any("serpette" in name for name in sys.modules)
    """)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_modules_of_like_names(tmp_path):
    """Layers 1 and 10 to 11, with other counts each: every module gets its own rank."""
    net = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))})
    net.forward = net["layers"].forward
    model = get_peft_model(net, RowConfig(r=2, target_modules=[f"layers.{i}" for i in (1, 10, 11)]))
    for i, (_, layer) in enumerate(row_layers(model)):
        layer.choose("default", torch.arange(i + 1))
    randomise(model)
    x = torch.randn(3, 8)
    expected = model(x)
    folder = to_lora(model, tmp_path)
    base = model.unload()
    loaded = quietly(PeftModel.from_pretrained, base, folder)  # old peft leaves a peft_config behind
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
