"""nt_xent against equation 1 of SimCLR, pair by pair; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast import contrast
from selfsup.triton_ops.contrast_nt_xent import nt_xent, nt_xent_reference


def views(count, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, width, generator=g, dtype=torch.float64), dim=-1) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_it_is_the_mean_of_equation_1_over_all_views(count, temperature):
    a, b = views(count)
    z, total = torch.cat([a, b]), 0.0
    for i in range(2 * count):
        scores = [float(z[i] @ z[k]) / temperature for k in range(2 * count)]
        rest = sum(math.exp(s) for k, s in enumerate(scores) if k != i)
        total -= math.log(math.exp(scores[(i + count) % (2 * count)]) / rest)
    expected = pytest.approx(total / (2 * count), rel=1e-12, abs=1e-14)
    assert nt_xent(a, b, temperature=temperature).item() == expected
    assert nt_xent_reference(a, b, temperature=temperature).item() == expected


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_vectors_of_any_length_count_as_unit_ones(device, gradients_of, kind):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, 5, generator=g).to(device, kind).mul_(4).requires_grad_() for _ in range(2))
    found = gradients_of(partial(nt_xent, temperature=0.2, normalize=True), (a, b))
    true = gradients_of(partial(nt_xent_reference, temperature=0.2, normalize=True), (a, b))
    for got, want in zip(found, true, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11 if kind == torch.float64 else 1e-4, atol=1e-6)
    by_hand = nt_xent_reference(a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True), temperature=0.2)
    torch.testing.assert_close(found[0], by_hand.detach(), rtol=1e-5, atol=1e-6)
    assert abs(float((found[1] * a.detach()).sum())) < 1e-5, "a longer vector is no nearer"


def test_the_general_form_gives_the_same():
    a, b = views(6)
    z, ids = torch.cat([a, b]), torch.arange(6).repeat(2)
    losses, nearest = contrast(z, torch.cat([b, a]), z, ids, ids, temperature=0.2)
    assert losses.mean().item() == pytest.approx(nt_xent(a, b, temperature=0.2).item(), rel=1e-12)
    similarities = (z @ z.T).fill_diagonal_(-2)
    assert torch.equal(nearest, similarities.argmax(1) == torch.arange(12).roll(6))


def test_views_that_do_not_pair_are_named():
    a, b = views(3)
    with pytest.raises(ContractError, match=r"a and b must be \[N, D\], \[N, D\], and are \[3, 5\], \[2, 5\]"):
        nt_xent(a, b[:2], temperature=0.1)
    with pytest.raises(ContractError, match=r"a temperature must be above 0, and is -0.1"):
        nt_xent(a, b, temperature=-0.1)
    with pytest.raises(ContractError, match="nothing to contrast"):
        nt_xent(a[:0], b[:0], temperature=0.1)
