"""Tables and pictures of docs/when-does-pruning-pay.md, all from the committed results of the benchmarks.

python benchmarks/when_pays.py
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme import fill, interval, table

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGE = DOCS / "when-does-pruning-pay.md"

TASKS = {
    "fashion-vit/clean": "ViT, Fashion-MNIST",
    "movies/clean": "MiniLM, movie snippets",
    "fashion-effnet/clean": "EfficientNet, Fashion-MNIST",
    "fashion-vit/wrong_labels": "ViT, a fifth of the labels wrong",
    "movies/wrong_labels": "MiniLM, a fifth of the labels wrong",
    "fashion-effnet/wrong_labels": "EfficientNet, a fifth of the labels wrong",
    "fashion-vit/long_tail": "ViT, long tail (50 to 1)",
}
TUNED = {
    "fashion-vit/clean": "ViT",
    "movies-minilm/clean": "MiniLM",
    "fashion-vit/wrong_labels": "ViT, a fifth of the labels wrong",
    "movies-minilm/wrong_labels": "MiniLM, a fifth of the labels wrong",
}
MODELS = {
    "fashion-vit": "ViT, Fashion-MNIST",
    "movies-minilm": "MiniLM, movie snippets",
    "fashion-effnet": "EfficientNet, Fashion-MNIST",
}
CHOICES = {
    "equal_quotas": "at random, equal quotas",
    "herding+top_hard": "herding",
    "optimisation_complexity+flex_rand": "S_Opt + FlexRand",
    "dlc+flex_rand": "DLC + FlexRand",
    "unmasked_loss+flex_rand": "unmasked loss + FlexRand, the control of DLC",
    "random": "at random, not stratified",
    "k_center+top_hard": "k-center",
    "learning_confidence+top_hard": "learning confidence, the highest",
    "el2n+top_hard": "EL2N, the hardest",
    "unmasked_loss+top_hard": "unmasked loss, the hardest",
}
DETECTORS = {
    "dlc": "DLC",
    "unmasked_loss": "unmasked loss, the control of DLC",
    "el2n": "EL2N",
    "forgetting": "forgetting",
    "entropy": "entropy",
    "herding": "herding",
}
ROWS = {
    "full": "full",
    "head": "head",
    "lora": "LoRA",
    "rows/random": "rows, at random",
    "rows/magnitude": "rows, by magnitude",
    "rows/taylor": "rows, by Taylor",
    "rows/taylor/dependencies": "rows, Taylor with dependencies",
}
STEPS = {
    "lora_dropout": "LoRA with dropout",
    "dora": "DoRA",
    "shira": "SHiRA",
    "rows": "rows",
    "live": "rows, `live` kernel",
    "columns": "columns",
    "full": "full",
}
STRUCTURED = {
    "structured/lora_prune@0.5": "LoRAPrune",
    "structured/taylor_once@0.5": "Taylor, cut once before",
    "structured/map_lora@0.5": "magnitude",
    "structured/rap@0.5": "at random",
}
IMPORTANCES = {
    "original_gradient": "the weights' gradients",
    "lora_prune": "LoRAPrune",
    "map_lora": "magnitude",
}
MEMORY = {
    "lora,r=64,dropout=0.1": "LoRA, dropout 0.1",
    "lora,r=64": "LoRA",
    "dora,r=64": "DoRA",
    "rows,r=128": "rows",
    "columns,r=128": "columns",
    "rows,r=128,recompute": "rows, norms and gates computed again",
    "rows,r=128,freeze_attention": "rows, attention frozen",
    "lora,r=64,checkpointing": "LoRA, checkpointing",
    "rows,r=128,checkpointing": "rows, checkpointing",
    "columns,r=128,checkpointing": "columns, checkpointing",
}
INK, MAIN, SECOND, THIRD, GREY = "#222222", "#0b6e4f", "#c0562f", "#3b5b92", "#999999"


def result(benchmark: str) -> dict[str, Any]:
    return json.loads((HERE / benchmark / "result.json").read_text(encoding="utf-8"))


def cells() -> dict[tuple[str, float, str], list[float]]:
    """(task, keep, choice) -> difference to a stratified random choice: mean, low, high."""
    with (HERE / "dlc_table1" / "rows.csv").open(encoding="utf-8") as file:
        return {
            (row["task"], float(row["keep"]), row["arm"]): [
                float(row[f"vs_stratified{end}"]) for end in ("", "_low", "_high")
            ]
            for row in csv.DictReader(file)
        }


def minus(found: Sequence[float]) -> list[float]:
    mean, low, high = found
    return [-mean, -high, -low]


def plain(found: Sequence[float]) -> str:
    """`81.8 [81.5, 82.1]`."""
    return f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"


def parts() -> dict[str, str]:
    """The text between each pair of marks of the page."""
    return data() | rows() | weights() | memory()


def data() -> dict[str, str]:
    heads, tuned, speed = result("dlc_table1"), result("loprune_table"), result("dlc_speed")
    found, keeps = cells(), (0.05, 0.1, 0.3, 0.5, 0.7)

    def line(task: str, arm: str, sign: int = 1) -> list[str]:
        cell = [found.get((task, keep, arm)) for keep in keeps]
        return [interval(minus(c) if sign < 0 else c) if c else "" for c in cell]

    share = [[name, *line(task, "no_pruning", -1)] for task, name in TASKS.items()]
    of = {(row["task"], row["keep"], row["arm"]): row for row in tuned["rows"]}
    tuned_keeps = sorted({keep for _, keep, arm in of if arm == "stratified_random"} - {1.0})

    def tuned_line(task: str, arm: str, key: str) -> list[str]:
        return [interval(of.get((task, keep, arm), {}).get(key)) for keep in tuned_keeps]

    summary = {row["arm"]: row for row in heads["summary"]}
    lora = {(row["keep"], row["arm"]): row for row in heads["lora"]["rows"]}
    lora_keeps = sorted({keep for keep, _ in lora} - {1.0})
    lora_arms = {"herding+top_hard": "herding", "dlc+flex_rand": "DLC + FlexRand"}
    lora_arms |= {"forgetting+flex_rand": "forgetting + FlexRand"}
    lora_arms |= {"learning_confidence+flex_rand": "learning confidence + FlexRand"}
    auc = {f"{TASKS[task].split(',')[0]}, head": found for task, found in heads["detection_auc"].items()} | {
        f"{TUNED[task].split(',')[0]}, LoRA": scores["detection_auc"]
        for task, scores in tuned["scores"].items()
        if scores["detection_auc"]
    }
    one_shot = speed["parts"]["one_shot"]["seconds"]
    spent_on = {"dlc": "DLC, five models", "search": "its search for gamma", "lora": "one epoch with LoRA"}
    spent_on["full"] = "one epoch of all weights"
    epoch = one_shot["lora"]["processor"]
    costs = [
        [how, f"{seconds:.1f}", f"{seconds / epoch:.2f}"]
        for part, how in spent_on.items()
        for seconds in [one_shot[part]["processor"]]
    ]
    spent = {"stratified_random": "at random, stratified", "tsa+flex_rand": "TSA + FlexRand"}
    spent |= {"dlc+flex_rand": "DLC + FlexRand", "unmasked_loss+flex_rand": "unmasked loss + FlexRand"}
    return {
        "share": table(["kept", *(f"{keep:.0%}" for keep in keeps)], share),
        "share-tuned": table(
            ["kept", *(f"{keep:.0%}" for keep in tuned_keeps)],
            [[name, *tuned_line(task, "stratified_random", "vs_no_pruning")] for task, name in TUNED.items()],
        ),
        "choices": table(
            ["choice", "mean difference", "cells above", "cells below"],
            [
                [name, interval(row["vs_stratified"]), f"{row['above']} of {row['cells']}", row["below"]]
                for arm, name in CHOICES.items()
                for row in [summary[arm]]
            ],
        ),
        "choices-lora": table(
            ["ViT, 1,000 images", *(f"{keep:.0%} kept" for keep in lora_keeps)],
            [
                [name, *(interval(lora[keep, arm]["vs_stratified"]) for keep in lora_keeps)]
                for arm, name in lora_arms.items()
            ],
        ),
        "choices-tsa": table(
            ["TSA, 500 examples", *(f"{keep:.0%} kept" for keep in tuned_keeps)],
            [
                [f"{name}: {how}", *tuned_line(task, arm, "vs_stratified")]
                for task, name in TUNED.items()
                for arm, how in (("tsa+top_hard/global", "the highest"), ("tsa+flex_rand", "FlexRand"))
            ],
        ),
        "labels": table(
            ["score", *auc],
            [
                [name, *(f"{found[key]:.2f}" if key in found else "" for found in auc.values())]
                for key, name in DETECTORS.items()
            ],
        ),
        "labels-choices": table(
            ["kept", *(f"{keep:.0%}" for keep in keeps)],
            [
                [f"{name.split(',')[0]}: {how}", *line(task, arm)]
                for task, name in TASKS.items()
                if "wrong" in task
                for arm, how in (("herding+top_hard", "herding"), ("dlc+flex_rand", "DLC + FlexRand"))
            ],
        ),
        "tail": table(
            ["kept", *(f"{keep:.0%}" for keep in keeps)],
            [
                [how, *line("fashion-vit/long_tail", arm)]
                for arm, how in (
                    ("equal_quotas", "at random, equal quotas"),
                    ("herding+top_hard/equal", "herding, equal quotas"),
                    ("herding+top_hard", "herding, proportional"),
                    ("dlc+flex_rand/equal", "DLC + FlexRand, equal quotas"),
                    ("dlc+flex_rand", "DLC + FlexRand, proportional"),
                    ("no_pruning", "everything"),
                )
            ],
        ),
        "cost": table(["ViT, 1,000 images", "processor seconds", "epochs of LoRA"], costs),
        "cost-tuned": table(
            ["half of 500 examples", *(f"{name}, seconds" for name in list(TUNED.values())[:2])],
            [
                [
                    how,
                    *(
                        f"{of[task, 0.5, arm]['seconds']:.1f} of {of[task, 1.0, 'no_pruning']['seconds']:.1f}"
                        for task in list(TUNED)[:2]
                    ),
                ]
                for arm, how in spent.items()
            ],
        ),
        "data-count": (
            f"{heads['comparisons']:,} comparisons of a head on frozen features ({heads['seeds']} seeds; by "
            f"chance alone {heads['expected_by_chance']:.0f} intervals would lie above 0), "
            f"{heads['lora']['comparisons']} with LoRA on 1,000 images and {tuned['comparisons']} on 500 "
            f"examples ({tuned['settings']['seeds']} seeds; of these {tuned['above_stratified']} lie above a "
            f"stratified random choice and {tuned['below_stratified']} below)."
        ),
    }


def rows() -> dict[str, str]:
    tuned, speed = result("spsft_table2"), result("spsft_speed")["parts"]["model"]["over_lora"]
    of = {(row["task"], row["arm"]): row for row in tuned["rows"]}
    lines = [
        [
            how,
            *(
                f"{of[task, arm]['accuracy']:.1f}"
                + (
                    f" ({interval(of[task, arm]['vs_random_rows'])})"
                    if "vs_random_rows" in of[task, arm]
                    else ""
                )
                for task in MODELS
            ),
        ]
        for arm, how in ROWS.items()
    ]
    return {
        "rows": table(["what trains", *MODELS.values()], lines),
        "rows-lora": table(
            ["to LoRA", *MODELS.values()],
            [
                [how, *(interval(of[task, arm]["vs_lora"]) for task in MODELS)]
                for arm, how in ROWS.items()
                if arm != "lora"
            ],
        ),
        "rows-time": table(
            ["a step over LoRA's", *speed],
            [
                [how, *(_ratio(speed[model][arm]["processor"]) for model in speed)]
                for arm, how in STEPS.items()
            ],
        ),
        "rows-count": (
            f"{tuned['comparisons_with_random_rows']} choices of rows are compared with random rows "
            f"({tuned['settings']['seeds']} seeds): {tuned['above_random_rows']} are above, "
            f"{tuned['below_random_rows']} below."
        ),
    }


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['least']:.2f}, {found['most']:.2f}]"


def weights() -> dict[str, str]:
    at, speed, whole = result("loraprune_figure3"), result("shrink_speed"), result("loraprune_table")
    strategies, steps = (
        result("loraprune_strategies"),
        result("loraprune_speed")["parts"]["model"]["over_lora"],
    )
    unpruned = {(row["model"], row["arm"]): row for row in whole["rows"]}
    by = {(row["model"], row["arm"]): row for row in at["rows"]}
    models, sparsities = list(MODELS)[:2], (0.5, 0.8, 0.9, 0.95)
    after = {(row["model"], row["arm"]): row for row in strategies["rows"]}
    ways = {
        "lora_prune@0.5": "LoRAPrune while LoRA tunes",
        "then/lora_prune@0.5": "after tuning, LoRAPrune and tuning again",
        "obs@0.5": "after tuning all weights, OBS at once",
    }
    return {
        "sparsity": table(
            ["cut", *(f"{s:.0%}" for s in (0, *sparsities))],
            [
                [
                    f"{MODELS[model].split(',')[0]}: {how}",
                    plain([unpruned[model, "lora"]["accuracy"], *unpruned[model, "lora"]["interval"]]),
                    *(
                        plain([row["accuracy"], *row["interval"]])
                        for s in sparsities
                        for row in [by[model, f"{arm}@{s:g}"]]
                    ),
                ]
                for model in models
                for arm, how in IMPORTANCES.items()
            ],
        ),  # fmt: skip
        "structured": table(
            ["half of heads and channels, to LoRA unpruned", *(MODELS[model] for model in models)],
            [
                [how, *(interval(unpruned[model, arm]["vs_lora"]) for model in models)]
                for arm, how in STRUCTURED.items()
            ],
        ),
        "strategies": table(
            ["half of the weights, accuracy (to the first line)", *(MODELS[model] for model in models)],
            [
                [
                    how,
                    *(
                        f"{row['accuracy']:.1f}"
                        + (f" ({interval(row['vs_joint'])})" if "vs_joint" in row else "")
                        for model in models
                        for row in [after[model, arm]]
                    ),
                ]
                for arm, how in ways.items()
            ],
        ),
        "speed": table(
            ["half of heads and channels, shrunk", "batch of 1", "8", "32", "parameters", "file"],
            [
                [
                    name,
                    *(_faster(found["speed"].get(size)) for size in ("1", "8", "32")),
                    *(
                        f"{found['after'][what] / found['before'][what]:.2f}"
                        for what in ("parameters", "file_bytes")
                    ),
                ]
                for name, found in speed["models"].items()
            ],
        ),
        "training": table(
            ["a training step over plain LoRA's", *steps],
            [
                [how, *(_ratio(steps[model][arm]["processor"]) for model in steps)]
                for arm, how in (
                    ("ste", "single weights masked"),
                    ("structured, masked", "heads and channels masked"),
                    ("structured, shrunk", "heads and channels taken out"),
                )
            ],
        ),
        "weights-count": (
            f"{whole['comparisons_with_magnitude']} prunings are compared with magnitude at the same "
            f"sparsity ({whole['settings']['seeds']} seeds): {whole['above_magnitude']} are above, "
            f"{whole['below_magnitude']} below."
        ),
    }


def _faster(found: dict[str, Any] | None) -> str:
    """How many times as fast, with the interval; of the ratio of the times."""
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{1 / found['time_ratio']:.2f} [{1 / high:.2f}, {1 / low:.2f}]"


def memory() -> dict[str, str]:
    models = {
        k: v["rows"] for k, v in result("spsft_memory")["parts"]["llama"].items() if k.startswith("llama")
    }
    steps = result("loraprune_speed")["parts"]["model"]["over_lora"]

    return {
        "memory": table(
            ["GiB over the weights", *models],
            [
                [name, *(f"{model[how]['over_weights_gib']:.1f}" for model in models.values())]
                for how, name in MEMORY.items()
            ],
        ),
        "memory-cut": table(
            ["kept for the backward pass, over plain LoRA's", *steps],
            [
                [
                    how,
                    *(f"{steps[m]['saved_bytes'][arm] / steps[m]['saved_bytes']['lora']:.2f}" for m in steps),
                ]
                for arm, how in (("ste", "masked"), ("structured, shrunk", "heads and channels taken out"))
            ],
        ),
    }


def draw() -> None:
    """The pictures of the page, as small SVG files that are the same each time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "serpette",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    _draw_choices(plt)
    _draw_sparsity(plt)
    _draw_memory(plt)


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / "figures" / name, metadata={"Date": None})


