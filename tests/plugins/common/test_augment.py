"""Geometry against Pillow, kornia and plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from PIL import Image

from selfsup.kernel.random import stream
from selfsup.plugins.common import augment


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
    boxes = augment.crop_boxes(torch.full((count,), h), torch.full((count,), w), extent, u)
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
    box = augment.crop_boxes(torch.tensor([60_001]), torch.tensor([60_001]), (0.001, 1.0), u)[0]
    assert box[0] + box[2] <= 60_001
    assert box[1] + box[3] <= 60_001


def test_areas_and_aspects_follow_the_law() -> None:
    """Shares of area and logarithms of aspect ratios against a sampler that uses another generator."""
    count, extent, h, w = 20_000, (0.08, 1.0), 375, 500
    boxes = augment.crop_boxes(torch.full((count,), h), torch.full((count,), w), extent, uniform(count)).double()
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


def photo(size: int, seed: int = 0) -> torch.Tensor:
    """Noise on a smooth picture: [3, S, S] uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return torch.from_numpy((smooth + rng.integers(-40, 40, smooth.shape)).clip(0, 255).astype(np.uint8)).permute(
        2, 0, 1
    )


BOXES = [(0.0, 0.0, 64.0, 64.0), (3.25, 10.5, 20.0, 31.7), (40.0, 1.0, 24.0, 60.0), (63.0, 63.0, 1.0, 1.0)]


@pytest.mark.parametrize("out", [16, 48, 64, 100])
def test_resample_equals_pillow(out: int) -> None:
    x = torch.stack([photo(64, seed) for seed in range(len(BOXES))])
    start, length = torch.tensor(BOXES)[:, :2], torch.tensor(BOXES)[:, 2:]
    rows, columns = (augment.taps(start[:, axis], length[:, axis], 64, out) for axis in (0, 1))
    ours = augment.resample(x, rows, columns)
    for image, box, y in zip(x, BOXES, ours, strict=True):
        top, left, h, w = box
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = pillow.resize(
            (out, out), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h), reducing_gap=None
        )
        difference = (y - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
        assert difference.max() <= 1.01  # Pillow rounds to whole levels twice
        assert difference.mean() < 0.5


def test_resample_is_the_weighted_sum_of_the_docstring() -> None:
    """Every weight by hand in float64, for a reduction and an enlargement at once."""
    x = torch.rand(1, 1, 9, 9)
    start, length, out = 1.3, 7.1, 4
    rows = augment.taps(torch.tensor([start]), torch.tensor([length]), 9, out)
    columns = augment.taps(torch.tensor([4.0]), torch.tensor([2.5]), 9, out)

    def matrix(start: float, length: float) -> torch.Tensor:
        scale = length / out
        w = torch.zeros(out, 9, dtype=torch.float64)
        for o in range(out):
            for i in range(9):
                w[o, i] = max(0.0, 1 - abs(i + 0.5 - (start + (o + 0.5) * scale)) / max(scale, 1.0))
        return w / w.sum(1, keepdim=True)

    expected = matrix(start, length) @ x[0, 0].double() @ matrix(4.0, 2.5).T
    torch.testing.assert_close(augment.resample(x, rows, columns)[0, 0].double(), expected, rtol=0, atol=1e-5)


def test_flip_mirrors_the_view() -> None:
    x = torch.rand(2, 3, 20, 20)
    start, length = torch.tensor([2.0, 2.0]), torch.tensor([11.0, 11.0])
    rows = augment.taps(start, length, 20, 8)
    columns = augment.taps(start, length, 20, 8, flip=torch.tensor([False, True]))
    y = augment.resample(x[:1].expand(2, -1, -1, -1), rows, columns)
    torch.testing.assert_close(y[1], y[0].flip(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(y[1], y[0])


def test_memory_order_does_not_matter() -> None:
    x = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    rows = augment.taps(torch.zeros(2), torch.full((2,), 12.0), 12, 7)
    by_columns = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(augment.resample(x, rows, rows), augment.resample(by_columns, rows, rows))


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (37, 9), (12, 1), (48, 23)])
def test_blur_equals_kornia(side: int, kernel: int) -> None:
    x, sigma = torch.rand(3, 3, side, side), torch.tensor([0.1, 0.9, 2.0])
    ours = augment.blur(x, augment.bands(augment.gaussian(sigma, kernel), side))
    theirs = gaussian_blur2d(x, (kernel, kernel), sigma[:, None].expand(-1, 2), border_type="reflect")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hosted", [True, False])
@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True] * 3])
def test_only_changes_the_chosen(chosen: list[bool], hosted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "hosted", lambda x: hosted)
    x, factor = torch.rand(3, 1, 2, 2), torch.tensor([2.0, 3.0, 4.0])
    before = x.clone()
    y = augment.only(torch.tensor(chosen), lambda x, f: x.mul_(f[:, None, None, None]), x, factor)
    for i, change in enumerate(chosen):
        assert torch.equal(y[i], before[i] * factor[i] if change else before[i])


def test_chunks_cover_the_batch_once_and_keep_kinds_together() -> None:
    kind = torch.arange(1000) % 7
    order, parts = augment.chunks(kind, 32 * 32)
    assert torch.cat([order[part] for part in parts]).sort().values.tolist() == list(range(1000))
    assert (kind[order].diff() >= 0).all()
    assert len(augment.chunks(kind, 4096 * 4096)[1]) == 1000
    assert augment.chunks(kind.to("meta"), 4096 * 4096)[1] == [slice(0, 1000)]
