"""A document as it is stored -> text, or the reason why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsup.kernel.errors import BadSample, SelfsupError
from selfsup.kernel.loader import Source

MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs write before UTF-8
NULS = 1e-3  # share of zero bytes from which on a file is taken for a binary one


class Empty(BadSample):
    """There is nothing to read: an empty row of a table, a file of white space."""


def text_of(source: Source, number: int, name: str, max_bytes: int) -> str:
    """The text in a field of a sample of a source; whatever goes wrong is a BadSample."""
    try:
        return decode(source[number][name], max_bytes)
    except SelfsupError:  # a BadSample, or what no other sample would mend
        raise
    except Exception as cause:
        raise BadSample(f"{type(cause).__name__}: {cause}") from cause


def decode(stored: Any, max_bytes: int) -> str:
    """Read a text, a Path, the bytes of a file or {"bytes", "path"}; strict UTF-8, never empty."""
    if isinstance(stored, Mapping):
        stored = stored["bytes"] if stored.get("bytes") is not None else Path(stored.get("path") or "")
    if isinstance(stored, Path):
        stored = _file(stored, max_bytes)
    if isinstance(stored, str):
        text, size = stored, _size(stored)
    elif isinstance(stored, bytes | bytearray | memoryview):
        size = len(stored)
        text = "" if size > max_bytes else _utf8(bytes(stored))
    elif stored is None:
        raise Empty("there is no text: the field is empty")
    else:
        raise BadSample(f"text is stored as a str, a file or bytes; this is {type(stored).__name__}")
    if size > max_bytes:
        raise BadSample(f"{size:,} bytes are more than the {max_bytes:,} that modality.max_bytes allows")
    if not text or text.isspace():
        raise Empty("the text is empty" if not text else "the text is nothing but white space")
    if (zeros := text.count("\0")) > NULS * len(text):
        raise BadSample(f"this is no text: {zeros:,} of its {len(text):,} characters are NUL")
    return text


def _file(path: Path, max_bytes: int) -> bytes:
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise BadSample(f"{size:,} bytes are more than the {max_bytes:,} that modality.max_bytes allows")
        return path.read_bytes()
    except OSError as cause:
        raise BadSample(f"it cannot be opened: {cause.strerror or cause}") from None


def _utf8(data: bytes) -> str:
    try:
        return str(data.removeprefix(MARK), "utf-8")
    except UnicodeDecodeError as cause:
        offset = cause.start + len(MARK) * data.startswith(MARK)
        hint = ", and it begins as UTF-16 does" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadSample(f"invalid UTF-8 at byte {offset:,} (0x{data[offset]:02x}){hint}") from None


def _size(text: str) -> int:
    """Bytes in UTF-8; a text with half of a surrogate pair (from "\\ud800" in JSON) has none."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as cause:
        raise BadSample(f"character {cause.start:,} is half of a surrogate pair, which no UTF-8 can hold") from None
