"""Short tunings: what a head on frozen features does not tell.

For a causal language model, which no head stands for, they are the learning curve: the model is tuned with
the user's settings on small random subsets of growing size, several times, and each time judged on examples
that were held out. For other tasks one short tuning tells how far the tuned model is behind a head that is
fitted to the end, for want of steps: a few examples are soon learned by a head, not by twenty steps of LoRA.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arms import predict
from ..data.examples import Examples
from ..evaluate import paired_difference
from ..files import write_json
from ..recipe import TuneSpec
from ..scoring import tuned_head
from ..tuning import set_seeds, train, trainable
from ..types import Signals, uniform_of
from .curve import Curve, fit
from .head import choose_penalty, fit_head, folds_of, whitened
from .probes import each_of

SHARES = (0.25, 0.5, 1.0)  # of the largest pilot
REPEATS = 3
HELD = 64  # examples that judge a language model
JUDGES = 256  # else


def sizes_for(seconds: float, example_seconds: float, epochs: int, total: int, batch_size: int) -> list[int]:
    """Examples of each pilot, so that all together take about `seconds`; at least a batch, at most a quarter.

    Args:
        example_seconds: of one example in a training step.
    """
    largest = int(seconds / (REPEATS * sum(SHARES) * epochs * example_seconds))
    largest = min(max(largest, 4 * batch_size), max(total // 4, 4))
    return sorted({max(1, round(share * largest)) for share in SHARES})


def learning_curve(
    model: Any,
    examples: Examples | Some,
    sizes: list[int],
    tune: TuneSpec,
    *,
    batch_size: int = 8,
    seed: int = 0,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Curve, np.ndarray]:
    """The curve of quality (minus the mean response loss, in hundredths of a nat), and (P, REPEATS) values.

    Args:
        model: without adapters; left as it is.
        examples: that can all be read, of which subsets are drawn by `seed`; HELD, at most a fifth, judge.
        folder: where finished pilots are kept, so that a killed run goes on.
    """
    held = min(HELD, max(1, len(examples) // 5))
    values = np.empty((len(sizes), REPEATS))
    for repeat in range(REPEATS):
        order = uniform_of(examples.ids, 1000 * seed + repeat).argsort().tolist()
        judges, pool = order[:held], order[held:]
        for place, size in enumerate(sizes):
            file = folder / f"{repeat}-{size}.json" if folder else None
            if file is not None and file.exists():
                values[place, repeat] = json.loads(file.read_text(encoding="utf-8"))["value"]
                continue
            say(f"a pilot on {size} examples, {repeat * len(sizes) + place + 1} of {values.size}")
            losses = tuned_outputs(
                model, examples, pool[:size], judges, tune, batch_size=batch_size, seed=seed + repeat
            )
            values[place, repeat] = -100 * float(losses[:, 0].double().mean())
            if file is not None:
                write_json(file, {"value": values[place, repeat]})
    return fit(np.array(sizes, float), values, ceiling=0.0), values


def beside_a_head(
    model: Any,
    examples: Examples,
    rows: torch.Tensor,
    signals: Signals,
    size: int,
    tune: TuneSpec,
    *,
    metric: str,
    groups: torch.Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """The fields of `Behind`: a short tuning and a head, both on `size` examples and judged by JUDGES others.

    Args:
        rows: (N,) places of `signals` in `examples`.
        signals: of N examples, with embeddings and labels.
        groups: (N,) of duplicates, which are not on both sides.
    """
    labels, C = signals.require("labels", "advise"), signals.num_classes
    fold_N = folds_of(signals.ids, labels if C else None, len(signals) // size, seed, groups)
    pool, mixed = (fold_N == 0).nonzero()[:, 0], uniform_of(signals.ids, seed).argsort()
    judges = mixed[fold_N[mixed] != 0][:JUDGES]
    x_ND = whitened(signals.require("embeddings", "advise"))
    penalty = choose_penalty(
        x_ND[pool],
        labels[pool],
        C,
        signals.ids[pool.numpy()],
        groups=None if groups is None else groups[pool],
    )
    W, b = fit_head(x_ND[pool], labels[pool], C, penalty)
    outputs = tuned_outputs(
        model,
        examples,
        rows[pool].tolist(),
        rows[judges].tolist(),
        tune,
        labels=labels[pool],
        batch_size=batch_size,
        seed=seed,
    )
    head, tuned, trivial = (
        each_of(output, labels[judges], metric)
        for output in (x_ND[judges] @ W + b, outputs, _trivial(labels[pool], C).expand(len(judges), -1))
    )
    gap, low, high = paired_difference(head, tuned)
    return {
        "points": 100 * gap,
        "error": 100 * (high - low) / 3.92,
        "examples": len(pool),
        "trivial": 100 * float(trivial.mean()),
        "learned": paired_difference(tuned, trivial)[1] > 0,
    }


def _trivial(labels: torch.Tensor, C: int) -> torch.Tensor:
    """(1, C) or (1, 1) output that knows no input: the commonest class, or the mean."""
    if not C:
        return labels.float().mean().reshape(1, 1)
    return torch.bincount(labels, minlength=C)[None] / len(labels)


def tuned_outputs(
    model: Any,
    examples: Examples | Some,
    rows: list[int],
    judges: list[int],
    tune: TuneSpec,
    *,
    labels: torch.Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """Outputs of `judges`, as `arms.predict` gives them, by a copy of `model` tuned on `rows`.

    Args:
        labels: (k,) of `rows`; None in a causal language model.
    """
    set_seeds(seed)
    network = copy.deepcopy(model)
    network = trainable(network, tuned_head(network), **tune.adapter(seed))

    def collate(picks: list[int]) -> dict[str, torch.Tensor]:
        inputs = examples.read([rows[p] for p in picks])[1]
        return inputs if labels is None else {**inputs, "labels": labels[picks]}

    train(network, len(rows), collate, seed=seed, **tune.training)
    return predict(network, Some(examples, judges), batch_size)[0]  # type: ignore[arg-type]


class Some:
    """Some rows of `Examples`, numbered anew, as `predict` and `learning_curve` read them."""

    def __init__(self, examples: Examples | Some, rows: list[int]):
        self.examples, self.rows, self.task = examples, rows, examples.task
        self.ids = examples.ids[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, places: Sequence[int]) -> Any:
        return self.examples.read([self.rows[p] for p in places])
