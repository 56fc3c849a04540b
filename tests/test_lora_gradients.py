"""Per-example gradients of LoRA factors from one backward pass, against autograd one example at a time."""

import oracles_lora as slow
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from serpette.lora_gradients import LoraGradients, lora_layers, packed
from serpette.zoo import tiny
from serpette.zoo.quiet import quiet_transformers

QUERY = r".*\.(query|q_proj)"  # the name depends on the version of transformers
LINEAR = r".*\.(query|key|value|[qkvo]_proj|dense|fc1|fc2)"


def with_lora(model, targets="all-linear", double=True, **options):
    """A LoRA whose B is not 0, unless its kind of initialisation says what it is."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **options})
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    g = torch.Generator().manual_seed(0)
    for _, B in slow.factors(model):
        if not B.detach().any():
            B.data = torch.randn(B.shape, generator=g) * 0.1
    return (model.double() if double else model).eval()


def images(n=3, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def read(model, loss, n, late_scale=None, **begin):
    """[(g_B, g_A)] from one backward pass of the scalar `loss()`, and what `visit` was given."""
    seen = {}
    with LoraGradients(model, lambda layer: seen.__setitem__(layer.index, layer)) as hooks:
        hooks.begin(n, **begin)
        value = loss()
        if late_scale is not None:
            hooks.loss_scale = late_scale
        value.backward()
        hooks.end()
    model.zero_grad()
    scaled = [[layer.scale * g for g in layer.factors()] for _, layer in sorted(seen.items())]
    return [tuple(g) for g in scaled], seen, hooks


def close(found, expected, rtol=1e-9, atol=1e-11):
    assert len(found) == len(expected) > 0
    for layer in zip(found, expected, strict=True):
        for a, b in zip(*layer, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)
    assert any(bool(g.any()) for g in expected[0])


def losses(logits, labels=None):
    labels = torch.arange(len(logits)) % 3 if labels is None else labels
    return cross_entropy(logits, labels, reduction="none")


def check_images(model, x=None, **options):
    x = images() if x is None else x
    call = lambda v: getattr(out := model(v), "logits", out)  # noqa: E731
    found, seen, _ = read(model, lambda: losses(call(x)).sum(), len(x))
    each = (losses(call(x[i : i + 1]), torch.tensor([i % 3])).sum() for i in range(len(x)))
    close(found, slow.gradients(model, each), **options)
    return seen


LORAS = {
    "plain": {},
    "alpha": {"r": 4, "lora_alpha": 1},
    "rslora": {"r": 4, "use_rslora": True},
    "patterns": {"rank_pattern": {QUERY: 3, r".*\.1\..*": 1}, "alpha_pattern": {QUERY: 7}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},  # off in evaluation mode
}


@pytest.mark.parametrize("kind", LORAS)
def test_linear_layers(kind):
    model = with_lora(tiny("vit"), **LORAS[kind])
    seen = check_images(model)
    assert len(seen) == len(lora_layers(model)) == 13
    if kind == "patterns":
        assert {layer.A_rI.shape[0] for layer in seen.values()} == {1, 2, 3}
        assert {layer.scale for layer in seen.values()} >= {7 / 3, 3.0, 6.0}


def test_windows_of_an_image_are_its_tokens():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    model = with_lora(transformers.SwinForImageClassification(config), LINEAR)
    seen = check_images(model, images(size=16))
    assert {tuple(layer.x_nTI.shape[:2]) for layer in seen.values()} == {(3, 64), (3, 16)}


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 5, (3, 2), padding=(2, 0)),
            nn.Tanh(),
            nn.Conv2d(5, 4, (1, 4), padding="same"),
            nn.Tanh(),
            nn.Conv2d(4, 6, 1, stride=(1, 3), bias=False, padding_mode="reflect"),  # of the layer, not of A
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
def test_convolutions():
    model = with_lora(Convolutions(), ["body.0", "body.2", "body.4", "body.6"])
    check_images(model, images(size=9))
    check_images(with_lora(tiny("resnet"), ["convolution"]))


def text(lengths, seed=0, left=False):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(2, len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        held = slice(-length, None) if left else slice(length)
        ids[row, held], mask[row, held] = torch.randint(5, 90, (length,), generator=g), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_padding():
    model = with_lora(tiny("bert"), LINEAR + r"|.*\.classifier")
    inputs = text([4, 7, 2])
    loss = lambda: losses(model(**inputs).logits).sum()  # noqa: E731
    found, seen, hooks = read(model, loss, 3, mask=inputs["attention_mask"])
    unpadded = []
    for i in range(3):
        ids = inputs["input_ids"][i][inputs["attention_mask"][i] == 1]
        unpadded.append(losses(model(input_ids=ids[None]).logits, torch.tensor([i])).sum())
    close(found, slow.gradients(model, unpadded))
    for layer in seen.values():
        if layer.x_nTI.shape[1] > 1:
            assert layer.mask_nT is not None and layer.mask_nT.sum(1).tolist() == [4, 7, 2]
            away = ~layer.mask_nT
            assert not layer.x_nTI[away].any() and not layer.u_nTr[away].any()
            assert not layer.delta_nTO[away].any()
        else:
            assert layer.mask_nT is None, "pooled layers have no padding"
    names = [layer.name for layer in hooks.layers]
    groups = [hooks.input_of[i] for i, name in enumerate(names) if "layer.0.attention.self" in name]
    assert len(groups) == 3 and len(set(groups)) == 1, "query, key and value read the same input"
    assert len(set(hooks.input_of)) == len(names) - 4


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=100, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)


def test_conv1d():
    model = with_lora(gpt2(), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    inputs = text([5, 3])
    found, _, _ = read(model, lambda: losses(model(**inputs).logits).sum(), 2, mask=inputs["attention_mask"])
    each = (
        losses(model(input_ids=inputs["input_ids"][i : i + 1, :length]).logits, torch.tensor([i])).sum()
        for i, length in enumerate((5, 3))
    )
    close(found, slow.gradients(model, each))


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def language_loss(model, ids, **inputs):
    """Summed over the tokens."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def one_by_one(model, rows):
    return slow.gradients(model, (language_loss(model, row[None]) for row in rows))


