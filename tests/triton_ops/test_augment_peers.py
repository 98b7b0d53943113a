"""augment against Pillow, kornia, the standard library's colorsys, and the weights written out by hand."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from selfsup.triton_ops.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, AugmentPlan, augment

kornia = pytest.importorskip("kornia", reason="it is what views are compared with")
gaussian_blur2d = kornia.filters.gaussian_blur2d

FACTORS = [0.2, 0.7, 1.0, 1.4, 1.8]
BOXES = [(0.0, 0.0, 64.0, 64.0), (3.25, 10.5, 20.0, 31.7), (40.0, 1.0, 24.0, 60.0), (63.0, 63.0, 1.0, 1.0)]


def photo(size, seed=0):
    """Noise on a smooth picture: [3, S, S] uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return torch.from_numpy((smooth + rng.integers(-40, 40, smooth.shape)).clip(0, 255).astype(np.uint8)).permute(
        2, 0, 1
    )


def whole(x):
    """The boxes of whole images."""
    return torch.tensor([[0.0, 0.0, *x.shape[2:]]]).repeat(len(x), 1)


def view(x, size=None, box=None, blur=1, **parts):
    """Views of x, whole unless there are boxes."""
    plan = {"box": whole(x) if box is None else box, **parts}
    return augment(x, AugmentPlan(**plan), size or x.shape[-1], blur=blur)


def alone(kind, factors, x):
    """One distortion of the jitter with each of the factors, on copies of x [1, 3, S, S]."""
    all_factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(factors), 1)
    all_factors[:, kind] = torch.tensor(factors)
    order = torch.tensor([[kind, *(k for k in range(4) if k != kind)]]).repeat(len(factors), 1)
    return view(x.expand(len(factors), -1, -1, -1), order=order, factors=all_factors)


def as_pillow(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def as_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("out", [16, 48, 64, 100])
def test_the_resize_equals_pillows(out):
    x = torch.stack([photo(64, seed) for seed in range(len(BOXES))])
    ours = view(x, out, torch.tensor(BOXES)) * 255
    for image, (top, left, height, width), y in zip(x, BOXES, ours, strict=True):
        box = (left, top, left + width, top + height)
        theirs = as_pillow(image).resize((out, out), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
        difference = (y - as_tensor(theirs)).abs()
        assert difference.max() <= 1.01  # Pillow rounds to whole levels twice
        assert difference.mean() < 0.5


def test_the_resize_is_the_weighted_sum_of_the_docstring():
    """Every weight by hand in float64, for a reduction and an enlargement at once."""
    x = torch.randint(256, (1, 1, 9, 9), dtype=torch.uint8)

    def matrix(start, length):
        scale = length / 4
        w = torch.zeros(4, 9, dtype=torch.float64)
        for o in range(4):
            for i in range(9):
                w[o, i] = max(0.0, 1 - abs(i + 0.5 - (start + (o + 0.5) * scale)) / max(scale, 1.0))
        return w / w.sum(1, keepdim=True)

    expected = matrix(1.3, 7.1) @ x[0, 0].double() @ matrix(4.0, 2.5).T / 255
    ours = view(x, 4, torch.tensor([[1.3, 4.0, 7.1, 2.5]]))
    torch.testing.assert_close(ours[0, 0].double(), expected, rtol=0, atol=1e-5)


def test_a_flip_mirrors_the_view():
    x = photo(20)[None].expand(2, -1, -1, -1)
    y = view(x, 8, torch.tensor([[2.0, 3.0, 11.0, 11.0]] * 2), flip=torch.tensor([False, True]))
    torch.testing.assert_close(y[1], y[0].flip(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(y[1], y[0])


@pytest.mark.parametrize(
    ("kind", "enhance", "adjust"),
    [
        (BRIGHTNESS, ImageEnhance.Brightness, kornia.enhance.adjust_brightness_accumulative),
        (CONTRAST, ImageEnhance.Contrast, kornia.enhance.adjust_contrast_with_mean_subtraction),
        (SATURATION, ImageEnhance.Color, kornia.enhance.adjust_saturation_with_gray_subtraction),
    ],
)
def test_blends_equal_pillows_and_kornias(kind, enhance, adjust):
    x = photo(24)
    for factor, ours in zip(FACTORS, alone(kind, FACTORS, x[None]), strict=True):
        pillow = as_tensor(enhance(as_pillow(x)).enhance(factor))
        assert (255 * ours - pillow).abs().max() <= 2  # Pillow rounds the grey image and its mean, then the result
        torch.testing.assert_close(ours, adjust(x[None] / 255, factor)[0], rtol=0, atol=1e-5)


TURNS = [-0.5, -0.2, 0.0, 0.07, 1 / 3, 0.5]


def test_the_hue_equals_colorsys():
    """All corners, edges and greys of the colour cube, and colours inside it."""
    level = torch.tensor([0, 64, 128, 255], dtype=torch.uint8)
    cube = torch.cartesian_prod(level, level, level)  # [64, 3]
    colours = torch.cat([cube, torch.randint(256, (36, 3), dtype=torch.uint8)])  # [100, 3]
    views = alone(HUE, TURNS, colours.T.reshape(1, 3, 10, 10)).flatten(2).mT  # [turns, 100, 3]
    for turn, found in zip(TURNS, views, strict=True):
        for colour, got in zip((colours.double() / 255).tolist(), found, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*colour)
            expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v))
            torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


def test_the_hue_equals_kornias():
    x = photo(9)[None]
    theirs = kornia.enhance.adjust_hue(x.expand(len(TURNS), -1, -1, -1) / 255, 2 * torch.pi * torch.tensor(TURNS))
    torch.testing.assert_close(alone(HUE, TURNS, x), theirs, rtol=0, atol=1e-4)


def test_grey_equals_pillows():
    x = photo(24)
    ours = view(x[None], greyed=torch.tensor([True]))[0] * 255
    theirs = torch.from_numpy(np.array(as_pillow(x).convert("L")))
    assert (ours - theirs).abs().max() <= 0.51
    assert torch.equal(ours[0], ours[2])


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (37, 9), (12, 1), (48, 23)])
def test_the_blur_equals_kornias(side, kernel):
    x = torch.stack([photo(side, seed) for seed in range(3)])
    sigma = torch.tensor([0.1, 0.9, 2.0])
    theirs = gaussian_blur2d(x / 255, (kernel, kernel), sigma[:, None].expand(-1, 2), border_type="reflect")
    torch.testing.assert_close(view(x, blur=kernel, sigma=sigma), theirs, rtol=0, atol=1e-5)


def test_solarising_inverts_the_bright_half():
    x = torch.tensor([0, 100, 127, 128, 200, 255], dtype=torch.uint8)[None, None, None].expand(1, 1, 6, 6)
    ours = view(x, solarized=torch.tensor([True]))[0, 0, 0] * 255
    torch.testing.assert_close(ours, torch.tensor([0.0, 100, 127, 127, 55, 0]), rtol=0, atol=1e-4)
