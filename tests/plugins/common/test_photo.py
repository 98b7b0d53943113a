"""Decoding: every form a photo may be stored in, and every way it may be broken."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.kernel.errors import BadSample
from selfsup.plugins.common.photo import Photo, decode

LIMIT = 10_000_000


def picture(height: int = 40, width: int = 60, mode: str = "RGB") -> Image.Image:
    """A smooth picture whose corners differ: red grows to the right, green downwards."""
    down, across = np.mgrid[0:height, 0:width]
    rgb = np.stack([across * 255 // width, down * 255 // height, np.full_like(down, 90)], -1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(stored: Any, side: int = 32, channels: int = 3) -> Photo:
    return decode(stored, side, channels, LIMIT)


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(form: str, channels: int) -> None:
    photo = read(encoded(picture(), form), channels=channels)
    assert photo.size == (40, 60)
    assert photo.pixels.shape == (channels, 32, 32)
    assert photo.pixels.dtype == torch.uint8
    expected = picture(mode="RGB" if channels == 3 else "L").resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(expected)).reshape(32, 32, channels).permute(2, 0, 1)
    assert levels(photo.pixels, expected) <= (1 if form in ("PNG", "BMP", "TIFF", "PPM") else 24)


def test_sources(tmp_path: Path) -> None:
    """Path, text, bytes, both of a data set's fields, array and Pillow image are one photo."""
    data = encoded(picture(), "PNG")
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    first = read(data)
    sources = [path, str(path), bytearray(data), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in [*sources, np.asarray(picture()), picture()]:
        photo = read(source)
        assert torch.equal(photo.pixels, first.pixels)
        assert photo.size == (40, 60)


def test_a_pillow_image_stays_open_and_unchanged() -> None:
    image = picture()
    read(image)
    assert image.size == (60, 40)
    assert image.getpixel((0, 0)) == (0, 0, 90)


def test_arrays() -> None:
    grey = np.asarray(picture(mode="L"))
    assert torch.equal(read(grey).pixels, read(grey[:, :, None]).pixels)
    assert read(np.zeros((1, 1), np.uint8), side=4).pixels.shape == (3, 4, 4)
    clear = np.concatenate([np.asarray(picture()), np.zeros((40, 60, 1), np.uint8)], -1)
    assert (read(clear).pixels == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [8, 33])
def test_turned_upright_as_exif_says(orientation: int, side: int) -> None:
    """Stored so that showing it as the tag says gives the picture; also where a JPEG is decoded at a fraction."""
    upright = picture(48, 80)
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = read(encoded(image, "JPEG", exif=exif.tobytes(), quality=95, subsampling=0), side)
    assert photo.size == (48, 80)
    assert levels(photo.pixels, read(upright, side).pixels) <= 12


def test_large_jpegs_are_decoded_small_and_look_the_same() -> None:
    data = encoded(picture(1200, 1600), "JPEG", quality=95)
    photo = read(data)
    assert photo.size == (1200, 1600)
    assert levels(photo.pixels, read(picture(1200, 1600)).pixels) <= 4


def test_transparency_lies_over_white() -> None:
    image = picture(mode="RGBA")
    image.putalpha(0)
    assert (read(image).pixels == 255).all()
    image.putalpha(255)
    assert torch.equal(read(image).pixels, read(picture()).pixels)
    named = encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert (read(named).pixels == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert 126 <= int(read(half, channels=1).pixels.unique()) <= 128
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert (read(encoded(palette, "PNG", transparency=0)).pixels == 255).all()
    assert read(encoded(palette, "PNG")).pixels[:, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    data = encoded(Image.fromarray(np.tile(ramp, (32, 1))), "PNG")
    pixels = read(data, channels=1).pixels[0, 0]
    assert levels(pixels, torch.linspace(0, 255, 32)) <= 1


@pytest.mark.parametrize(
    "image", [Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 1 << 20), Image.new("I", (4, 4), -1)]
)
def test_pixels_without_a_white_are_refused(image: Image.Image) -> None:
    with pytest.raises(BadSample, match="no known white; convert the image to 8 or 16 bits"):
        read(image)


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted(mode: str) -> None:
    image = picture().convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8), (128, 128, 128))
    assert read(image).pixels.shape == (3, 32, 32)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read(data).pixels[:, 0, 0].tolist() == [255, 0, 0]


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def broken() -> dict[str, tuple[Any, str]]:
    jpeg, png = encoded(picture(400, 600), "JPEG"), encoded(picture(400, 600), "PNG")
    return {
        "empty": (b"", "the image is empty: 0 bytes"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "cannot be decoded: .*truncated"),
        "truncated png": (png[: len(png) // 2], "cannot be decoded: .*truncated"),
        "damaged png": (png[:60] + b"\xff" * (len(png) - 80) + png[-20:], "cannot be decoded"),
        "text": (b"hello, this is no image at all", r"this is no image \(JPEG, PNG, "),
        "header alone": (jpeg[:20], "this is no image|cannot be decoded"),
        "missing": ("/nowhere/photo.jpg", "no such file"),
        "too many pixels": (bomb(4000), r"4000 x 4000 pixels, more than the 10,000,000 that modality.max_pixels"),
        "bomb": (bomb(60_000), "more than the 10,000,000 pixels that modality.max_pixels allows"),
        "float array": (np.zeros((4, 4, 3)), r"uint8 \[height, width\].*this one is float64 \[4, 4, 3\]"),
        "channels first": (np.zeros((3, 5, 5), np.uint8), r"this one is uint8 \[3, 5, 5\]"),
        "empty array": (np.zeros((0, 4), np.uint8), r"this one is uint8 \[0, 4\]"),
        "number": (7, "this is a int"),
        "nothing": ({"bytes": None, "path": None}, "this is a NoneType"),
    }


@pytest.mark.parametrize("name", broken())
def test_broken_samples_say_why(name: str) -> None:
    stored, reason = broken()[name]
    with pytest.raises(BadSample, match=reason):
        read(stored)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadSample, match="the file is empty: 0 bytes"):
        read(tmp_path / "empty.jpg")
    with pytest.raises(BadSample, match="directory"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadSample, match="a device, not a file"):
        read(tmp_path / "pipe.png")


def test_a_program_in_place_of_a_photo_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(BadSample, match="this is no image"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\n%%EOF\n")


def test_broken_metadata_costs_no_photo() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff\xff\xff")
    assert read(data).size == (40, 60)
