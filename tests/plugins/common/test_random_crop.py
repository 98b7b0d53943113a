"""Crop boxes against the random resized crop as everybody writes it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from selfsup.kernel.random import stream
from selfsup.plugins.common.random_crop import crop_boxes


def uniform(count: int, tries: int = 10, seed: int = 0) -> torch.Tensor:
    return stream(seed, "crop", torch.arange(count)).uniform(4, tries)


def reference_box(h: int, w: int, extent: tuple[float, float], u: np.ndarray) -> tuple[int, int, int, int]:
    """The random resized crop as everybody writes it, for given random numbers [4, tries]."""
    for share, shape, down, across in u.T:
        area = h * w * (extent[0] + (extent[1] - extent[0]) * share)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * shape)
        cw, ch = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            return int(down * (h - ch + 1)), int(across * (w - cw + 1)), ch, cw
    if w / h < 3 / 4:
        cw, ch = w, round(w / (3 / 4))
    elif w / h > 4 / 3:
        cw, ch = round(h * (4 / 3)), h
    else:
        cw, ch = w, h
    return (h - ch) // 2, (w - cw) // 2, ch, cw


@pytest.mark.parametrize(("h", "w"), [(375, 500), (500, 375), (32, 32), (8, 8), (1, 1), (10, 1000), (900, 7)])
@pytest.mark.parametrize("extent", [(0.08, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_boxes_are_those_of_the_random_resized_crop(h: int, w: int, extent: tuple[float, float]) -> None:
    count = 300
    u = uniform(count)
    boxes = crop_boxes(torch.full((count,), h), torch.full((count,), w), extent, u)
    expected = torch.tensor([reference_box(h, w, extent, row) for row in u.double().numpy()])
    # Half a pixel may round the other way in float32.
    differ = (boxes != expected).any(1).float().mean()
    assert differ < 0.02
    assert ((boxes - expected).abs() <= 1).all()
    top, left, ch, cw = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (ch >= 1).all()
    assert (cw >= 1).all()
    assert (top + ch <= h).all()
    assert (left + cw <= w).all()
    assert (boxes == boxes.round()).all()


def test_boxes_stay_inside_when_a_draw_is_almost_one() -> None:
    u = torch.full((1, 4, 10), 1 - 2.0**-24)
    u[:, :2] = 0.0  # the smallest, tallest crop
    box = crop_boxes(torch.tensor([60_001]), torch.tensor([60_001]), (0.001, 1.0), u)[0]
    assert box[0] + box[2] <= 60_001
    assert box[1] + box[3] <= 60_001


def test_areas_and_aspects_follow_the_law() -> None:
    """Shares of area and logarithms of aspect ratios against a sampler that uses another generator."""
    count, extent, h, w = 20_000, (0.08, 1.0), 375, 500
    boxes = crop_boxes(torch.full((count,), h), torch.full((count,), w), extent, uniform(count)).double()
    rng = random.Random(0)
    draws = (np.array([[rng.random() for _ in range(10)] for _ in range(4)]) for _ in range(10_000))
    other = torch.tensor([reference_box(h, w, extent, u) for u in draws]).double()
    for what in (
        lambda b: b[:, 2] * b[:, 3] / (h * w),
        lambda b: torch.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0] / h,
        lambda b: b[:, 1] / w,
    ):
        # Kolmogorov and Smirnov: 0.024 is passed by chance once in a thousand runs of other numbers.
        ours, theirs = what(boxes).sort().values, what(other).sort().values
        at = torch.cat([ours, theirs])
        shares = [torch.searchsorted(values, at, right=True) / len(values) for values in (ours, theirs)]
        assert (shares[0] - shares[1]).abs().max() < 0.024
