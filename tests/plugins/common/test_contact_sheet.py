"""The sheet shows every sample under its captions, and texts keep their marks without colours."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.common.contact_sheet import CURVE, plain, sheet
from selfsup.plugins.common.seen import Seen

COLOURS = [(200, 30, 40), (20, 160, 60), (30, 60, 220)]


def block(colour, height=8, width=8):
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


def places(image, colour):
    """Rows and columns of the pixels of a colour: (top, left, bottom, right)."""
    found = np.argwhere((np.asarray(image) == colour).all(-1))
    return (*found.min(0).tolist(), *(found.max(0) + 1).tolist())


def test_samples_are_rows_and_captions_columns():
    seen = Seen(["a", "b"], {"left": [block(COLOURS[0]), block(COLOURS[1])], "right": [block(COLOURS[2])] * 2})
    image = sheet("title", seen)
    first, second, right = (places(image, colour) for colour in COLOURS)
    for top, left, bottom, side in (first, second):
        assert (bottom - top, side - left) == (96, 96)
    assert first[1] == second[1]
    assert first[2] < second[0]
    assert right[1] > first[3]
    assert (right[0], right[2]) == (first[0], second[2])


def test_small_pictures_are_enlarged_without_blur():
    checks = np.zeros((4, 4, 3), np.uint8)
    checks[::2, ::2] = COLOURS[0]
    image = np.asarray(sheet("t", Seen(["a"], {"c": [checks]})))
    top, left, *_ = places(image, COLOURS[0])
    np.testing.assert_array_equal(image[top : top + 96, left : left + 96], checks.repeat(24, 0).repeat(24, 1))


def test_a_curve_has_a_band_where_it_has_nothing():
    curve = np.sin(np.arange(4800) / 20)
    curve[1200:2400] = np.nan
    image = sheet("t", Seen(["a"], {"c": [curve]}))
    top, left, bottom, right = places(image, (0xD6, 0xD9, 0xDE))
    assert (right - left, bottom - top) == (CURVE[0] // 4, CURVE[1])
    blue = np.argwhere((np.asarray(image) == (0x25, 0x63, 0xA8)).all(-1))[:, 1]
    assert not ((blue >= left) & (blue < right)).any()
    assert {blue.min() < left, blue.max() > right} == {True}


@pytest.mark.parametrize("curve", [np.zeros(0), np.full(9, np.nan), np.ones(1), np.zeros(100_000)])
def test_odd_curves_have_a_place(curve):
    sheet("t", Seen(["a"], {"c": [curve]}))


def test_texts_stand_beside_pictures():
    words = "many words that fill the line and the next " * 30
    image = sheet("t", Seen(["p" * 500], {"picture": [block(COLOURS[0])], "text": [[(words, ""), ("x", "hidden")]]}))
    assert image.height > 250
    assert image.width < 600


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ([("a", ""), (" b ", "hidden"), ("c", "guess")], "a [b] <c>"),
        ([("the", ""), (" [MASK]", "hidden"), (" [MASK] [MASK]", "hidden")], "the [MASK] [MASK] [MASK]"),
        ([(" ", "hidden")], " "),
        ([("a", "of another kind")], "[a]"),
    ],
)
def test_marks_are_brackets_around_words(value, text):
    assert plain(value) == text


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "PIL":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"pip install 'selfsup\[image\]'"):
        sheet("t", Seen(["a"], {"c": [block(COLOURS[0])]}))
