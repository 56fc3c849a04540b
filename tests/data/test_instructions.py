"""Chats, instructions and text become tokens of which only the responses count."""

import datasets
import pytest
from language import CHAT, FORGETS, NO_END, NO_SYSTEM, OPENS, character_tokenizer, shown

from serpette.data.examples import Examples
from serpette.data.instructions import BadExample, Format, collate, encode, find_format


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PLAIN = character_tokenizer()
CHATTY = character_tokenizer(CHAT)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["id", "messages", "prompt", "response"], Format("chat", response="messages")),
        (["conversations"], Format("chat", response="conversations")),
        (["input_ids", "labels", "text"], Format("tokens", response="labels")),
        (["input_ids", "attention_mask"], Format("tokens")),
        (["instruction", "input", "output"], Format("instruction", "instruction", "output", "input")),
        (["instruction", "response"], Format("instruction", "instruction", "response")),
        (["subject", "prompt", "response"], Format("prompt", "prompt", "response")),
        (["prompt", "completion"], Format("prompt", "prompt", "completion")),
        (["question", "answer"], Format("prompt", "question", "answer")),
        (["text", "label"], Format("text", response="text")),
        (["prompt", "score"], None),
        (["instruction", "input"], None),
    ],
)
def test_formats_are_found_by_their_columns(columns, form):
    assert find_format(columns) == form


def test_alpaca_with_and_without_an_input():
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    bare = {"instruction": "Say hi", "input": "", "output": "hi"}
    text, counted = shown(encode(row, PLAIN), PLAIN)
    assert (
        text == "<s>### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3</s>" and counted == "3</s>"
    )
    text, counted = shown(encode(bare, PLAIN), PLAIN)
    assert text == "<s>### Instruction:\nSay hi\n\n### Response:\nhi</s>" and counted == "hi</s>"
    text, counted = shown(encode(row, CHATTY), CHATTY)
    assert text == "<|start|>user\nAdd\n\n1 2<|end|>\n<|start|>assistant\n3<|end|>" and counted == "3<|end|>"
    assert shown(encode({**bare, "input": None}, CHATTY), CHATTY)[0].startswith(
        "<|start|>user\nSay hi<|end|>"
    )


@pytest.mark.parametrize("response", ["response", "completion", "output", "answer"])
@pytest.mark.parametrize("prompt", ["prompt", "question"])
def test_a_prompt_and_its_response(prompt, response):
    text, counted = shown(encode({prompt: "a b?", response: "a b"}, CHATTY), CHATTY)
    assert text == "<|start|>user\na b?<|end|>\n<|start|>assistant\na b<|end|>" and counted == "a b<|end|>"


def test_every_turn_of_the_assistant_counts():
    chat = [{"role": "system", "content": "be"}, user("a"), assistant("b a"), user("b a"), assistant("c")]
    text, counted = shown(encode({"messages": chat}, CHATTY), CHATTY)
    assert counted == "b a<|end|>c<|end|>", "equal words of the user do not count"
    assert text.startswith("<|start|>system\nbe<|end|>\n<|start|>user\na<|end|>")
    text, counted = shown(encode({"messages": chat}, PLAIN), PLAIN)
    assert counted == "b a</s>c</s>"
    assert text == (
        "<s>be\n\n### Instruction:\na\n\n### Response:\nb a</s>\n\n"
        "### Instruction:\nb a\n\n### Response:\nc</s>"
    )
    others = [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in chat
    ]
    assert encode({"conversations": others}, CHATTY) == encode({"messages": chat}, CHATTY)


def test_what_follows_the_last_answer_is_left_out():
    chat = [user("a"), assistant("b"), user("cc")]
    assert shown(encode({"messages": chat}, CHATTY), CHATTY)[0].endswith("b<|end|>")


def test_a_prompt_of_messages_does_not_count_though_the_assistant_speaks_in_it():
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert shown(encode(row, CHATTY), CHATTY)[1] == "d<|end|>"
    assert shown(encode(row, PLAIN), PLAIN)[1] == "d</s>"


def test_a_template_that_does_not_end_a_turn_gets_the_end_token():
    tokenizer = character_tokenizer(NO_END)
    text, counted = shown(encode({"messages": [user("a"), assistant("b ")]}, tokenizer), tokenizer)
    assert text == "user: a\nassistant: b</s>" and counted.endswith("b</s>") and "a\n" not in counted


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = character_tokenizer(FORGETS)
    chat = [user("a"), assistant("why#b"), user("c"), assistant("how#d")]
    with pytest.raises(BadExample, match="leaves an answer out"):
        encode({"messages": chat}, tokenizer)
    kept = [user("a"), assistant("b"), user("c"), assistant("how#d")]
    assert shown(encode({"messages": kept}, tokenizer), tokenizer)[1] == "b<|end|>how#d<|end|>"


def test_a_template_that_opens_with_a_message_of_its_own():
    tokenizer = character_tokenizer(OPENS)
    asked = [user("a"), assistant("b a"), user("b a"), assistant("a")]
    assert shown(encode({"messages": asked}, tokenizer), tokenizer)[1] == "b a<|end|>a<|end|>"
    first = [assistant("b a"), user("b a"), assistant("a")]
    text, counted = shown(encode({"messages": first}, tokenizer), tokenizer)
    assert counted == "b a<|end|>a<|end|>" and text.startswith(
        "<|start|>system\nb a<|end|>\n<|start|>assistant"
    )
    assert encode({"messages": first}, tokenizer)["labels"][:12] == [-100] * 12


