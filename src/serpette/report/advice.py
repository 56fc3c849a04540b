"""The page about an advice: what to do, how healthy the data are, and what each choice would do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .answer import count, file_size, seconds
from .run import number
from .template import fill
from .weights import share as share_of

Entry = dict[str, Any]
LISTED = 50  # of each list of examples
METRICS = {"r2": "R²", "balanced_accuracy": "balanced accuracy"}


@dataclass
class Advice:
    """An advice as the page sees it: `result` is result.json."""

    result: Entry

    def part(self, name: str) -> Entry:
        """An object of the result; empty where it is missing."""
        found = self.result.get(name)
        return found if isinstance(found, dict) else {}

    def entries(self, *names: str) -> list[Entry]:
        """A list of objects of the result; empty where it is missing."""
        found: Any = self.result
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return [entry for entry in found or [] if isinstance(entry, dict)]

    @property
    def nats(self) -> bool:
        """Whether values are losses in nats, of which less is better; else points."""
        return self.result.get("metric") == "loss"

    @property
    def metric(self) -> str:
        name = str(self.result.get("metric") or "accuracy")
        return METRICS.get(name, name)

    @property
    def unit(self) -> str:
        """Of a value and of a loss."""
        if self.nats:
            return "nats"
        return "points, 100 R²" if self.metric == "R²" else f"points of {self.metric}"

    @property
    def axis(self) -> str:
        """The name of a value's axis."""
        return {"loss": "loss, nats", "R²": "100 R²"}.get(self.metric, f"{self.metric}, %")

    @property
    def loss_name(self) -> str:
        return "rise of the loss" if self.nats else "loss"

    def value(self, value: Any) -> str:
        """`84.2`, or `1.312` nats."""
        value = number(value)
        return "–" if value is None else f"{value:.{3 if self.nats else 1}f}".replace("-", "−")

    def signed(self, value: Any) -> str:
        """The same with its sign."""
        value = number(value)
        text = "–" if value is None else f"{value:+.{3 if self.nats else 1}f}".replace("-", "−")
        return text if value is None or float(text.replace("−", "-")) else text[1:]

    def ends(self, low: Any, high: Any) -> str:
        """`(0.3 to 2.1)`; empty without both."""
        if number(low) is None or number(high) is None:
            return ""
        return f"({self.value(low)} to {self.value(high)})"


def render_advice(result: Entry) -> str:
    """The whole page as text."""
    from . import advice_figures, svg

    advice = Advice(result)
    with svg.style():
        drawn = {
            "choices_chart": advice_figures.choices(advice),
            "curve_chart": advice_figures.curve(advice),
            "tunings_chart": advice_figures.tunings(advice),
            "weights_chart": advice_figures.sparsities(advice),
            "layers_chart": advice_figures.layers(advice),
        }
    sentence = str(advice.part("recommendation").get("sentence") or "There is no recommendation yet.")
    verdict, colon, rest = sentence.partition(": ")
    return fill(
        "advice.html.j2",
        result,
        drawn,
        verdict=verdict + colon.strip() if rest else "",
        answer=rest or sentence,
        facts=facts(advice),
        budget=budget(advice),
        plans=plans(advice),
        loss_name=advice.loss_name,
        tunings_only=advice.nats,
        unit=advice.unit,
        health=health(advice),
        classes=class_counts(advice),
        suspects=suspects(advice),
        outliers=[
            _listed(entry, f"distance {_short(entry.get('distance'))}")
            for entry in advice.entries("health", "outliers")[:LISTED]
        ],
        set_aside=[_listed(s, s.get("reason")) for s in advice.entries("health", "set_aside")],
        groups=_groups(advice),
        choices=choices(advice),
        tunings=tunings(advice),
        sparsities=sparsities(advice),
        recovery=advice.part("weights").get("recovery"),
        parts=[
            (str(part), seconds(number(spent)))
            for part, spent in (advice.part("advising").get("seconds") or {}).items()
        ],
        notes=[str(note) for note in result.get("notes") or []],
    )


