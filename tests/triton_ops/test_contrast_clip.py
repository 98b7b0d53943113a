"""clip_loss against the pseudocode of CLIP; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math

import pytest
import torch

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast_clip import clip_loss, clip_loss_reference


def test_it_is_the_mean_of_both_ways():
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    scores = [[2.5 * float(x @ y) for y in text] for x in image]
    by_row = [math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(scores)]
    columns = list(zip(*scores, strict=True))
    by_column = [math.log(sum(map(math.exp, column))) - column[i] for i, column in enumerate(columns)]
    expected = pytest.approx((sum(by_row) + sum(by_column)) / 10, rel=1e-12)
    assert clip_loss(image, text, 2.5).item() == expected
    assert clip_loss_reference(image, text, 2.5).item() == expected


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_learns_in_its_own_shape(shape):
    image, text = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.full(shape, 2.5, requires_grad=True)
    (ours,) = torch.autograd.grad(clip_loss(image, text, scale), scale)
    (theirs,) = torch.autograd.grad(clip_loss_reference(image, text, scale), scale)
    assert ours.shape == shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_pair_alone_is_found():
    assert clip_loss(torch.ones(1, 3), torch.ones(1, 3), 10.0).item() == 0


def test_images_without_texts_are_named():
    with pytest.raises(ContractError, match=r"image and text must be \[N, D\], \[N, D\], and are \[3, 5\], \[2, 5\]"):
        clip_loss(torch.ones(3, 5), torch.ones(2, 5), 1.0)
