"""Instruction and chat rows -> tokens and labels of a causal language model: only responses count.

A format is found by its columns, in this order:

| columns | response |
|---|---|
| `messages` ({role, content}) or `conversations` ({from, value}) | every assistant turn |
| `input_ids`, and `labels` (-100 = not a response) if there are any | as labelled, or every token |
| `instruction`, `input` or `context` if there is one, and a response column | the response |
| `prompt`, `question`, `query` or `problem`, and a response column | the response |
| `text`, `sentence`, `content`, `document`, `review` | every token |

A response column is the first of `response`, `completion`, `output`, `answer`, `solution`. A prompt and its
response may be lists of messages; then the assistant's turns in the response count.

All but plain text goes through the tokenizer's chat template. A tokenizer without one gets

    [BOS]{system}

    ### Instruction:
    {user}

    ### Input:
    {input}

    ### Response:
    {response}[EOS]

(Alpaca's, without its preamble; several turns follow each other). A response ends with the token that ends a
turn, which counts: a model has to learn to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is not a response, as in transformers
MAX_LENGTH = 1024  # tokens an instruction example is cut to by default: a page and a half

CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "query", "problem")
INPUTS = ("input", "context")
RESPONSES = ("response", "completion", "output", "answer", "solution")
TEXTS = ("text", "sentence", "content", "document", "review")
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant"}


class BadExample(ValueError):
    """One example that cannot be read; `observe` sets it aside or raises it."""


@dataclass(frozen=True)
class Format:
    """Which columns hold what; `prompt`, `input` and `response` are empty where there is none."""

    kind: Literal["chat", "tokens", "instruction", "prompt", "text"]
    prompt: str = ""
    response: str = ""
    input: str = ""


def find_format(columns: Sequence[str]) -> Format | None:
    """The instruction format that `columns` show, see above; None if they show none.

    >>> find_format(["id", "instruction", "input", "output"])
    Format(kind='instruction', prompt='instruction', response='output', input='input')
    """

    def first(names: Sequence[str]) -> str:
        return next((name for name in names if name in columns), "")

    response = first(RESPONSES)
    if chat := first(CHATS):
        return Format("chat", response=chat)
    if "input_ids" in columns:
        return Format("tokens", response="labels" if "labels" in columns else "")
    if "instruction" in columns and response:
        return Format("instruction", "instruction", response, first(INPUTS))
    if response and (prompt := first(PROMPTS)):
        return Format("prompt", prompt, response)
    if text := first(TEXTS):
        return Format("text", response=text)
    return None


def encode(row: dict[str, Any], tokenizer: Any, max_length: int = MAX_LENGTH) -> dict[str, list[int]]:
    """`{"input_ids", "attention_mask", "labels"}` of one row; labels are -100 but on responses.

    A row that is too long loses its end.

    Raises:
        BadExample: a response that is missing or empty, an unknown role, no room for any response.
        ValueError: columns of no known format, or text without a tokenizer.
    """
    form = find_format(list(row))
    if form is None:
        raise ValueError(
            f"no instructions found in a row with columns {', '.join(row)}: expected messages, a prompt and "
            "a response, instruction and output, input_ids and labels, or text; rename the columns"
        )
    if form.kind == "tokens":
        ids, counts = _given_tokens(row, form)
    else:
        if tokenizer is None:
            raise ValueError("the rows hold text: give processing_class=, the model's tokenizer")
        pieces = _pieces(row, form, tokenizer)
        ids, counts = _tokens(pieces, tokenizer, templated=form.kind != "text" and _has_template(tokenizer))
    if not any(counts[1:]):
        raise BadExample("no token of a response, or only the first token of all, which nothing predicts")
    if not any(counts[1:max_length]):
        where = counts.index(True)
        raise BadExample(
            f"a prompt of {where} tokens leaves no room for a response; raise max_length={max_length}"
        )
    ids, counts = ids[:max_length], counts[:max_length]
    labels = [i if counted else IGNORED for i, counted in zip(ids, counts, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int = 0) -> dict[str, Tensor]:
    """One batch of encoded rows, padded on the right: what a Trainer or `response_losses` takes.

    >>> batch = collate([encode({"input_ids": [5, 6, 7]}, None), encode({"input_ids": [8, 9]}, None)])
    >>> batch["labels"].tolist()
    [[5, 6, 7], [8, 9, -100]]
    """
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def padding_of(tokenizer: Any) -> int:
    """The id that fills a batch: the tokenizer's, else 0 (it is masked anyway)."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def _given_tokens(row: dict, form: Format) -> tuple[list[int], list[bool]]:
    ids = np.asarray(row["input_ids"]).reshape(-1).tolist()
    given = row.get(form.response) if form.response else None
    labels = ids if given is None else np.asarray(given).reshape(-1).tolist()
    mask = row.get("attention_mask")
    mask = [1] * len(ids) if mask is None else np.asarray(mask).reshape(-1).tolist()
    if not len(ids) == len(labels) == len(mask):
        raise BadExample(
            f"{len(ids)} input_ids, {len(labels)} labels and {len(mask)} values of attention_mask "
            "must be as many"
        )
    kept = [(i, label != IGNORED) for i, label, attended in zip(ids, labels, mask, strict=True) if attended]
    if any(label not in (IGNORED, i) for i, label in zip(ids, labels, strict=True)):
        raise BadExample("labels must be the input_ids or -100: the model shifts them itself")
    return [i for i, _ in kept], [counted for _, counted in kept]