def test_a_tokenizer_without_offsets_gives_the_same():
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(CHATTY, name)

        def __call__(self, *args, **kwargs):
            return CHATTY(*args, **kwargs)

    chat = {"messages": [user("a b"), assistant("c"), user("d"), assistant("e f")]}
    assert encode(chat, Slow()) == encode(chat, CHATTY)


def test_plain_text_counts_as_a_whole():
    assert shown(encode({"text": "abc"}, CHATTY), CHATTY) == ("<s>abc</s>", "abc</s>")
    bare = character_tokenizer(bos=False)
    assert shown(encode({"text": "abc"}, bare), bare) == ("abc</s>", "abc</s>")


def test_rows_of_tokens():
    coded = encode({"input_ids": [1, 7, 8, 9], "labels": [-100, -100, 8, 9]}, None)
    assert coded == {"input_ids": [1, 7, 8, 9], "attention_mask": [1] * 4, "labels": [-100, -100, 8, 9]}
    assert encode({"input_ids": [1, 7]}, None)["labels"] == [1, 7]
    padded = {"input_ids": [0, 0, 1, 7], "labels": [-100, -100, -100, 7], "attention_mask": [0, 0, 1, 1]}
    assert encode(padded, None)["input_ids"] == [1, 7]


def test_too_long_a_row_loses_its_end_but_keeps_a_response():
    row = {"prompt": "abc", "response": "defg"}
    whole = encode(row, CHATTY)
    start = whole["labels"].index(next(i for i in whole["labels"] if i != -100))
    cut = encode(row, CHATTY, start + 1)
    assert len(cut["input_ids"]) == start + 1 and shown(cut, CHATTY)[1] == "d"
    with pytest.raises(BadExample, match=rf"prompt of {start} tokens.*max_length={start}"):
        encode(row, CHATTY, start)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": None}, "'response' is missing"),
        ({"prompt": "a", "response": " \n"}, "'response' is empty"),
        ({"prompt": None, "response": "b"}, "'prompt' is missing"),
        ({"prompt": "a", "response": 3}, "'response' holds int, not text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' holds int"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": None}, "must be a list of messages"),
        ({"messages": ["a"]}, "must be a list of messages"),
        ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "role 'bot'.*known: system"),
        ({"messages": [user("a")]}, "no turn of the assistant"),
        ({"messages": [user("a"), assistant("")]}, "'content' is empty"),
        ({"messages": [user("a"), assistant(None)]}, "'content' is missing"),
        ({"text": ""}, "'text' is empty"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token of a response"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "only the first token"),
        ({"input_ids": [1, 2], "labels": [2]}, "2 input_ids, 1 labels"),
        ({"input_ids": [1, 2], "labels": [-100, 7]}, "must be the input_ids or -100"),
    ],
)
@pytest.mark.parametrize("tokenizer", [PLAIN, CHATTY], ids=["plain", "chat"])
def test_bad_rows_say_why(row, message, tokenizer):
    with pytest.raises(BadExample, match=message):
        encode(row, tokenizer)


def test_a_template_that_refuses_a_chat():
    chat = [{"role": "system", "content": "be"}, user("a"), assistant("b")]
    with pytest.raises(BadExample, match="template refuses it: no system"):
        encode({"messages": chat}, character_tokenizer(NO_SYSTEM))


def test_no_known_columns_and_no_tokenizer():
    with pytest.raises(ValueError, match=r"columns a, b.*messages"):
        encode({"a": 1, "b": "x"}, PLAIN)
    with pytest.raises(ValueError, match="processing_class"):
        encode({"text": "abc"}, None)


def test_examples_read_batches_for_a_trainer():
    rows = [{"id": "x", "prompt": "a", "response": "bcd"}, {"id": "y", "prompt": "a", "response": None}]
    examples = Examples(
        datasets.Dataset.from_list([*rows, {"id": "z", "prompt": "aa", "response": "b"}]),
        processing_class=CHATTY,
        task="causal-lm",
    )
    good, batch, labels, bad = examples.read([0, 1, 2])
    assert good == [0, 2] and labels == [None, None] and bad == {"y": "'response' is missing"}
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    coded = [encode(examples.dataset[i], CHATTY) for i in good]
    assert {k: v.tolist() for k, v in collate(coded, 0).items()} == {k: v.tolist() for k, v in batch.items()}
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert examples.max_length == 1024 and Examples(rows, processing_class=CHATTY).max_length == 128


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "response": "b"}, True),
        ({"text": "a"}, True),
        ({"text": "a", "label": 1}, False),
        ({"input_ids": [1, 2], "labels": [1, 2]}, True),
        ({"input_ids": [1, 2], "label": 0}, False),
        ({"input_ids": [1, 2], "labels": 0}, False),
        ({"x": [0.5, 1.0]}, False),
    ],
)
def test_a_data_set_of_instructions_is_told_from_one_with_labels(row, found):
    assert Examples(datasets.Dataset.from_list([row, row])).has_instructions is found
