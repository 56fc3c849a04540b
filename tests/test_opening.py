"""Which task and classes the labels have, found or as the user says."""

import datasets
import pytest
import torch

from serpette.opening import labelled, opened


def rows(labels):
    return datasets.Dataset.from_dict({"x": [[float(i)] for i in range(len(labels))], "label": labels})


def test_the_task_is_found_by_the_labels():
    assert labelled(rows([0, 2, 1]), None)[1:] == ("classification", ["0", "1", "2"])
    assert labelled(rows([0.5, 1.0]), None)[1:] == ("regression", [])
    data, task, classes = labelled(rows(["b", "a"]), None)
    assert (data["label"][:], task, classes) == ([1, 0], "classification", ["a", "b"])


def test_a_given_classification_has_whole_floats_for_classes():
    assert labelled(rows([0.0, 1.0, 2.0]), "classification")[1:] == ("classification", ["0", "1", "2"])
    found = opened(torch.nn.Linear(1, 2), rows([0.0, 1.0] * 4), task="classification")
    assert found.task == "classification" and found.classes == ["0", "1"]
    with pytest.raises(ValueError, match="label=0.5 .* must be a class index"):
        labelled(rows([0.0, 0.5]), "classification")


def test_a_given_regression_has_any_numbers_for_targets():
    data = rows(list(range(-3, 4)))
    assert labelled(data, "regression") == (data, "regression", [])
    with pytest.raises(ValueError, match="label=-3 .* must be at least 0"):
        labelled(data, None)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_given_task_needs_a_label_column(task):
    with pytest.raises(ValueError, match="no label column found; columns: x"):
        labelled(rows([1, 2]).remove_columns("label"), task)
