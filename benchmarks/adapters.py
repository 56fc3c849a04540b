"""LoRA on the upper layers of an encoder, on cached activations of those below: shared by benchmarks.

One set of activations belongs to a set of features of `tasks.SETS`: the training examples that the seeds
draw, and a test set, as they leave the frozen lower layers. A tuning then costs the upper layers alone.

Letters: N examples, T tokens, D features, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import serpette
from serpette import zoo
from serpette.data.examples import Examples
from serpette.lora_gradients import lora_layers
from serpette.scorers import TSA
from serpette.tuning import trainable
from serpette.types import Signals


@dataclass(frozen=True)
class Base:
    """What of an encoder stays frozen below the LoRA; `tokens`: where texts are cut."""

    source: str
    lower: int
    test: int
    tokens: int = 0


TARGETS = ("query", "value", "q_proj", "v_proj")  # of each encoder two, what peft adapts by default
BASES = {
    "fashion-vit": Base("fashion-vit", lower=4, test=3000),
    "movies-minilm": Base("movies-minilm", lower=3, test=2000, tokens=40),
}


@dataclass
class Activations:
    """(N, T, D) float16 after the lower layers, and (N, T) bool of the tokens; None: all of them."""

    hidden: Tensor
    mask: Tensor | None

    def __getitem__(self, rows: Tensor) -> Activations:
        return Activations(self.hidden[rows], None if self.mask is None else self.mask[rows])

    def __len__(self) -> int:
        return len(self.hidden)

    def inputs(self) -> dict[str, Tensor]:
        """Of a model, cut to the longest of these examples."""
        if self.mask is None:
            return {"inputs_embeds": self.hidden.float()}
        T = int(self.mask.sum(1).max())
        return {"inputs_embeds": self.hidden[:, :T].float(), "attention_mask": self.mask[:, :T]}


@functools.lru_cache(maxsize=1)
def activations(
    name: str,
    make_ups: tuple[str, ...],
    seeds: int,
    size: int,
    pool: int | None = None,
    test: int | None = None,
) -> tuple[dict[int, int], Activations, Activations, Tensor]:
    """(place of each row of the pool, training examples, test examples, their labels); made once.

    `pool` and `test` shrink the set of features.
    """
    base = BASES[name]
    held_out = min(base.test, test or base.test)
    small = f"-of{pool}" if pool else ""
    file = tasks.cache() / f"{name}-layer{base.lower}-{seeds}x{size}{small}-{held_out}.safetensors"
    if not file.exists():
        _make(name, make_ups, seeds, size, pool, test, file)
    held = load_file(file)
    place = {int(row): i for i, row in enumerate(held["rows"])}
    parts = [Activations(held[part], held.get(f"{part}_mask")) for part in ("train", "test")]
    return place, parts[0], parts[1], held["test_labels"]


def _make(
    name: str,
    make_ups: tuple[str, ...],
    seeds: int,
    size: int,
    pool_size: int | None,
    test_size: int | None,
    file: Path,
) -> None:
    base, (source, pool_limit, test_limit, model_name, options, batch_size) = BASES[name], tasks.SETS[name]
    pool = tasks.features(name, pool_size, test_size)
    drawn = {int(r) for m in make_ups for s in range(seeds) for r in tasks.draw(pool, m, s, size=size).rows}
    order = sorted(drawn)
    train = zoo.load_dataset(source, "train", limit=pool_size or pool_limit)
    if base.tokens:  # the order of `tasks.features`
        train = train.select(np.argsort([len(t) for t in train["text"]], kind="stable"))
    train = train.select(order)
    test = zoo.load_dataset(source, "test", limit=min(base.test, test_size or test_limit))
    assert list(train["id"]) == pool.ids[order].tolist()
    image = {k: v for k, v in options.items() if k == "image_size"}
    model, processor = (
        zoo.load_model(model_name, layers=base.lower, **image),
        zoo.load_processor(model_name, **image),
    )
    tensors = {"rows": torch.tensor(order), "test_labels": torch.tensor(test["label"])}
    for part, data in (("train", train), ("test", test)):
        examples = Examples(data, processing_class=processor, max_length=base.tokens or 128)
        tensors[part] = torch.zeros(0)
        for rows in torch.arange(len(data)).split(batch_size):
            inputs = examples.read(rows.tolist())[1]
            hidden = after_layers(model, inputs).half()
            n, T, D = hidden.shape
            if not len(tensors[part]):
                tensors[part] = torch.zeros(len(data), base.tokens or T, D, dtype=torch.float16)
                if base.tokens:
                    tensors[f"{part}_mask"] = torch.zeros(len(data), base.tokens, dtype=torch.bool)
            tensors[part][rows, :T] = hidden
            if base.tokens:
                tensors[f"{part}_mask"][rows, :T] = inputs["attention_mask"].bool()
    save_file(tensors, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def after_layers(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(n, T, D): what the last layer of `model` gives, before a final norm."""
    seen: list[Tensor] = []
    layers = model.encoder.layer  # type: ignore[union-attr]

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)  # a tuple before transformers 5

    handle = layers[-1].register_forward_hook(keep)  # type: ignore[index,union-attr]
    with torch.inference_mode():
        model(**inputs)
    handle.remove()
    return seen[0]


