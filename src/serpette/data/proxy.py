"""Training signals for the scorers that need them: what a proxy says while it learns the examples.

The paper behind each score trains or fine-tunes the whole model first. `Probe` trains a linear head
on the frozen features instead: seconds, and the same for every order of the examples.
`FineTune` is the paper's way: a run of the stock Trainer over all examples, whose logits are
recorded as each example is visited.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..tuning import train, trainable
from ..types import Signals
from .examples import Examples
from .features import call, find_head

TRAINING_SIGNALS = frozenset({"logits", "early_logits", "history"})


@dataclass(frozen=True)
class Probe:
    """A linear head on standardised frozen features, trained by SGD with momentum.

    Args:
        epochs: T visits to each example; 10 is where a head on features has settled.
        early: epochs before `early_logits` are taken (EL2N and GraNd are early-training scores).
        seeds: S heads for `early_logits`; the papers average 10, DLC's comparison 3.
        learning_rate, batch_size: of SGD with momentum 0.9. In a regression the targets are standardised and
            the step is a tenth, since the squared error curves more and has no bound.
    """

    epochs: int = 10
    early: int = 2
    seeds: int = 5
    learning_rate: float = 1.0
    batch_size: int = 64

    def train(self, signals: Signals) -> Signals:
        """`signals` with `logits` (N, C), `early_logits` (S, N, C) and `history` (T, N, C)."""
        embeddings, labels = signals.require("embeddings", "probe"), signals.require("labels", "probe")
        order = torch.from_numpy(
            np.argsort(signals.ids, kind="stable")
        )  # so that the given order is no matter
        back = order.argsort()
        z_ND = embeddings[order].double()
        std_D = z_ND.std(0, correction=0)
        z_ND = (z_ND - z_ND.mean(0)) / torch.where(std_D > 1e-12, std_D, torch.ones_like(std_D))
        z_ND = z_ND / z_ND.shape[1] ** 0.5  # unit mean square norm: one learning rate fits every D
        y_N, mean, scale = labels[order], 0.0, 1.0
        if not signals.num_classes:  # one outlier must not throw the squared error off
            z_ND = z_ND / (z_ND.norm(dim=1, keepdim=True) / 2).clamp(min=1)
            mean, scale = float(y_N.mean()), float(y_N.std(correction=0)) or 1.0
            y_N = (y_N - mean) / scale
        z_ND = z_ND.float()
        history, logits, early = None, None, []
        for seed in range(self.seeds):
            visits, after_early, final = self._fit(
                z_ND, y_N, signals.num_classes, signals.seed * 1000 + seed, seed == 0
            )
            early.append(after_early[back] * scale + mean)
            if seed == 0:
                history, logits = visits[:, back] * scale + mean, final[back] * scale + mean
        return replace(signals, logits=logits, early_logits=torch.stack(early), history=history)

    def _fit(self, z_ND: Tensor, y_N: Tensor, num_classes: int, seed: int, whole: bool):
        generator = torch.Generator().manual_seed(seed)
        N, D = z_ND.shape
        outputs = max(1, num_classes)
        head = nn.Linear(D, outputs)
        nn.init.zeros_(head.bias)
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        step = self.learning_rate if num_classes else self.learning_rate / 10
        optimizer = torch.optim.SGD(head.parameters(), step, momentum=0.9)
        epochs = self.epochs if whole else self.early
        visits = torch.empty(epochs, N, outputs)
        early = torch.empty(0)
        with torch.enable_grad():
            for epoch in range(epochs):
                for rows in torch.randperm(N, generator=generator).split(self.batch_size):
                    output = head(z_ND[rows])
                    visits[epoch, rows] = output.detach()
                    optimizer.zero_grad()
                    loss_of(output, y_N[rows], num_classes).backward()
                    optimizer.step()
                if epoch + 1 == min(self.early, epochs):
                    early = head(z_ND).detach()
        return visits, early, head(z_ND).detach()


@dataclass(frozen=True)
class FineTune:
    """The whole model fine-tuned on all examples by the stock Trainer: what one-shot scores cost.

    Args:
        epochs: T visits to each example.
        early: `early_logits` are those of the visit after so many epochs (S = 1).
        learning_rate, batch_size: of AdamW.
        lora_rank: tune a LoRA of that rank on all linear layers; 0 tunes every weight.
    """

    epochs: int = 3
    early: int = 1
    learning_rate: float = 5e-4
    batch_size: int = 32
    lora_rank: int = 8

    def train(self, signals: Signals, model: nn.Module, examples: Examples, rows: Tensor) -> Signals:
        """`signals` of the dataset's `rows`, with `logits`, `early_logits` and `history` of the run.

        Raises:
            ValueError: in more than one process, where each would see a part of the run.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "proxy='finetune' runs in one process; score with it in one, or use proxy='probe' in several"
            )
        model = copy.deepcopy(model)
        method = "lora" if self.lora_rank else "full"
        model = trainable(model, find_head(model), method, rank=self.lora_rank, alpha=2 * self.lora_rank)
        order = torch.from_numpy(np.argsort(signals.ids, kind="stable"))  # the given order is no matter
        history = record_history(model, examples, rows[order], signals.subset(order), self)[
            :, order.argsort()
        ]
        early = history[min(self.early, len(history) - 1)]
        return replace(signals, logits=history[-1], early_logits=early[None], history=history)


def loss_of(output: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean cross-entropy; mean squared error in a regression (`num_classes` = 0)."""
    return cross_entropy(output, labels) if num_classes else mse_loss(output.squeeze(-1), labels)


def record_history(
    model: nn.Module, examples: Examples, rows: Tensor, signals: Signals, run: FineTune
) -> Tensor:
    """Logits (T, N, C) of each example at each of its visits during a run of the Trainer."""
    labels = signals.require("labels", "record_history")
    history = torch.zeros(run.epochs, len(rows), max(1, signals.num_classes))
    visit = torch.zeros(len(rows), dtype=torch.long)

    def collate(positions: list[int]) -> dict[str, Tensor]:
        _, inputs, _, _ = examples.read(rows[positions].tolist())
        return {**inputs, "labels": labels[positions], "positions": torch.tensor(positions)}

    class Recorder(nn.Module):  # the model, with the examples' positions taken off its inputs
        accepts_loss_kwargs = False  # else the Trainer adds its own count of items to the inputs

        def __init__(self):
            super().__init__()
            self.tuned = model

        def forward(self, labels: Tensor, positions: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
            output = call(self.tuned, inputs)
            logits = output if torch.is_tensor(output) else output.logits
            seen = positions.cpu()
            history[visit[seen], seen] = logits.detach().float().cpu()
            visit[seen] += 1
            return {"loss": loss_of(logits, labels, signals.num_classes), "logits": logits}

    train(
        Recorder(),
        len(rows),
        collate,
        epochs=run.epochs,
        batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        seed=signals.seed,
    )
    return history
