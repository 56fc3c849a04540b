"""Heads: against scikit-learn, and that no example is judged by a head that saw it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from serpette.adviser.head import choose_penalty, cross_fitted, fit_head, folds_of, whitened


@pytest.fixture
def blobs():
    y = torch.arange(120) % 3
    return 0.5 * torch.eye(3)[y] @ torch.randn(3, 5) + torch.randn(120, 5), y


def test_logistic_head_is_that_of_scikit_learn(blobs):
    x, y = blobs
    W, b = fit_head(x, y, 3, 0.01)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000).fit(x, y)
    assert np.allclose((x @ W + b).softmax(1), theirs.predict_proba(x), atol=2e-3)


def test_ridge_head_is_that_of_scikit_learn(blobs):
    x, _ = blobs
    y = x[:, 0] + 3 + torch.randn(120)
    W, b = fit_head(x, y, 0, 0.1)
    theirs = Ridge(alpha=0.1 * len(x)).fit(x, y)
    assert np.allclose((x @ W + b)[:, 0], theirs.predict(x), atol=1e-4)


def test_folds_are_balanced_and_do_not_depend_on_the_order():
    ids, labels = np.arange(50).astype(str), torch.tensor([0] * 40 + [1] * 10)
    fold = folds_of(ids, labels, 5, seed=1)
    assert torch.bincount(fold).tolist() == [10] * 5
    assert torch.bincount(fold[40:]).tolist() == [2] * 5
    mixed = torch.randperm(50)
    assert torch.equal(folds_of(ids[mixed.numpy()], labels[mixed], 5, seed=1), fold[mixed])
    assert not torch.equal(folds_of(ids, labels, 5, seed=2), fold)


def test_duplicates_share_a_fold_and_folds_stay_even():
    ids, labels = np.arange(60).astype(str), torch.arange(60) % 3
    pairs = torch.arange(60) % 30
    fold_N = folds_of(ids, labels, 5, 0, pairs)
    assert torch.equal(fold_N[:30], fold_N[30:])
    for c in range(3):
        assert torch.bincount(fold_N[labels == c], minlength=5).tolist() == [4] * 5
    alone = folds_of(ids, labels, 5, 0, torch.arange(60))
    assert torch.equal(alone, folds_of(ids, labels, 5, 0))
    huge = torch.cat([torch.zeros(40, dtype=torch.long), torch.arange(1, 21)])  # more than a fold holds
    assert torch.bincount(folds_of(ids, None, 5, 0, huge)).tolist() == [12] * 5


def test_no_example_is_judged_by_a_head_that_saw_it(blobs):
    x, y = blobs
    noise = torch.randint(0, 3, (120,))
    seen = x @ (W := fit_head(x, noise, 3, 1e-5))[0] + W[1]
    unseen = cross_fitted(x, noise, 3, penalty=1e-5)
    assert (seen.argmax(1) == noise).float().mean() > 0.4 > (unseen.argmax(1) == noise).float().mean()
    by_hand = torch.empty(120, 3)
    ids, z = np.arange(120).astype(str), whitened(x)
    fold = folds_of(ids, y, 5, 0)
    for number in range(5):
        W, b = fit_head(z[fold != number], y[fold != number], 3, 1e-2)
        by_hand[fold == number] = z[fold == number] @ W + b
    assert torch.equal(cross_fitted(x, y, 3, penalty=1e-2), by_hand)


def test_whitened_features_are_the_principal_components():
    x = torch.randn(200, 6) * torch.tensor([1.0, 5, 1, 1, 1, 1])
    x[:, 5] = x[:, 0] + 0.01 * x[:, 5]
    z = whitened(x, components=5)
    gram = z.T @ z
    assert z.shape == (200, 5) and torch.allclose(gram, torch.diag(gram.diag()), atol=1e-3)
    assert z.square().sum(1).mean() == pytest.approx(1, rel=0.02)


def test_penalty_is_strong_where_there_is_nothing_to_learn(blobs):
    x, y = blobs
    ids = np.arange(120).astype(str)
    weak = choose_penalty(whitened(torch.eye(3)[y].repeat(1, 2) + 0.01 * torch.randn(120, 6)), y, 3, ids)
    targets = torch.randn(120)
    assert choose_penalty(whitened(x), targets, 0, ids) >= weak
