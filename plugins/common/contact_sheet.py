"""Samples on one picture: a row each, a column for every caption. Drawn with Pillow.

Small pictures are enlarged without blur and large ones averaged down, so that each has 96 to 224 pixels; a curve is
drawn as an envelope, with a grey band where it has nothing; a text is wrapped, its hidden parts in brackets.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfsup.kernel.errors import DataError

from .pictures import envelope, fitted, limits, spans
from .seen import Seen

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

LEAST, MOST = 96, 224  # pixels of a picture's longer side
CURVE = (480, 84)
TEXT = 320  # pixels of its width
LINES = 12  # of a text
GAP = 12
PAPER, INK, SOFT, BLUE, GREY = "#ffffff", "#1c2430", "#66707f", "#2563a8", "#d6d9de"
BRACKETS = {"": ("", ""), "hidden": ("[", "]"), "guess": ("<", ">")}


def sheet(title: str, seen: Seen) -> Image:
    """The picture; DataError where Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError:
        raise DataError("drawing a sheet needs Pillow, which is not installed: pip install 'selfsup[image]'") from None
    rows = [[_cell(value) for value in seen.of(place).values()] for place in range(len(seen.names))]
    widths = [max(cell.width for cell in column) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    captions = ["\n".join(_wrapped(caption, w, 13)) for caption, w in zip(seen.shown, widths, strict=True)]
    head = 44 + 17 * max(text.count("\n") + 1 for text in captions)
    names = [_shortened(name, sum(widths) + GAP * (len(widths) - 1)) for name in seen.names]
    width = max(GAP + sum(w + GAP for w in widths), int(_font(17).getlength(title)) + 2 * GAP)
    page = Image.new("RGB", (width, head + sum(h + 22 + GAP for h in heights)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 10), title, INK, _font(17))
    lefts = [GAP + sum(widths[:n]) + GAP * n for n in range(len(widths))]
    for left, text in zip(lefts, captions, strict=True):
        draw.multiline_text((left, 38), text, INK, _font(13))
    top = head
    for name, row, height in zip(names, rows, heights, strict=True):
        draw.text((GAP, top), name, SOFT, _font(12))
        for left, cell in zip(lefts, row, strict=True):
            page.paste(cell, (left, top + 18))
        top += height + 22 + GAP
    return page


def _cell(value: Any) -> Image:
    """What stands in a row under a caption."""
    from PIL import Image

    if isinstance(value, np.ndarray) and value.ndim == 3:
        return Image.fromarray(np.ascontiguousarray(fitted(value, LEAST, MOST)))
    return _curve(value) if isinstance(value, np.ndarray) else _text(value)


def _curve(curve: np.ndarray[Any, Any]) -> Image:
    from PIL import Image, ImageDraw

    width, height = CURVE
    cell = Image.new("RGB", CURVE, "#f3f4f6")
    draw = ImageDraw.Draw(cell)
    low, high = envelope(np.asarray(curve, float), width)
    wide = width / len(low)
    bottom, top = limits(curve)
    scale = (height - 5) / (top - bottom)
    for first, last in spans(np.isnan(low)):
        draw.rectangle((first * wide, 0, last * wide - 1, height), GREY)
    for first, last in spans(np.isfinite(low)):
        before = None
        for place in range(first, last):
            x, over, under = (place + 0.5) * wide, 2 + (top - high[place]) * scale, 2 + (top - low[place]) * scale
            draw.line((before or (x, over)) + (x, over), BLUE, 1)
            draw.line((x, over, x, under + 1), BLUE, 1)
            before = (x, under)
    return cell


def _text(value: str | Sequence[tuple[str, str]]) -> Image:
    from PIL import Image, ImageDraw

    lines = [line for part in plain(value).splitlines() or [""] for line in _wrapped(part, TEXT, 13)]
    lines = [*lines[:LINES], "…"] if len(lines) > LINES else lines
    cell = Image.new("RGB", (TEXT, 17 * len(lines) + 4), PAPER)
    ImageDraw.Draw(cell).multiline_text((0, 0), "\n".join(lines), INK, _font(13))
    return cell


def plain(value: str | Sequence[tuple[str, str]]) -> str:
    """A text without colours: [hidden], <guess>."""
    if isinstance(value, str):
        return value
    return "".join(_bracketed(text, *BRACKETS.get(mark, BRACKETS["hidden"])) for text, mark in value)


def _bracketed(text: str, left: str, right: str) -> str:
    """Brackets around the words, not around the space before them; "[MASK]" has its own."""
    words = text.strip()
    if not words or (words.startswith(left) and words.endswith(right)):
        return text
    before = text[: len(text) - len(text.lstrip())]
    return f"{before}{left}{words}{right}{text[len(before) + len(words) :]}"


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines that are about `width` pixels long at most."""
    letter = _font(size).getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    return textwrap.wrap(text, max(8, int(width / letter))) or [""]


def _shortened(name: str, width: int) -> str:
    """A name that fits; of a path the end says more than the beginning."""
    if _font(12).getlength(name) <= width:
        return name
    while name and _font(12).getlength("…" + name) > width:
        name = name[1:]
    return "…" + name


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
