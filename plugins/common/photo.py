"""Decode a photo to a small square of uint8 pixels, and say why where that cannot be done.

A photo becomes [C, S, S] uint8: turned upright as its EXIF says, transparency laid over
white, 16-bit grey brought to 8 bits, converted to RGB or grey, and squashed to a square with an antialiasing
filter. A JPEG that is much larger than the square is decoded at a half, quarter or eighth of its size, which
costs a fraction of the time. Of a file with several pictures the first is taken.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel.errors import BadSample

try:
    import PIL.Image as pillow
    from PIL import UnidentifiedImageError
except ModuleNotFoundError as cause:
    raise ModuleNotFoundError(
        "images are read with Pillow, which is not installed: pip install 'selfsup[image]'"
    ) from cause

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# By content, whatever the name says. Pillow knows forty more, of which EPS is a program that it would have Ghostscript
# run, and others are decoders that nobody looks after.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # its value -> whether rows and columns change places, and which of them then run backwards
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


class Photo(NamedTuple):
    """A decoded photo."""

    pixels: Tensor  # [C, S, S] uint8, in memory column by column: the order in which views are resampled
    size: tuple[int, int]  # height and width before it was squashed, upright


def decode(stored: Any, side: int, channels: int, max_pixels: int) -> Photo:
    """Read a path, bytes, {"bytes", "path"}, a uint8 array [H, W] or [H, W, C], or a Pillow image.

    Raises BadSample with the reason for a file that is missing, empty, truncated, damaged or no image, that has
    more than `max_pixels` pixels, or whose pixels have no known white (32-bit and floating point).
    """
    try:
        # Pillow warns of harmless oddities (metadata, palettes) and of many pixels, which are counted here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(stored) as image:
                return _squash(image, side, "RGB" if channels == 3 else "L", max_pixels)
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadSample(f"this is no image ({', '.join(FORMATS)}), or its first bytes are damaged") from None
    except pillow.DecompressionBombError:
        raise BadSample(f"the image has more than the {max_pixels:,} pixels that modality.max_pixels allows") from None
    except FileNotFoundError:
        raise BadSample("there is no such file") from None
    except Exception as cause:
        # A damaged file can break a decoder anywhere: OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadSample(f"the image cannot be decoded: {str(cause) or type(cause).__name__}") from cause


def _open(stored: Any) -> pillow.Image:
    """The image behind whatever a data set stores; its pixels are not decoded yet."""
    if isinstance(stored, Mapping):
        stored = stored.get("bytes") if stored.get("bytes") is not None else stored.get("path")
    if isinstance(stored, bytes | bytearray | memoryview):
        if not len(stored):
            raise BadSample("the image is empty: 0 bytes")
        return pillow.open(io.BytesIO(stored), formats=FORMATS)
    if isinstance(stored, str | os.PathLike):
        if os.path.exists(stored) and not os.path.isfile(stored):  # a pipe would be waited for
            raise BadSample("this is a directory or a device, not a file")
        if os.path.exists(stored) and not os.path.getsize(stored):
            raise BadSample("the file is empty: 0 bytes")
        return pillow.open(stored, formats=FORMATS)
    if isinstance(stored, np.ndarray):
        return _from_array(stored)
    if isinstance(stored, pillow.Image):
        return stored.copy()  # the caller's own stays open
    raise BadSample(f"an image is a path, bytes, a uint8 array or a Pillow image; this is a {type(stored).__name__}")


def _from_array(array: np.ndarray[Any, Any]) -> pillow.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        raise BadSample(
            f"an image array is uint8 [height, width] or [height, width, 1, 3 or 4 channels]; "
            f"this one is {array.dtype} {list(array.shape)}"
        )
    return pillow.fromarray(np.ascontiguousarray(array))


def _squash(image: pillow.Image, side: int, mode: str, max_pixels: int) -> Photo:
    """Decode, turn upright, convert and resize."""
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(
            f"the image has {width} x {height} pixels, more than the {max_pixels:,} that modality.max_pixels allows"
        )
    image.draft(mode, (side, side))  # only JPEG heeds it
    image.load()  # before the metadata, of which some formats decode the pixels and swallow what is wrong with them
    swap, backwards = UPRIGHT.get(_orientation(image), (False, ()))
    image = _convert(image, mode)
    # Three times the side before the last, exact reduction cannot be told from reducing exactly at once.
    factors = max(1, image.width // (3 * side)), max(1, image.height // (3 * side))
    image = image.reduce(factors) if max(factors) > 1 else image
    rows = torch.from_numpy(np.array(image)).reshape(1, image.height, image.width, -1)
    # The same filter as Pillow's BILINEAR, to within one level, in a quarter of the time.
    pixels = F.interpolate(rows.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", antialias=True)[0]  # [C, S, S]
    if swap:
        pixels, height, width = pixels.transpose(1, 2), width, height
    columns = pixels.flip(backwards).permute(2, 0, 1).contiguous()  # [S, C, S]
    return Photo(columns.permute(1, 2, 0), (height, width))


def _orientation(image: pillow.Image) -> int:
    """How the camera was held, as EXIF counts it; broken metadata costs no photo."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _convert(image: pillow.Image, mode: str) -> pillow.Image:
    """To "RGB" or "L", over white where it is transparent."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut at 255 rather than scale
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadSample("32-bit integer pixels have no known white; convert the image to 8 or 16 bits")
        image = pillow.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadSample("floating-point pixels have no known white; convert the image to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = pillow.new("RGBA", seen.size, "white")
        image.alpha_composite(seen)
    return image.convert(mode)
