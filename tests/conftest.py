"""One seed, one thread, no network: for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model saved to disk and an image folder with two splits; one training image does not decode."""
    from PIL import Image
    from transformers import ViTImageProcessor

    from serpette.zoo import tiny

    root = tmp_path_factory.mktemp("places")
    tiny("vit").save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 36), ("test", 24)):
        for i in range(n):
            folder = root / "images" / split / ("ant", "bee", "<b>cat</b>")[i % 3].replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (32, 32, 3)) + 80 * np.eye(3)[i % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "images" / "train" / "ant" / "0.png").write_bytes(b"broken")
    return root
