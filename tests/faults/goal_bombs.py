"""R18: files that are small and promise, or unpack to, very much are refused with a reason, in bounded memory.

Each is read in a process of its own that may take one gigabyte more than it had; reading it at all would take more. The
usual library reads the same file under the same limit.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import soundfile
import spoiled
import torch
from goal_hostile import forge
from PIL import Image
from pyarrow import parquet
from result import Result

from selfsup.cli.run_metrics import read_log
from selfsup.kernel import saving, state
from selfsup.kernel.config import read_toml
from selfsup.kernel.errors import SelfsupError
from selfsup.plugins.common.corpus import Corpus
from selfsup.plugins.common.vocabulary import Vocabulary
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.modalities.image import Image as Images
from selfsup.plugins.modalities.text import Text

LIMIT = 1 << 30  # bytes more than the process had
LARGE = LIMIT // 2  # as the option data.max_memory
Bomb = tuple[str, Callable[[], Any], Callable[[], Any] | None]  # name, how the product reads it, how others do


def measure(work: Path, full: bool) -> Iterator[Result]:
    work.mkdir(parents=True, exist_ok=True)
    for kind in (photos, sounds, tables, numbers, brackets):
        (work / kind.__name__).mkdir()
        yield tried(kind.__name__, list(kind(work / kind.__name__, full)), kind.__doc__ or "")


def tried(kind: str, bombs: list[Bomb], about: str) -> Result:
    good, peak, slowest, wrong, usual = 0, 0.0, 0.0, [], []
    for name, read, other in bombs:
        said, more, seconds = alone(read)
        good += said.startswith("refused")
        wrong += [] if said.startswith("refused") else [f"{name}: {said}"]
        peak, slowest = max(peak, more), max(slowest, seconds)
        if other:
            said, more, _ = alone(other)
            usual.append(f"{name} {said.partition(':')[0]}{f', {more:.0f} MB' if said == 'read' else ''}")
    figure = f"{good} of {len(bombs)} refused, at most {peak:.0f} MB more memory and {slowest:.1f} s"
    figure = "; ".join([figure, *wrong])
    return Result("R18", about.rstrip(".").lower(), len(bombs), good, figure, "; ".join(usual))


def alone(read: Callable[[], Any]) -> tuple[str, float, float]:
    """What reading gives in a process with little memory: (refused: why, read, or how it ended; MB more; seconds)."""
    ours, theirs = os.pipe()
    began = time.perf_counter()
    if (child := os.fork()) == 0:
        with suppress(BaseException):
            said = _limited(read)
            os.write(theirs, said.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(theirs)
    _, status, used = os.wait4(child, 0)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    more, _, said = said.partition(" ")
    if os.WIFSIGNALED(status):
        return f"crashed by signal {os.WTERMSIG(status)}", used.ru_maxrss / 1024, time.perf_counter() - began
    return said, float(more), time.perf_counter() - began


def _limited(read: Callable[[], Any]) -> str:
    before = _status("VmHWM")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + LIMIT,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        read()
        said = "read"
    except SelfsupError as cause:
        said = f"refused: {cause}"
    except MemoryError:
        said = "out of memory"
    except BaseException as cause:
        said = (
            f"refused by {type(cause).__name__}: {cause}"[:200]
            if read.__name__ == "other"
            else f"{type(cause).__name__}: {cause}"
        )
        said = "out of memory" if "memory" in str(cause).lower() else said
    return f"{(_status('VmHWM') - before) / 1e6:.0f} {said}"


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def photos(work: Path, full: bool) -> Iterator[Bomb]:
    """Pictures of billions of pixels."""
    side = 60_000
    row = zlib.compress(bytes(1 + 3 * side), 9)

    def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
        body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(body)

    jpeg = bytearray(spoiled.picture(0, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\xf0\0\0" + bytes(6) + b"\x2c" + bytes(4)
    gif += struct.pack("<HH", 65_535, 65_535) + b"\0\x02\x02\x44\x01\0\x3b"
    bmp = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, *[0] * 6)
    files = {
        "PNG of 3.6 billion": png(side, side, (b"IDAT", row)),
        "PNG with a text of 100 MB": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))),
        "JPEG of 4.2 billion": bytes(jpeg),
        "GIF of 4.3 billion": gif,
        "BMP of 3.6 billion": bmp + bytes(100),
        "PPM of 10 billion": b"P6 100000 100000 255\n" + bytes(100),
    }
    if full:
        packed = zlib.compressobj(9)
        lines = b"".join(packed.compress(bytes(1 + 3 * 13_000)) for _ in range(13_000)) + packed.flush()
        files["PNG of 169 million"] = png(13_000, 13_000, (b"IDAT", lines))
        out = io.BytesIO()
        Image.new("RGB", (16_383, 16_383)).save(out, "WEBP", lossless=True, quality=0, method=0)
        files["WebP of 268 million"] = out.getvalue()
    for name, data in files.items():
        yield name, lambda data=data: Images().read(data), lambda data=data: np.asarray(Image.open(io.BytesIO(data)))


def sounds(work: Path, full: bool) -> Iterator[Bomb]:
    """Sounds of hours, and headers that promise them."""
    files = {}
    for name, rate, seconds in (("FLAC of 70 minutes", 8_000, 4_200), ("FLAC of 400 million samples", 192_000, 2_100)):
        if full or rate == 8_000:
            path = work / f"{rate}.flac"
            with soundfile.SoundFile(path, "w", rate, 1, format="FLAC") as file:
                for _ in range(seconds // 60):
                    file.write(np.zeros(60 * rate, np.int16))
            files[name] = path.read_bytes()
    wav = bytearray(spoiled.sound(0, "WAV"))
    files["WAV that promises 2 GB"] = bytes(wav[:40]) + struct.pack("<I", 2_000_000_000) + bytes(wav[44:])
    files["WAV of 4 GHz"] = bytes(wav[:24]) + struct.pack("<I", 4_000_000_000) + bytes(wav[28:])
    flac = bytearray(spoiled.sound(0, "FLAC"))
    flac[21] = flac[21] & 0xF0 | 0x0F  # the upper bits of the number of samples
    flac[22:26] = b"\xff" * 4
    files["FLAC that promises 2^36 samples"] = bytes(flac)
    for name, data in files.items():
        yield name, lambda data=data: Audio().read(data), lambda data=data: soundfile.read(io.BytesIO(data))


def tables(work: Path, full: bool) -> Iterator[Bomb]:
    """Tables and tars that unpack to gigabytes."""

    def opened(path: Path) -> Callable[[], Any]:
        return lambda: spoiled.opened(path, work / "cache", Text, max_memory=LARGE)

    def packed(path: Path, parts: Iterator[bytes]) -> Path:
        with gzip.open(path, "wb", 9) as file:
            for part in parts:
                file.write(part)
        return path

    size = 20 if full else 1
    line = b'{"text": "' + bytes(100).replace(b"\0", b"a") * 10_000 + b'"}\n'
    many = packed(work / "rows.jsonl.gz", (line for _ in range(size * 100)))
    yield f"jsonl.gz of {size / 10:g} GB", opened(many), lambda: gzip.decompress(many.read_bytes())
    one = packed(work / "one.jsonl.gz", (b"a" * 10_000_000 for _ in range(size * 10)))
    yield "jsonl.gz of one line", opened(one), None
    comma = packed(work / "rows.csv.gz", (b"text\n" + b"a" * 10_000_000 for _ in range(size * 10)))
    yield "csv.gz", opened(comma), None
    path = work / "plain.parquet"
    schema = pa.schema([("text", pa.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(size * 5):
            writer.write_table(pa.table({"text": ["a" * 10_000] * 4_000}, schema))
    yield f"parquet of {size / 5:g} GB", opened(path), lambda: parquet.read_table(path)
    same = work / "same.parquet"
    value = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), ["a" * 100_000])
    parquet.write_table(pa.table({"text": value}), same, store_schema=False)
    yield "parquet that repeats a value, 2 GB", opened(same), lambda: parquet.read_table(same)
    tar = work / "a.tar"
    spoiled.shard(tar, {"a.txt": b"a"})
    head = bytearray(tar.read_bytes())
    head[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (256 + sum(head[:148]) + sum(head[156:512]))
    tar.write_bytes(head)
    yield "tar with a member of 2^40 bytes", opened(tar), None


def numbers(work: Path, full: bool) -> Iterator[Bomb]:
    """Headers of tensors and arrays that lie."""

    def header(facts: Any, length: int | None = None) -> bytes:
        text = json.dumps(facts).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    sharded = json.dumps({"a": {"saved_offsets": [1 << 40]}})
    lies = {
        "a header of 2^40 bytes": header({}, 1 << 40),
        "a header of 120 MB": header({f"{'a' * 1000}{n}": one for n in range(120_000)} if full else {}, 120_000_000),
        "2^62 values": header({"a": {**one, "shape": [1 << 62]}}) + bytes(4),
        "overlapping tensors": header({"a": one, "b": one}) + bytes(4),
        "a part from 2^40 on": header({"a": one, "__metadata__": {"DCP_SHARDING_INFO": sharded}}) + bytes(4),
    }
    for number, (name, content) in enumerate(lies.items()):
        folder = saving.save(work / str(number), 1, {"model": {"a": torch.ones(1)}, "optimizer": {}}, {})
        forge(folder, "model.safetensors", content)
        yield f"safetensors: {name}", lambda folder=folder: state.load(folder), None
    tokens = work / "tokens"
    tokens.mkdir()
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1099511627776), }".ljust(117) + b"\n"
    (tokens / "documents.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text)
    facts = {"tokenizer": "", "samples": 1, "max_bytes": 1}
    (tokens / "corpus.json").write_text(json.dumps(facts))
    yield "npy of 2^41 values", lambda: Corpus(tokens), lambda: np.load(tokens / "documents.npy")
    words = json.dumps(
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 2**31, "b": 0}, "unk_token": "a"}}
    )
    yield "tokenizer.json with an id of 2^31", lambda: Vocabulary(words), None


def brackets(work: Path, full: bool) -> Iterator[Bomb]:
    """Brackets within brackets, 100,000 deep."""
    deep = "[" * 100_000 + "]" * 100_000
    rows = work / "rows.jsonl"
    rows.write_text('{"text": ' + deep + "}\n")
    yield "jsonl", lambda: spoiled.opened(rows, work / "cache"), lambda: pyarrow.json.read_json(rows)
    (work / "rows.json").write_text(deep)
    yield "json", lambda: spoiled.opened(work / "rows.json", work / "cache"), lambda: json.loads(deep)
    (work / "run.toml").write_text(f"x = {deep}")
    yield "run.toml", lambda: read_toml(work / "run.toml"), None
    (work / "large.toml").write_text("# nothing\n" * 2_000_000)
    yield "run.toml of 20 MB", lambda: read_toml(work / "large.toml"), None
    (work / "metrics.jsonl").write_text(deep + "\n" + '{"step": ' + "9" * 400 + ', "loss": 1}\n' + deep)
    yield "metrics.jsonl", lambda: _none(read_log(work / "metrics.jsonl").time), None
    folder = saving.save(work / "c", 1, {"model": {"a": torch.ones(1)}, "optimizer": {}}, {})
    forge(folder, "state.json", deep.encode())
    yield "state.json", lambda: state.load(folder), None
    other = saving.save(work / "d", 1, {"model": {"a": torch.ones(1)}, "optimizer": {}}, {})
    (other / "manifest.json").write_text(deep)
    yield "manifest.json", lambda: state.load(other), None


def _none(found: Any) -> None:
    """What is passed over with nothing said, as it is made anew or a line among others, counts as refused."""
    if found is None:
        raise SelfsupError("it was passed over")