def facts(advice: Advice) -> list[str]:
    """Model, data, how much of it was looked at, and what that cost."""
    model, data, spent = advice.part("model"), advice.part("data"), advice.part("advising")
    found = []
    if model.get("name"):
        size = f" ({count(model['parameters'])} parameters)" if number(model.get("parameters")) else ""
        found.append(f"{model['name']}{size}")
    if data.get("train"):
        found.append(str(data["train"]))
    total, observed = number(data.get("examples")), number(data.get("observed"))
    if total is not None:
        looked = "" if observed is None or observed >= total else f", {observed:,.0f} of them looked at"
        found.append(f"{total:,.0f} examples{looked}")
    if len(data.get("classes") or []) > 1:
        found.append(f"{len(data['classes'])} classes")
    times = [number(value) for value in (spent.get("seconds") or {}).values()]
    if any(times):
        share = number(spent.get("share"))
        of = "" if share is None else f", {share_of(share)} of the full fine-tune"
        found.append(f"advising took {seconds(sum(t or 0.0 for t in times))}{of}")
    if advice.result.get("seed") is not None:
        found.append(f"seed {advice.result['seed']}")
    return found


def budget(advice: Advice) -> str:
    """The limits that were given; empty without any."""
    given, words = advice.part("budget"), []
    time, memory, latency = (given.get(key) or {} for key in ("time", "memory", "latency"))
    if number(time.get("seconds")) is not None:
        words.append(f"{seconds(time['seconds'])} of time{_given(time)}")
    if number(memory.get("bytes")) is not None:
        words.append(f"{file_size(memory['bytes'])} of memory{_given(memory)}")
    if number(latency.get("share")) is not None:
        words.append(f"{share_of(latency['share'])} of the latency{_given(latency)}")
    if number(given.get("max_loss")) is not None:
        words.append(f"at most {given['max_loss']:g} {advice.unit} lost")
    return ", ".join(words)


def _given(limit: Entry) -> str:
    return f" ({limit['text']})" if limit.get("text") else ""


def plans(advice: Advice) -> list[dict[str, Any]]:
    """The recommendation, the runners-up and, to compare them with, keeping everything."""
    full = advice.part("full")
    whole = number(full.get("seconds"))
    named = [("recommended", advice.part("recommendation"))]
    named += [("runner-up", plan) for plan in advice.entries("runners_up")]
    rows = []
    for role, plan in named:
        if not plan:
            continue
        choice, tuning = plan.get("choice") or {}, plan.get("tuning") or {}
        spent, sparsity = number(plan.get("seconds")), number(plan.get("sparsity"))
        rows.append({
            "role": role,
            "data": _choice_name(choice),
            "tuning": str(tuning.get("name") or tuning.get("method") or "–"),
            "cut": share_of(sparsity) if sparsity else "none",
            "loss": advice.value(plan.get("loss")),
            "ends": advice.ends(plan.get("low"), plan.get("high")),
            "seconds": seconds(spent),
            "share": f"{share_of(spent / whole)} of full" if spent is not None and whole else "",
            "peak": _bytes(plan.get("peak_bytes")),
            "speedup": _times(plan.get("speedup")),
        })  # fmt: skip
    if full and rows:
        rows.append({
            "role": "everything",
            "data": "all examples",
            "tuning": str(full.get("method") or "–"),
            "cut": "none",
            "loss": advice.value(0.0),
            "ends": f"of {advice.value(full.get('value'))} {advice.ends(full.get('low'), full.get('high'))}",
            "seconds": seconds(whole),
            "share": "",
            "peak": "–",
            "speedup": "–",
        })  # fmt: skip
    return rows


def _choice_name(choice: Entry) -> str:
    keep, kept = number(choice.get("keep")), number(choice.get("examples"))
    name = str(choice.get("name") or "all examples")
    if keep is None or keep >= 1:
        return name
    return f"{share_of(keep)}, {name}" + ("" if kept is None else f" ({kept:,.0f} examples)")


