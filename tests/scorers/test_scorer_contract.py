import pytest
from contract import check_scorer, check_scorer_documentation

from serpette.scorers import registry

BASELINES = """aum contextual_diversity craig dual el2n entropy facility_location forgetting glister
grad_match grand graph_cut herding k_center least_confidence margin moderate moso
optimisation_complexity random ssp""".split()


def test_every_baseline_is_found():
    assert set(BASELINES) <= set(registry)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", sorted(registry))
def test_scorer(name, task):
    check_scorer(name, task)


@pytest.mark.parametrize("name", sorted(n for n, cls in registry.items() if "causal-lm" in cls.tasks))
def test_scorer_of_causal_language_models(name):
    check_scorer(name, "causal-lm")


@pytest.mark.parametrize("name", sorted(registry))
def test_documentation(name):
    check_scorer_documentation(name)
