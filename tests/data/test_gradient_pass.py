"""The backward pass of `observe` leaves no trace, goes on after a kill, and bad examples spoil no other."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import serpette
from serpette.data.gradient_pass import GradientPass
from serpette.data.observe import observe
from serpette.data.store import ChunkStore
from serpette.scorers import EL2N, TSA, TSAJoint
from serpette.zoo import tiny


class Tokens(nn.Module):
    """Tokens x (n, 4, 5), with dropout and a norm that a training step would move."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x)).mT).mT
        h = torch.tanh(self.second(self.drop(h)))
        return self.head(h.mean(1) + h[:, 0] * h[:, 1])


def small(B=True, targets=("first", "second"), **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(targets), **options)
    model = get_peft_model(Tokens(), config).eval()
    for name, parameter in model.named_parameters():
        if B and "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return model


def tokens(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = {
        "id": [f"r{i:03d}" for i in range(n)],
        "x": torch.randn(n, 4, 5, generator=g).numpy(),
        "label": [i % 3 for i in range(n)],
    }
    return datasets.Dataset.from_dict(rows).with_format("torch")


def score(model, data, scorer, **options):
    """{id: score}"""
    scores = serpette.score(model, data, scorer, progress=False, **options)
    return dict(zip(scores.signals.ids.tolist(), scores.values[scorer.name].tolist(), strict=True))


def close(a, b, rtol=1e-5):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[i] for i in a], [b[i] for i in a], rtol=rtol)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_before(fails, monkeypatch):
    model = small(B=False).train()
    model.base_model.model.norm.eval()
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {
        n: (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    numpys = np.random.get_state()[1].copy()
    if fails:
        calls = []

        def failing(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, *arguments)

        real = GradientPass.__call__
        monkeypatch.setattr(GradientPass, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            score(model, tokens(), TSA(warmup_steps=3, epochs=2), batch_size=8)
    else:
        score(model, tokens(), TSA(warmup_steps=3, epochs=2), batch_size=8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    for name, parameter in model.named_parameters():
        wanted, gradient, value = gradients[name]
        assert parameter.requires_grad == wanted and parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    observe(model, tokens(), progress=False)
    assert torch.equal(after, torch.get_rng_state()), "no draws beside those of the loader"
    assert (numpys == np.random.get_state()[1]).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_seed_moves_the_warm_up():
    """Its order comes from the ids, and dropout is off."""
    model, data, scorer = small(B=False, lora_dropout=0.5), tokens(), TSA(warmup_steps=4, epochs=2)
    torch.manual_seed(1)
    one = score(model, data, scorer, seed=0)
    torch.manual_seed(2)
    assert one == score(model.train(), data, scorer, seed=1)
    turned = data.select(np.random.default_rng(0).permutation(24))
    close(one, score(model, turned, scorer, batch_size=5), 1e-3)


def test_the_outputs_are_those_of_the_model_as_it_was_given():
    data = tokens()
    model = small(B=False)
    scores = serpette.score(model, data, [TSA(), EL2N()], progress=False)
    alone = serpette.score(model, data, EL2N(), progress=False)
    torch.testing.assert_close(scores.values["el2n"], alone.values["el2n"])
    torch.testing.assert_close(scores.signals.embeddings, alone.signals.embeddings)


class Stop(RuntimeError):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    data, model = tokens(), small(B=False)
    scorers = [TSA(epochs=2, warmup_steps=2), TSAJoint(statistics="two_pass")]
    options = {"batch_size": 3, "chunk_size": 6, "progress": False}
    whole = observe(model, data, scorers, folder=tmp_path / "whole", **options)

    write = ChunkStore.write
    monkeypatch.setattr(
        ChunkStore, "write", lambda self, number, *v: write(self, number, *v) if number < 2 else _stop()
    )
    with pytest.raises(Stop):
        observe(model, data, scorers, folder=tmp_path / "killed", **options)
    monkeypatch.setattr(ChunkStore, "write", write)
    assert len(list((tmp_path / "killed").glob("[0-9]*.safetensors"))) == 2
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.safetensors")}
    assert "gradients.safetensors" in kept

    prepared = []
    for name in ("_make_states", "_gather_moments"):
        monkeypatch.setattr(GradientPass, name, lambda *_, name=name: prepared.append(name))
    again = observe(model, data, scorers, folder=tmp_path / "killed", **options)
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.safetensors")}
    assert kept.items() <= now.items() and len(now) == 5 and not prepared
    for scorer in scorers:
        assert torch.equal(scorer(whole.signals), scorer(again.signals))

    monkeypatch.setattr(GradientPass, "prepare", lambda *_: _stop())
    monkeypatch.setattr(GradientPass, "_backward", lambda *_: _stop())
    done = observe(model, data, scorers, folder=tmp_path / "whole", **options)
    assert torch.equal(scorers[0](done.signals), scorers[0](whole.signals))


def _stop():
    raise Stop


def test_other_readings_are_another_run(tmp_path):
    score(small(), tokens(), TSA(), out=tmp_path)
    with pytest.raises(ValueError, match="differs in: readings"):
        score(small(), tokens(), TSA(damping=0.2), out=tmp_path)


def test_moving_statistics_start_again(tmp_path, monkeypatch):
    data, model, scorer = tokens(), small(), TSA(statistics="running")
    options = {"batch_size": 3, "chunk_size": 6, "progress": False}
    whole = observe(model, data, [scorer], **options)
    write = ChunkStore.write
    monkeypatch.setattr(
        ChunkStore, "write", lambda self, number, *v: write(self, number, *v) if number < 2 else _stop()
    )
    with pytest.raises(Stop):
        observe(model, data, [scorer], folder=tmp_path, **options)
    monkeypatch.setattr(ChunkStore, "write", write)
    again = observe(model, data, [scorer], folder=tmp_path, **options)
    assert torch.equal(scorer(whole.signals), scorer(again.signals))


WORKER = textwrap.dedent(
    """
    import sys, torch
    torch.set_num_threads(1)
    from accelerate import PartialState
    assert PartialState(cpu=True).num_processes == 2
    sys.path.insert(0, sys.argv[1])
    from data.test_gradient_pass import in_processes
    torch.save(in_processes(), sys.argv[2])
    """
)


def in_processes():
    """Scores of 24 examples in batches of 3, and of 3 in one, which leaves a second process nothing."""
    found = []
    for n, batch in ((24, 3), (3, 32)):
        scores = serpette.score(
            small(B=False),
            tokens(n),
            [TSA(damping=0.01, sample=10), TSAJoint(statistics="two_pass", damping=0.01, warmup_steps=2)],
            batch_size=batch,
            progress=False,
        )
        found += list(scores.values.values())
    try:
        score(small(), tokens(), TSA(statistics="running"))
    except ValueError as error:
        found.append(str(error))
    return found


def test_two_processes_give_the_scores_of_one(tmp_path):
    script, tests = tmp_path / "worker.py", Path(__file__).parent.parent
    script.write_text(WORKER)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tests.parent / 'src'}:{tests}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() + 7919) % 20000),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    with open(tmp_path / "stderr", "a") as errors:
        pair = [
            subprocess.Popen(
                [sys.executable, str(script), str(tests), str(tmp_path / f"{rank}.pt")],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            for rank in range(2)
        ]
    try:
        for process in pair:
            assert process.wait(120) == 0, (tmp_path / "stderr").read_text()
    finally:
        for process in pair:
            process.kill()
    one = in_processes()
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert "need one process" in two.pop()
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def with_bad(rows, value=3e38):
    data = tokens()
    held = data.with_format(None).to_dict()
    for row in rows:
        held["x"][row] = (np.asarray(held["x"][row]) * 0 + value).tolist()
    return datasets.Dataset.from_dict(held).with_format("torch")


class Overflowing(Tokens):
    def forward(self, x):
        return super().forward(x) + (x.square().sum((1, 2)) - x.square().sum((1, 2)))[:, None]


@pytest.mark.parametrize("statistics", ["two_pass", "running"])
def test_examples_whose_loss_is_not_finite_are_set_aside(statistics):
    model = small()
    model.base_model.model.__class__ = Overflowing
    scorer = TSA(statistics=statistics, tokens=None)
    scores = serpette.score(model, with_bad([4, 5, 20]), scorer, progress=False, batch_size=8)
    assert scores.set_aside == dict.fromkeys(["r004", "r005", "r020"], "its loss is not finite")
    rest = tokens().select([i for i in range(24) if i not in (4, 5, 20)])
    found = dict(zip(scores.signals.ids.tolist(), scores.values["tsa"].tolist(), strict=True))
    if statistics == "two_pass":
        close(found, score(model, rest, scorer, batch_size=8))
    assert len(found) == 21 and np.isfinite(list(found.values())).all()
    with pytest.raises(ValueError, match=r"id 'r004' is not finite; mend it, or .* on_bad='set_aside'"):
        score(model, with_bad([4]), scorer, on_bad="raise")


def test_a_loss_that_is_not_finite_does_not_spoil_the_warm_up():
    model = small(B=False)
    model.base_model.model.__class__ = Overflowing
    scores = serpette.score(model, with_bad([4, 5, 20]), TSA(), progress=False)
    assert len(scores.set_aside) == 3 and len(scores.values["tsa"]) == 21
    assert torch.isfinite(scores.values["tsa"]).all()


class Deaf(Tokens):
    def forward(self, x):
        return super().forward(x) * 0


@pytest.mark.parametrize("statistics", ["sampled", "running"])
def test_gradients_that_are_all_zero_are_refused(statistics):
    model = small()
    model.base_model.model.__class__ = Deaf
    with pytest.raises(ValueError, match="all gradients of the LoRA factors are zero"):
        score(model, tokens(), TSA(statistics=statistics))


def test_a_layer_that_no_gradient_reaches_counts_for_nothing():
    torch.manual_seed(0)
    both, one = small(), small(targets=["first"])
    one.load_state_dict(both.state_dict(), strict=False)
    inner = both.base_model.model
    second = inner.second
    inner.second = second.base_layer
    inner.unused = second
    close(score(both, tokens(), TSA()), score(one, tokens(), TSA()))


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match=r"the model \(Tokens\) has no LoRA layer"):
        score(Tokens(), tokens(), TSA())


@pytest.mark.parametrize("task", ["regression"])
def test_a_regression(task):
    model = small()
    model.base_model.model.head = nn.Linear(6, 1)
    data = tokens().remove_columns("label").add_column("label", np.linspace(-1, 1, 24).tolist())
    found = score(model, data.with_format("torch"), TSA(), task=task)
    assert np.isfinite(list(found.values())).all() and len(set(found.values())) == 24


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_dropout_stays_off(use_reentrant):
    config = transformers.OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=24, num_attention_heads=2, num_hidden_layers=2, num_labels=3,
        word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.3, layerdrop=0.3, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "fc1", "fc2"], lora_dropout=0.3)
    model = get_peft_model(transformers.OPTForSequenceClassification(config), lora)
    rng = np.random.default_rng(0)
    rows = [
        {"id": str(i), "input_ids": rng.integers(5, 90, size=8).tolist(), "label": i % 3} for i in range(12)
    ]
    data = datasets.Dataset.from_list(rows).with_format("torch")
    plain = score(model, data, TSA(warmup_steps=2), batch_size=5)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    runs: list = []
    inner = model.base_model.model.model.decoder.layers[1].fc1
    inner.register_forward_hook(lambda *_: runs.append(1))
    close(plain, score(model, data, TSA(warmup_steps=2), batch_size=5))
    assert len(runs) == 2 * (2 + 3 + 3) + 3, "twice in warm-up, moments and scores; once to show"


