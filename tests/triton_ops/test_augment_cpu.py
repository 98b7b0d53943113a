"""The views on a CPU: samples in groups, of which each gets what it needs alone."""

from __future__ import annotations

import pytest
import torch

from selfsup.triton_ops import augment_cpu as module
from selfsup.triton_ops.augment import AugmentPlan, augment, augment_reference


def mixed(count):
    """All kinds of samples: (images, plan)."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 20, 20), generator=g, dtype=torch.uint8)
    u = torch.rand(count, 8, generator=g)
    order = torch.where(u[:, :1] < 0.8, torch.rand(count, 4, generator=g).argsort(1), -1)
    factors = torch.cat([0.2 + 1.6 * u[:, 1:4], u[:, 4:5] - 0.5], 1)
    box = torch.tensor([1.0, 2.0, 17.0, 16.0]).repeat(count, 1)
    sigma = torch.where(u[:, 5] < 0.5, 2 * u[:, 5] + 0.1, 0)
    return images, AugmentPlan(box, u[:, 6] < 0.5, order, factors, u[:, 7] < 0.3, sigma, u[:, 6] < 0.2)


@pytest.mark.parametrize("pixels", [1, 3 * 18**2, 2**16])
def test_groups_of_any_size_make_the_views_of_the_reference(monkeypatch, pixels):
    monkeypatch.setattr(module, "CHUNK", pixels)
    images, plan = mixed(40)
    got = augment(images, plan, 18, blur=5)
    torch.testing.assert_close(got, augment_reference(images, plan, 18, blur=5), rtol=0, atol=2e-5)


def test_chunks_cover_the_batch_once_and_keep_kinds_together():
    kind = torch.arange(1000) % 7
    order, parts = module.chunks(kind, 32 * 32)
    assert torch.cat([order[part] for part in parts]).sort().values.tolist() == list(range(1000))
    assert (kind[order].diff() >= 0).all()
    assert len(module.chunks(kind, 4096 * 4096)[1]) == 1000


@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True] * 3])
def test_only_changes_the_chosen(chosen):
    x, factor = torch.rand(3, 1, 2, 2), torch.tensor([2.0, 3.0, 4.0])
    before = x.clone()
    y = module.only(torch.tensor(chosen), lambda x, f: x.mul_(f[:, None, None, None]), x, factor)
    for i, change in enumerate(chosen):
        assert torch.equal(y[i], before[i] * factor[i] if change else before[i])


def test_an_image_as_it_is_costs_no_resize(monkeypatch):
    """And gives the bits that resizing gives, which it does where a sample beside it is cropped."""
    images = mixed(3)[0]
    box = torch.tensor([[0.0, 0.0, 20.0, 20.0]]).repeat(3, 1)
    box[2, 2] = 19.0
    among_others = augment(images, AugmentPlan(box), 20, (0.4,) * 3)
    monkeypatch.setattr(module, "resample", None)
    assert torch.equal(augment(images[:2], AugmentPlan(box[:2]), 20, (0.4,) * 3), among_others[:2])
