"""The answer where weights were pruned: examples, tuning and weights, cost and gain, as one story."""

from __future__ import annotations

from typing import Any

from .answer import (
    SAVED,
    cost_of_arm,
    cost_words,
    count,
    file_size,
    find_full,
    lost,
    seconds,
    sign_of,
)
from .run import Run, cost_of, keeps_all, number
from .weights import faster, find_dense, share

Arm = dict[str, Any]
SMALLER = 0.98  # less is a rounding of widths, and no smaller model


def find_story(run: Run) -> Arm | None:
    """The first arm whose weights are pruned by a score; those on a part of the data before the others."""
    scored = [a for a in run.cut if (a.get("prune") or {}).get("importance") not in ("random", "magnitude")]
    arms = scored or run.cut
    return next((arm for arm in arms if not keeps_all(arm)), arms[0] if arms else None)


def story(run: Run, arm: Arm) -> tuple[str, str]:
    """The verdict and its figures."""
    full, dense = find_full(run, arm), find_dense(run, arm)
    pairs = [(full, full["name"])] if full else []
    if dense and dense is not full:
        pairs.append((dense, f"{dense['name']} without the cut"))
    return f"{_verdict(run, arm, full)}:", f"{_done(run, arm, full)}. {_left(arm)}. {lost(run, arm, pairs)}"


def _verdict(run: Run, arm: Arm, full: Arm | None) -> str:
    mine, whole = cost_of(arm), cost_of(full) if full else None
    cheaper = mine is not None and whole is not None and mine < SAVED * whole
    gains = ["smaller"] if _share(arm, "parameters") < SMALLER else []
    gains += ["faster"] if gains and faster(arm) else []
    if gains:
        made = f"the model {' and '.join(gains)}"
    elif _packed(arm) < SMALLER:
        made = "the packed file smaller, and nothing faster"
    else:
        return "Pruning the weights made nothing smaller"
    what = "Pruning" if keeps_all(arm) else "Pruning examples and weights"
    price = {"worse": ", at a price", "better": ", and gained"}.get(sign_of(run, arm, full) or "", "")
    return f"{what} made {'the tuning cheaper and ' if cheaper else ''}{made}{price}"


def _done(run: Run, arm: Arm, full: Arm | None) -> str:
    kept, total = number(arm.get("examples")), number((full or run.data).get("examples"))
    total = total or number(run.data.get("train_examples"))
    data = "all examples" if kept is None else f"{kept:,.0f} examples"
    if kept is not None and total and kept < total:
        by = " by ".join(str(arm[key]) for key in ("select", "scorer") if arm.get(key))
        data = f"{kept:,.0f} of {total:,.0f} examples ({share(kept / total)}, {by})"
    trained, part = number(arm.get("trainable_parameters")), run.trainable_share(arm)
    tuned = "" if trained is None or part is None else f", {count(trained)} weights of it ({share(part)})"
    still = arm.get("method") == "none"
    cut = f"cut {share(arm['weights']['sparsity'])} of {_kind(arm)} {'at once' if still else 'meanwhile'}"
    cost = f"{cost_of_arm(arm)} of {cost_words(run)}"
    mine, whole = cost_of(arm), cost_of(full) if full else None
    against = ""
    if full and mine and whole:
        against = f", against {seconds(whole)} for {full['name']} ({share(mine / whole)})"
    done = "trained nothing" if still else f"tuned {arm.get('method')} on {data}{tuned}"
    return f"{arm['name']} {done}, {cut}, and cost {cost}{against}"


def _kind(arm: Arm) -> str:
    prune = arm.get("prune") or {}
    where = {"attention": " in attention", "ffn": " in the FFN"}.get(prune.get("targets", ""), "")
    if prune.get("pattern") == "structured":
        return {"": "the heads and channels", " in attention": "the heads"}.get(where, "the channels")
    return f"the linear layers' weights{where}"


def _left(arm: Arm) -> str:
    found, after = arm["weights"], arm["weights"]["after"]
    parts = []
    if _share(arm, "parameters") < SMALLER:
        parts.append(f"{count(after['parameters'])} parameters ({share(_share(arm, 'parameters'))})")
        if number(after.get("file_bytes")):
            parts.append(f"a file of {file_size(after['file_bytes'])} ({share(_share(arm, 'file_bytes'))})")
    elif number(after.get("packed_bytes")):
        parts.append(f"a packed file of {file_size(after['packed_bytes'])} ({share(_packed(arm))})")
    if not parts:
        return "What is left is as large as before"
    text = f"What is left: {', '.join(parts)}"
    quick = faster(arm)
    if quick and "file of" in text and _share(arm, "parameters") < SMALLER:
        return f"{text}, measured {quick[0]:.2f} times as fast in batches of {quick[1]}"
    measured = bool(found.get("timings"))
    return f"{text}; it is not faster" if measured else f"{text}; its speed was not measured"


def _share(arm: Arm, key: str) -> float:
    before, after = (number(arm["weights"][side].get(key)) for side in ("before", "after"))
    return after / before if after is not None and before else 1.0


def _packed(arm: Arm) -> float:
    before = number(arm["weights"]["before"].get("file_bytes"))
    after = number(arm["weights"]["after"].get("packed_bytes"))
    return after / before if after is not None and before else 1.0
