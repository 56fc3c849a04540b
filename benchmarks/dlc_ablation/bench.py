"""dlc_ablation: Figures 4 and 6 and Table 4 of the DLC paper in shape, with a head on cached features.

    serpette bench dlc_ablation [part ...] [--quick]

Fashion-MNIST, the zoo's ViT. A seed draws the training images from a pool, the subset and the order; every
arm of a seed is tested on the same images with the same penalty of the head, chosen by splits of a random
subset of the training images. Nothing is chosen on the test set, except where a line says so.
Each cell is a small file in the cache of the zoo; a stopped run goes on from there.

Letters: N examples, P path points, D features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import observed  # noqa: E402
import tasks  # noqa: E402
from observed import Size  # noqa: E402

import serpette  # noqa: E402
from serpette.cost import forward_flops, hardware, versions  # noqa: E402
from serpette.data.mmd import mmd  # noqa: E402
from serpette.data.proxy import Probe  # noqa: E402
from serpette.data.selectors.flex_rand import FlexRand  # noqa: E402
from serpette.evaluate import class_averaged_spearman, paired_over_seeds, seeds_interval  # noqa: E402
from serpette.files import write_json  # noqa: E402
from serpette.masking import LOW_DISCREPANCY  # noqa: E402
from serpette.scorers import DLC, OptimisationComplexity  # noqa: E402
from serpette.types import PathFeatures, Signals  # noqa: E402

PAPER = {
    "spearman_with_s_opt": {"five data sets": [0.54, 0.46, 0.65, 0.68, 0.55], "mean": 0.51},
    "path_saturates_at": 5,
    "flex_rand_over_random": 1.39,
    "table_14": {"random": 55.77, "dq": 55.98, "flex_rand": 57.08},
    "table_4": {"random": 60.38, "original": 61.08, "transfer": 60.70},
}


class Study:
    """The pool of images as each model sees it, and what a seed makes of it."""

    def __init__(self, size: Size, folder: Path):
        self.size, self.folder = size, folder
        self.large = observed.l1_path("vit-8", size.pool, len(LOW_DISCREPANCY))
        self.test = observed.test_set(size.test)
        self.path_PND = stacked(self.large)

    def cell(self, name: str, make: Callable[[], Any]) -> Any:
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, make())
        return json.loads(file.read_text())

    def task(
        self,
        seed: int,
        path_PND: Tensor | None = None,
        signals: Signals | None = None,
        size: int | None = None,
    ):
        """The seed's training images; `paths` is left to the caller. Embeddings: standardised, PCA 192."""
        path_PND = self.path_PND if path_PND is None else path_PND
        signals = signals or self.large
        pool = tasks.Pool(
            ids=signals.ids,
            path=path_PND,
            labels=signals.labels,
            test=self.test.embeddings,
            test_labels=self.test.labels,
            num_classes=10,
            seconds={},
        )
        if pool.test.shape[1] != path_PND.shape[2]:  # a small model has no test features here: not needed
            pool.test = torch.zeros(1, path_PND.shape[2])
        return tasks.draw(pool, "clean", seed, size=size or self.size.train)

    def accuracy(self, task: tasks.Task, picks: Tensor, keep: float, seed: int, tag: str = "") -> float:
        penalty = self.cell(
            f"penalty{tag}-{seed}-{keep}",
            lambda: tasks.choose_penalty(task, round(keep * len(task.signals)), seed),
        )
        chosen = task.signals
        W, b = tasks.fit_head(chosen.embeddings[picks], chosen.labels[picks], 10, penalty)
        return float(((task.test @ W + b).argmax(1) == task.test_labels).double().mean())


def stacked(signals: Signals) -> Tensor:
    """(P, N, D) of the only path."""
    (path,) = signals.paths.values()
    whole = torch.empty(len(path.points), *signals.embeddings.shape)
    for rows, part in path.chunks():
        whole[:, rows] = part
    return whole


def with_path(signals: Signals, path_PND: Tensor, scorer: DLC) -> Signals:
    """`signals` with the first points of `path_PND` (already cut to its N examples) for `scorer`."""
    points = scorer.path.points
    chunk = [(torch.arange(len(signals)), path_PND[: len(points)])]
    return replace(signals, paths={**signals.paths, scorer.path: PathFeatures(points, chunk)})


def first_points(k: int, **options: Any) -> DLC:
    return DLC(points=observed.SHARES[:k], **options)


