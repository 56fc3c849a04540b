"""Every layer type against a dense layer with masked gradients."""

import copy
from functools import partial

import pytest
import torch
from models import LAYERS, DenseTwin, adapted, make_net, randomise, trained_masks
from torch import nn

from serpette.rows.layer import row_layers

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
OPTIMIZERS = {
    "sgd": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), None, 0.0),
    "adam": (partial(torch.optim.Adam, lr=0.01), None, 0.0),
    "adamw": (
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.2),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0),
        0.01 * 0.2,
    ),
}
NORMS = {name for name in LAYERS if "norm" in name}
NO_COLUMNS = NORMS | {"conv2d grouped", "conv2d depthwise", "conv1d multiplier"}
LINEAR = [name for name in LAYERS if "linear" in name or name == "gpt2"]


def train_beside_twin(net, x, model, optimizer, train=False, steps=4):
    make, make_twin, decay = OPTIMIZERS[optimizer]
    twin = DenseTwin(net, trained_masks(model), make_twin or make, decay)
    mine = make([p for p in model.parameters() if p.requires_grad])
    weight_of_loss = torch.randn_like(model(x))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(steps):
        gradients = []
        for m, step in ((model, None), (twin.net, twin.step)):
            m.train(train)
            x.grad = None
            out = m(x)
            loss = (out * weight_of_loss).sum() + (out**2).mean()
            if step:
                step(loss)
            else:
                mine.zero_grad()
                loss.backward()
                mine.step()
            gradients.append(None if x.grad is None else x.grad.clone())
        if x.requires_grad:
            close(*gradients)
    model.eval(), twin.net.eval()
    close(model(x), twin.net(x))
    assert not torch.equal(model(x), net.eval()(x)), "nothing was trained"
    with model.disable_adapter():
        close(model(x), net(x), rtol=0, atol=0)
    for key, value in net.state_dict().items():
        assert torch.equal(value, start[key]), "the twin must not share weights"
    close(model.merge_and_unload(safe_merge=True)(x), twin.net(x))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["rows", "columns", "both"])
@pytest.mark.parametrize("name", LAYERS)
def test_dense_layer_with_masked_gradients(name, mode, optimizer):
    if mode != "rows" and name in NO_COLUMNS:
        net, _ = make_net(name)
        with pytest.raises(ValueError, match="columns"):
            adapted(net, modes={"layer": mode})
        return
    net, x = make_net(name)
    net.eval()
    model = adapted(net, modes=mode, train_bias=optimizer != "sgd")
    assert torch.equal(model(x), net(x)), "zero changes, another output"
    train_beside_twin(net, x, model, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["rows", "columns", "both"])
@pytest.mark.parametrize("name", LINEAR)
def test_live(name, mode, optimizer):
    net, x = make_net(name)
    model = adapted(net, modes=mode, train_bias=True, kernel="live")
    train_beside_twin(net, x, model, optimizer)


@pytest.mark.parametrize("name", ["batch norm 1d", "batch norm 2d"])
@pytest.mark.parametrize("statistics", ["frozen", "update"])
def test_running_statistics(name, statistics):
    net, x = make_net(name)
    model = adapted(net, running_statistics=statistics, train_bias=True)
    twin = DenseTwin(net, trained_masks(model), partial(torch.optim.SGD, lr=0.1))
    mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        twin.net.train(statistics == "update")
        mine.zero_grad()
        model(x).pow(3).mean().backward()
        mine.step()
        twin.step(twin.net(x).pow(3).mean())
    base = model.base_model.model.layer.get_base_layer()
    close(base.running_mean, twin.net.layer.running_mean)
    close(base.running_var, twin.net.layer.running_var)
    assert base.num_batches_tracked == twin.net.layer.num_batches_tracked == 3 * (statistics == "update")
    assert torch.equal(base.running_mean, net.layer.running_mean) == (statistics == "frozen")
    close(model.eval()(x), twin.net.eval()(x))


