"""Histograms of the scores, class by class: the counts, which `result.json` may hold, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .run import Run
from .svg import ARMS, THEME, figure, inline, plain

PANELS = 12  # classes in the histogram; more would be too small to read on a phone


def histogram_of(
    scores: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Counts of the scores in equal bins between their 0.5 and 99.5 % quantiles.

    What lies outside is in the end bins. With more than 12 classes those of the lowest and the highest
    medians, and the others together.

    Args:
        scores: (N,) numbers; those that are not finite are left out.
        labels: (N,) classes; None in a regression.
        class_names: by class; a class without a name is called by its number.

    Returns:
        `{"edges": [...], "counts": [...], "groups": [{"name", "examples", "median", "counts"}]}`; None where
        no score is finite.

    Example:
        >>> found = histogram_of(np.array([0.0, 1.0, 2.0]), np.array([0, 0, 1]), ["cat", "dog"])
        >>> [(group["name"], group["median"], sum(group["counts"])) for group in found["groups"]]
        [('cat', 0.5, 2), ('dog', 2.0, 1)]
    """
    finite = np.isfinite(scores)
    scores = scores[finite]
    if not len(scores):
        return None
    groups = [("all examples", scores)]
    if labels is not None:
        groups = _groups(scores, labels[finite], class_names)
    low, high = np.quantile(scores, (0.005, 0.995))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    edges = np.linspace(low, high, 25 if len(groups) > 1 else 41)
    return {
        "edges": edges.tolist(),
        "counts": _counts(scores, edges),
        "groups": [
            {
                "name": name,
                "examples": len(values),
                "median": float(np.median(values)),
                "counts": _counts(values, edges),
            }
            for name, values in groups
        ],
    }


def _groups(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    classes = [int(c) for c in np.unique(labels)]
    groups = [(names[c] if 0 <= c < len(names) else str(c), scores[labels == c]) for c in classes]
    if len(groups) <= PANELS:
        return groups
    # easiest and hardest classes by their median, and all the others in one panel
    groups.sort(key=lambda group: float(np.median(group[1])))
    low, high = groups[: PANELS // 2], groups[-(PANELS - 1 - PANELS // 2) :]
    rest = groups[len(low) : len(groups) - len(high)]
    return [*low, (f"{len(rest)} others", np.concatenate([s for _, s in rest])), *high]


def _counts(values: np.ndarray, edges: np.ndarray) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def score_histograms(run: Run) -> list[tuple[str, str]]:
    """`(scorer, svg)` for each scorer with a path: small panels by class, or one in a regression."""
    entries, found = run.result.get("scorers") or {}, {}
    for scorer in run.path_scorers:
        labels = run.scores.get("label") if run.classification else None
        found[scorer] = histogram_of(run.scores[f"score:{scorer}"].astype(float), labels, run.class_names)
    found |= {name: entry["histogram"] for name, entry in entries.items() if (entry or {}).get("histogram")}
    return [(name, _draw(run, f"hist{i}", name, h)) for i, (name, h) in enumerate(found.items()) if h]


def _draw(run: Run, name: str, scorer: str, histogram: dict[str, Any]) -> str:
    from .figures import arm_index, few_ticks, mark

    groups, edges = histogram["groups"], histogram["edges"]
    columns = min(2 if len(groups) % 2 == 0 and len(groups) % 3 else 3, len(groups))  # fills its last row
    rows = -(-len(groups) // columns)
    fig, axes = figure(
        190 if rows == 1 else 40 + 92 * rows, rows, columns, sharex=True, sharey=True, squeeze=False
    )
    whole = _shares(histogram["counts"])
    arm = next((arm for arm in run.arms if arm.get("scorer") == scorer), None)
    color = mark(arm_index(run)[arm["name"]])[0] if arm else ARMS[2]
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    for ax, group in zip(axes.flat, groups, strict=False):
        ax.stairs(_shares(group["counts"]), edges, fill=True, color=color, lw=0)
        if len(groups) > 1:
            ax.stairs(whole, edges, color=THEME["hist"], lw=1.1)
        middle = min(max(group["median"], edges[0]), edges[-1])
        ax.plot(middle, 0, "^", ms=6, color=THEME["ink"], clip_on=False, zorder=4)
        ax.set_title(plain(group["name"], 19 if columns == 3 else 40), loc="left", pad=3, color=THEME["ink"])
        ax.set_yticks([])
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(few_ticks(3 if columns == 3 else 5))
    for column in range(columns):  # the last panel of a column carries the axis, also above an empty corner
        last = [r for r in range(rows) if r * columns + column < len(groups)][-1]
        axes[last, column].tick_params(labelbottom=True)
    fig.supxlabel(f"score of {plain(scorer, 40)} (right: harder)", fontsize=11, color=THEME["soft"])
    said = "; ".join(f"{plain(group['name'], 30)} {group['median']:.3g}" for group in groups)
    return inline(fig, name, f"Histograms of the score {plain(scorer)}. Medians: {said}")


def _shares(counts: list[int]) -> np.ndarray:
    return np.array(counts) / max(sum(counts), 1)
