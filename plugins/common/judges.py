"""Judges of frozen features: weighted nearest neighbours, and a linear probe.

kNN (Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination",
https://arxiv.org/abs/1805.01978, section 3.4; k = 20, T = 0.07 as in Caron et al. 2021, "DINO",
https://arxiv.org/abs/2104.14294): the k neighbours of a query vote with

    w_i = exp(cos(q, b_i) / T)

The probe is a multinomial logistic regression on standardised features, whose strength of regularisation C
is chosen on a part of the bank; the query is seen once, at the end.

Shapes: N bank, M query, D features, K classes, k neighbours.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from selfsup.kernel.errors import DataError
from selfsup.kernel.random import stream

Indices = np.ndarray[Any, Any]
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@torch.no_grad()
def knn(
    bank: Tensor, bank_labels: Tensor, query: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """The label that the neighbours in the bank [N, D] give each query [M, D]: [M] int64.

    Labels are >= 0. A tie goes to the smaller label.
    """
    bank, classes = normalize(bank.float(), dim=1), int(bank_labels.max()) + 1
    guesses = []
    for start in range(0, len(query), chunk):
        part = normalize(query[start : start + chunk].float(), dim=1)  # [chunk, D]
        cosine, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [chunk, k]
        votes = torch.zeros(len(part), classes, device=bank.device)  # [chunk, K]
        # Relative to the nearest, so that small temperatures do not overflow; the order of votes is the same.
        votes.scatter_add_(1, bank_labels[index], ((cosine - cosine[:, :1]) / temperature).exp())
        guesses.append(votes.argmax(1))
    return torch.cat(guesses)


def need_sklearn() -> None:
    """DataError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise DataError("the probe needs scikit-learn: pip install 'selfsup[eval]'") from None


class Probe(NamedTuple):
    """What a probe says."""

    guess: Tensor  # [M] int64
    c: float  # the chosen C
    converged: bool


def probe(bank: Tensor, bank_labels: Tensor, query: Tensor, *, seed: int = 0, steps: int = 1000) -> Probe:
    """The label that a linear classifier, trained on the bank [N, D], gives each query [M, D].

    C is the best of `GRID` on a fifth of the bank (the smaller on a tie); then all of the bank is used.
    """
    need_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(x: Tensor, y: Tensor, c: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=steps)).fit(x.numpy(), y.numpy())

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ConvergenceWarning)
        inner, held = (torch.from_numpy(part) for part in split(bank_labels.numpy(), 0.2, seed))
        c = GRID[2]
        if len(held) and len(np.unique(bank_labels[inner])) > 1:
            fits = {c: fit(bank[inner], bank_labels[inner], c) for c in GRID}
            c = max(fits, key=lambda c: fits[c].score(bank[held].numpy(), bank_labels[held].numpy()))
        raised.clear()
        guess = fit(bank, bank_labels, c).predict(query.numpy())
    return Probe(torch.from_numpy(guess), c, not any(issubclass(w.category, ConvergenceWarning) for w in raised))


def split(labels: Indices, share: float, seed: int) -> tuple[Indices, Indices]:
    """Indices of two parts that hold every class in proportion; the second has `share` of each class [N] int.

    The same for the same labels and seed. A class of one sample stays in the first part.
    """
    order = stream(seed, "split", torch.arange(len(labels))).bits(1)[:, 0].argsort(stable=True).numpy()
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        second[members[: min(round(share * len(members)), len(members) - 1)]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)