def test_all_rows_are_a_dense_layer():
    net, x = make_net("linear")
    model = adapted(net, fraction=1.0, modes="both", train_bias=True)
    assert trained_masks(model)["layer.weight"].all()
    train_beside_twin(net, x, model, "adam")


@pytest.mark.parametrize("name", ["linear", "gpt2", "conv2d", "conv2d grouped", "embedding", "layer norm"])
def test_two_active_adapters(name):
    net, x = make_net(name)
    net.eval()
    mode = "rows" if name in NO_COLUMNS else "both"
    model = adapted(net, modes=mode, train_bias=True)
    config = copy.copy(model.peft_config["default"])
    config.counts, config.importance, config.seed = None, "random", 5
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    randomise(model)
    layer = row_layers(model)[0][1]
    assert not torch.equal(layer.rows_index["default"], layer.rows_index["other"])

    dense = copy.deepcopy(net)
    with torch.no_grad():
        for adapter in ("default", "other"):
            dense.layer.weight += layer.get_delta_weight(adapter)
            if adapter in layer.rows_bias:
                dense.layer.bias[layer.rows_index[adapter]] += layer.rows_bias[adapter]
    close(model(x), dense(x))
    g = torch.randn_like(model(x))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == sum(len(h) for h in (layer.rows_weight, layer.rows_bias, layer.rows_columns))
    found = dict(zip(map(id, trained), torch.autograd.grad(model(x), trained, g), strict=True))
    dense.requires_grad_(True)
    (dense(x) * g).sum().backward()
    gradient = layer.neuron_first(dense.layer.weight.grad)
    for adapter in ("default", "other"):
        rows = layer.rows_index[adapter]
        close(found[id(layer.rows_weight[adapter])], gradient[rows])
        if adapter in layer.rows_columns:
            expected = gradient[:, layer.rows_column_index[adapter]].clone()
            expected[rows] = 0
            close(found[id(layer.rows_columns[adapter])], expected)
        if adapter in layer.rows_bias:
            close(found[id(layer.rows_bias[adapter])], dense.layer.bias.grad[rows])
    merged = copy.deepcopy(model)
    merged.merge_adapter(["default", "other"])
    close(merged(x), dense(x))
    merged.unmerge_adapter()
    close(merged(x), dense(x))


def test_padding_token_never_trains():
    net, _ = make_net("embedding, padding")
    model = adapted(net)
    layer = row_layers(model)[0][1]
    layer.choose("default", torch.arange(11))
    x = torch.arange(11)
    before = model(x)[3].clone()
    model(x).sum().backward()
    assert not layer.rows_weight["default"].grad[3].any() and layer.rows_weight["default"].grad[2].all()
    randomise(model)
    assert torch.equal(model(x)[3], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR + ["conv2d grouped", "embedding, scaled", "rms norm of llama"])
def test_half_base_with_full_deltas(name, dtype):
    net, x = make_net(name, dtype)
    model = randomise(adapted(net, train_bias=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {dtype}
    y = model(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    layer = row_layers(model)[0][1]
    assert layer.rows_weight["default"].grad.dtype == torch.float32
    assert layer.rows_weight["default"].grad.any()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["linear", "gpt2", "conv2d", "conv2d grouped", "embedding", "layer norm"])
def test_autocast(name):
    net, x = make_net(name, torch.float32)
    mode = "rows" if name in NO_COLUMNS else "both"
    model = randomise(adapted(net, train_bias=True, modes=mode))
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with model.disable_adapter():
            assert model(x).dtype == y.dtype
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), full, rtol=5e-2, atol=0.1)
    for p in model.parameters():
        assert not p.requires_grad or p.grad.dtype == torch.float32


# -- live: the weight holds the changes


