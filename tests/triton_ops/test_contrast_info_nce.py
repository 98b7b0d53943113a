"""info_nce against cross-entropy by hand; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math

import pytest
import torch

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast_info_nce import info_nce, info_nce_reference

Q, K, QUEUE = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 7, 9))
LABELS = torch.tensor([6, 0, 0, 3])


def by_hand(negatives_of, temperature=0.7):
    losses = []
    for n, label in enumerate(LABELS.tolist()):
        true = float(Q[n] @ K[label]) / temperature
        others = sum(math.exp(float(Q[n] @ k) / temperature) for k in negatives_of(label))
        losses.append(math.log(math.exp(true) + others) - true)
    return losses


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_negatives_are_the_other_keys(f):
    expected = by_hand(lambda label: [k for m, k in enumerate(K) if m != label])
    assert f(Q, K, LABELS, temperature=0.7, reduction="none").tolist() == pytest.approx(expected, rel=1e-12)
    assert f(Q, K, LABELS, temperature=0.7, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-12)
    assert f(Q, K, LABELS, temperature=0.7).item() == pytest.approx(sum(expected) / 4, rel=1e-12)


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_with_a_queue_they_are_its_keys_alone(f):
    expected = by_hand(lambda label: QUEUE)
    found = f(Q, K, LABELS, temperature=0.7, queue=QUEUE, reduction="none")
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_without_labels_key_n_is_that_of_query_n():
    given = info_nce(Q, K, torch.arange(4), temperature=0.7)
    assert info_nce(Q, K, temperature=0.7) == given
    with pytest.raises(ContractError, match="7 queries need as many keys, and there are 4"):
        info_nce(K, Q, temperature=0.7)


def test_labels_of_no_key_are_named():
    with pytest.raises(ContractError, match=r"from 0 to 6, the last key, and are from 0 to 7"):
        info_nce(Q, K, LABELS + torch.tensor([1, 0, 0, 0]), temperature=0.7)
    with pytest.raises(ContractError, match=r"and are from -1 to 5"):
        info_nce(Q, K, LABELS - 1, temperature=0.7)
    with pytest.raises(ContractError, match=r"labels must be int64 \[N\] = \[4\], and are torch.int64 \[3\]"):
        info_nce(Q, K, LABELS[:3], temperature=0.7)
    with pytest.raises(ContractError, match=r"are torch.int32 \[4\]"):
        info_nce(Q, K, LABELS.int(), temperature=0.7)


def test_what_does_not_fit_is_named():
    with pytest.raises(ContractError, match=r"queries and queue must be \[N, D\], \[M, D\], .* \[4, 3\], \[9, 2\]"):
        info_nce(Q, K, LABELS, temperature=0.7, queue=QUEUE[:, :2])
    with pytest.raises(ContractError, match="no reduction 'avg'"):
        info_nce(Q, K, LABELS, temperature=0.7, reduction="avg")