def _pieces(row: dict, form: Format, tokenizer: Any) -> list[tuple[str, bool]]:
    """[(text, whether it is a response)] of the whole example."""
    said = row[form.response]
    if form.kind == "text":
        return [(_words(said, form.response) + (tokenizer.eos_token or ""), True)]
    if form.kind == "chat":
        turns, first = _messages(said, form.response), 0
    elif isinstance(said, (list, tuple)) or isinstance(row[form.prompt], (list, tuple)):
        asked = row[form.prompt]
        turns = _messages(asked, form.prompt) if not isinstance(asked, str) else [_turn("user", asked)]
        first = len(turns)
        turns += _messages(said, form.response) if not isinstance(said, str) else [_turn("assistant", said)]
    else:
        asked, more = _words(row[form.prompt], form.prompt), row.get(form.input) if form.input else None
        if more is not None and not isinstance(more, str):
            raise BadExample(f"{form.input!r} holds {type(more).__name__}, not text")
        if more and more.strip():
            joint = "\n\n" if _has_template(tokenizer) else "\n\n### Input:\n"
            asked = f"{asked}{joint}{more}"
        turns, first = [_turn("user", asked), _turn("assistant", _words(said, form.response))], 1
    if not any(turn["role"] == "assistant" for turn in turns[first:]):
        raise BadExample("no turn of the assistant: there is no response to learn")
    write = _templated if _has_template(tokenizer) else _plain
    return write(turns, first, tokenizer)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _words(value: Any, column: str) -> str:
    if value is None:
        raise BadExample(f"{column!r} is missing")
    if not isinstance(value, str):
        raise BadExample(f"{column!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadExample(f"{column!r} is empty")
    return value


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not value or not all(isinstance(message, dict) for message in value):
        raise BadExample(f"{column!r} must be a list of messages with role and content")
    turns = []
    for message in value:
        named = message.get("role", message.get("from"))
        if named not in ROLES:
            raise BadExample(f"role {named!r} of a message is unknown; known: {', '.join(ROLES)}")
        turns.append(_turn(ROLES[named], _words(message.get("content", message.get("value")), "content")))
    return turns


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _templated(turns: list[dict], first: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """The chat as its template writes it, cut where each answer begins and ends.

    An answer begins where the chat so far with its generation prompt ends, and ends where the chat with it
    ends. A template that writes the start otherwise once more follows is searched for the answer's words.
    """

    def render(part: list[dict], ask: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # templates raise what they like, jinja's own errors among them
            raise BadExample(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    whole, pieces, done = render(turns), [], 0
    for i, turn in enumerate(turns):
        if i < first or turn["role"] != "assistant":
            continue
        before = render(turns[:i], True) if i else ""
        start = max(done, len(commonprefix([before, whole])))
        end = len(commonprefix([render(turns[: i + 1]), whole]))
        answer = turn["content"].strip()
        if not i or start != len(before) or answer not in whole[start:end]:
            found = whole.rfind(answer, start, end)
            start = found if found >= 0 else whole.find(answer, start)
            if start < 0:
                raise BadExample("the chat template leaves an answer out")
            end = max(end, start + len(answer))
        end = start + len(whole[start:end].rstrip())  # a line break after the end of a turn is no answer
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    if pieces[-1][0].endswith(answer):  # the template does not end a turn
        pieces[-1] = (pieces[-1][0] + (tokenizer.eos_token or ""), True)
    return pieces


def _plain(turns: list[dict], first: int, tokenizer: Any) -> list[tuple[str, bool]]:
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}
    pieces = []
    for i, turn in enumerate(turns):
        answers = turn["role"] == "assistant"
        ending = (tokenizer.eos_token or "") if answers else ""
        pieces.append((("\n\n" if i else "") + heads.get(turn["role"], ""), False))
        pieces.append((turn["content"] + ending, answers and i >= first))
    return pieces


def _tokens(pieces: list[tuple[str, bool]], tokenizer: Any, templated: bool) -> tuple[list[int], list[bool]]:
    """Ids, and whether each counts. The pieces are read as one text; a token belongs where it begins."""
    ids: list[int] = []
    if not templated:  # a template writes the first token itself
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is not None and list(tokenizer("")["input_ids"][:1]) == [bos]:
            ids = [bos]
    counts = [False] * len(ids)
    if not tokenizer.is_fast:  # no offsets to be had: piece by piece
        for text, counted in pieces:
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, counts = ids + part, counts + [counted] * len(part)
        return ids, counts
    text = "".join(piece for piece, _ in pieces)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.cumsum([len(piece) for piece, _ in pieces])
    begins = np.array([span[0] for span in coded["offset_mapping"]], dtype=int)
    which = np.searchsorted(ends, begins, side="right").clip(max=len(pieces) - 1)
    return ids + list(coded["input_ids"]), counts + [pieces[w][1] for w in which]
