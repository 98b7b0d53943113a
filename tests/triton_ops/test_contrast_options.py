"""What the losses share: unit vectors, and the mean of all logits without them; each loss's file tries the rest."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast_options import above_mean, check_share, inverse, unit


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unit_vectors_are_made_in_full_precision(kind):
    x = (200 * torch.randn(9, 700, generator=torch.Generator().manual_seed(0))).to(kind)  # |x|^2 overflows 16 bits
    found = unit(x)
    assert found.dtype == kind
    assert torch.equal(found, F.normalize(x.double() if kind == torch.float64 else x.float(), dim=-1).to(kind))


def test_a_vector_of_zeros_stays_so_and_has_a_finite_gradient():
    x = torch.zeros(1, 3, requires_grad=True)
    y = unit(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("beside", [False, True])
def test_it_is_above_the_mean_of_all_logits(beside):
    rows, keys = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, margin = torch.tensor(2.0, dtype=torch.float64), 0.3
    logits = scale * (rows @ keys.T)
    near = logits.diagonal() - scale * margin
    whole = (
        torch.cat([near[:, None], logits], 1) if beside else logits - scale * margin * torch.eye(5, dtype=torch.float64)
    )
    found = above_mean(near, rows, keys, scale, margin=margin, group=None, beside=beside)
    torch.testing.assert_close(found, near - whole.mean(1), rtol=1e-12, atol=1e-14)


def test_what_is_no_temperature_and_no_share_is_named():
    assert inverse(0.5) == 2
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ContractError, match="a temperature must be above 0"):
            inverse(wrong)
        with pytest.raises(ContractError, match="label_smoothing must be from 0 to 1"):
            check_share(wrong - 1)
