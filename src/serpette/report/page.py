"""From a Run to the HTML page: tables as rows of text, figures as SVG, the rest in the template."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import figures, svg, weights
from .answer import (
    answer,
    cost_words,
    count,
    file_size,
    find_full,
    find_lora,
    find_random,
    find_subject,
    interval,
    is_random,
    noise_lines,
    percent,
    seconds,
    shown,
)
from .histograms import score_histograms
from .predicted import predicted_chart, predicted_rows, predicted_words
from .run import Run, cost_of, is_noise, number
from .story import find_story
from .template import fill

OPEN_CLASSES = 12  # galleries shown at once; those of the other classes are folded away


def render(run: Run) -> str:
    """The whole page as text."""
    with svg.style():
        drawn: dict[str, Any] = {
            "scatter": figures.accuracy_against_cost(run),
            "parameters": figures.accuracy_against_parameters(run),
            "split": figures.cost_split(run),
            "mmd": figures.subset_distance(run),
            "histograms": score_histograms(run),
            "stopping": figures.stopping_curves(run),
            "layer_maps": weights.layer_maps(run),
            "predicted_chart": predicted_chart(run),
            "sensitivity": weights.sensitivity_curves(run),
        }
    gallery, rows, (verdict, figures_of_answer) = galleries(run), arm_rows(run), answer(run)
    foretold = predicted_words(run, find_story(run) or find_subject(run))
    return fill(
        "report.html.j2",
        run.result,
        drawn,
        verdict=verdict,
        answer=" ".join(filter(None, (figures_of_answer, foretold))),
        predicted=predicted_rows(run),
        models=model_rows(run),
        measured=any(run.value(arm) is not None for arm in run.arms),
        noise=noise_lines(run),
        facts=facts(run),
        arms=rows,
        has_lora=any(row["to_lora"] for row in rows),
        cut=run.chosen,
        weights=weights.weights_table(run),
        weights_words=weights.speed_words(run),
        tunings_differ=run.tunings_differ,
        full_name=(find_full(run) or {}).get("name", "full") if run.tunings_differ else "full",
        cost_words=cost_words(run),
        on_cpu=(run.result.get("hardware") or {}).get("device") == "cpu",
        metric=run.metric,
        unit=_unit(run),
        compared=sum(len(items) for _, items in noise_lines(run)),
        lower_is_better=run.lower_is_better,
        seeds=run.seeds,
        test_examples=run.data.get("test_examples"),
        classification=run.classification,
        gallery=gallery[:OPEN_CLASSES],
        more_gallery=gallery[OPEN_CLASSES:],
        classes=class_table(run),
        set_aside=[s for s in run.data.get("set_aside") or [] if isinstance(s, dict)],
        recipe=_yaml(run.result.get("recipe")),
        scorers=scorer_rows(run),
        seed=", ".join(map(str, run.seeds)) or run.result.get("seed"),
    )


def facts(run: Run) -> list[str]:
    """A line of small facts under the answer: model, data, classes, seed."""
    model, data = run.result.get("model") or {}, run.data
    found = []
    if model.get("name"):
        size = f" ({count(model['parameters'])} parameters)" if number(model.get("parameters")) else ""
        found.append(f"{model['name']}{size}")
    if data.get("train"):
        found.append(str(data["train"]))
    if number(data.get("train_examples")):
        test = f" and {data['test_examples']:,} test" if number(data.get("test_examples")) else ""
        found.append(f"{data['train_examples']:,} training{test} examples")
    if len(run.class_names) > 1:
        found.append(f"{len(run.class_names)} classes")
    if run.seeds:
        found.append(f"{len(run.seeds)} seeds, {run.seeds[0]} to {run.seeds[-1]}")
    elif run.result.get("seed") is not None:
        found.append(f"seed {run.result['seed']}")
    return found


def _unit(run: Run) -> str:
    if run.lower_is_better:
        return "nats of the mean loss of a response (less is better; 0.01 is about 1 % of perplexity)"
    return f"points of {run.metric}" if run.classification else run.metric


def _ends(run: Run, arm: dict) -> str:
    ends = run.interval(arm)
    return "" if ends is None else f"({shown(run, ends[0]).removesuffix(' %')} to {shown(run, ends[1])})"


def arm_rows(run: Run) -> list[dict[str, Any]]:
    """One row an arm, each cell as text."""
    full, index = find_full(run), figures.arm_index(run)
    whole = cost_of(full) if full else None
    total = (full or {}).get("examples") or run.data.get("train_examples")
    rows = []
    for arm in run.arms:
        cost, kept = cost_of(arm), arm.get("examples")
        flops = [number(value) for value in (arm.get("flops") or {}).values()]
        peak = number(arm.get("peak_bytes"))
        chance = None if arm is full or is_random(arm) else find_random(run, arm)
        share = run.trainable_share(arm)
        rows.append({
            "name": arm["name"],
            "how": _how(arm, run.tunings_differ),
            "index": index[arm["name"]],
            "kept": "–" if kept is None else f"{kept:,.0f}",
            "kept_share": f"{100 * kept / total:.0f} %" if kept is not None and total else "",
            "value": shown(run, run.value(arm)),
            "ends": _ends(run, arm),
            "trainable": count(arm["trainable_parameters"]) if share is not None else "–",
            "trainable_share": "" if share is None else percent(share),
            "to_full": _against(run, arm, find_full(run, arm)),
            "to_lora": _against(run, arm, find_lora(run, arm)),
            "to_chance": _against(run, arm, chance),
            "cost": seconds(cost),
            "cost_share": f"{100 * cost / whole:.0f} %" if cost is not None and whole else "",
            "steps": f"{arm['steps']:,.0f}" if number(arm.get("steps")) is not None else "–",
            "epochs": arm.get("epochs"),
            "flops": count(sum(f or 0 for f in flops)) if flops else "–",
            "peak": file_size(peak) if peak else "–",
        })  # fmt: skip
    return rows


def _against(run: Run, arm: dict, to: dict | None) -> dict[str, Any] | None:
    comparison = run.comparison(arm["name"], to["name"]) if to and to is not arm else None
    if comparison is None:
        return None
    both = interval(run, comparison)
    difference, _, ends = both.partition(" ")
    return {"difference": difference, "ends": ends, "noise": is_noise(comparison)}


def _how(arm: dict, tuned: bool) -> str:
    parts = [str(arm[key]) for key in ("scorer", "select") if arm.get(key)]
    text = " + ".join(dict.fromkeys(parts))
    if number(arm.get("gamma")) is not None:
        text += f", gamma {arm['gamma']:g}"
    if arm.get("per_class") and number(arm.get("keep")) != 1.0:
        text += ", balanced" if text else "balanced"
    words = _tuning_words(arm) if tuned else ""
    cut = f"weights: {weights.how(arm)}" if arm.get("weights") else ""
    return "; ".join(part for part in (text, words, cut) if part)


def _tuning_words(arm: dict) -> str:
    """`rows, fraction 0.05, importance taylor`: the method, and what differs from the recipe's settings."""
    changed = {k.replace("_", " "): v for k, v in (arm.get("tune") or {}).items() if k != "method" and v}
    words = [
        k if v is True else f"{k} {v:g}" if number(v) is not None else f"{k} {v}" for k, v in changed.items()
    ]
    return ", ".join([str(arm.get("method") or ""), *words]).strip(", ")