def spearman(a, b):
    ranks = [np.argsort(np.argsort([v[i] for i in a])) for v in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


def test_autocast():
    model, data = small(), tokens(60)
    plain, half = (score(model, data, TSA(), precision=p) for p in (None, torch.bfloat16))
    assert plain != half and spearman(plain, half) > 0.98
    close(plain, half, 0.2)


def language_rows(n=14):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        ids = rng.integers(5, 90, size=4 + i % 5).tolist()
        rows.append({"id": f"r{i}", "input_ids": ids, "labels": [-100] * 2 + ids[2:]})
    return datasets.Dataset.from_list(rows)


def test_a_causal_language_model():
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    close(
        score(model, language_rows(), TSA(warmup_steps=2, damping=0.1), batch_size=1),
        score(model, language_rows(), TSA(warmup_steps=2, damping=0.1), batch_size=14),
        1e-4,
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="an optional backend of peft")
    torch.manual_seed(0)
    float_model, quantised = Tokens(), Tokens()
    wide = [nn.Linear(5, 64), nn.Linear(64, 64), nn.Linear(64, 3)]
    for model in (float_model, quantised):
        model.norm = nn.Identity()
        model.first, model.second, model.head = (
            nn.Linear(layer.in_features, layer.out_features) for layer in wide
        )
        for layer, source in zip((model.first, model.second, model.head), wide, strict=True):
            layer.load_state_dict(source.state_dict())
    weight = quantised.second.state_dict()
    if bits == 8:
        quantised.second = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        quantised.second = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    quantised.second.load_state_dict(weight)
    quantised.second = quantised.second.to("cpu")
    found = []
    for model in (float_model, quantised):
        torch.manual_seed(1)
        lora = get_peft_model(model.eval(), LoraConfig(r=2, target_modules=["second"]))
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0, 0.1)
        found.append(score(lora, tokens(60), TSA(damping=0.01)))
    assert spearman(*found) > 0.95 and found[0] != found[1]