class Upper(nn.Module):
    """The layers above the frozen ones, the norm after them and a head; activations -> logits.

    A ViT's head sees the class token beside the mean of the others, a text's the mean over its tokens.
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module | None, classifier: nn.Linear):
        super().__init__()
        self.layers, self.norm, self.classifier = layers, norm, classifier

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = inputs_embeds
        more = () if attention_mask is None else (attention_mask[:, None, None, :].bool(),)
        for layer in self.layers:
            output = layer(hidden, *more)
            hidden = output[0] if isinstance(output, tuple) else output
        if self.norm is not None:
            hidden = self.norm(hidden)
        if attention_mask is None:
            return self.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))
        weight = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * weight).sum(1) / weight.sum(1))


def upper(name: str) -> Upper:
    """A new `Upper` of the pre-trained encoder, with a head of zeros."""
    base, (_, _, _, model_name, options, _) = BASES[name], tasks.SETS[name]
    if model_name == "vit-s":
        model = zoo.load_model(model_name, **options)
        return Upper(model.dinov2.encoder.layer[base.lower :], model.dinov2.layernorm, model.classifier)
    model = zoo.load_model(model_name)
    layers = model.encoder.layer[base.lower :]
    return Upper(layers, None, nn.Linear(model.config.hidden_size, 2)).eval()


class Tuner:
    """A LoRA model that is used again and again: `reset` makes it new, `tune` trains it, `test` gives logits.

    Frozen matrices lie in bfloat16, so that autocast need not cast them at each step; LoRA factors, head
    and norms stay in float32. Dropout is off.

    Args:
        precision: `torch.bfloat16` or None for float32.
    """

    def __init__(self, name: str, rank: int = 8, alpha: float = 16, precision: torch.dtype | None = None):
        self.name, self.rank, self.precision = name, rank, precision
        self.plain = upper(name)
        inner = upper(name)
        self.model = trainable(
            inner, inner.classifier, "lora", rank=rank, alpha=alpha, target_modules=list(TARGETS)
        ).eval()
        self.layers = lora_layers(self.model)
        self.frozen = {n: m.weight.detach().clone() for n, m in self.plain.named_modules() if _is_matrix(m)}
        if precision is not None:
            for parameter in self.model.parameters():
                if parameter.ndim == 2 and not parameter.requires_grad:
                    parameter.data = parameter.data.to(precision)
            self.plain.to(precision)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def head(self) -> nn.Linear:
        """The head that trains."""
        return self.model.base_model.model.classifier.modules_to_save["default"]  # type: ignore[union-attr]

    def reset(self, seed: int) -> nn.Module:
        """The model with a fresh LoRA (B = 0) and a fresh head."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers:
                nn.init.kaiming_uniform_(layer.A.weight, a=5**0.5)  # type: ignore[arg-type]
                layer.B.weight.zero_()  # type: ignore[operator]
            self.head.weight.normal_(0.0, 0.02)
            self.head.bias.zero_()
        return self.model

    def autocast(self) -> ExitStack:
        """To the precision; and plain attention, whose backward pass is quicker on so few tokens."""
        stack = ExitStack()
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.precision is not None:
            stack.enter_context(torch.autocast("cpu", self.precision))
        return stack

    def score(
        self, examples: Activations, labels: Tensor, scorers: list, seed: int, batch_size: int = 32
    ) -> serpette.Scores:
        """Of a fresh adapter: what a user gets from `serpette.score`."""
        self.reset(seed)
        with sdpa_kernel(SDPBackend.MATH):
            return serpette.score(
                self.model,
                Rows(examples, labels),
                scorers,
                data_collator=collate,
                batch_size=batch_size,
                precision=self.precision,
                progress=False,
                seed=seed,
            )

    def tune(
        self,
        examples: Activations,
        labels: Tensor,
        seed: int,
        *,
        epochs: int,
        learning_rate: float,
        batch_size: int = 16,
        steps: int | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        """AdamW without decay, the learning rate falls linearly to 0; `steps` instead of `epochs`."""
        self.reset(seed)
        steps = steps or epochs * -(-len(examples) // batch_size)
        optimizer = torch.optim.AdamW(self.trained, learning_rate, weight_decay=0.0, fused=True)
        generator, step = torch.Generator().manual_seed(seed), 0
        while step < steps:
            for rows in torch.randperm(len(examples), generator=generator).split(batch_size):
                if step == steps:
                    break
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
                with self.autocast():
                    logits = self.model(**examples[rows].inputs())
                loss = cross_entropy(logits.float(), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1

    def test(self, examples: Activations, batch_size: int = 100) -> Tensor:
        """(M, C) logits of the tuned model, its adapter merged."""
        with torch.no_grad():
            modules = dict(self.plain.named_modules())
            for layer in self.layers:
                name = layer.name.removeprefix("base_model.model.")
                merged = self.frozen[name] + layer.scale * layer.B.weight @ layer.A.weight  # type: ignore[operator]
                modules[name].weight.copy_(merged)  # type: ignore[union-attr]
            self.plain.classifier.load_state_dict(self.head.state_dict())
        order = torch.arange(len(examples))
        if examples.mask is not None:  # texts of a length side by side
            order = examples.mask.sum(1).argsort()
        logits = torch.empty(len(examples), self.head.out_features)
        with torch.inference_mode():
            for rows in order.split(batch_size):
                inputs = examples[rows].inputs()
                if self.precision is not None:
                    inputs["inputs_embeds"] = inputs["inputs_embeds"].to(self.precision)
                logits[rows] = self.plain(**inputs).float()
        return logits


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


class Rows(torch.utils.data.Dataset):
    """Activations and labels as a data set for `serpette.score`; give it `collate`, too."""

    def __init__(self, examples: Activations, labels: Tensor):
        self.examples, self.targets = examples, labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = {"inputs_embeds": self.examples.hidden[row], "labels": self.targets[row]}
        if self.examples.mask is not None:
            item["attention_mask"] = self.examples.mask[row]
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of `Rows`, cut to its longest example."""
    masks = [item["attention_mask"] for item in items if "attention_mask" in item]
    hidden = torch.stack([item["inputs_embeds"] for item in items])
    return Activations(hidden, torch.stack(masks) if masks else None).inputs()


@dataclass(frozen=True)
class LogitsReading:
    """The logits (n, C) of the model on which a `TSA` with the same warm-up scores."""

    head: nn.Module
    warmup_steps: int | None = None
    warmup_learning_rate: float = 1e-3
    epochs: int = 1

    def reader(self, layers: Any) -> LogitsReader:
        return LogitsReader(self.head)


class LogitsReader:
    """Takes what the head gave last when a batch's backward pass begins."""

    sample = 0

    def __init__(self, head: nn.Module):
        self._handle = head.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._last = output.detach().float()

    def begin(self, *about: Any) -> None:
        self._logits = self._last

    def layer(self, seen: Any) -> None:
        """Nothing: the layers' gradients are not needed."""

    def batch(self) -> Tensor:
        return self._logits

    def finish(self, reduce: Any = None) -> None:
        """Nothing to end."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, held: dict[str, Tensor]) -> None:
        """Nothing to load."""


class WarmLoss:
    """Cross-entropy of each example under the warmed model: the control of TSA; high = hard."""

    name = "loss"
    needs = frozenset({"labels"})
    tasks = frozenset({"classification"})

    def __init__(self, tuner: Tuner, like: TSA):
        reading = like.reading
        self.reading = LogitsReading(
            tuner.head, reading.warmup_steps, reading.warmup_learning_rate, reading.epochs
        )

    def __call__(self, signals: Signals) -> Tensor:
        logits = signals.reading(self.reading, self.name)
        return cross_entropy(logits, signals.require("labels", self.name), reduction="none").double()