def _bytes(value: Any) -> str:
    return "–" if not number(value) else file_size(value)


def _times(value: Any) -> str:
    return "–" if number(value) is None else f"{value:.2f} times"


def _short(value: Any) -> str:
    return "–" if number(value) is None else f"{value:.3g}"


def health(advice: Advice) -> list[tuple[str, str]]:
    """`(what, figures)`: one line each for duplicates, labels, outliers and what could not be read."""
    found, rows = advice.part("health"), []
    for key, what in (("exact_duplicates", "exact duplicates"), ("near_duplicates", "near duplicates")):
        entry = found.get(key) or {}
        if number(entry.get("examples")) is not None:
            share = f" ({share_of(entry['share'])})" if number(entry.get("share")) else ""
            like = number(entry.get("similarity"))
            how = f", of a similarity of {like:g} or more" if like is not None else ""
            rows.append((what, f"{entry['examples']:,.0f}{share}{how}"))
    wrong = found.get("wrong_labels") or {}
    if number(wrong.get("share")) is not None:
        low, high = number(wrong.get("low")), number(wrong.get("high"))
        ends = "" if low is None or high is None else f" ({share_of(low)} to {share_of(high)})"
        rows.append(("wrong labels, estimated", f"{share_of(wrong['share'])}{ends}"))
    counts = [n for n in map(number, (found.get("classes") or {}).values()) if n is not None]
    if counts:
        rows.append(("classes", f"{len(counts)}, of {min(counts):,.0f} to {max(counts):,.0f} examples"))
    for key, what in (("outliers", "outliers"), ("set_aside", "could not be read")):
        if isinstance(found.get(key), list):
            rows.append((what, f"{len(found[key]):,}" if found[key] else "none"))
    return rows


def class_counts(advice: Advice) -> list[tuple[str, str, float]]:
    """`(class, examples, share of the largest)`, the largest first."""
    counts = {str(k): n for k, v in (advice.part("health").get("classes") or {}).items()
              if (n := number(v)) is not None}  # fmt: skip
    most = max(counts.values(), default=0) or 1
    return [(k, f"{n:,.0f}", n / most) for k, n in sorted(counts.items(), key=lambda pair: -pair[1])]


def suspects(advice: Advice) -> list[dict[str, str]]:
    """Labels that look wrong, the likeliest first as they come."""
    names = [str(name) for name in advice.part("data").get("classes") or []]

    def name_of(label: Any) -> str:
        known = isinstance(label, int) and 0 <= label < len(names)
        return names[label] if known else _short(label) if number(label) is not None else str(label)

    return [
        {
            "id": str(s.get("id")),
            "label": name_of(s.get("label")),
            "likely": name_of(s.get("likely")),
            "confidence": _short(s.get("confidence")),
        }
        for s in advice.entries("health", "wrong_labels", "suspects")[:LISTED]
    ]


def _listed(entry: Entry, text: Any) -> tuple[str, str]:
    return str(entry.get("id")), str(text)


def _groups(advice: Advice) -> list[tuple[str, list[str]]]:
    """`(kind, groups of ids)` of the duplicates."""
    found = advice.part("health")
    kinds = (("exact duplicates", "exact_duplicates"), ("near duplicates", "near_duplicates"))
    lists = [(what, _lists((found.get(key) or {}).get("groups"))) for what, key in kinds]
    return [(what, groups) for what, groups in lists if groups]


def _lists(groups: Iterable[Any] | None) -> list[str]:
    return [", ".join(map(str, group)) for group in list(groups or [])[:LISTED] if isinstance(group, list)]


def is_control(choice: Entry) -> bool:
    """Whether a choice is a random one, balanced over the classes where there are any."""
    return choice.get("scorer") in (None, "random") and choice.get("select") in (None, "random")


