"""What became of pruned weights: a table, the sparsity of each layer and how sensitive it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .answer import count, file_size, shown
from .figures import SMALL, arm_index, few_ticks, mark
from .run import Run, number
from .svg import ARMS, THEME, figure, inline, plain

Arm = dict[str, Any]
MAPS = 4  # arms with a picture of their layers
SIZES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("weights that are not 0", "nonzero_parameters", count),
    ("parameters", "parameters", count),
    ("FLOPs an example", "flops_per_example", count),
    ("file", "file_bytes", file_size),
    ("packed file", "packed_bytes", file_size),
)
NAMED = 3  # layers that have their name in the sensitivity curves


def weights_table(run: Run) -> dict[str, Any] | None:
    """The arms whose weights were pruned side by side; each row (what, unpruned, [(value, share of it)])."""
    arms = run.cut
    if not arms:
        return None
    index, dense = arm_index(run), [find_dense(run, arm) for arm in arms]
    rows = [(run.metric, "", [
        (shown(run, run.value(arm)), f"unpruned {shown(run, run.value(other))}" if other else "")
        for arm, other in zip(arms, dense, strict=True)
    ])]  # fmt: skip
    for what, key, word in SIZES:
        cells = [_pair(arm["weights"], key, word) for arm in arms]
        whole = number(arms[0]["weights"]["before"].get("file_bytes" if key == "packed_bytes" else key))
        rows.append((what, "–" if whole is None else word(whole), cells))
    for size in sorted({t["batch_size"] for arm in arms for t in arm["weights"].get("timings") or []}):
        timings = [_timing(arm, size) for arm in arms]
        rows.append((f"latency, batch of {size}", "", [_latency(t) for t in timings]))
        rows.append((f"examples a second, batch of {size}", "", [_throughput(t, size) for t in timings]))
    return {
        "arms": [(arm["name"], index[arm["name"]], how(arm)) for arm in arms],
        "rows": [row for row in rows if any(value != "–" for value, _ in row[2])],
    }


def find_dense(run: Run, arm: Arm) -> Arm | None:
    """The arm of the same examples, tuned alike, with all its weights."""
    keys = ("scorer", "select", "keep", "per_class")
    for other in run.arms:
        alike = (other.get("tune") or {}) == (arm.get("tune") or {})
        if not other.get("weights") and alike and all(other.get(k) == arm.get(k) for k in keys):
            return other
    return None


def how(arm: Arm) -> str:
    """`lora_prune, 50 %, heads and channels, shrunk`."""
    prune = arm.get("prune") or {}
    pattern = {"structured": "heads and channels", "unstructured": "single weights"}
    targets = {"attention": " of attention", "ffn": " of the FFN"}.get(prune.get("targets", ""), "")
    words = [str(prune.get("importance", "")), share(arm["weights"]["sparsity"])]
    words.append(pattern.get(prune.get("pattern", ""), str(prune.get("pattern", ""))) + targets)
    words += ["shrunk"] if prune.get("shrink") else []
    return ", ".join(word for word in words if word)


def faster(arm: Arm) -> tuple[float, int] | None:
    """The greatest measured speed-up and its batch size; None where none is beyond the noise."""
    found = [
        (ratio, int(timing["batch_size"]))
        for timing in arm["weights"].get("timings") or []
        if (ratio := number(timing.get("speedup"))) and (number(timing.get("low")) or 0) > 1
    ]
    return max(found, default=None)


def speed_words(run: Run) -> str:
    """What may be said of speed, of what was measured alone."""
    arms = run.cut
    masked = [a for a in arms if not (a.get("prune") or {}).get("shrink")]
    words = []
    if masked:
        names = ", ".join(plain(a["name"]) for a in masked)
        fast = ", ".join(plain(a["name"]) for a in masked if faster(a))
        words.append(
            f"Nothing gets faster where weights are only set to zero ({names}): the matrices keep their "
            "shapes, and only a packed file is smaller."
        )
        words += [f"The times measured for {fast} are not of the zeros' making."] if fast else []
    for arm in arms:
        if arm in masked:
            continue
        found = faster(arm)
        words.append(
            f"{plain(arm['name'])} is measured {found[0]:.2f} times as fast in batches of {found[1]}."
            if found
            else f"{plain(arm['name'])} is smaller, but was not measured faster on this machine."
        )
    return " ".join(words)


def layer_maps(run: Run) -> list[tuple[str, str]]:
    """`(arm, svg)`: the sparsity of each layer, blocks from left to right."""
    found = []
    for i, arm in enumerate(run.cut[:MAPS]):
        layers = [
            entry for entry in arm["weights"].get("layers") or [] if number(entry.get("sparsity")) is not None
        ]
        if layers:
            found.append((arm["name"], _layer_map(run, arm, layers, f"layers{i}")))
    return found


def _layer_map(run: Run, arm: Arm, layers: list[dict[str, Any]], name: str) -> str:
    from matplotlib.patches import Rectangle

    places = [split_name(str(layer["name"])) for layer in layers]
    blocks, kinds = (list(dict.fromkeys(place[side] for place in places)) for side in (0, 1))
    fig, ax = figure(70 + 22 * len(kinds))
    color = mark(arm_index(run)[arm["name"]])[0]
    for (block, kind), layer in zip(places, layers, strict=True):
        x, y, gone = blocks.index(block), kinds.index(kind), float(layer["sparsity"])
        ax.add_patch(
            Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor="none", edgecolor=THEME["line"], lw=0.8)
        )
        ax.add_patch(Rectangle((x - 0.46, y + 0.42 - 0.84 * gone), 0.92, 0.84 * gone, color=color, lw=0))
    ax.set_xlim(-0.6, len(blocks) - 0.4)
    ax.set_ylim(len(kinds) - 0.4, -0.6)
    ax.set_yticks(range(len(kinds)), [plain(kind, 24) for kind in short(kinds)])
    ax.xaxis.set_major_locator(few_ticks(8, integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: plain(blocks[int(x)], 8) if 0 <= x < len(blocks) else "")
    ax.set_xlabel("block")
    ax.grid(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    shares = [float(layer["sparsity"]) for layer in layers]
    said = f"from {share(min(shares))} to {share(max(shares))}, mean {share(float(np.mean(shares)))}"
    return inline(fig, name, f"Sparsity of {len(layers)} layers of {plain(arm['name'])}: {said}")


def sensitivity_curves(run: Run) -> list[tuple[str, str, str]]:
    """`(arm, which layers, svg)`: the loss with one layer pruned; the most sensitive ones have names."""
    found = []
    for i, arm in enumerate(run.arms):
        curves = (arm.get("sensitivity") or {}).get("layers")
        if curves:
            entry = arm["sensitivity"]
            whole = int(number(entry.get("of")) or len(curves))
            drawn = f" {len(curves)} of {whole} layers, drawn." if len(curves) < whole else ""
            found.append((arm["name"], drawn, sensitivity_figure(entry, f"sensitivity{i}")))
    return found


def sensitivity_figure(entry: dict[str, Any], name: str, what: str = "loss") -> str:
    """Curves of `entry["layers"]`, each `{"name", "losses"}`, over `entry["sparsities"]`, as SVG."""
    xs = [100 * float(x) for x in entry["sparsities"]]
    curves = {str(layer["name"]): [float(loss) for loss in layer["losses"]] for layer in entry["layers"]}
    worst = sorted(curves, key=lambda layer: -max(curves[layer]))[:NAMED]
    fig, ax = figure(270)
    for layer, losses in curves.items():
        if layer not in worst:
            ax.plot(xs, losses, color=THEME["line"], lw=1.2)
    for place, layer in enumerate(worst):
        color, marker = ARMS[2 + place], mark(2 + place)[1]
        ax.plot(xs, curves[layer], color=color, lw=1.8, marker=marker, ms=5, label=plain(layer, 44))
    dense = number(entry.get("dense"))
    if dense is not None:
        ax.axhline(dense, color=THEME["ink"], lw=1.1, ls=(0, (4, 3)))
        ax.annotate("unpruned", (0, dense), xycoords=("axes fraction", "data"), xytext=(4, -4),
                    textcoords="offset points", va="top", **SMALL)  # fmt: skip
    ax.set_xlabel("sparsity of the one layer, %")
    ax.set_title(what, loc="left", color=THEME["soft"])
    ax.xaxis.set_major_locator(few_ticks(6))
    fig.legend(loc="outside upper left", ncols=1, handlelength=1.4, borderpad=0, borderaxespad=0,
               labelcolor=THEME["soft"])  # fmt: skip
    said = "; ".join(f"{plain(layer)} up to {max(curves[layer]):.3g}" for layer in worst)
    return inline(
        fig, name, f"{what.capitalize()} with one of {len(curves)} layers pruned. Most sensitive: {said}"
    )


def split_name(name: str) -> tuple[str, str]:
    """Block and kind of a layer: `("3", "attention.output.dense")`, at the last number of its name.

    >>> split_name("bert.encoder.layer.3.attention.output.dense")
    ('3', 'attention.output.dense')
    """
    found = re.fullmatch(r"(?:.*?\.)?(\d+(?:\.\d+)*)\.(.+?)", name)
    return (found[1], found[2]) if found else ("", name)


def short(kinds: list[str]) -> list[str]:
    """The shortest ends of the names that tell them apart.

    >>> short(["attention.query", "attention.output.dense", "output.dense", "mlp.fc1"])
    ['query', 'attention.output.dense', 'output.dense', 'fc1']
    """
    ends = []
    for kind in kinds:
        parts = kind.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in kinds if other != kind]
        ends.append(next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), kind))
    return ends


def _pair(weights: dict[str, Any], key: str, word: Callable[[float], str]) -> tuple[str, str]:
    before = weights["before"].get("file_bytes" if key == "packed_bytes" else key)
    mine, whole = number(weights["after"].get(key)), number(before)
    return ("–", "") if mine is None else (word(mine), f"{share(mine / whole)}" if whole else "")


def _timing(arm: Arm, size: int) -> tuple[float | None, float | None]:
    found = next((t for t in arm["weights"].get("timings") or [] if t["batch_size"] == size), {})
    return number(found.get("before")), number(found.get("after"))


def _latency(timing: tuple[float | None, float | None]) -> tuple[str, str]:
    before, after = timing
    if not before or not after:
        return "–", ""
    return f"{1000 * after:.3g} ms", f"unpruned {1000 * before:.3g} ms"


def _throughput(timing: tuple[float | None, float | None], size: int) -> tuple[str, str]:
    before, after = timing
    return (f"{size / after:.3g}", f"unpruned {size / before:.3g}") if before and after else ("–", "")


def share(value: float) -> str:
    """`52.3 %`, `50 %`."""
    return f"{100 * value:.3g} %"
