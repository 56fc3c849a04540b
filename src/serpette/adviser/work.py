"""What an adviser measures, part by part; each part is kept on disk with its seconds, and done once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..cost import hardware, versions
from ..data.budget import count
from ..files import write_json
from ..opening import Opened
from ..pipeline.progress import Sayer
from ..recipe import TuneSpec
from ..types import uniform_of
from . import observing, pilot
from .budget import Budget
from .curve import Curve
from .health import near_groups
from .probes import RANDOM, Choice, Measured, choices_for, measure
from .recommend import NATS, Behind, Noise, Outlook, choice_dict, curve_of, kept_of, outlooks
from .tuning import Tuning, tunings
from .weights import cuts, outputs_of, predicted_losses, sensitivities

SHARE = 0.2  # of the full fine-tune, that advising may take
# of that: the observing pass, the probes, a short tuning, the ways to tune, the weights
PARTS = {"observing": 0.35, "probes": 0.2, "pilot": 0.25, "tuning": 0.1, "weights": 0.1}
TRIAL_SECONDS = 1e-3  # of a probe's trial, by example: what sizes the sample before a trial was timed
FOLDS = 5
READING_SECONDS = 5.0  # of a language model's examples
CUT_EXAMPLES = {"causal-lm": 8}  # that the cut models read, else 400
SENSITIVITY_EXAMPLES = {"causal-lm": 4}  # else 64
CUT_SECONDS = 30.0  # for the weights at least, if the latency is limited
WAYS = {"lora": "LoRA", "rows": "rows", "full": "full"}


class Work:
    """What is measured, part by part; each part is kept in the folder with its seconds."""

    def __init__(
        self,
        job: Opened,
        folder: Path,
        say: Sayer,
        tune: TuneSpec,
        reading: dict,
        batch_size: int,
        seed: int,
        limits: Budget,
    ):
        self.job, self.folder, self.say, self.tune, self.reading = job, folder, say, tune, reading
        self.batch_size, self.seed, self.limits = batch_size, seed, limits
        self.total = len(job.dataset)  # of which those that cannot be read are taken off once it is known
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.measured: Measured | None = None
        self.health: dict[str, Any] = {}
        self.behind: Behind | None = None
        self.cuts: list[Any] = []
        self.why_not_cut = "no share of the weights was measured"
        self.layers: list[dict[str, Any]] = []
        self.causal = job.task == "causal-lm"
        self.groups: torch.Tensor | None = None  # of duplicates

    def steps(self, examples: int) -> int:
        """Of tuning on so many."""
        return self.tune.epochs * -(-examples // self.tune.batch_size)

    def kept(self, part: str, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, from the folder if an earlier call has finished it."""
        file = self.folder / "found" / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            found = work()
            write_json(file, {"found": found, "seconds": time.perf_counter() - start})
        held = json.loads(file.read_text(encoding="utf-8"))
        self.seconds[part] = self.seconds.get(part, 0.0) + held["seconds"]
        return held["found"]

    def allowed(self, part: str) -> float:
        """Seconds of a part."""
        return SHARE * PARTS[part] * self.full_seconds

    @property
    def full_seconds(self) -> float:
        """Of tuning on all examples."""
        return self.tuning_seconds(self.tunings[0], self.total)

    def tuning_seconds(self, way: Tuning, examples: int) -> float:
        """Of tuning on so many, with the reading of each batch."""
        return self.steps(examples) * (way.step_seconds + self.reading_seconds)

    def read(self) -> None:
        """The examples of a language model, without the model: which can be read, and which are equal."""
        self.say("reading the examples")
        found = self.kept(
            "observing",
            "tokens",
            lambda: observing.tokens(self.job.examples, READING_SECONDS, self.seed),
        )
        self.readable = pilot.Some(self.job.examples, found["rows"])
        self._judge_health(found["health"], len(self.readable))

    def _judge_health(self, health: dict[str, Any], readable: int) -> None:
        self.health, bad = health, len(health["set_aside"])
        self.total = round(self.total * readable / (readable + bad))
        if bad:
            self.notes.append(
                f"{bad} of {readable + bad} examples cannot be read; training sets them aside, too."
            )

    def step(self) -> None:
        """Times the step that is advised on, and the reading of examples."""
        self.say("timing a training step")

        def work() -> dict[str, Any]:
            rows, batch = self._batch()
            start = time.perf_counter()
            self.job.examples.read(rows)
            reading = time.perf_counter() - start
            few = rows[: 2 if self.causal else min(self.batch_size, 16)]  # logits of all words are large
            per_example = observing.example_seconds(self.job, few)
            base = tunings(self.job.model, batch, rank=self.tune.rank, ways=[WAYS[self.tune.method]])
            return {"example_seconds": per_example, "reading_seconds": reading, "tuning": asdict(base[0])}

        found = self.kept("tuning", "step", work)
        self.example_seconds, self.reading_seconds = found["example_seconds"], found["reading_seconds"]
        self.tunings = [Tuning(**found["tuning"])]

    def _batch(self) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Rows of examples that can be read, drawn at random, and a batch of them as they are tuned with."""
        size, examples = self.tune.batch_size, self.job.examples
        if self.causal:
            rows = self.readable.rows[:size]
            return rows, examples.read(rows)[1]
        drawn = uniform_of(examples.ids, self.seed).argsort()[: 2 * size].tolist()
        good, inputs, labels, bad = examples.read(drawn)
        if not good:
            name, reason = next(iter(bad.items()))
            raise ValueError(f"none of {len(bad)} examples could be read; {name!r}: {reason}")
        inputs = {name: value[:size] for name, value in inputs.items()}
        kind = torch.float32 if self.job.task == "regression" else torch.long
        return good[:size], {**inputs, "labels": torch.tensor(labels[:size], dtype=kind)}

    def observe(self) -> None:
        """One pass over as many examples as fit."""
        n = min(
            self.allowed("observing") / self.example_seconds, self.allowed("probes") / (FOLDS * TRIAL_SECONDS)
        )
        n = min(self.total, max(int(n), observing.LEAST))
        file = self.folder / "found" / "sample.json"
        if not file.exists():
            write_json(file, {"examples": n})
        n = json.loads(file.read_text(encoding="utf-8"))["examples"]
        self.say(f"observing {n:,} of {self.total:,} examples")
        self.observation, self.examples = observing.observed(
            self.job,
            n,
            self.reading,
            batch_size=self.batch_size,
            folder=self.folder / "observed",
            seed=self.seed,
            progress=self.say.shown,
        )
        self.seconds["observing"] = sum(self.observation.seconds.values())
        self.say("health of the data")
        self.groups = groups = near_groups(self.observation.signals.require("embeddings", "advise"))
        health = self.kept(
            "observing",
            "health",
            lambda: observing.health_of(self.observation, self.examples, self.job.classes, groups, self.seed),
        )
        self._judge_health(health, len(self.observation.rows))

    def probe(self, choices: Sequence[Choice], keeps: Sequence[float], metric: str) -> None:
        """The choices, in as many trials as fit: five at least."""
        signals = self.observation.signals
        tried = choices_for(self.job.task, signals.labels, choices)
        self.say(f"probing {len(tried)} choices at {len(keeps)} shares")
        start, file = time.perf_counter(), self.folder / "found" / "probing.json"
        before = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.exists() else 0.0
        done = 0

        def spent() -> float:
            return before + time.perf_counter() - start

        def advance() -> None:
            nonlocal done
            done += 1
            write_json(file, {"seconds": spent()})
            self.say.step(done, 2 * FOLDS, "probing")

        self.measured = measure(
            signals,
            tried,
            keeps,
            groups=self.groups,
            metric=metric,
            folds=FOLDS,
            repeats=2,
            seed=self.seed,
            folder=self.folder / "trials",
            go_on=lambda: spent() < self.allowed("probes"),
            advance=advance,
        )
        self.say.done()
        self.seconds["probes"] = json.loads(file.read_text(encoding="utf-8"))["seconds"]

    def pilot(self, metric: str) -> None:
        """One short tuning beside a head on the same examples: how far it is behind, for want of steps."""
        signals = self.observation.signals
        size = max(int(SHARE * PARTS["pilot"] * self.total), 2 * self.tune.batch_size)
        size = min(size, len(signals) // 2)
        self.say(f"a short tuning on {size} examples")

        def work() -> dict[str, Any]:
            return pilot.beside_a_head(
                self.job.model,
                self.examples,
                self.observation.rows,
                signals,
                size,
                self.tune,
                metric=metric,
                groups=self.groups,
                batch_size=self.batch_size,
                seed=self.seed,
            )

        self.behind = Behind(**self.kept("pilot", "pilot", work))
        if not self.behind.learned:
            self.notes.append(
                f"A short tuning on {self.behind.examples} examples had learned nothing yet. When it does is "
                "not known, nor what fewer steps lose: keep everything, or give more epochs."
            )

    def pilots(self) -> None:
        """Short tunings in place of probes."""
        per_example = self.tunings[0].step_seconds / self.tune.batch_size
        seconds = self.allowed("observing") + self.allowed("probes") + self.allowed("pilot")
        sizes = pilot.sizes_for(
            seconds, per_example, self.tune.epochs, len(self.readable), self.tune.batch_size
        )
        self.say(f"short tunings on {', '.join(map(str, sizes))} examples")

        def work() -> dict[str, Any]:
            curve, values = pilot.learning_curve(
                self.job.model,
                self.readable,
                sizes,
                self.tune,
                seed=self.seed,
                folder=self.folder / "pilots",
                say=self.say,
            )
            return {
                "sizes": sizes,
                "values": values.tolist(),
                "curve": {k: v.tolist() for k, v in asdict(curve).items() if k in ("ceiling", "b", "c")},
            }

        found = self.kept("probes", "pilots", work)
        self.pilot_sizes, self.pilot_values = found["sizes"], np.array(found["values"])
        ceiling, b, c = (np.array(found["curve"][name]) for name in ("ceiling", "b", "c"))
        self.curve = Curve(ceiling, b, c).cautious(pilot.REPEATS, self.pilot_sizes[-1])

    def ways(self) -> None:
        """Memory and time of the ways to tune, where there is time or a limit that asks for it."""
        base = self.tunings[0].step_seconds
        if self.limits.memory is None and self.allowed("tuning") < 100 * base:
            self.notes.append(
                "The run is short: other ways to tune were not compared; give a memory limit to see them."
            )
            return
        self.say("what other ways to tune cost")

        def work() -> list[dict[str, Any]]:
            found = tunings(
                self.job.model, self._batch()[1], rank=self.tune.rank, seconds=self.allowed("tuning")
            )
            return [asdict(t) for t in found]

        first = self.tunings[0]
        rest = [Tuning(**t) for t in self.kept("tuning", "tunings", work)]
        self.tunings = [first, *(t for t in rest if t.name != first.name)]

    def weights(self) -> None:
        """What cutting heads and channels would do, where there is time or a limit of the latency."""
        task = self.job.task
        ids = self.readable.ids if self.causal else self.observation.signals.ids
        order = uniform_of(ids, self.seed).argsort()[: CUT_EXAMPLES.get(task, 400)]
        n = len(order)
        seconds = self.allowed("weights")
        if self.limits.latency is not None:  # then all shares must be looked at
            seconds = max(seconds, CUT_SECONDS)
        if self.limits.latency is None and seconds < 8 * n * self.example_seconds:
            self.notes.append(
                "The run is short: cutting weights was not measured; give a latency limit to see it."
            )
            return
        self.say("what cutting heads and channels does")
        if self.causal:
            rows, labels, examples = torch.tensor(self.readable.rows)[order], None, self.job.examples
        else:
            rows, examples = self.observation.rows[order], self.examples
            labels = self.observation.signals.require("labels", "advise")[order]
        read = observing.reader(examples, rows, labels)

        def work() -> dict[str, Any]:
            model = self.job.model
            try:
                made = cuts(model, read, n, task=task, seconds=seconds)
                dense = outputs_of(model, read, n, task=task)
                lost = predicted_losses(
                    made,
                    dense,
                    labels,
                    len(self.job.classes),
                    task=task,
                    seed=self.seed,
                )
                seen = min(SENSITIVITY_EXAMPLES.get(task, 64), n)
                layers = sensitivities(model, read, seen, task=task, seconds=seconds / 4, seed=self.seed)
            except ValueError as error:
                return {"reason": str(error)}
            points = 1 / NATS if self.causal else 1
            return {
                "cuts": [
                    {
                        "sparsity": c.sparsity,
                        "parameters": c.parameters,
                        "file": c.file,
                        "timings": c.timings,
                        "loss": points * loss[0],
                        "low": points * loss[1],
                        "high": points * loss[2],
                    }
                    for c, loss in zip(made, lost, strict=True)
                ],
                "layers": layers,
            }

        # with a limit all shares were looked at
        name = "weights" if self.limits.latency is None else "weights for latency"
        found = self.kept("weights", name, work)
        if "reason" in found:
            self.why_not_cut = found["reason"]
            self.notes.append(f"Weights cannot be cut: {self.why_not_cut}.")
        self.cuts, self.layers = found.get("cuts", []), found.get("layers", [])
        if self.behind is not None and not self.behind.learned:  # a head tells nothing of this model
            self.cuts = [_unknown(cut, (100 - self.behind.trivial) / 2) for cut in self.cuts]

    def outlooks(
        self, keeps: Sequence[float], clean_test: bool, test_examples: int | None
    ) -> tuple[list[Outlook], Curve | None]:
        """What each choice is predicted to reach, with its seconds of scoring; and the learning curve."""
        if self.measured is None:
            return self._along_curve(keeps), self.curve
        noise, wrong = None, self.health.get("wrong_labels")
        if clean_test and wrong and wrong["share"] > 0:
            noise = Noise(wrong["share"], (wrong["high"] - wrong["low"]) / 3.92, len(self.job.classes))
            if not noise.identified:
                self.notes.append(
                    f"The share of wrong labels is not known well enough ({wrong['low']:.0%} to "
                    f"{wrong['high']:.0%}) to tell what right test labels would show: values are those on "
                    "labels as they are."
                )
                noise = None
        found = outlooks(
            self.measured,
            self.total,
            listed=len(self.job.dataset),
            noise=noise,
            behind=self.behind,
            test_examples=test_examples,
        )
        return [self._with_scoring(o) for o in found], curve_of(self.measured, RANDOM)

    def _with_scoring(self, o: Outlook) -> Outlook:
        if o.choice.by_chance:
            return o
        assert self.measured is not None
        own = self.measured.seconds.get(o.choice.name, 0.0) * self.total / self.measured.trained
        return replace(o, scoring=own + self.example_seconds * self.total)

    def _along_curve(self, keeps: Sequence[float]) -> list[Outlook]:
        choice, found = Choice("random", per_class=False), []
        for keep in (*sorted(keeps), 1.0):
            k = kept_of(keep, self.total, len(self.job.dataset))
            if k == self.total and keep < 1:
                continue
            found.append(Outlook(choice, keep, k, *self.curve.band(k), *self.curve.loss(k, self.total)))
        return found

    def result(
        self, found: list[Outlook], curve: Curve | None, names: dict[str, str], metric: str
    ) -> dict[str, Any]:
        """`result.json`, but for the recommendation."""
        causal, unit = self.causal, NATS if self.causal else 1.0
        spent = sum(self.seconds.values())
        first = self.tunings[0]
        metric = "loss" if causal else "r2" if self.job.task == "regression" else metric
        if spent > SHARE * self.full_seconds:
            self.notes.append(
                f"Advising took {spent / self.full_seconds:.0%} of the full run, more than {SHARE:.0%}: the "
                "run is short, and what an adviser needs at least does not get shorter."
            )
        self.notes.append(
            "The curve is that of short tunings, and no score was tried: nothing cheap tells which examples "
            "of a language model matter."
            if causal
            else "Values are those of a linear head on the frozen features, less what a short tuning was "
            "behind it, which shrinks with the steps. A tuned model may reach more than the head; the "
            "differences are what the advice rests on."
        )
        shown = [
            choice_dict(o, causal) | {"seconds": o.scoring + self.tuning_seconds(first, o.examples)}
            for o in found
        ]
        cuts = [cut | {key: unit * cut[key] for key in ("loss", "low", "high")} for cut in self.cuts]
        budget = self.limits.as_dict(self.full_seconds)
        if self.limits.max_loss is not None:
            budget["max_loss"] = unit * self.limits.max_loss
        return {
            "kind": "advice",
            "name": self.folder.name,
            "serpette": __version__,
            "versions": versions(),
            "hardware": hardware(next(self.job.model.parameters()).device),
            "seed": self.seed,
            "task": self.job.task,
            "metric": metric,
            "model": {
                "name": names["model"],
                "parameters": sum(p.numel() for p in self.job.model.parameters()),
            },
            "data": {
                "train": names["train"],
                "examples": len(self.job.dataset),
                "readable": self.total,
                "observed": len(self.readable if causal else self.observation.rows),
                "classes": self.job.classes,
            },
            "budget": budget,
            "full": {
                "method": self.tune.method,
                "epochs": self.tune.epochs,
                "steps": self.steps(self.total),
                "seconds": self.full_seconds,
                "step_seconds": first.step_seconds,
                "value": shown[-1]["value"],
                "low": shown[-1]["low"],
                "high": shown[-1]["high"],
            },
            "advising": {"seconds": self.seconds, "share": spent / self.full_seconds},
            "health": self.health,
            "choices": shown[:-1],
            "behind": asdict(self.behind) if self.behind else None,
            "curve": self._curve_points(curve),
            "tunings": [asdict(t) for t in self.tunings],
            "weights": {"recovery": False, "sparsities": cuts, "layers": self.layers} if self.cuts else {},
            "notes": self.notes,
        }

    def _curve_points(self, curve: Curve | None) -> dict[str, Any]:
        if curve is None:
            return {}
        sign = -NATS if self.causal else 1.0

        def point(n: int, value: float, low: float, high: float) -> dict[str, float]:
            low, high = sorted((sign * low, sign * high))
            return {"examples": n, "value": sign * value, "low": low, "high": high}

        if self.measured is None:
            seen = [
                point(n, v.mean(), v.min(), v.max())
                for n, v in zip(self.pilot_sizes, self.pilot_values, strict=True)
            ]
        else:
            m = self.measured
            held = [(k, m.values[RANDOM.name, k]) for k in m.keeps] + [(1.0, m.whole)]
            seen = [point(count(m.trained, k), *m.interval(v)) for k, v in held]
        ns = np.unique(
            np.geomspace(seen[0]["examples"], max(self.total, seen[-1]["examples"]), 24).round().astype(int)
        )
        return {"points": seen, "fitted": [point(int(n), *curve.band(float(n))) for n in ns]}


def _unknown(cut: dict[str, Any], points: float) -> dict[str, Any]:
    """With an interval of as many points to both sides."""
    return cut | {"low": cut["loss"] - points, "high": cut["loss"] + points}
