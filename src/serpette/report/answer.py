"""The first line of the report: one verdict, built from the figures of the run and nothing else."""

from __future__ import annotations

import re
from typing import Any

from .run import Run, cost_of, is_noise, keeps_all, number, parts_of

NOISE = "within the noise of one seed and this test set"
BEYOND = "beyond the noise of this test set"
OF_SEEDS = {NOISE: "within the noise of these {} seeds", BEYOND: "beyond the noise of these {} seeds"}
SAVED = 0.98  # a cost above 98 % of the full one is no saving: timings vary by about 2 % from run to run

Arm = dict[str, Any]


def find_full(run: Run, subject: Arm | None = None) -> Arm | None:
    """The arm that trains on everything: of a pruned `subject` the one tuned alike, else full fine-tuning."""
    whole = [arm for arm in run.arms if keeps_all(arm) and not arm.get("weights")]
    if subject is not None and not keeps_all(subject):
        alike = [arm for arm in whole if _tuned_alike(arm, subject)]
        if alike:
            return alike[0]
    every_weight = [arm for arm in whole if arm.get("method") == "full"]
    return next(iter(every_weight or whole), run.arm("full"))


def _tuned_alike(arm: Arm, other: Arm) -> bool:
    return (arm.get("tune") or {}) == (other.get("tune") or {})


def find_lora(run: Run, subject: Arm | None) -> Arm | None:
    """What rows are compared with beside full fine-tuning: the first LoRA on all examples."""
    if subject is None or subject.get("method") != "rows" or not keeps_all(subject):
        return None
    return next((a for a in run.arms if a.get("method") == "lora" and keeps_all(a)), None)


def is_random(arm: Arm) -> bool:
    """Chosen by chance: no scorer, or the random one, or a random selection whatever the scorer."""
    if number(arm.get("keep")) == 1.0:
        return False
    return arm.get("scorer") in (None, "random") or arm.get("select") == "random"


def find_random(run: Run, subject: Arm | None) -> Arm | None:
    """The control of `subject`: a random choice of the same size, one balanced over the classes first."""
    if subject is not None and subject.get("weights"):
        return None  # its control by chance is another cut
    chance = [arm for arm in run.arms if is_random(arm) and arm is not subject and not arm.get("weights")]
    if subject is not None:
        same = [arm for arm in chance if arm.get("examples") == subject.get("examples")]
        chance = [arm for arm in same if _tuned_alike(arm, subject)]
    return next((arm for arm in chance if arm.get("per_class")), chance[0] if chance else None)


def find_subject(run: Run) -> Arm | None:
    """The arm that the answer speaks of: the first that is chosen by a score, else the first pruned one.

    Where nothing is pruned, the first that trains rows, else the first beside full fine-tuning.
    The first of the recipe, not the best: taking the best by test accuracy would be choosing on the test set.
    """
    full = find_full(run)
    others = [arm for arm in run.arms if arm is not full]
    if run.tunings_differ and not run.pruned:
        return next((arm for arm in others if arm.get("method") == "rows"), others[0] if others else None)
    pruned = [arm for arm in others if not (run.tunings_differ and keeps_all(arm))]
    return next((arm for arm in pruned if not is_random(arm)), pruned[0] if pruned else None)


def answer(run: Run) -> tuple[str, str]:
    """The verdict, and in one or two plain sentences its figures: what was kept, its cost, what was lost."""
    verdict, figures = _answer(run)
    if not run.result.get("finished", True):
        verdict = f"This run is not finished; so far: {verdict}"
    return keep_units(verdict), keep_units(figures)


def keep_units(text: str) -> str:
    """`text` without a line break before a unit."""
    return re.sub(r"(?<=\d) (?=(?:%|s|min|h|points)\b|%)", "\u00a0", text)  # no line break before a unit


def _answer(run: Run) -> tuple[str, str]:
    from .story import find_story, story

    if not run.arms:
        return "No arm of this run has finished yet.", "There is nothing to compare."
    pruned = find_story(run)
    if pruned is not None:
        return story(run, pruned)
    subject = find_subject(run)
    full = find_full(run, subject)
    if subject is None:
        assert full is not None
        reached = "" if run.value(full) is None else f" to {_value(run, full)}"
        return (
            "Nothing was pruned, so there is nothing to compare:",
            f"only the full set was tuned,{reached} in {cost_of_arm(full)}.",
        )
    if run.tunings_differ and keeps_all(subject):
        others = [(arm, arm["name"]) for arm in (full, find_lora(run, subject)) if arm and arm is not subject]
        figures = f"{_trained(run, subject, full)}. {lost(run, subject, others)}"
        return f"{_tuning_verdict(run, subject, full)}:", figures
    chance = None if is_random(subject) else find_random(run, subject)
    pairs = [(full, _full_name(subject, full)), (chance, _chance_name(chance) if chance else "")]
    second = lost(run, subject, [(arm, name) for arm, name in pairs if arm])
    if not (chance or is_random(subject)) and second.startswith("It ") and "no other arm" not in second:
        second += " No random choice of the same size was run."
    return f"{_verdict(run, subject, full, chance)}:", f"{_kept(run, subject, full, chance)}. {second}"


