"""Checks that every scorer and every selector gets for free. A new method is found by its name."""

import inspect
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from serpette.scorers import registry as scorers
from serpette.types import PathFeatures, Signals

LANGUAGE = ("response_losses", "answer_losses")  # signals that only a causal LM has
OBSERVED = ("labels", "embeddings", "logits", "early_logits", "history", *LANGUAGE)


def make_signals(task="classification", n=24, seed=0, path=None, reading=None) -> Signals:
    """Every signal of n examples, 3 classes; `path` adds features along that PathSpec, in two chunks,
    `reading` three numbers for each of four LoRA layers. A causal LM has no labels and no logits."""
    g = torch.Generator().manual_seed(seed)
    C, D, S, T = 3, 5, 2, 6
    classes, language = task == "classification", task == "causal-lm"
    labels = torch.arange(n) % C if classes else torch.randn(n, generator=g)
    width = C if classes else 1
    centre = labels[:, None].float()
    x_ND = centre + torch.randn(n, D, generator=g)
    paths = {}
    if path is not None:
        start = x_ND[:, :1].abs() if language else x_ND
        noise = [start + i * torch.randn(start.shape, generator=g) for i in range(len(path.points))]
        f_PND = torch.stack(noise)
        cut = n // 3
        chunks = [(torch.arange(n)[:cut], f_PND[:, :cut]), (torch.arange(n)[cut:], f_PND[:, cut:])]
        paths[path] = PathFeatures(path.points, chunks)
    return Signals(
        ids=np.array([f"example-{i}" for i in range(n)]),
        labels=None if language else labels,
        num_classes=C if classes else 0,
        embeddings=x_ND,
        logits=None if language else torch.randn(n, width, generator=g) * 2,
        early_logits=None if language else torch.randn(S, n, width, generator=g) * 2,
        history=None if language else torch.randn(T, n, width, generator=g) * 2,
        response_losses=torch.rand(n, generator=g) * 4 if language else None,
        answer_losses=torch.rand(n, generator=g) * 4 if language else None,
        paths=paths,
        readings={} if reading is None else {reading: torch.rand(n, 4, 3, generator=g)},
        seed=seed,
        task=task,
    )


def without(signals: Signals, name: str) -> Signals:
    return replace(signals, **{name: {} if name in ("paths", "readings") else None})


def check_scorer(name: str, task: str):
    cls = scorers[name]
    scorer = cls()
    path, reading = getattr(scorer, "path", None), getattr(scorer, "reading", None)
    signals = make_signals(task, path=path, reading=reading)
    assert scorer.name == name
    assert isinstance(scorer.needs, frozenset) and scorer.needs <= {f.name for f in fields(Signals)}
    assert scorer.tasks and scorer.tasks <= {"classification", "regression", "causal-lm"}
    if task not in scorer.tasks:
        with pytest.raises(ValueError, match=task):
            scorer(signals)
        return

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    observed = [f for f in OBSERVED if getattr(signals, f) is not None]
    needs = {f for f in scorer.needs if f in observed or f not in OBSERVED}  # those that the task has
    inputs = [getattr(signals, f).clone() for f in observed]
    scores = scorer(signals)
    assert scores.shape == (len(signals),), "one score an example"
    assert scores.is_floating_point() and torch.isfinite(scores).all()
    assert torch.equal(before[0], torch.get_rng_state()), "global torch seed touched"
    assert (before[1] == np.random.get_state()[1]).all(), "global numpy seed touched"
    for f, value in zip(observed, inputs, strict=True):
        assert torch.equal(value, getattr(signals, f)), f"{f} was changed in place"
    assert torch.equal(scores, scorer(signals)), "the same signals, other scores"

    tolerance = {"rtol": 1e-9, "atol": 1e-9} if path else {"rtol": 1e-12, "atol": 1e-12}
    for seed in range(3):  # the order of the examples does not matter
        rows = torch.randperm(len(signals), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(scorer(signals.subset(rows)), scores[rows], **tolerance)

    bare = signals  # what it declares is all that it reads
    for f in OBSERVED:
        if f not in scorer.needs:
            bare = without(bare, f)
    assert torch.equal(scorer(bare), scores)
    for need in needs | ({"paths"} if path else set()) | ({"readings"} if reading else set()):
        with pytest.raises(ValueError, match=need.rstrip("s")) as error:
            scorer(without(signals, need))
        assert name in str(error.value)
    if path:
        torch.testing.assert_close(scorer.along_path(signals).mean(0).double(), scores.double())


def documentation(cls) -> str:
    return f"{inspect.getmodule(cls).__doc__}\n{cls.__doc__}"


def check_scorer_documentation(name: str):
    text = documentation(scorers[name])
    assert re.search(r"\bhigh", text, re.I), "say which way the score points"
    assert re.search(r"\bhard|picked sooner", text, re.I), "say which way the score points"
    assert re.search(r"\b(19|20)\d\d\b", text), "name the paper and its year"
    assert "Differs" in text, "say what differs from the paper, or that nothing does"


def check_selector(selector):
    name = selector.name
    assert isinstance(selector.needs, frozenset) and selector.needs <= {"embeddings"}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for n in (1, 2, 3, 7, 24):
        g = torch.Generator().manual_seed(n)
        embeddings = torch.randn(n, 4, generator=g)
        for scores in (torch.randn(n, generator=g), torch.zeros(n, dtype=torch.float64)):
            kept = scores.clone(), embeddings.clone()
            for k in range(n + 1):
                picks = selector(scores, k, torch.Generator().manual_seed(k), embeddings)
                assert picks.dtype == torch.int64 and picks.shape == (k,), f"k={k} of {n}: {picks}"
                assert (picks.diff() > 0).all(), "not sorted or not unique"
                assert not k or (0 <= picks[0] and picks[-1] < n)
                again = selector(scores, k, torch.Generator().manual_seed(k), embeddings)
                assert torch.equal(picks, again), "the same generator, other picks"
            assert torch.equal(picks, torch.arange(n)), "k = n is everybody"
            assert torch.equal(scores, kept[0]) and torch.equal(embeddings, kept[1]), "changed in place"
            for k in (-1, n + 1):
                with pytest.raises(ValueError, match=rf"k={k} must be in"):
                    selector(scores, k, g, embeddings)
    assert torch.equal(before[0], torch.get_rng_state()), "global torch seed touched"
    assert (before[1] == np.random.get_state()[1]).all(), "global numpy seed touched"
    if selector.needs:
        with pytest.raises(ValueError, match=f"'{name}' needs embeddings"):
            selector(torch.zeros(5), 2, torch.Generator())


def check_selector_documentation(cls):
    text = documentation(cls)
    assert re.search(r"\b(19|20)\d\d\b", text), "name the paper and its year"
    assert re.search(r"\b(hard|easy|easiest|hardest|scores are not)", text, re.I), "say how it reads a score"
    assert "Differs" in text, "say what differs from the paper, or that nothing does"