def class_table(run: Run) -> dict[str, Any] | None:
    """Accuracy and kept examples of each class by arm; None in a regression or without figures."""
    arms = [a for a in run.arms if a.get("accuracy_by_class") or a.get("kept_by_class")]
    if not run.classification or not arms:
        return None
    full, labels = find_full(run), run.scores.get("label")
    totals = list((full or {}).get("kept_by_class") or [])
    if not totals and labels is not None and labels.dtype.kind in "iu":
        totals = np.bincount(labels[labels >= 0]).tolist()
    rows = []
    for c, name in enumerate(run.class_names):
        cells = []
        for arm in arms:
            right = _at(arm.get("accuracy_by_class"), c)
            kept, total = _at(arm.get("kept_by_class"), c), _at(totals, c)
            share = f" ({100 * kept / total:.0f} %)" if kept is not None and total else ""
            cells.append((f"{100 * right:.1f}" if right is not None else "–",
                          f"{kept:,.0f}{share}" if kept is not None else "–"))  # fmt: skip
        rows.append((name, cells))
    return {"arms": [(a["name"], figures.arm_index(run)[a["name"]]) for a in arms], "rows": rows}


def galleries(run: Run) -> list[dict[str, Any]]:
    """By class: a row of the easiest and a row of the hardest examples, as images or texts."""
    names, groups = run.class_names, {}
    for item in run.gallery:
        label = item.get("class")
        if not isinstance(label, (int, str, float)) and label is not None:
            continue
        image, text = item.get("png"), item.get("text")
        if isinstance(image, str) and not re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", image):
            image = None  # not base64: never put into an address
        if not image and not isinstance(text, str):
            continue
        known = isinstance(label, int) and 0 <= label < len(names)
        title = names[label] if known else "all examples" if label is None else str(label)  # type: ignore[index]
        group = groups.setdefault(title, {"title": title, "easiest": [], "hardest": []})
        score = number(item.get("score"))
        entry = {"id": str(item.get("id")), "score": "unknown" if score is None else f"{score:.3g}"}
        kind = "hardest" if item.get("kind") == "hardest" else "easiest"
        group[kind].append({**entry, "png": image, "text": text})
    if names:
        order = {name: i for i, name in enumerate(names)}
        return sorted(groups.values(), key=lambda group: order.get(group["title"], len(order)))
    return list(groups.values())


def model_rows(run: Run) -> list[tuple[str, int, str, str]]:
    """`(arm, index, folder, its files)` of each saved model; the folder is within that of the run."""
    index, rows = figures.arm_index(run), []
    for arm in run.arms:
        files = (arm.get("export") or arm.get("weights") or {}).get("files") or {}
        if files:
            sizes = [f"{name} {file_size(size)}" for name, size in files.items() if number(size) is not None]
            rows.append((arm["name"], index[arm["name"]], str(arm.get("model") or ""), ", ".join(sizes)))
    return rows


def scorer_rows(run: Run) -> list[dict[str, str]]:
    """What each scorer did: its time, its passes, the points of its path."""
    rows = []
    for name, entry in (run.result.get("scorers") or {}).items():
        entry = entry if isinstance(entry, dict) else {}
        points = ", ".join(f"{p:g}" for p in map(number, entry.get("points") or []) if p is not None)
        rows.append({
            "name": name,
            "seconds": seconds(number(entry.get("seconds"))),
            "passes": str(entry.get("passes", "–")),
            "flops": count(entry["flops"]) if number(entry.get("flops")) else "–",
            "points": points or "–",
        })  # fmt: skip
    return rows


def _yaml(recipe: Any) -> str | None:
    import yaml

    if not recipe:
        return None
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=88)


def _at(values: Any, i: int) -> float | None:
    return number(values[i]) if values is not None and i < len(values) else None