def _verdict(run: Run, subject: Arm, full: Arm | None, chance: Arm | None) -> str:
    mine, whole = cost_of(subject), cost_of(full) if full else None
    if mine is None or whole is None:
        return "Whether pruning paid is unknown, as there is no cost of the full set to compare with"
    if mine >= SAVED * whole:
        return "Pruning did not pay"
    to_full, to_chance = sign_of(run, subject, full), sign_of(run, subject, chance)
    if is_random(subject):
        return "Pruning by chance saved time" + (" at a price" if to_full == "worse" else "")
    if chance is None or to_chance is None:
        return "Pruning saved time" + (" at a price" if to_full == "worse" else "")
    if to_chance == "worse":
        return "Pruning saved time, but the score did not pay: it chose worse than chance"
    if to_chance == "noise":
        return "Pruning saved time, but the score did not pay: it chose no better than chance"
    return "Pruning saved time and beat chance, at a price" if to_full == "worse" else "Pruning paid"


def _tuning_verdict(run: Run, subject: Arm, full: Arm | None) -> str:
    mine, whole = cost_of(subject), cost_of(full) if full else None
    if full is None or mine is None or whole is None:
        return "Whether training less paid is unknown, as there is nothing to compare with"
    saved = ["time"] if mine < SAVED * whole else []
    memory = _gpu_peak(run, subject), _gpu_peak(run, full)
    if memory[0] and memory[1] and memory[0] < SAVED * memory[1]:
        saved.append("memory")
    sign = sign_of(run, subject, full)
    if not saved:
        gain = ", but was more accurate" if sign == "better" and not run.lower_is_better else ""
        return f"Training fewer weights saved no time{gain}"
    price = {"worse": " at a price", "better": " and gained"}.get(sign or "", "")
    return f"Training fewer weights saved {' and '.join(saved)}{price}"


def _gpu_peak(run: Run, arm: Arm) -> float | None:
    """Peak bytes; None on a CPU, where they are those of the whole process and of earlier arms."""
    on_gpu = str((run.result.get("hardware") or {}).get("device", "")).startswith("cuda")
    return number(arm.get("peak_bytes")) if on_gpu else None


def _trained(run: Run, subject: Arm, full: Arm | None) -> str:
    share, weights = run.trainable_share(subject), number(subject.get("trainable_parameters"))
    part = "a part of the weights" if weights is None else f"{weights:,.0f} weights"
    if share is not None:
        part += f" ({percent(share)} of the model's)"
    text = f"{subject['name']} trained {part} and cost {cost_of_arm(subject)} of {cost_words(run)}"
    for other in (full, find_lora(run, subject)):
        mine, its = cost_of(subject), cost_of(other) if other else None
        if other and its and mine is not None:
            lead = ", against" if other is full else " and"
            text += f"{lead} {seconds(its)} for {other['name']} ({_percent(mine / its)})"
    return text


def percent(share: float) -> str:
    """`4.8 %`, `0.031 %`: a share that may be small."""
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def sign_of(run: Run, arm: Arm, to: Arm | None) -> str | None:
    """`better`, `worse`, `noise`; None when the two cannot be compared."""
    difference, within = _difference(run, arm, to) if to else (None, None)
    if difference is None:
        return None
    if within or difference == 0:
        return "noise"
    return "better" if (difference < 0) == run.lower_is_better else "worse"


def _difference(run: Run, arm: Arm, to: Arm) -> tuple[float | None, bool | None]:
    """Difference of the metric and whether it is noise (None: no interval was recorded)."""
    comparison = run.comparison(arm["name"], to["name"])
    if comparison:
        return comparison["difference"], is_noise(comparison)
    key = "loss" if run.lower_is_better else "accuracy"
    mine, other = number(arm.get(key)), number(to.get(key))
    return (None, None) if mine is None or other is None else (mine - other, None)


def _full_name(subject: Arm, full: Arm | None) -> str:
    return "the full set" if full is None or _tuned_alike(full, subject) else full["name"]


def cost_words(run: Run) -> str:
    """`scoring, selection and tuning`: what the cost is made of."""
    *parts, last = parts_of(run)
    return f"{', '.join(parts)} and {last}" if parts else last