def s_opt(signals: Signals, raw_ND: Tensor) -> Tensor:
    """Mean loss over the ten epochs of a linear head on the raw features."""
    return OptimisationComplexity()(Probe(seeds=1).train(replace(signals, embeddings=raw_ND)))


def scores_of(signals: Signals, values: dict[str, Tensor], **methods: Any) -> serpette.Scores:
    return serpette.Scores(signals, values, torch.arange(len(signals)), len(signals), methods=methods)


def path_size(study: Study, seed: int) -> dict[str, Any]:
    """Figure 6a: rank correlations and accuracy with the first k points of the path."""
    task = study.task(seed)
    signals, path = task.signals, study.path_PND[:, task.rows]
    hard = s_opt(signals, path[0])
    values = {k: None for k in range(1, len(path) + 1)}
    found: dict[str, Any] = {"s_opt": [], "unmasked": [], "one_point_less": []}
    for k in values:
        scorer = first_points(k)
        values[k] = scorer(with_path(signals, path, scorer))
        found["s_opt"].append(class_averaged_spearman(values[k], hard, signals.labels))
        found["unmasked"].append(class_averaged_spearman(values[k], values[1], signals.labels))
        before = values[max(1, k - 1)]
        found["one_point_less"].append(class_averaged_spearman(values[k], before, signals.labels))
    for keep in (0.1, 0.3):
        accuracies = []
        for k in values:
            scorer = first_points(k)
            scores = scores_of(with_path(signals, path, scorer), {"dlc": values[k]}, dlc=scorer)
            picks = serpette.select(scores, "flex_rand", keep, seed=seed).positions
            accuracies.append(study.accuracy(task, picks, keep, seed))
        random = serpette.select(scores_of(signals, {"dlc": values[1]}), "random", keep, seed=seed).positions
        found[f"keep {keep}"] = {"flex_rand": accuracies, "random": study.accuracy(task, random, keep, seed)}
    return found


def path_size_fine_tuned(study: Study) -> dict[str, Any]:
    """The same correlations with the fine-tuning run, on its images."""
    size = study.size
    tuned = observed.fine_tuned(size.tuned, size.epochs)
    hard = OptimisationComplexity()(tuned)
    place = {i: n for n, i in enumerate(study.large.ids.tolist())}
    path = study.path_PND[:, [place[i] for i in tuned.ids.tolist()]]
    values = []
    for k in range(1, len(path) + 1):
        scorer = first_points(k)
        values.append(scorer(with_path(tuned, path, scorer)))
    official_logits = first_points(5, logits="inverse_distance", prototype="unmasked")
    return {
        "images": size.tuned,
        "epochs": size.epochs,
        "accuracy_at_the_last_visit": float((tuned.history[-1].argmax(1) == tuned.labels).double().mean()),
        "s_opt": [class_averaged_spearman(v, hard, tuned.labels) for v in values],
        "s_opt_of_inverse_distance": class_averaged_spearman(
            official_logits(with_path(tuned, path, official_logits)), hard, tuned.labels
        ),
        "s_opt_of_the_probe": class_averaged_spearman(s_opt(tuned, path[0]), hard, tuned.labels),
    }


