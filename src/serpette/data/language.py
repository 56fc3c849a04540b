r"""Losses of a causal language model on the responses of its examples, and its mean hidden state.

    loss_n = - 1/|R_n| sum over t in R_n of log p( x_t | x_1 .. x_(t-1) ),   R_n = { t > 1: label_nt != -100 }

Letters: n examples of a batch, T tokens, k response tokens of the batch, V words, D features.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .instructions import IGNORED

LOGITS = 2**24  # values at a time: 64 MiB in float32


def is_causal_lm(model: nn.Module) -> bool:
    """A transformers model that predicts the next token, with a LoRA on it or without."""
    name = type(_inner(model)).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(model, "config")


def response_losses(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss in nats of each example's response tokens (n,), and how many those are (n,).

    Keeps the graph, so that gradients can be taken; wrap it in `torch.inference_mode()` if not. The logits
    of prompt tokens are never made and the others in pieces of 64 MiB, in float32 whatever the model is.
    The perplexity of a whole set is `exp((losses * counts).sum() / counts.sum())`.

    Args:
        model: a causal language model of transformers, in evaluation mode unless dropout is wanted.
        inputs: a batch of `Examples.read(...)[1]` or of a collator: `input_ids` (n, T), `attention_mask`
            (n, T) if anything is padded (on either side), `labels` (n, T) with -100 where no response is;
            without labels every token is one.

    Raises:
        ValueError: an example without a response token that something predicts.

    Example:
        >>> from serpette.zoo import tiny
        >>> losses, counts = response_losses(tiny("llama"), {"input_ids": torch.tensor([[1, 5, 9, 2]])})
        >>> losses.shape, counts.tolist()
        (torch.Size([1]), [3])
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return _losses(model, inputs, hidden_states(model, inputs))


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (n, T, D): what the head of the vocabulary reads."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    body, mask = _inner(model).base_model, given.get("attention_mask")
    if mask is not None and "position_ids" not in given and not bool(mask[:, 0].all()):
        if "position_ids" in inspect.signature(body.forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # padded on the left
    return body(**given, use_cache=False).last_hidden_state


def answers_alone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The response tokens of each example without its prompt, after the model's first token: a batch.

    The first token (`bos_token_id`, else `eos_token_id`) is not counted: what is counted are the same
    tokens as with the prompt.

    Raises:
        ValueError: examples without a prompt (plain text), a model with neither token.
    """
    config: Any = _inner(model).config
    start = next((i for i in (config.bos_token_id, config.eos_token_id) if i is not None), None)
    start = start[0] if isinstance(start, (list, tuple)) else start
    if start is None:
        raise ValueError(
            "the model's config has neither bos_token_id nor eos_token_id, so nothing can stand in the place "
            "of the prompt; set one"
        )
    counted = _counted(inputs)
    lengths = counted.sum(1).tolist()
    attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1).tolist()
    if all(tokens - length <= 1 for tokens, length in zip(attended, lengths, strict=True)):
        raise ValueError(
            "the examples are plain text without prompts, and a loss with the prompt over one without has no "
            "meaning; give rows with a prompt and a response, or choose another scorer"
        )
    ids = inputs["input_ids"].new_full((len(lengths), 1 + max(lengths)), start)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        ids[row, 1 : 1 + length] = labels[row, 1 : 1 + length] = inputs["input_ids"][row, counted[row]]
        mask[row, : 1 + length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class LanguageReader:
    """Runs a causal language model on a batch; stands where `serpette.data.features.Reader` does for others.

    Raises:
        ValueError: another kind of model, or `features`, which have no meaning here.
    """

    num_classes = 0

    def __init__(self, model: nn.Module, features: Any = None):
        if not is_causal_lm(model):
            raise ValueError(
                f"task='causal-lm' needs a causal language model, and {type(model).__name__} is none; "
                "open it with AutoModelForCausalLM, or open_model(name, task='causal-lm')"
            )
        if features is not None:
            raise ValueError(
                f"features={features!r} has no meaning in a causal language model, whose features are its "
                "mean last hidden state; leave it out"
            )
        self.model = model
        self.head = _head(model)
        self.device = next(model.parameters()).device

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean last hidden state over attended tokens (n, D); response losses and their counts (n, 2)."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        hidden_nTD = hidden_states(self.model, inputs)
        weight_nT1 = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None].float()
        mean_nD = (hidden_nTD.float() * weight_nT1).sum(1) / weight_nT1.sum(1)
        losses_n2 = torch.stack(_losses(self.model, inputs, hidden_nTD), 1)
        return mean_nD.cpu(), losses_n2.cpu()

    def answer_losses(self, inputs: dict[str, Tensor]) -> Tensor:
        """(n,) loss of each example's response without its prompt: a second, shorter forward pass."""
        return response_losses(self.model, answers_alone(self.model, inputs))[0].cpu()

    def check(self) -> None:
        """Compares logits made here with the model's own, which may do more after its head.

        Raises:
            ValueError: they differ.
        """
        words = self.head.weight.shape[0]
        inputs = {"input_ids": torch.arange(4, device=self.device)[None] % words}
        with torch.no_grad():
            logits = _adjustment(_inner(self.model).config)(self.head(hidden_states(self.model, inputs)))
            own = self.model(**inputs).logits
        near = {"rtol": 1e-2, "atol": 1e-2, "equal_nan": True}  # bfloat16 has three digits
        if own.shape != logits.shape or not torch.allclose(own.float(), logits.float(), **near):
            raise ValueError(
                f"{type(_inner(self.model)).__name__} makes its logits in a way that is not known here "
                "(a prompt of peft's, or a step after its head), so its losses cannot be had"
            )