def _kept(run: Run, subject: Arm, full: Arm | None, chance: Arm | None) -> str:
    kept, total = subject.get("examples"), full.get("examples") if full else None
    share = f"{kept:,.0f} examples" if kept is not None else "a part of the examples"
    if kept is not None and total:
        share = f"{kept:,.0f} of {total:,.0f} training examples ({100 * kept / total:.0f} %)"
    text = f"{subject['name']} kept {share} and cost {cost_of_arm(subject)} of {cost_words(run)}"
    mine, whole = cost_of(subject), cost_of(full) if full else None
    if whole and mine is not None:
        text += f", against {seconds(whole)} for {_full_name(subject, full)} ({_percent(mine / whole)})"
    if chance and cost_of(chance) is not None:
        text += f" and {cost_of_arm(chance)} for {_chance_name(chance)}"
    return text


def lost(run: Run, subject: Arm, pairs: list[tuple[Arm, str]]) -> str:
    """What `subject` lost or gained against each (arm, its name), and whether that is noise."""
    phrases, noises = [], []
    for to, name in pairs:
        difference, within = _difference(run, subject, to)
        if difference is None:
            continue
        verb = "gained" if (difference < 0) == run.lower_is_better else "lost"
        amount = size(run, difference)
        whole = f"{verb} {amount} against {name}"
        if run.lower_is_better:  # a loss that is lost would be a gain
            whole = f"was {'better' if verb == 'gained' else 'worse'} by {amount} than {name}"
        whole = whole if float(amount.split()[0]) else f"matched {name}"
        phrases.append(whole)
        noises.append("noise not measured" if within is None else noise_of(run, NOISE if within else BEYOND))
    if not phrases and run.value(subject) is None:
        return (
            f"What was lost {'was not measured' if run.result.get('finished', True) else 'is not known yet'}."
        )
    if not phrases:
        return f"It reached {_value(run, subject)}; there is no other arm to compare it with."
    if len(phrases) == 2 and noises[0] == noises[1]:
        return f"It {phrases[0]} and {phrases[1]}, both {noises[0]}."
    return "It " + " and ".join(f"{p} ({n})" for p, n in zip(phrases, noises, strict=True)) + "."


def noise_of(run: Run, words: str) -> str:
    """`NOISE` or `BEYOND`, as it is said of one seed or of several."""
    return OF_SEEDS[words].format(len(run.seeds)) if run.seeds else words


def noise_lines(run: Run) -> list[tuple[str, list[str]]]:
    """Every recorded comparison, sorted into what is noise and what is not."""
    groups: dict[bool, list[str]] = {False: [], True: []}
    for c in run.result.get("comparisons") or []:
        difference = number(c.get("difference"))
        noise = is_noise(c)
        if difference is not None and noise is not None:
            groups[noise].append(f"{c['arm']} to {c['to']} {interval(run, c)}")
    lines = [(noise_of(run, words).capitalize(), groups[words == NOISE]) for words in (BEYOND, NOISE)]
    return [line for line in lines if line[1]]


def interval(run: Run, c: dict[str, Any]) -> str:
    """`−2.1 (−3.5 to −0.7)`, in points; for R2 in its own unit; for a perplexity in nats of the loss."""
    low, high = number(c.get("low")), number(c.get("high"))
    text = signed(run, c["difference"])
    return text if low is None or high is None else f"{text} ({signed(run, low)} to {signed(run, high)})"


def signed(run: Run, difference: float) -> str:
    """A difference with its sign: `+0.3` points, or `+0.012` of R2."""
    text = f"{100 * difference:+.1f}" if run.classification else f"{difference:+.3f}"
    return text.replace("-", "−") if float(text) else text[1:]


def size(run: Run, difference: float) -> str:
    """A difference without its sign, with its unit."""
    if run.lower_is_better:
        return f"{abs(difference):.3f} nats of loss"
    if not run.classification:
        return f"{abs(difference):.3f} of {run.metric}"
    return f"{100 * abs(difference):.1f} points of {run.metric}"


def shown(run: Run, value: Any) -> str:
    """A value of the metric: `81.2 %`, `0.812` for R2, `8.12` for a perplexity."""
    value = number(value)
    if value is None:
        return "–"
    if run.lower_is_better:
        return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
    return f"{100 * value:.1f} %" if run.classification else f"{value:.3f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """`0.31 s`, `31.4 s`, `312 s`, `12 min 05 s`, `3 h 07 min`."""
    if value is None:
        return "–"
    if value < 600:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """`14.2 M`."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:g}"


def file_size(value: float) -> str:
    """`28.4 MiB`."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:,.0f} B"


def cost_of_arm(arm: Arm) -> str:
    """Its cost in words."""
    cost = cost_of(arm)
    return "an unknown time" if cost is None else seconds(cost)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _chance_name(arm: Arm) -> str:
    return "the balanced random choice" if arm.get("per_class") else "the random choice"


def _value(run: Run, arm: Arm) -> str:
    return f"{shown(run, run.value(arm))} {run.metric}" if run.classification else (
        f"{run.metric} of {shown(run, run.value(arm))}"
    )  # fmt: skip
