"""sigmoid_loss against the equation of SigLIP; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast_sigmoid import sigmoid_loss, sigmoid_loss_reference


def test_it_is_the_sum_over_pairs_for_each_image():
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    total = 0.0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            logit = 2.5 * float(x @ y) - 1.5
            total += math.log1p(math.exp(-logit if i == j else logit))
    expected = pytest.approx(total / 5, rel=1e-12)
    assert sigmoid_loss(image, text, 2.5, -1.5).item() == expected
    assert sigmoid_loss_reference(image, text, 2.5, -1.5).item() == expected


def test_at_the_papers_start_many_small_losses_are_not_rounded_away():
    """At a bias of -10 the loss of most pairs is 1e-5 or so, and there are 40,000 of them."""
    image, text = torch.nn.functional.normalize(torch.randn(2, 200, 64), dim=-1)
    whole = sigmoid_loss_reference(image.double(), text.double(), 10.0, -10.0).item()
    assert sigmoid_loss(image, text, 10.0, -10.0).item() == pytest.approx(whole, rel=2e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_vectors_of_any_length_count_as_unit_ones(device, as_exact_as_torch, kind):
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        vectors = (torch.randn(17, 10, generator=g).to(device, kind).requires_grad_() for _ in range(2))
        exact = {"device": device, "dtype": torch.promote_types(kind, torch.float32), "requires_grad": True}
        return *vectors, torch.tensor(10.0, **exact), torch.tensor(-10.0, **exact)

    slack = 1e-13 if kind == torch.float64 else 1e-6
    op, reference = partial(sigmoid_loss, normalize=True), partial(sigmoid_loss_reference, normalize=True)
    as_exact_as_torch(op, reference, draw, slack=slack, seeds=2)


def test_images_without_texts_are_named():
    with pytest.raises(ContractError, match=r"image and text must be \[N, D\], \[N, D\], and are \[3, 5\], \[2, 5\]"):
        sigmoid_loss(torch.ones(3, 5), torch.ones(2, 5), 1.0, 0.0)
