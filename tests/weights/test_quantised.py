"""4-bit and 8-bit bases: dequantised layer by layer, masked, merged to exact zeros."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from serpette.weights import PruneConfig, attach

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, of types on a CPU
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_pruned_and_merged_to_zeros(bits, tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    quantised = BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    ids = torch.randint(0, 50, (4, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruner = attach(model, PruneConfig("lora_prune", 0.5), steps=20)
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    assert set(pruner.finish().sparsity_.values()) == {0.5}
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in pruner.masks_}
    kept = {name: layer.frozen() + layer.get_delta_weight("default") for name, layer in layers.items()}
    for name, mask in pruner.masks_.items():
        assert torch.equal(kept[name][~mask], torch.zeros(int((~mask).sum())))
        assert kept[name][mask].ne(0).float().mean() > 0.9
    logits = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
    assert float((merged - logits).abs().max()) < 0.1 * float(logits.abs().max())  # quantised once more
