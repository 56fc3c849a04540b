"""Random models small enough to be made in milliseconds: the architectures of the real ones, for tests."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import near


def make(kind: str, num_labels: int = 3, seed: int = 0):
    """A classifier in eval mode whose weights follow from `seed` alone.

    Args:
        kind: `"vit"` (3x32x32 images, 8-pixel patches, 2 layers of width 32), `"resnet"` (3x32x32, two
            stages), `"bert"` (vocabulary 100, 2 layers of width 32) or `"llama"` (a causal language model
            with vocabulary 100, 4 heads and 2 KV heads; `num_labels` has no meaning there).
        num_labels: width of the head.
        seed: of the weights.
    """
    import transformers

    from .quiet import quiet_transformers

    hf: Any = transformers  # the signatures of its configurations differ between versions
    wide: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    text: dict[str, Any] = {**wide, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
    makers = {
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**wide, image_size=32, patch_size=8, num_labels=num_labels)
        ),
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                num_labels=num_labels,
            )
        ),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**text, num_labels=num_labels)),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**text, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
        ),
    }
    if kind not in makers:
        raise ValueError(f"unknown tiny model {kind!r}{near(kind, makers)}")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[kind]().float().eval()