def test_every_linear_layer_of_a_language_model():
    model = with_lora(tiny("llama"), LLAMA)
    ids = text([6, 6, 6])["input_ids"]
    found, _, _ = read(model, lambda: language_loss(model, ids), 3)
    assert len(found) == 15
    close(found, one_by_one(model, ids))


@pytest.mark.parametrize("left", [False, True])
def test_padding_of_a_language_model(left):
    model = with_lora(tiny("llama"), LLAMA)
    inputs = text([4, 7, 2], left=left)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def loss():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, :-1]
        there = (mask[:, 1:] * mask[:, :-1]).bool()
        return cross_entropy(logits[there], ids[:, 1:][there], reduction="sum")

    found, _, _ = read(model, loss, 3, mask=mask)
    close(found, one_by_one(model, [row[held.bool()] for row, held in zip(ids, mask, strict=True)]))


def test_a_packed_batch():
    model = with_lora(tiny("llama"), LLAMA[:-1])
    rows = [text([length], seed=length)["input_ids"][0] for length in (5, 3, 4)]
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    gather = packed(positions)
    assert gather.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, -1, -1], [8, 9, 10, 11, -1]]

    def loss():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        inside = torch.arange(12)[(positions[0] != 0).nonzero()[:, 0]]
        return cross_entropy(logits[inside - 1], ids[0, inside], reduction="sum")

    found, seen, _ = read(model, loss, 3, gather=gather)
    close(found, one_by_one(model, rows))
    assert all(layer.mask_nT is not None for layer in seen.values())


def test_the_scale_of_the_loss_is_taken_out():
    model = with_lora(tiny("vit"))
    x = images()
    plain, _, _ = read(model, lambda: losses(model(x).logits).sum(), 3)
    scaled, _, _ = read(model, lambda: 1024 * losses(model(x).logits).sum(), 3, loss_scale=1024.0)
    mean, _, _ = read(
        model, lambda: losses(model(x).logits).mean(), 3, loss_scale=torch.tensor(1 / 3.0).double()
    )
    late, _, _ = read(model, lambda: 4 * losses(model(x).logits).sum(), 3, late_scale=4.0)
    close(scaled, plain)
    close(mean, plain, rtol=1e-6)
    close(late, plain)


def cosines(found, expected):
    pairs = [p for layer in zip(found, expected, strict=True) for p in zip(*layer, strict=True)]
    return torch.stack(
        [nn.functional.cosine_similarity(a.flatten().double(), b.flatten(), 0) for a, b in pairs]
    )


