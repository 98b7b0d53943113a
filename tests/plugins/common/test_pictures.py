"""Pictures against Pillow, curves against what they are made of."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as pillow

from selfsup.plugins.common.pictures import envelope, fitted, limits, png, spans


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 20)])
def test_a_png_is_what_pillow_reads_back(shape):
    pixels = noise(*shape)
    with pillow.open(io.BytesIO(png(pixels))) as image:
        image.verify()
    with pillow.open(io.BytesIO(png(pixels))) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_small_pictures_are_enlarged_without_blur():
    pixels = noise(8, 4)
    large = fitted(pixels, 96, 192)
    assert large.shape == (96, 48, 3)
    np.testing.assert_array_equal(large[::12, ::12], pixels)
    np.testing.assert_array_equal(large[11::12, 11::12], pixels)
    assert fitted(noise(90, 90), 96, 100).shape == (90, 90, 3)  # twice as large would be too large


def test_large_pictures_are_averaged_down():
    assert fitted(noise(100, 180), 96, 192).shape == (100, 180, 3)
    pixels = noise(400, 300)
    small = fitted(pixels, 96, 192)
    assert small.shape == (133, 100, 3)
    np.testing.assert_array_equal(small[0, 0], pixels[:3, :3].reshape(9, 3).mean(0).round())
    assert fitted(noise(1, 1000), 96, 192).shape == (1, 166, 3)


def test_an_envelope_holds_every_value():
    curve = np.random.default_rng(0).normal(size=1003)
    low, high = envelope(curve, 100)
    edges = np.linspace(0, 1003, 101).astype(int)
    for column in range(100):
        part = curve[edges[column] : edges[column + 1]]
        assert (low[column], high[column]) == (part.min(), part.max())


def test_an_envelope_has_nothing_where_the_curve_has_nothing():
    curve = np.array([1.0, np.nan, np.nan, np.nan, 2.0, 3.0])
    low, high = envelope(curve, 3)
    np.testing.assert_array_equal(low, [1, np.nan, 2])
    np.testing.assert_array_equal(high, [1, np.nan, 3])
    np.testing.assert_array_equal(envelope(curve, 99)[0], curve)


@pytest.mark.parametrize(
    ("there", "runs"),
    [([], []), ([0, 0], []), ([1, 1, 0, 1], [(0, 2), (3, 4)]), ([0, 1, 1], [(1, 3)]), ([1], [(0, 1)])],
)
def test_runs(there, runs):
    assert spans(np.array(there, bool)) == runs


@pytest.mark.parametrize(
    ("curve", "between"),
    [
        ([0.1, 0.4, np.nan], (0, 1)),
        ([-3, 1], (-3, 3)),
        ([5, 9], (5, 9)),
        ([7, 7], (6, 8)),
        ([np.nan], (-1, 1)),
        ([0, 0], (0, 1)),
    ],
)
def test_between_which_values_a_curve_is_drawn(curve, between):
    assert limits(np.array(curve)) == between
