"""Colours against Pillow, the standard library's colorsys and kornia."""

from __future__ import annotations

import colorsys
from itertools import permutations

import kornia.enhance
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from selfsup.plugins.common import augment, augment_colour

FACTORS = [0.2, 0.7, 1.0, 1.4, 1.8]


def picture(seed: int = 0, side: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8))


def alone(kind: int, factor: float, x: torch.Tensor) -> torch.Tensor:
    """One distortion of x [B, C, H, W], the others idle."""
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(x), 1)
    factors[:, kind] = factor
    order = torch.tensor([[kind, *(k for k in range(4) if k != kind)]]).expand(len(x), -1)
    return augment_colour.jitter(x.clone(), *augment_colour.plan_jitter(factors, order))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("kind", "enhance"),
    [
        (augment_colour.BRIGHTNESS, ImageEnhance.Brightness),
        (augment_colour.CONTRAST, ImageEnhance.Contrast),
        (augment_colour.SATURATION, ImageEnhance.Color),
    ],
)
def test_blends_equal_pillow(kind: int, enhance: type, factor: float) -> None:
    x = picture()
    ours = alone(kind, factor, x[None] / 255)[0] * 255
    pillow = enhance(Image.fromarray(x.permute(1, 2, 0).numpy())).enhance(factor)
    theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    assert (ours - theirs).abs().max() <= 2  # Pillow rounds the grey image and its mean, then the result


@pytest.mark.parametrize("factor", FACTORS)
def test_blends_equal_kornia(factor: float) -> None:
    x = torch.rand(2, 3, 9, 9)
    close = {"rtol": 0, "atol": 1e-5}
    ours = alone(augment_colour.BRIGHTNESS, factor, x)
    torch.testing.assert_close(ours, kornia.enhance.adjust_brightness_accumulative(x, factor), **close)
    ours = alone(augment_colour.CONTRAST, factor, x)
    torch.testing.assert_close(ours, kornia.enhance.adjust_contrast_with_mean_subtraction(x, factor), **close)
    ours = alone(augment_colour.SATURATION, factor, x)
    torch.testing.assert_close(ours, kornia.enhance.adjust_saturation_with_gray_subtraction(x, factor), **close)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_equals_colorsys(turn: float) -> None:
    """All corners, edges and greys of the colour cube, and colours inside it."""
    level = torch.tensor([0.0, 0.25, 0.5, 1.0])
    cube = torch.cartesian_prod(level, level, level)  # [64, 3]
    colours = torch.cat([cube, torch.rand(64, 3), torch.full((1, 3), 0.3)])
    ours = augment_colour.turn_hue(colours.T[None, :, None].clone(), torch.tensor([turn]))[0, :, 0].T
    for colour, got in zip(colours.double().tolist(), ours, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*colour)
        expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v))
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


def test_hue_equals_kornia_sample_by_sample() -> None:
    x, turn = torch.rand(4, 3, 9, 9), torch.tensor([-0.2, 0.0, 0.1, 0.5])
    theirs = kornia.enhance.adjust_hue(x, 2 * torch.pi * turn)
    torch.testing.assert_close(augment_colour.turn_hue(x, turn), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("hosted", [True, False])
def test_every_order_is_kept(hosted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 24 orders in one batch against the four distortions applied one after the other."""
    monkeypatch.setattr(augment, "hosted", lambda x: hosted)
    orders = list(permutations(range(4)))
    x = torch.rand(1, 3, 8, 8).repeat(24, 1, 1, 1)
    factors = torch.tensor([1.7, 1.6, 0.3, 0.15])
    ours = augment_colour.jitter(x.clone(), *augment_colour.plan_jitter(factors.expand(24, -1), torch.tensor(orders)))
    for order, got in zip(orders, ours, strict=True):
        expected = x[:1]
        for kind in order:
            expected = alone(kind, float(factors[kind]), expected)
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-5)
    assert len({tuple(y.flatten().tolist()) for y in ours}) == 24


def test_factors_are_each_samples_own() -> None:
    x = torch.rand(2, 3, 8, 8)
    factors = torch.tensor([[0.5, 1.3, 0.2, 0.1], [1.5, 0.4, 1.9, -0.2]])
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    both = augment_colour.jitter(x.clone(), *augment_colour.plan_jitter(factors, order))
    for i in range(2):
        one = augment_colour.jitter(x[i : i + 1], *augment_colour.plan_jitter(factors[i : i + 1], order[i : i + 1]))
        torch.testing.assert_close(both[i], one[0], rtol=0, atol=1e-6)


def test_one_channel_has_no_colour_to_lose() -> None:
    x = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(alone(augment_colour.SATURATION, 0.1, x), x)
    assert torch.equal(alone(augment_colour.HUE, 0.3, x), x)
    assert torch.equal(augment_colour.without_colour(x.clone()), x)
    torch.testing.assert_close(alone(augment_colour.BRIGHTNESS, 0.5, x), x * 0.5)


def test_grey_equals_pillow() -> None:
    x = picture()
    theirs = torch.from_numpy(np.array(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L")))
    ours = augment_colour.without_colour(x[None] / 255)[0] * 255
    assert (ours - theirs).abs().max() <= 0.51
    assert torch.equal(ours[0], ours[2])


def test_solarize_inverts_the_bright_half() -> None:
    x = torch.tensor([0.0, 0.49, 0.51, 0.75, 1.0])
    torch.testing.assert_close(augment_colour.solarize(x), torch.tensor([0.0, 0.49, 0.49, 0.25, 0.0]))


def test_normalise() -> None:
    x = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(augment_colour.normalise(x.clone(), mean, std), expected)
    assert torch.equal(augment_colour.normalise(x.clone(), None, None), x)
