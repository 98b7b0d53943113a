"""clip_loss against the pseudocode of CLIP; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math
from functools import partial

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


IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
TEXTS = torch.tensor([[2.0, 1.0], [0.0, 1.0]])  # logits [[2, 0], [1, 1]]


def test_smoothed_labels_by_hand(device):
    """0.9 + 0.05 of each target is the pair's, and 0.05 another's."""
    rows = math.log(math.e**2 + 1) - (0.95 * 2 + 0.05 * 0) + math.log(2 * math.e) - (0.95 + 0.05)
    columns = math.log(math.e**2 + math.e) - (0.95 * 2 + 0.05 * 1) + math.log(1 + math.e) - (0.95 * 1 + 0.05 * 0)
    image, text = IMAGES.to(device), TEXTS.to(device)
    assert clip_loss(image, text, 1.0, label_smoothing=0.1).item() == pytest.approx((rows + columns) / 4, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_options_are_as_exact_as_torchs(device, as_exact_as_torch, share, normalize, kind):
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        vectors = (torch.randn(17, 10, generator=g).to(device, kind).requires_grad_() for _ in range(2))
        return (
            *vectors,
            torch.full((1,), 5.0, device=device, dtype=torch.promote_types(kind, torch.float32)).requires_grad_(),
        )

    options = {"label_smoothing": share, "normalize": normalize}
    slack = 1e-13 if kind == torch.float64 else 1e-6
    op, reference = partial(clip_loss, **options), partial(clip_loss_reference, **options)
    as_exact_as_torch(op, reference, draw, slack=slack, seeds=2)


def test_with_the_whole_target_spread_nothing_pulls_a_pair(gradients_of):
    """Each logit then has the same target: of equal logits, the loss is log 2 and the gradient 0."""
    image, text = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    loss, gradient = gradients_of(lambda x, y: clip_loss(x, y, 2.0, label_smoothing=1.0), (image, text))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert gradient.abs().max() < 1e-6


def test_more_than_the_whole_target_is_named():
    with pytest.raises(ContractError, match=r"label_smoothing must be from 0 to 1, and is 1\.5"):
        clip_loss(IMAGES, TEXTS, 1.0, label_smoothing=1.5)


def test_a_pair_alone_is_found():
    assert clip_loss(torch.ones(1, 3), torch.ones(1, 3), 10.0).item() == 0
    assert clip_loss(torch.ones(1, 3), torch.ones(1, 3), 10.0, label_smoothing=0.1).item() == pytest.approx(0, abs=1e-5)


def test_images_without_texts_are_named():
    with pytest.raises(ContractError, match=r"image and text must be \[N, D\], \[N, D\], and are \[3, 5\], \[2, 5\]"):
        clip_loss(torch.ones(3, 5), torch.ones(2, 5), 1.0)
