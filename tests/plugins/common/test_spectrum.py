"""Principal components against scikit-learn, effective rank against cases that are known."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.decomposition import PCA

from selfsup.plugins.common.spectrum import spectrum


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(60, 9), (7, 30)])
def test_components_are_those_of_scikit_learn(shape):
    x = noise(*shape) * torch.linspace(1, 3, shape[1]).double() + 5
    found, reference = spectrum(x), PCA().fit(x.numpy())
    known = min(shape[0] - 1, shape[1])
    wanted = torch.from_numpy(reference.explained_variance_ratio_)[:known]
    torch.testing.assert_close(found.explained[:known], wanted, rtol=1e-9, atol=1e-12)
    places = torch.from_numpy(reference.transform(x.numpy()))[:, :2]
    torch.testing.assert_close(found.places.abs(), places.abs(), rtol=1e-7, atol=1e-9)  # signs are free
    assert found.most == known


def test_the_effective_rank_counts_equal_directions():
    for rank in (1, 2, 5):
        x = noise(40, rank)
        axes, _ = torch.linalg.qr(x - x.mean(0))  # centred and orthonormal: all singular values are 1
        found = spectrum(axes @ torch.eye(rank, 8).double() + 3)
        assert found.rank == pytest.approx(rank, rel=1e-9)
        assert found.collapsed == (rank < 2)


def test_the_effective_rank_follows_its_equation():
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).double()
    x = torch.cat([x, -x])  # centred; its singular values are sqrt(2) times these
    p = [3 / 6.5, 2 / 6.5, 1 / 6.5, 0.5 / 6.5]
    assert spectrum(x).rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-9)


def test_samples_that_are_all_alike_have_no_directions():
    row = noise(1, 6).float()
    for x in (row.expand(9, -1), torch.zeros(9, 6), row.expand(9, -1) * (1 + 1e-7 * noise(9, 1).float())):
        found = spectrum(x)
        assert (found.rank, found.collapsed) == (0.0, True)
        assert found.explained.isfinite().all()
        assert not found.places.any()


def test_one_feature_is_no_collapse():
    found = spectrum(noise(20, 1))
    assert (found.most, found.collapsed) == (1, False)
    assert found.places[:, 1].abs().max() == 0
