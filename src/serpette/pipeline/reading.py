"""What a run does with the training examples where no arm needs a score or embeddings: it only reads them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from ..cost import measure
from ..data.examples import Examples
from ..data.observe import observe
from ..data.scores import Scores
from ..scorers import registry as scorers
from ..types import Task


def read(
    model: nn.Module,
    dataset: Any,
    *,
    task: Task | None = None,
    batch_size: int = 32,
    seed: int = 0,
    out: str | Path | None = None,
    on_bad: str = "set_aside",
    progress: bool = True,
    **reading: Any,
) -> Scores:
    """What a choice at random needs, as `Scores` of `random`: ids, labels, and the examples set aside.

    The examples are read, but not given to the model: there are no embeddings.

    Args:
        model: what the inputs and the labels must fit.
        **reading: of `serpette.data.examples.Examples`.
        task, batch_size, seed, out, on_bad, progress: as for `serpette.score`.

    Raises:
        ValueError: as `serpette.score`.

    Example:
        >>> import torch
        >>> from serpette.zoo import tiny
        >>> rows = [{"pixel_values": torch.rand(3, 32, 32), "label": i % 3} for i in range(6)]
        >>> scores = read(tiny("vit"), rows, progress=False)
        >>> scores.signals.labels.tolist(), scores.signals.embeddings
        ([0, 1, 2, 0, 1, 2], None)
    """
    method, examples = scorers.make("random"), Examples(dataset, **reading)
    with measure(next((p.device for p in model.parameters()), "cpu")) as cost:
        found = observe(
            model,
            examples,
            task=task,
            batch_size=batch_size,
            folder=None if out is None else Path(out) / "read",
            on_bad=on_bad,
            seed=seed,
            progress=progress,
            run_model=False,
        )
        start = time.perf_counter()
        values = method(found.signals)
        seconds = found.seconds | {method.name: time.perf_counter() - start}
    scores = Scores(
        signals=found.signals,
        values={method.name: values},
        rows=found.rows,
        total=len(examples),
        cost={"seconds": seconds, "passes": found.passes, "peak_bytes": cost.peak_bytes},
        set_aside=found.set_aside,
        methods={method.name: method},
        settings={"batch_size": batch_size, "max_length": examples.max_length},
    )
    if out is not None:
        scores.save(out)
    return scores
