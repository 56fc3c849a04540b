"""Scorers of both kinds together: each gets what it would get by itself, and costs what it costs."""

import numpy as np
import pytest
import torch

from serpette import scoring
from serpette.data import pruner
from serpette.data.scores import Scores
from serpette.scorers import registry
from serpette.types import Signals
from serpette.zoo import tiny

LORA = {"rank": 2, "alpha": 4}


def rows(n=12):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.rand(3, 32, 32, generator=generator), "label": i % 3} for i in range(n)]


def test_each_kind_is_scored_as_by_itself(tmp_path):
    model, data = tiny("vit"), rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    methods = [registry.make(name) for name in ("dlc", "tsa", "el2n")]
    scores = scoring.score(model, data, methods, lora=LORA, seed=3, out=tmp_path, progress=False)
    assert list(scores.values) == ["dlc", "tsa", "el2n"]
    plain = pruner.score(model, data, ["dlc", "el2n"], seed=3, progress=False)
    adapted = pruner.score(scoring.with_lora(model, LORA, 3), data, "tsa", seed=3, progress=False)
    for name in ("dlc", "el2n"):
        assert torch.equal(scores.values[name], plain.values[name])
    assert torch.equal(scores.values["tsa"], adapted.values["tsa"])
    assert torch.equal(scores.signals.embeddings, plain.signals.embeddings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    cost = scores.cost
    assert "warmup" not in cost["plain"]["seconds"] and "dlc" not in cost["lora"]["seconds"]
    for part in ("decoding", "unmasked"):
        assert cost["seconds"][part] == cost["plain"]["seconds"][part] + cost["lora"]["seconds"][part] > 0
    assert cost["seconds"]["warmup"] > 0 and cost["seconds"]["moments"] > 0
    held = Scores.load(tmp_path)
    assert list(held.values) == list(scores.values) and held.settings["lora"] == LORA
    assert torch.equal(held.values["tsa"], scores.values["tsa"])


def test_the_lora_follows_from_the_seed_and_leaves_the_generator():
    model = tiny("vit")
    state = torch.get_rng_state()
    one, same, other = (
        torch.cat(
            [p.flatten() for n, p in scoring.with_lora(model, LORA, seed).named_parameters() if "lora_" in n]
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_keeps_its_vocabulary(tied):
    model = tiny("llama")
    if tied:  # as SmolLM2's: a LoRA on the one would be lost on the other
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model = scoring.with_lora(model, LORA, 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and "lm_head" not in name for name in trained)
    assert len(trained) == 2 * 2 * 7, "q, k, v, o, gate, up, down of 2 layers"


def test_examples_that_one_kind_could_not_read_are_set_aside():
    def scores(name, ids, lost):
        signals = Signals(np.array(list(ids)), torch.zeros(len(ids), dtype=torch.int64), 1)
        values = {name: torch.tensor([float(i) for i in ids])}
        cost = {"seconds": {"decoding": 1.0, name: 2.0}, "passes": 1, "peak_bytes": len(ids)}
        places = torch.tensor([int(i) for i in ids])
        return Scores(
            signals,
            values,
            places,
            4,
            cost=cost,
            set_aside={lost: "why"},
            settings={"lora": 1},
            methods={name: 0},
        )

    joined = scoring._joined(scores("a", "023", "1"), scores("b", "013", "2"), ["b", "a"])
    assert joined.signals.ids.tolist() == ["0", "3"] and joined.rows.tolist() == [0, 3]
    assert list(joined.values) == ["b", "a"] and joined.values["b"].tolist() == [0, 3]
    assert joined.set_aside == {"1": "why", "2": "why"}
    assert joined.cost["seconds"] == {"decoding": 2.0, "a": 2.0, "b": 2.0} and joined.cost["peak_bytes"] == 3
    with pytest.raises(ValueError, match="no example could be read by all"):
        scoring._joined(scores("a", "0", "1"), scores("b", "1", "0"), ["a", "b"])