def masks(study: Study) -> dict[str, Any]:
    """Figure 6b: smallest weights first against ten arbitrary orders, at the same four shares."""
    size = study.size
    signals, scorers = observed.random_paths(size.random_pool, size.mask_seeds)
    tuned = observed.fine_tuned(size.tuned, size.epochs)
    assert (tuned.ids == signals.ids).all()
    hard = {"fine_tuned": OptimisationComplexity()(tuned), "probe": s_opt(signals, signals.embeddings)}
    values = [scorer(signals) for scorer in scorers]
    labels = signals.labels
    found: dict[str, Any] = {"points": [float(p) for p in scorers[0].path.points]}
    for name, target in hard.items():
        each = [class_averaged_spearman(v, target, labels) for v in values]
        found[f"s_opt_{name}"] = {"l1": each[0], "random": each[1:]}
    among = [class_averaged_spearman(a, b, labels) for i, a in enumerate(values[1:]) for b in values[i + 2 :]]
    found["random_orders_among_each_other"] = among
    along = [scorer.along_path(signals) for scorer in scorers]
    found["mean_loss_at_each_point"] = {
        "l1": along[0].mean(1).tolist(),
        "random": torch.stack(along[1:]).mean((0, 2)).tolist(),
    }
    for keep in (0.1, 0.3):
        rows: dict[str, list] = {"l1": [], "random masks": [], "random subset": []}
        for seed in range(size.mask_seeds):
            arms = {"l1": scorers[0], "random masks": scorers[1 + seed]}
            for arm, scorer in arms.items():
                spec = scorer.path
                path = stacked(replace(signals, paths={spec: signals.paths[spec]}))
                task = study.task(seed, path, signals, size=size.random_pool * 4 // 5)
                mine = with_path(task.signals, path[:, task.rows], scorer)
                scores = scores_of(mine, {"dlc": scorer(mine)}, dlc=scorer)
                picks = serpette.select(scores, "flex_rand", keep, seed=seed).positions
                rows[arm].append(study.accuracy(task, picks, keep, seed, "-masks"))
            picks = serpette.select(scores, "random", keep, seed=seed).positions
            rows["random subset"].append(study.accuracy(task, picks, keep, seed, "-masks"))
        found[f"keep {keep}"] = rows
    return found


SELECTORS = ("random", "top_hard", "top_easy", "top_flexible", "mixed_flexible", "flex_rand", "dq", "ccs")


def under_sampling(study: Study, seed: int) -> dict[str, Any]:
    """Figures 4 and 6c, Table 14: accuracy and distance to the full set."""
    task = study.task(seed)
    signals, path = task.signals, study.path_PND[:, task.rows]
    scorer, plain = first_points(5), first_points(1)
    signals = with_path(with_path(signals, path, scorer), path, plain)
    values = {"dlc": scorer(signals), "s_opt": s_opt(signals, path[0]), "unmasked": plain(signals)}
    scores = scores_of(signals, values, dlc=scorer, unmasked=plain)
    full_ND = signals.embeddings
    ruler = float(torch.pdist(full_ND[:1000]).median())  # the kernel's width, taken once
    found: dict[str, Any] = {}
    for keep in (0.1, 0.3, 0.5):
        for name in values:
            for selector in SELECTORS if name != "unmasked" else ("flex_rand",):
                if name != "dlc" and selector in ("random", "dq"):
                    continue  # they look at no score
                selection = serpette.select(scores, selector, keep, scorer=name, seed=seed)
                arm = selector if selector in ("random", "dq") else f"{name} {selector}"
                found[f"{keep} {arm}"] = {
                    "accuracy": study.accuracy(task, selection.positions, keep, seed),
                    "mmd": mmd(full_ND, full_ND[selection.positions], bandwidth=ruler),
                    "chosen": getattr(selection.selector, "gamma", getattr(selection.selector, "side", None)),
                }
    return found


def gamma(study: Study, seed: int) -> dict[str, Any]:
    """Figure 6d: accuracy for each gamma, and the one that the search takes."""
    task = study.task(seed)
    path = study.path_PND[:, task.rows]
    scorer = first_points(5)
    signals = with_path(task.signals, path, scorer)
    scores = scores_of(signals, {"dlc": scorer(signals)}, dlc=scorer)
    found: dict[str, Any] = {}
    for keep in (0.1, 0.2, 0.3):
        curve = {}
        for selector in FlexRand().candidates():
            picks = serpette.select(scores, selector, keep, seed=seed).positions
            curve[str(selector.gamma)] = study.accuracy(task, picks, keep, seed)
        searched = serpette.select(scores, "flex_rand", keep, seed=seed)
        random = serpette.select(scores, "random", keep, seed=seed).positions
        found[str(keep)] = {
            "curve": curve,
            "searched_gamma": searched.selector.gamma,  # type: ignore[attr-defined]
            "searched": study.accuracy(task, searched.positions, keep, seed),
            "random": study.accuracy(task, random, keep, seed),
        }
    return found


def transfer(study: Study, seed: int) -> dict[str, Any]:
    """Table 4: examples picked with a small model's scores and features, for the head on the large one's."""
    found: dict[str, Any] = {}
    large = study.task(seed)
    scorer = first_points(5)
    own = scorer(with_path(large.signals, study.path_PND[:, large.rows], scorer))
    for name in ("vit-8", "vit-4", "lite0"):
        seen = study.large if name == "vit-8" else observed.l1_path(name, study.size.pool, 5)
        assert (seen.ids == study.large.ids).all()
        path = study.path_PND if name == "vit-8" else stacked(seen)
        task = study.task(seed, path, seen)
        assert torch.equal(task.rows, large.rows)
        signals = with_path(task.signals, path[:, task.rows], scorer)
        values = scorer(signals)
        found[f"spearman {name}"] = class_averaged_spearman(values, own, signals.labels)
        scores = scores_of(signals, {"dlc": values}, dlc=scorer)
        for keep in (0.1, 0.2, 0.3, 0.5):
            picks = serpette.select(scores, "flex_rand", keep, seed=seed).positions
            found[f"{keep} {name}"] = study.accuracy(large, picks, keep, seed)
            if name == "vit-8":
                random = serpette.select(scores, "random", keep, seed=seed).positions
                found[f"{keep} random"] = study.accuracy(large, random, keep, seed)
    return found


def classifier(study: Study, seed: int) -> dict[str, Any]:
    """What the paper leaves open: prototypes, logits and temperature, by rank correlation with S_Opt."""
    task = study.task(seed)
    path = study.path_PND[:, task.rows]
    hard = s_opt(task.signals, path[0])
    found = {}
    for prototype in ("unmasked", "masked"):
        options: list[dict[str, Any]] = [{"temperature": t} for t in (0.5, 1.0, 2.0)]
        for given in [*options, {"logits": "inverse_distance"}]:
            scorer = first_points(5, prototype=prototype, **given)
            values = scorer(with_path(task.signals, path, scorer))
            name = f"{prototype} {' '.join(f'{k}={v}' for k, v in given.items())}"
            found[name] = class_averaged_spearman(values, hard, task.signals.labels)
    return found


BY_SEED = (path_size, under_sampling, gamma, classifier, transfer)
HALF = (path_size, transfer)  # many searches a seed: half the seeds
ONCE = (path_size_fine_tuned, masks)
NAMES = [part.__name__ for part in (*BY_SEED, *ONCE)]


def seeds_of(part: Callable, size: Size) -> int:
    return size.seeds // 2 if part in HALF and size.seeds > 2 else size.seeds


def costs() -> dict[str, int]:
    """Operations of one image in one forward pass of each model."""
    found = {}
    for name, (entry, options, _) in observed.MODELS.items():
        model = serpette.zoo.load_model(entry, num_labels=10, **options)
        pixels = torch.zeros(1, 3, options["image_size"], options["image_size"])
        found[name] = forward_flops(model, {"pixel_values": pixels})
    return found


def main(out: Path, args: list[str]) -> None:
    quick, wanted = "--quick" in args, [a for a in args if not a.startswith("--")]
    if unknown := [a for a in wanted if a not in NAMES]:
        raise ValueError(f"unknown part {unknown[0]!r}; known: {', '.join(NAMES)}")
    torch.set_num_threads(1)
    size = observed.QUICK if quick else Size()
    folder = observed.cache() / ("cells-quick" if quick else "cells")
    observed.everything(size) if not wanted else None
    study = Study(size, folder)
    cells: dict[str, Any] = {}
    for part in BY_SEED:
        name = part.__name__
        if not wanted or name in wanted:
            cells[name] = [
                study.cell(f"{name}-{seed}", lambda p=part, s=seed: p(study, s))
                for seed in track(range(seeds_of(part, size)), description=name)
            ]
    for part in ONCE:
        if not wanted or part.__name__ in wanted:
            cells[part.__name__] = study.cell(part.__name__, lambda p=part: p(study))
    if wanted and not quick:
        print("cells done; without the names of parts the result is put together")
        return
    result = {
        "command": "serpette bench dlc_ablation",
        "quick": quick,
        "size": vars(size),
        "seeds": {part.__name__: seeds_of(part, size) for part in BY_SEED} | {"masks": size.mask_seeds},
        "differences_with_an_interval": differences(found := summary(cells)),
        "summary": found,
        "flops_an_image": study.cell("flops", costs),
        "paper": PAPER,
        "versions": versions(),
        "hardware": hardware(),
    }
    target = folder if quick else out
    write_json(target / "result.json", result)
    from picture import draw

    draw(found, target / "ablation.svg")
    print(f"written: {target / 'result.json'}")


def points(values: Any) -> list[float]:
    """[mean, low, high] in percentage points, rounded."""
    return [round(100 * v, 2) for v in seeds_interval(values)]


def over(a: Any, b: Any) -> list[float]:
    return [round(100 * v, 2) for v in paired_over_seeds(a, b)]


def differences(found: Any, name: str = "") -> int:
    """How many paired differences the result shows; one in twenty of their intervals misses by chance."""
    if isinstance(found, dict):
        return sum(differences(value, f"{name} {key}") for key, value in found.items())
    if isinstance(found, list) and found and isinstance(found[0], list):
        return sum(differences(value, name) for value in found)
    is_difference = isinstance(found, list) and ("over" in name or "regret" in name)
    return int(is_difference and any(found))  # random over itself is none


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if by := cells.get("path_size"):
        table = {
            name: np.mean([c[name] for c in by], 0).round(3).tolist()
            for name in ("s_opt", "unmasked", "one_point_less")
        }
        for keep in ("keep 0.1", "keep 0.3"):
            arms = np.array([c[keep]["flex_rand"] for c in by])  # (seeds, points)
            random = [c[keep]["random"] for c in by]
            table[keep] = {
                "random": points(random),
                "flex_rand": [round(100 * a, 2) for a in arms.mean(0)],
                "flex_rand_over_random": [over(a, random) for a in arms.T],
                "five_points_over_one": over(arms[:, min(4, arms.shape[1] - 1)], arms[:, 0]),
            }
        found["path_size"] = table
    for name in ("path_size_fine_tuned", "masks"):
        if name in cells:
            found[name] = dict(cells[name])
    if "masks" in cells:
        masks = found["masks"]
        among = masks.pop("random_orders_among_each_other")
        masks["random_orders_among_each_other"] = {
            "mean": np.mean(among),
            "least": min(among),
            "most": max(among),
        }
        for name in ("s_opt_fine_tuned", "s_opt_probe"):
            each = masks[name]["random"]
            masks[name] |= {"random_mean": np.mean(each), "random_sd": np.std(each, ddof=1)}
        for keep in ("keep 0.1", "keep 0.3"):
            rows = masks[keep]
            masks[keep] = {arm: points(v) for arm, v in rows.items()} | {
                "l1_over_random_masks": over(rows["l1"], rows["random masks"]),
                "l1_over_random_subset": over(rows["l1"], rows["random subset"]),
                "random_masks_over_random_subset": over(rows["random masks"], rows["random subset"]),
                "sd_over_seeds": {arm: round(100 * float(np.std(v, ddof=1)), 2) for arm, v in rows.items()},
            }
    if by := cells.get("under_sampling"):
        found["under_sampling"] = {
            arm: {
                "accuracy": points([c[arm]["accuracy"] for c in by]),
                "over_random": over(
                    [c[arm]["accuracy"] for c in by], [c[arm.split()[0] + " random"]["accuracy"] for c in by]
                ),
                "mmd": round(float(np.mean([c[arm]["mmd"] for c in by])), 4),
                "chosen": [c[arm]["chosen"] for c in by],
            }
            for arm in by[0]
        }
    if by := cells.get("gamma"):
        found["gamma"] = {}
        for keep in by[0]:
            curve = {g: np.mean([c[keep]["curve"][g] for c in by]) for g in by[0][keep]["curve"]}
            searched, random = [c[keep]["searched"] for c in by], [c[keep]["random"] for c in by]
            best = max(curve, key=curve.__getitem__)
            found["gamma"][keep] = {
                "curve": {g: round(100 * v, 2) for g, v in curve.items()},
                "random": points(random),
                "searched": points(searched),
                "searched_gammas": [c[keep]["searched_gamma"] for c in by],
                "searched_over_random": over(searched, random),
                "best_fixed_gamma_in_hindsight": best,
                "regret_to_it": over([c[keep]["curve"][best] for c in by], searched),
                "chosen_on_the_test_set_each_seed_over_random (made out of nothing)": over(
                    [max(c[keep]["curve"].values()) for c in by], random
                ),
                "half (gamma 0.5) over_random": over([c[keep]["curve"]["0.5"] for c in by], random),
            }
    if by := cells.get("transfer"):
        table = {name: points([c[name] for c in by]) for name in by[0] if not name.startswith("spearman")}
        mean = {
            m: [np.mean([c[f"{k} {m}"] for k in (0.1, 0.2, 0.3, 0.5)]) for c in by]
            for m in ("random", "vit-8", "vit-4", "lite0")
        }
        found["transfer"] = {
            "accuracy": table,
            "spearman_with_own": {
                m: round(np.mean([c[f"spearman {m}"] for c in by]), 3) for m in ("vit-4", "lite0")
            },
            "mean_of_keeps": {m: points(v) for m, v in mean.items()},
            "mean_over_random": {m: over(v, mean["random"]) for m, v in mean.items() if m != "random"},
        }
    if by := cells.get("classifier"):
        found["classifier"] = {n: [round(v, 3) for v in seeds_interval([c[n] for c in by])] for n in by[0]}
    return found
