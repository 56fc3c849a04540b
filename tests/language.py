"""A tokenizer of characters for tests of language models, and chat templates."""

import string

import tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>", "<unk>"]
CHARACTERS = list(string.ascii_letters + string.digits[:5] + "\n #:?.,")[: 100 - len(SPECIAL)]

CHAT = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
# as SmolLM2's does, it opens a chat with a system message of its own
OPENS = CHAT.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|start|>system\nb a<|end|>\n' }}{% endif %}",
)
# an answer that is not the last loses what it says before '#', as templates do with thoughts
FORGETS = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set c = c.split('#')[-1] %}{% endif %}"
    "{{ '<|start|>' + m['role'] + '\n' + c + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def character_tokenizer(chat_template=None, bos=True):
    """One token a character, 100 in all; `<s>` comes first unless `bos=False`."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def shown(coded, tokenizer):
    """(the whole text, the text that counts)."""
    text = "".join(tokenizer.convert_ids_to_tokens(coded["input_ids"]))
    counted = [i for i, label in zip(coded["input_ids"], coded["labels"], strict=True) if label != -100]
    assert all(label in (-100, i) for i, label in zip(coded["input_ids"], coded["labels"], strict=True))
    return text, "".join(tokenizer.convert_ids_to_tokens(counted))