@pytest.mark.parametrize("kind", ["autocast", "half adapter", "half model"])
def test_half_precision(kind):
    model = with_lora(tiny("vit"), double=kind == "exact")
    x = images().float()
    exact = with_lora(tiny("vit"))
    each = (losses(exact(x[i : i + 1].double()).logits, torch.tensor([i])).sum() for i in range(3))
    expected = slow.gradients(exact, each)
    if kind == "half adapter":
        for A, B in slow.factors(model):
            A.data, B.data = A.data.bfloat16(), B.data.bfloat16()
    elif kind == "half model":
        model, x = model.to(torch.bfloat16), x.bfloat16()

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = model(x).logits
        return losses(logits.float()).sum()

    found, seen, _ = read(model, loss, 3)
    assert all(g.dtype == torch.float32 for layer in found for g in layer), "half precision is widened"
    assert cosines(found, expected).min() > 0.99
    for a, b in zip(found, expected, strict=True):
        assert a[0].norm() == pytest.approx(float(b[0].norm()), rel=0.05)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    config = tiny("bert").config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = with_lora(transformers.BertForSequenceClassification(config), LINEAR)
    inputs = text([4, 7, 2])
    loss = lambda: losses(model(**inputs).logits).sum()  # noqa: E731
    plain, _, hooks = read(model, loss, 3, mask=inputs["attention_mask"])
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    runs = []
    body = model.base_model.model.bert.encoder.layer[0].intermediate
    body.register_forward_hook(lambda *_: runs.append(1))
    again, _, hooks_again = read(model, loss, 3, mask=inputs["attention_mask"])
    assert len(runs) == 2, "the forward pass was run again"
    close(again, plain)


def test_many_batches_and_nothing_between_them():
    model = with_lora(tiny("vit"))
    x = images(4)
    seen = []
    with LoraGradients(model, seen.append) as hooks:
        assert hooks.input_of == []
        for rows in (x[:3], x[3:]):
            hooks.begin(len(rows))
            losses(model(rows).logits).sum().backward()
            hooks.end()
            losses(model(rows).logits).sum().backward()  # a step of training: not announced, not seen
    losses(model(x).logits).sum().backward()
    assert [len(layer.x_nTI) for layer in seen] == [3] * 13 + [1] * 13
    assert not any(m._forward_hooks for m in model.modules())


class Shared(nn.Module):
    def __init__(self, mix=False):
        super().__init__()
        self.first, self.body, self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        if self.mix:
            return self.head(torch.cat([self.body(torch.cat([x, x[:1]]))[: len(x)]]))
        return self.head(self.body(self.body(x)))


def test_layers_that_cannot_be_told_apart_are_named():
    x = torch.randn(3, 4).double()
    model = with_lora(Shared(), ["body"])
    with pytest.raises(ValueError, match=r"'base_model\.model\.body' is used more than once.*target_modules"):
        read(model, lambda: losses(model(x)).sum(), 3)
    model = with_lora(Shared(mix=True), ["body"])
    with pytest.raises(ValueError, match=r"no whole number of tokens for each of the 3 examples"):
        read(model, lambda: losses(model(x)).sum(), 3)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.maps = nn.Conv2d(4, 4, 3, groups=2)
        self.line = nn.Conv1d(4, 4, 3)


def frozen(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def two_adapters():
    model = with_lora(tiny("vit"), QUERY)
    model.add_adapter("other", LoraConfig(r=2, target_modules=QUERY))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = with_lora(tiny("vit"), QUERY)
    model.merge_adapter()
    return model


def disabled():
    model = with_lora(tiny("vit"), QUERY)
    model.base_model.disable_adapter_layers()
    return model


BAD = {
    "no LoRA": (lambda: tiny("vit"), r"ViTForImageClassification\) has no LoRA layer; .*get_peft_model"),
    "frozen": (lambda: frozen(with_lora(tiny("vit"))), r"frozen \(13 of 13 layers\).*is_trainable=True"),
    "two active": (two_adapters, r"' has 2 active adapters; activate one: model.set_adapter"),
    "merged": (merged, r"' is merged or disabled; unmerge"),
    "disabled": (disabled, r"' is merged or disabled"),
    "DoRA": (lambda: with_lora(tiny("vit"), use_dora=True), r"is a LoRA variant.*leave it out of target_mod"),
    "Embedding": (
        lambda: get_peft_model(Embedded(), LoraConfig(target_modules=["words"])),
        r"'base_model\.model\.words' is a LoRA on an Embedding",
    ),
    "grouped": (
        lambda: get_peft_model(Embedded(), LoraConfig(target_modules=["maps"])),
        r"grouped convolution",
    ),
    "Conv1d": (
        lambda: get_peft_model(Embedded(), LoraConfig(target_modules=["line"])),
        r"is a LoRA on Conv1d",
    ),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_refused(kind):
    make, message = BAD[kind]
    with quiet_transformers():
        model = make()
    with pytest.raises(ValueError, match=message):
        LoraGradients(model, lambda layer: None)


def test_of_two_adapters_the_active_one_is_read():
    model = two_adapters()
    model.set_adapter("other")
    for _, module in slow.lora_layers(model):
        module.lora_B["other"].weight.data.fill_(0.1)
    x = images()
    found, seen, _ = read(model, lambda: losses(model(x.to(model.dtype)).logits).sum(), 3)
    module = slow.lora_layers(model)[0][1]
    assert (
        torch.equal(seen[0].A_rI, module.lora_A["other"].weight) and seen[0].scale == module.scaling["other"]
    )
