"""Pictures and curves as people see them: PNG without a library, enlarging without blur, envelopes of long curves.

PNG: https://www.w3.org/TR/png-3/, 8 bits a channel, no interlacing, no filter.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [H, W, 3]
Curve = np.ndarray[Any, Any]  # [N] float; NaN where there is nothing


def png(pixels: Pixels) -> bytes:
    """The file of a picture [H, W, 3]."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with the number of its filter: none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 9), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def fitted(pixels: Pixels, least: int, most: int) -> Pixels:
    """The picture with its longer side from `least` to `most` pixels where whole factors allow it: small ones are
    enlarged without blur, large ones averaged down.
    """
    longer = max(pixels.shape[:2])
    if longer < least:
        factor = min(-(-least // longer), max(1, most // longer))
        return pixels.repeat(factor, 0).repeat(factor, 1)
    factor = -(-longer // most)
    if factor == 1:
        return pixels
    height, width = (max(1, side // factor) for side in pixels.shape[:2])
    tall, wide = min(factor, pixels.shape[0]), min(factor, pixels.shape[1])
    blocks = pixels[: height * tall, : width * wide].reshape(height, tall, width, wide, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def envelope(curve: Curve, columns: int) -> tuple[Curve, Curve]:
    """The least and largest value in each of at most so many equal parts of a curve; NaN where one has nothing."""
    count = max(1, min(columns, len(curve)))
    edges = np.linspace(0, len(curve), count + 1).astype(int)
    low, high = np.full(count, np.nan), np.full(count, np.nan)
    for column, (first, last) in enumerate(pairwise(edges)):
        part = curve[first:last]
        part = part[np.isfinite(part)]
        if part.size:
            low[column], high[column] = part.min(), part.max()
    return low, high


def spans(there: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Where runs of true begin, and end before: [(0, 2)] of [True, True, False]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def limits(curve: Curve) -> tuple[float, float]:
    """Between which values a curve is drawn: shares of one from 0 to 1, others around 0 where they cross it."""
    known = curve[np.isfinite(curve)]
    if not known.size:
        return -1.0, 1.0
    low, high = float(known.min()), float(known.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low < 0 < high:
        most = max(-low, high)
        return -most, most
    return (low, high) if high > low else (low - 1, high + 1)