def _draw_choices(plt: Any) -> None:
    found, keeps = cells(), (0.05, 0.1, 0.3, 0.5, 0.7)
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
    make_ups = {"clean": "clean", "wrong_labels": "a fifth of the labels wrong", "long_tail": "long tail"}
    arms = {"herding+top_hard": ("herding", MAIN), "dlc+flex_rand": ("DLC + FlexRand", SECOND)}
    arms["equal_quotas"] = ("equal quotas, at random", THIRD)
    for ax, (make_up, title) in zip(axes, make_ups.items(), strict=True):
        for arm, (name, color) in arms.items():
            means, lows, highs = zip(*(found[f"fashion-vit/{make_up}", k, arm] for k in keeps), strict=True)
            ax.plot([100 * k for k in keeps], means, "o-", ms=3, color=color, label=name)
            ax.fill_between([100 * k for k in keeps], lows, highs, color=color, alpha=0.15, lw=0)
        ax.axhline(0, color=INK, lw=0.8)
        ax.set(title=title, xlabel="% kept")
    axes[0].set_ylabel("points over stratified random")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, "choices.svg")


def _draw_sparsity(plt: Any) -> None:
    at = result("loraprune_figure3")["rows"]
    unpruned = {r["model"]: r["accuracy"] for r in result("loraprune_table")["rows"] if r["arm"] == "lora"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8))
    for ax, model in zip(axes, list(MODELS)[:2], strict=True):
        for (arm, name), color in zip(IMPORTANCES.items(), (MAIN, SECOND, THIRD), strict=True):
            rows = [r for r in at if r["model"] == model and r["arm"].startswith(f"{arm}@")]
            cut = [100 * float(r["arm"].partition("@")[2]) for r in rows]
            ax.plot(cut, [r["accuracy"] for r in rows], "o-", ms=3, color=color, label=name)
            ax.fill_between(
                cut, *zip(*(r["interval"] for r in rows), strict=True), color=color, alpha=0.15, lw=0
            )
        ax.axhline(unpruned[model], color=GREY, lw=0.8, ls="--", label="LoRA, unpruned")
        ax.set(title=MODELS[model], xlabel="% of the weights cut")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, "sparsity.svg")


def _draw_memory(plt: Any) -> None:
    held = result("spsft_memory")["parts"]["llama"]["llama-2-7b"]["rows"]
    shown = {
        name: held[how]["over_weights_gib"] for how, name in MEMORY.items() if "over_weights_gib" in held[how]
    }
    figure, ax = plt.subplots(figsize=(9, 2.8))
    ax.barh(list(shown), list(shown.values()), color=MAIN)
    for place, value in enumerate(shown.values()):
        ax.text(value + 0.3, place, f"{value:.1f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="GiB over the weights at the peak of a step, Llama-2-7B, 2,048 tokens, float32")
    _save(figure, "memory.svg")


if __name__ == "__main__":
    fill(PAGE, **parts())
    draw()
