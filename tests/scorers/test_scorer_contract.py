import pytest
from contract import check_scorer, check_scorer_documentation

from serpette.scorers import registry

BASELINES = """contextual_diversity el2n entropy forgetting grand herding k_center least_confidence margin
moderate optimisation_complexity random ssp""".split()


def test_every_baseline_is_found():
    assert set(BASELINES) <= set(registry)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", sorted(registry))
def test_scorer(name, task):
    check_scorer(name, task)


@pytest.mark.parametrize("name", sorted(registry))
def test_documentation(name):
    check_scorer_documentation(name)
