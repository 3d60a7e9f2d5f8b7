"""The probes against scikit-learn's."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from trainer.probe import fit_linear, knn_scores


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return x[:900], y[:900], x[900:1300], y[900:1300]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_votes_as_scikit_learn_does(digits, k):
    x, y, queries, _ = digits
    unit = torch.nn.functional.normalize(x, dim=1).numpy()
    vote: Any = lambda d: np.exp((1 - d**2 / 2) / 0.07)  # noqa: E731  (of unit vectors: 1 - d^2 / 2 is the cosine)
    peer = KNeighborsClassifier(k, weights=vote, algorithm="brute").fit(unit, y.numpy())
    votes = knn_scores(x, y, queries, 10, k=k, chunk=37)
    expected = peer.predict_proba(torch.nn.functional.normalize(queries, dim=1).numpy())
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-3)


def test_knn_with_fewer_features_than_neighbours(digits):
    x, y, queries, _ = digits
    assert knn_scores(x[:3], y[:3], queries, 10, k=20).count_nonzero(dim=1).max() <= 3
    with pytest.raises(ValueError, match="at least one"):
        knn_scores(x[:0], y[:0], queries, 10)


def test_linear_probe_finds_scikit_learns_optimum(digits):
    x, y, queries, truth = digits
    l2 = 1e-2
    probe = fit_linear(x, y, 10, l2=l2)
    scaler = StandardScaler().fit(x.numpy())
    # scikit-learn minimises C * sum(loss) + ||W||^2 / 2, so C = 1 / (l2 * N)
    peer = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(scaler.transform(x.numpy()), y.numpy())
    expected = peer.predict_proba(scaler.transform(queries.numpy()))
    torch.testing.assert_close(probe(queries).softmax(1), torch.tensor(expected, dtype=torch.float64), atol=2e-3, rtol=0.0)
    assert (probe(queries).argmax(1) == truth).float().mean() > 0.9
