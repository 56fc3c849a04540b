"""What the training showed of each example, gathered batch by batch and over the processes.

Letters: N examples, n of a batch, T scored epochs, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .visits import Visit


class Tally:
    """Losses, labels, logits and values of N examples in T epochs; on the CPU, filled when asked.

    Args:
        with_logits: keep them, N T C numbers.
        device: over which several processes add up.
    """

    def __init__(self, epochs: int, examples: int, with_logits: bool, device: torch.device):
        self.with_logits, self.device = with_logits, device
        self.values_TN = torch.full((epochs, examples), torch.nan, dtype=torch.float64)
        self.losses_TN = torch.full((epochs, examples), torch.nan)
        self.seen_TN = torch.zeros(epochs, examples, dtype=torch.bool)
        self.labels_N: Tensor | None = None
        self.logits_TNC: Tensor | None = None
        self._pending: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    def add(self, turn: int, visit: Visit) -> None:
        """One batch of scored epoch `turn`; nothing is moved off the device yet."""
        found = {"losses": visit.losses}
        if visit.task != "causal-lm":
            found["labels"] = visit.labels.detach()
            if self.with_logits:
                found["logits"] = visit.logits.float()
        fresh = visit.part.fresh  # repeats count once
        self._pending.append((turn, visit.part.rows.where(fresh, -1), found))

    def add_values(self, values_n: Tensor) -> None:
        """Of the batch that was added last."""
        self._pending[-1][2]["values"] = values_n

    def flush(self) -> None:
        """Puts in place what is pending."""
        for turn, rows_n, found in self._pending:
            fresh = rows_n >= 0
            rows = rows_n[fresh]
            cpu = {name: value.cpu()[fresh] for name, value in found.items()}
            self.seen_TN[turn, rows] = True
            self.losses_TN[turn, rows] = cpu["losses"].float()
            if "values" in cpu:
                self.values_TN[turn, rows] = cpu["values"].double()
            if "labels" in cpu:
                labels = cpu["labels"].reshape(len(rows))
                if self.labels_N is None:
                    self.labels_N = torch.zeros(self.seen_TN.shape[1], dtype=labels.dtype)
                self.labels_N[rows] = labels
            if "logits" in cpu:
                if self.logits_TNC is None:
                    self.logits_TNC = torch.zeros(*self.seen_TN.shape, cpu["logits"].shape[1])
                self.logits_TNC[turn, rows] = cpu["logits"]
        self._pending = []

    def merge(self) -> None:
        """Every process gets what the others saw."""
        seen_N = self.seen_TN.any(0)
        whole = [(self.values_TN, self.seen_TN), (self.losses_TN, self.seen_TN)]
        whole += [] if self.labels_N is None else [(self.labels_N, seen_N)]
        whole += [] if self.logits_TNC is None else [(self.logits_TNC, self.seen_TN[..., None])]
        for held, mine in whole:
            held.copy_(self._sum(held.where(mine, held.new_zeros(()))))
        self.seen_TN = self._sum(self.seen_TN.int()).bool()

    def _sum(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        torch.distributed.all_reduce(value)
        return value.cpu()

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` goes on."""
        self.flush()
        held = {"values": self.values_TN, "losses": self.losses_TN, "seen": self.seen_TN}
        more = {"labels": self.labels_N, "logits": self.logits_TNC}
        return held | {name: value for name, value in more.items() if value is not None}

    def load(self, held: dict[str, Tensor]) -> None:
        """Takes over the state of another."""
        self.values_TN, self.losses_TN, self.seen_TN = held["values"], held["losses"], held["seen"]
        self.labels_N, self.logits_TNC = held.get("labels"), held.get("logits")
