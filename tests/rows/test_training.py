"""Training with peft, transformers and torch: resume, checkpointing, autocast, compile, processes, 4 bits."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import quietly, randomise
from peft import (
    PeftModel,
    TaskType,
    get_peft_model,
)
from test_tuner import KINDS, SRC, batch, make, out, rows_of
from torch import nn
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from serpette.rows import RowConfig
from serpette.rows.layer import row_layers


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2,
            "learning_rate": 0.05, "report_to": [], "use_cpu": True, "seed": 0, "logging_strategy": "no",
            "disable_tqdm": True, **options,
        }
    )  # fmt: skip


@pytest.mark.parametrize("kernel", ["additive", "live"])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_trainer_resumes_with_the_same_bits(kind, kernel, tmp_path):
    rows = [{k: v[i] for k, v in batch(kind, 6).items()} for i in range(6)]
    base = make(kind)

    def run(folder, resume=None, **options):
        _, model = rows_of(kind, base, kernel=kernel, task_type=TaskType.SEQ_CLS if kind == "bert" else None)
        trainer = Trainer(model, arguments(folder, **options), train_dataset=rows)
        quietly(trainer.train, resume_from_checkpoint=resume)
        return model.eval()

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", max_steps=3, lr_scheduler_type="constant")
    resumed = run(tmp_path / "cut", str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(out(whole, kind), out(resumed, kind))
    held = dict(resumed.state_dict())
    assert all(torch.equal(v, held[k]) for k, v in whole.state_dict().items())
    assert not torch.equal(out(whole, kind), out(base, kind))
    if kernel == "live":
        weights = {n: p for n, p in whole.unload().named_parameters() if "classifier" not in n}
        assert all(torch.equal(p, weights[n]) for n, p in base.named_parameters() if n in weights)


@pytest.mark.parametrize("kernel", ["additive", "live"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "vit", "gpt2"])
def test_gradient_checkpointing(kind, reentrant, kernel):
    _, model = rows_of(kind, modes="both", kernel=kernel)
    randomise(model).train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if hasattr(model, "enable_input_require_grads") and reentrant:
                model.enable_input_require_grads()
        model.zero_grad()
        quietly(lambda: model(**batch(kind)).loss.backward())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base(kind, tmp_path):
    base = make(kind).bfloat16()
    _, model = rows_of(kind, base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(kind).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    quietly(model.save_pretrained, str(tmp_path))
    loaded = quietly(PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    _, model = rows_of(kind, modes="both")
    randomise(model, scale=0.02)
    full = out(model, kind)
    with torch.autocast("cpu", dtype):
        result = model(**batch(kind))
        result.loss.backward()
    torch.testing.assert_close(result.logits.float(), full, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "kind, modes", [("vit", "both"), ("llama", "both"), ("llama", "columns"), ("bert", "rows")]
)
def test_compiled_without_breaks(kind, modes):
    base, model = rows_of(kind, modes=modes)
    randomise(model)
    given = batch(kind)
    expected = model(**given)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = compiled(**given)
    result.loss.backward()
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-6)
    for one, p in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_live_compiles_with_breaks():
    _, model = rows_of("llama", kernel="live")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    twin = copy.deepcopy(model)
    for m, call in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            quietly(call, **batch("llama")).loss.backward()
            optimizer.step()
    torch.testing.assert_close(out(model, "llama"), out(twin, "llama"), rtol=1e-5, atol=1e-6)


# -- without serpette, with two processes, quantised


def python(script, *words, **environment):
    import os

    command = [
        sys.executable,
        "-W",
        "ignore",
        *words,
        "-c" if not words else script,
        *([script] if not words else []),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_loading_needs_the_import(tmp_path):
    base, model = rows_of("bert")
    quietly(base.save_pretrained, tmp_path / "base")
    quietly(model.save_pretrained, str(tmp_path / "adapter"))
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {SRC!r})
        import transformers
        from peft import PeftModel
        base = transformers.BertForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
        try:
            PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
            print("loaded")
        except KeyError as error:
            print("KeyError", error)
        from serpette.rows import RowConfig
        print(type(PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).base_model).__name__)
    """)
    done = python(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "KeyError" in done.stdout and "ROWS" in done.stdout and "RowModel" in done.stdout


TWO_PROCESSES = """
    import os, sys
    sys.path[:0] = {paths!r}
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from test_tuner import batch, make, rows_of
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kernel in ("additive", "live"):
        torch.manual_seed(0)
        _, model = rows_of("llama", kernel=kernel, modes="both")
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        mine = {{k: v[rank * 2 : rank * 2 + 2] for k, v in batch("llama").items()}}
        for _ in range(3):
            optimizer.zero_grad()
            ddp(**mine).loss.backward()
            optimizer.step()
        state = {{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}
        torch.save(state, f"{folder}/{{kernel}}-{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    script = tmp_path / "run.py"
    paths = [SRC, str(Path(__file__).parent)]
    script.write_text(textwrap.dedent(TWO_PROCESSES.format(paths=paths, folder=str(tmp_path))))
    done = python(str(script), "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29641")
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    _, model = rows_of("llama", modes="both")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch("llama")).loss.backward()
        optimizer.step()
    for kernel in ("additive", "live"):
        one, two = (torch.load(tmp_path / f"{kernel}-{rank}.pt", weights_only=True) for rank in (0, 1))
        for name, value in model.named_parameters():
            if value.requires_grad:
                assert torch.equal(one[name], two[name])
                torch.testing.assert_close(one[name], value.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not a dependency")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    base = make("llama", width=128)
    quietly(base.save_pretrained, tmp_path / "base")
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )

    def load():
        return quietly(LlamaForCausalLM.from_pretrained, tmp_path / "base", quantization_config=quantised)

    model = quietly(load)
    assert any(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in model.modules())
    model = quietly(prepare_model_for_kbit_training, model)
    model = quietly(get_peft_model, model, RowConfig(r=2, modes="both"))
    for name, layer in row_layers(model):
        weight = base.get_submodule(name).weight
        assert (layer.neurons, layer.inputs) == tuple(weight.shape)
    with torch.no_grad():
        start = model(**batch("llama")).logits
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss = quietly(model, **batch("llama")).loss
        quietly(loss.backward)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    learnt = out(model, "llama")
    with model.disable_adapter():
        assert torch.equal(out(model, "llama"), start)
    quietly(model.save_pretrained, str(tmp_path / "adapter"))
    loaded = quietly(PeftModel.from_pretrained, load(), str(tmp_path / "adapter"))
    torch.testing.assert_close(out(loaded, "llama"), learnt)
    with pytest.raises(ValueError, match="cannot be merged into the quantised"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="quantised or special; use kernel='additive'"):
        get_peft_model(load(), RowConfig(r=2, kernel="live"))
