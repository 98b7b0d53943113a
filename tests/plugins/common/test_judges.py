"""kNN and the probe against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selfsup.plugins.common import judges
from selfsup.plugins.common.judges import knn, probe, split


def clusters(n, classes=5, width=12, noise=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + noise * torch.randn(n, width, generator=g), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (500, 0.1)])
def test_knn_equals_sklearn(k, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels = clusters(300)
    query, _ = clusters(70, seed=1)
    weigh = {"weights": lambda distance: np.exp((1 - distance) / temperature)}
    peer = KNeighborsClassifier(min(k, 300), metric="cosine", **weigh).fit(bank.double().numpy(), labels.numpy())
    guess = knn(bank, labels, query, k=k, temperature=temperature, chunk=32)
    assert guess.tolist() == peer.predict(query.double().numpy()).tolist()


def test_knn_by_hand():
    bank, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.1, 1]]), torch.tensor([2, 0, 0, 1])
    query = torch.tensor([[5.0, 0.0]])
    assert knn(bank, labels, query, k=3, temperature=0.07).tolist() == [2]  # e^(1/T) against e^(0.8/T)
    assert knn(bank, labels, query, k=3, temperature=100.0).tolist() == [2]  # all alike: the nearer one's class is kept
    assert knn(bank[1:], labels[1:], query, k=3, temperature=100.0).tolist() == [0]


def test_knn_keeps_small_temperatures_finite():
    bank, labels = clusters(50, noise=0.01)
    assert (knn(bank, labels, bank, k=5, temperature=1e-4) == labels).all()


def test_probe_equals_sklearn_at_the_c_it_chose():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, labels = clusters(300)
    query, truth = clusters(100, seed=1)
    said = probe(bank * 100 + 7, labels, query * 100 + 7)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=said.c, max_iter=1000)).fit(bank * 100 + 7, labels)
    assert said.converged
    assert said.guess.tolist() == peer.predict(query * 100 + 7).tolist()
    assert (said.guess == truth).float().mean() > 0.7


@pytest.mark.parametrize("extra", [0, 150])
def test_c_is_the_best_on_a_fifth_of_the_bank(extra):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, labels = clusters(200, noise=2.0)
    bank = torch.cat([bank, torch.randn(200, extra, generator=torch.Generator().manual_seed(2))], 1)
    inner, held = split(labels.numpy(), 0.2, seed=4)
    peers = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)) for c in judges.GRID]
    scores = [p.fit(bank[inner], labels[inner]).score(bank[held], labels[held]) for p in peers]
    assert min(scores) < max(scores)
    best = judges.GRID[scores.index(max(scores))]
    assert probe(bank, labels, bank[:7], seed=4).c == best
    assert probe(bank, labels, bank[:7] * 1000, seed=4).c == best  # whatever the query is


def test_a_probe_that_stopped_early_says_so():
    bank, labels = clusters(100)
    assert not probe(bank, labels, bank, steps=1).converged


def test_split_holds_every_class_in_proportion():
    labels = np.repeat([0, 3, 5, 7], [50, 10, 1, 2])
    first, second = split(labels, 0.2, seed=0)
    assert sorted([*first, *second]) == list(range(63))
    assert np.bincount(labels[second], minlength=8).tolist() == [10, 0, 0, 2, 0, 0, 0, 0]
    assert [part.tolist() for part in split(labels, 0.2, seed=0)] == [first.tolist(), second.tolist()]
    assert split(labels, 0.2, seed=1)[1].tolist() != second.tolist()
