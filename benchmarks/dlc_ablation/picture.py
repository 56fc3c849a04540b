"""The ablations in one picture, as small SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, MAIN, SECOND, THIRD, GREY = "#222222", "#0b6e4f", "#c0562f", "#3b5b92", "#999999"


def draw(summary: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.8))

    ax, by = axes[0, 0], summary["path_size"]
    k = range(1, len(by["s_opt"]) + 1)
    ax.plot(k, by["s_opt"], "o-", color=MAIN, label="with S_Opt of the probe")
    if tuned := summary.get("path_size_fine_tuned"):
        ax.plot(k, tuned["s_opt"], "s-", color=SECOND, label="with S_Opt of fine-tuning")
    ax.plot(k, by["unmasked"], "^-", color=GREY, label="with the unmasked loss")
    ax.plot(
        list(k)[1:],
        by["one_point_less"][1:],
        "-",
        color=THIRD,
        lw=1,
        label="with one point less (stops at 0.99)",
    )
    ax.set(title="Path size: rank correlation in a class", xlabel="points of the path", ylim=(0, 1.03))
    ax.legend(frameon=False, fontsize=8)

    ax = axes[0, 1]
    for keep, color in (("keep 0.1", SECOND), ("keep 0.3", MAIN)):
        means, lows, highs = zip(*by[keep]["flex_rand_over_random"], strict=True)
        ax.plot(k, means, "o-", color=color, label=f"{keep}: {by[keep]['random'][0]:.1f} % at random")
        ax.fill_between(k, lows, highs, color=color, alpha=0.12, lw=0)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set(title="FlexRand over stratified random, points of accuracy", xlabel="points of the path")
    ax.legend(frameon=False, fontsize=8)

    ax, arms = axes[1, 0], summary["under_sampling"]
    for keep, color in (("0.1", SECOND), ("0.3", MAIN), ("0.5", THIRD)):
        for arm, row in arms.items():
            if arm.startswith(keep) and "s_opt" not in arm and "unmasked" not in arm:
                at, name = (row["mmd"], row["over_random"][0]), arm.split()[-1]
                ax.plot(*at, "o", color=color, ms=4)
                if keep == "0.1" and name not in ("dq", "top_flexible"):  # they lie on random and on top_easy
                    ax.annotate(name, at, fontsize=7, xytext=(-4, -10), textcoords="offset points")
        ax.plot([], [], "o", color=color, ms=4, label=f"keep {keep}")
    ax.axhline(0, color=INK, lw=0.8)
    ax.set(
        title="Under-sampling by DLC: accuracy over random",
        xlabel="distance of the subset to the full set (MMD)",
    )
    ax.legend(frameon=False, fontsize=8)

    ax = axes[1, 1]
    for (keep, row), color in zip(summary["gamma"].items(), (SECOND, THIRD, MAIN), strict=True):
        gammas = [float(g) for g in row["curve"]]
        ax.plot(gammas, list(row["curve"].values()), "-", color=color, label=f"keep {keep}")
        ax.axhline(row["random"][0], color=color, lw=0.8, ls=":")
        picked = sum(row["searched_gammas"]) / len(row["searched_gammas"])
        ax.plot(picked, row["searched"][0], "D", color=color, ms=5)
    ax.set(
        title="Gamma: accuracy (dotted: random, diamond: searched)",
        xlabel="gamma, the share that counts as easy",
    )
    ax.legend(frameon=False, fontsize=8)

    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
