import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from serpette.weights.packed import Sizes, load_packed, pack_mask, save_packed, sizes_of, unpack_mask

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse(*shape, zeros=0.8):
    return torch.randn(*shape).masked_fill(torch.rand(*shape) < zeros, 0)


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]) if tensor.dim() else tensor


@pytest.mark.parametrize("shape", [(0,), (), (1,), (7,), (8,), (9,), (3, 5, 2), (0, 4), (16, 33)])
def test_masks_come_back(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_mask(packed, shape), mask)
    assert (
        torch.equal(unpack_mask(pack_mask(mask.t()), mask.t().shape), mask.t()) if mask.dim() == 2 else True
    )


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3\) takes 2 bytes, but 1 are given"):
        unpack_mask(torch.zeros(1, dtype=torch.uint8), (3, 3))


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float64", "int8", "int64", "float8_e4m3fn"],
)
def test_every_bit_comes_back(tmp_path, dtype):
    dtype = getattr(torch, dtype)
    tensors = {
        "sparse": sparse(13, 7).to(dtype),
        "dense": sparse(5, 3, zeros=0.0).to(dtype),
        "transposed": sparse(6, 10).to(dtype).t(),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "zeros": torch.zeros(4, 9).to(dtype),
    }
    sizes = save_packed(tensors, tmp_path / "packed.safetensors")
    found = load_packed(tmp_path / "packed.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name
    assert sizes == sizes_of(tensors)


def test_special_values_keep_their_bits(tmp_path):
    special = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45] + [0.0] * 28)
    special.view(torch.int32)[1] += 1  # another NaN
    save_packed({"w": special}, tmp_path / "w")
    assert "mask/w" in load_file(tmp_path / "w")
    assert torch.equal(bits(load_packed(tmp_path / "w")["w"]), bits(special))


def test_sizes_by_hand(tmp_path):
    weight = torch.zeros(4, 16)
    weight[:, :3] = 1
    sizes = save_packed({"w": weight, "b": torch.ones(5)}, tmp_path / "w")
    assert sizes == Sizes(dense_bytes=4 * (64 + 5), packed_bytes=64 // 8 + 4 * 12 + 4 * 5)
    stored = load_file(tmp_path / "w")
    assert set(stored) == {"mask/w", "values/w", "dense/b"}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sizes.packed_bytes


def test_a_model_with_tied_weights_is_stored_once_and_loads(tmp_path):
    def make():
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False))
        model[2].weight = model[0].weight
        return model

    model, other = make(), make()
    with torch.no_grad():
        model[1].weight.copy_(sparse(8, 8))
    sizes = save_packed(model, tmp_path / "model")
    assert sizes.dense_bytes == 4 * (160 + 64 + 8)
    found = load_packed(tmp_path / "model")
    assert found["0.weight"] is found["2.weight"]
    other.load_state_dict(found)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_two_views_of_one_tensor(tmp_path):
    whole = torch.randn(4, 4)
    save_packed({"whole": whole, "part": whole[:2]}, tmp_path / "w")
    found = load_packed(tmp_path / "w")
    assert torch.equal(found["whole"], whole) and torch.equal(found["part"], whole[:2])


def test_other_files_and_tensors_are_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="not 'serpette.packed.1'"):
        load_packed(tmp_path / "plain")
    with pytest.raises(ValueError, match="'w' is no dense tensor"):
        save_packed({"w": torch.eye(3).to_sparse()}, tmp_path / "w")
    save_packed({"w": torch.eye(16)}, tmp_path / "w")
    stored = load_file(tmp_path / "w")
    stored["values/w"] = stored["values/w"][1:].clone()
    metadata = {"format": "serpette.packed.1", "shapes": '{"w": [16, 16]}', "tied": "{}"}
    save_file(stored, tmp_path / "damaged", metadata)
    with pytest.raises(ValueError, match="'w' has 15 values for 16 places"):
        load_packed(tmp_path / "damaged")