def test_live_weight_is_written_once_a_step_and_put_back():
    net, x = make_net("linear")
    model = adapted(net, modes="both", train_bias=True, kernel="live")
    layer = row_layers(model)[0][1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(x)
        version = layer.base_layer.weight._version
        (y.sum() + model(x).sum()).backward()  # two passes, one backward
        assert layer.base_layer.weight._version == version, "written again without a step"
        optimizer.step()
        model(x)
        assert layer.base_layer.weight._version > version
    close(layer.base_layer.weight, net.layer.weight + layer.get_delta_weight("default"))
    trained = model(x)
    with model.disable_adapter():
        assert torch.equal(layer(x), net.layer(x)) and torch.equal(layer.base_layer.weight, net.layer.weight)
    assert torch.equal(model(x), trained)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), trained) and torch.equal(twin.unload()(x), net(x))
    saved = copy.deepcopy(model.state_dict())
    randomise(model)
    model(x)
    model.load_state_dict(saved)
    assert torch.equal(model(x), trained)
    model.float()(x.float())
    assert torch.equal(model.unload().layer.weight, net.layer.weight.float())


@pytest.mark.parametrize("write", ["unseen step", "new", "other"])
def test_live_notices_every_change(write):
    net, x = make_net("linear")
    model = adapted(net, kernel="live")
    layer = row_layers(model)[0][1]
    y = model(x)
    if write == "unseen step":  # as of an optimizer whose kernel torch knows nothing of
        y.sum().backward()
        layer.rows_weight["default"].grad = None
        layer.rows_weight["default"].data.normal_()
    elif write == "new":
        layer.rows_weight["default"] = nn.Parameter(torch.ones_like(layer.rows_weight["default"]))
    else:
        layer.choose("default", torch.tensor([0, 7]))
        assert torch.equal(model(x), net(x))
        randomise(model)
    expected = copy.deepcopy(net)
    expected.layer.weight.data += layer.get_delta_weight("default").detach()
    close(model(x), expected(x))


def test_live_forward_between_forward_and_backward_is_an_error_not_a_wrong_gradient():
    net, x = make_net("linear")
    model = randomise(adapted(net, kernel="live"))
    y = model(x)
    with model.disable_adapter():
        model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- merging


def test_deleting_a_merged_adapter_takes_it_off():
    net, x = make_net("linear")
    model = randomise(adapted(net))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="active"):
        row_layers(model)[0][1].delete_adapter("default")
    close(row_layers(model)[0][1].base_layer.weight, net.layer.weight)


@pytest.mark.parametrize("where", ["rows_weight", "rows_bias", "rows_columns"])
def test_safe_merge_refuses_what_is_not_finite(where):
    net, x = make_net("linear")
    model = adapted(net, modes="both", train_bias=True)
    layer = row_layers(model)[0][1]
    free = [n for n in range(12) if n not in layer.rows_index["default"]][0]
    place = (free, 0) if where == "rows_columns" else 0
    getattr(layer, where)["default"].data[place] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, net.layer.weight)
    assert torch.equal(layer.base_layer.bias, net.layer.bias) and not layer.merged
    model.merge_adapter()
    assert not all(p.isfinite().all() for p in layer.base_layer.parameters())


def test_choose_begins_anew():
    net, x = make_net("linear")
    model = randomise(adapted(net, modes="both", train_bias=True))
    layer = row_layers(model)[0][1]
    layer.choose("default", torch.tensor([1, 5, 7]), None)
    assert torch.equal(model(x), net(x)) and layer.rows_weight["default"].shape == (3, 8)
    assert "default" in layer.rows_bias and "default" not in layer.rows_columns
    for rows, columns, words in (([12], None, "rows must lie in"), ([0], [8], "columns must lie in")):
        with pytest.raises(ValueError, match=words):
            layer.choose("default", torch.tensor(rows), columns and torch.tensor(columns))
    assert layer.rows_weight["default"].shape == (3, 8), "an error must not change the layer"


def test_frozen_norm_trains_no_statistics_when_it_is_made_in_training_mode():
    net, x = make_net("batch norm 2d")
    model = adapted(net.train())
    before = model.base_model.model.layer.base_layer.running_mean.clone()
    model.train()(x)
    assert torch.equal(before, model.base_model.model.layer.base_layer.running_mean)
    assert isinstance(model.unload().layer, nn.BatchNorm2d)
