"""The easiest and the hardest examples, for the report."""

from __future__ import annotations

import base64
import io
from typing import Any

from ..data.examples import decode_image, is_image
from .job import Job

GALLERY = 6  # pictures of each class, easiest and hardest
THUMBNAIL = 64  # px


def gallery(job: Job) -> list[dict[str, Any]]:
    """The easiest and the hardest examples of each class, by the first scorer along a path."""
    name = next((n for n, m in job.methods.items() if hasattr(m, "path")), None)
    if name is None or job.task != "classification":
        return []
    values, signals = job.scores.values[name], job.scores.signals
    assert signals.labels is not None
    entries = []
    for c in range(len(job.classes)):
        mine = (signals.labels == c).nonzero()[:, 0]
        order = mine[values[mine].argsort()]
        for kind, picks in (("easiest", order[:GALLERY]), ("hardest", order.flip(0)[:GALLERY])):
            for i in picks.tolist():
                shown = _show(job, int(job.scores.rows[i]))
                if shown:
                    entries.append(
                        {"class": c, "kind": kind, "id": str(signals.ids[i]), "score": float(values[i])}
                        | shown
                    )
    return entries


def _show(job: Job, row: int) -> dict[str, str]:
    item = job.train[row]
    for value in item.values() if isinstance(item, dict) else ():
        if is_image(value):
            picture = decode_image(value)
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            return {"png": base64.b64encode(buffer.getvalue()).decode()}
    text = item.get("text") if isinstance(item, dict) else None
    return {"text": text[:300]} if text else {}