def _losses(model: nn.Module, inputs: dict[str, Tensor], hidden_nTD: Tensor) -> tuple[Tensor, Tensor]:
    counted_nT = _counted(inputs)[:, 1:]
    if "attention_mask" in inputs:  # nothing predicts the first token, wherever padding puts it
        counted_nT = counted_nT & (inputs["attention_mask"][:, :-1] != 0)
    counts_n = counted_nT.sum(1)
    if not bool(counts_n.all()):
        raise ValueError(
            f"example {int((counts_n == 0).nonzero()[0, 0])} of the batch has no response token that is "
            "predicted; labels must hold the input_ids of the response, and -100 elsewhere"
        )
    targets_k = inputs["input_ids"][:, 1:][counted_nT]
    hidden_kD = hidden_nTD[:, :-1][counted_nT]
    head, adjust = _head(model), _adjustment(_inner(model).config)
    piece = max(1, LOGITS // head.weight.shape[0])
    losses_k = torch.cat(
        [
            cross_entropy(adjust(head(h_D).float()), target, reduction="none")
            for h_D, target in zip(hidden_kD.split(piece), targets_k.split(piece), strict=True)
        ]
    )
    return torch.stack([losses.mean() for losses in losses_k.split(counts_n.tolist())]), counts_n


def _counted(inputs: dict[str, Tensor]) -> Tensor:
    """(n, T) bool: attended tokens of a response."""
    counted = inputs.get("labels", inputs["input_ids"]) != IGNORED
    mask = inputs.get("attention_mask")
    return counted if mask is None else counted & (mask != 0)


def _inner(model: nn.Module) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


def _head(model: nn.Module) -> Any:
    return _inner(model).get_output_embeddings()


def _adjustment(config: Any):
    """What a few architectures do to their logits after the head, by the fields of their configuration."""
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap:
        return lambda logits: cap * torch.tanh(logits / cap)  # Gemma 2 and 3
    if scale:
        return lambda logits: logits * scale  # Cohere
    if divisor:
        return lambda logits: logits / divisor  # Granite
    return lambda logits: logits