def choices(advice: Advice) -> list[dict[str, Any]]:
    """The choices by the share they keep, `{"keep", "open", "rows"}`; that of the recommendation is open."""
    advised = advice.part("recommendation").get("choice") or {}
    entries = [c for c in advice.entries("choices") if number(c.get("keep")) is not None and c["keep"] < 1]
    shares = sorted({c["keep"] for c in entries})
    shown = advised.get("keep") if advised.get("keep") in shares else max(shares, default=None)
    found = []
    for keep in sorted(shares, key=lambda share: (share != shown, share)):
        mine = [c for c in entries if c["keep"] == keep]
        mine.sort(key=lambda c: (number(c.get("loss")) is None, number(c.get("loss")) or 0.0))
        rows = [_choice_row(advice, c, c.get("name") == advised.get("name") and keep == advised.get("keep"))
                for c in mine]  # fmt: skip
        kept = number(mine[0].get("examples"))
        size = "" if kept is None else f", {kept:,.0f} examples"
        found.append({"keep": f"{share_of(keep)}{size}", "open": keep == shown, "rows": rows})
    return found


def _choice_row(advice: Advice, choice: Entry, advised: bool) -> dict[str, Any]:
    against = choice.get("to_random")
    difference, low, high = against if isinstance(against, list) and len(against) == 3 else (None, None, None)
    ends = number(low), number(high)
    noise = ends[0] is not None and ends[1] is not None and ends[0] <= 0 <= ends[1]
    return {
        "name": str(choice.get("name") or "–"),
        "advised": advised,
        "control": is_control(choice),
        "value": advice.value(choice.get("value")),
        "ends": advice.ends(choice.get("low"), choice.get("high")),
        "loss": advice.value(choice.get("loss")),
        "loss_ends": advice.ends(choice.get("loss_low"), choice.get("loss_high")),
        "to_random": advice.signed(difference),
        "to_random_ends": "" if number(low) is None else f"({advice.signed(low)} to {advice.signed(high)})",
        "noise": noise,
        "seconds": seconds(number(choice.get("seconds"))),
    }


def tunings(advice: Advice) -> list[dict[str, Any]]:
    """One row a way of tuning."""
    advised, limit = advice.part("recommendation").get("tuning") or {}, _memory_limit(advice)
    rows = []
    for entry in advice.entries("tunings"):
        peak, trained = number(entry.get("peak_bytes")), number(entry.get("trainable_parameters"))
        step = number(entry.get("step_seconds"))
        rows.append({
            "name": str(entry.get("name") or entry.get("method")),
            "advised": bool(advised) and entry.get("name") == advised.get("name"),
            "trains": "–" if trained is None else count(trained),
            "peak": _bytes(peak),
            "over": peak is not None and limit is not None and peak > limit,
            "step": seconds(step),
            "measured": bool(entry.get("measured")),
        })  # fmt: skip
    return rows


def _memory_limit(advice: Advice) -> float | None:
    return number((advice.part("budget").get("memory") or {}).get("bytes"))


def sparsities(advice: Advice) -> list[dict[str, Any]]:
    """One row a sparsity: the predicted loss, what is left and how fast it was measured."""
    rows = []
    for entry in advice.entries("weights", "sparsities"):
        if number(entry.get("sparsity")) is None:
            continue
        timings = [
            f"{t['speedup']:.2f} times at {t.get('batch_size')}"
            for t in entry.get("timings") or []
            if number(t.get("speedup")) is not None
        ]
        left = {key: number(entry.get(key)) for key in ("parameters", "file")}
        rows.append({
            "sparsity": share_of(entry["sparsity"]) if entry["sparsity"] else "none",
            "loss": advice.value(entry.get("loss")),
            "ends": advice.ends(entry.get("low"), entry.get("high")),
            **{key: "–" if value is None else share_of(value) for key, value in left.items()},
            "timings": ", ".join(timings) or "–",
        })  # fmt: skip
    return rows
