"""Good files of every kind that data come in, ways to spoil them, and what the product and the usual libraries read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image
from pyarrow import parquet

from selfsup.kernel.errors import BadSample
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.modalities.image import Image as Images
from selfsup.plugins.modalities.text import Text
from selfsup.plugins.services.data import Data, Mixture

MODEL = (
    "modality.size=16 modality.patch=4 backbone.width=32 backbone.depth=1 backbone.heads=2 train.batch=8 "
    "data.workers=0 checkpoints.steps=2"
)
RATE = 16000


def picture(seed: int, form: str) -> bytes:
    draw = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(48), np.arange(64))[..., None] + draw.integers(0, 60, (48, 64, 3))
    out = io.BytesIO()
    Image.fromarray((smooth % 256).astype(np.uint8)).save(out, form)
    return out.getvalue()


def sound(seed: int, form: str) -> bytes:
    wave = 0.3 * np.sin(np.arange(8000) / 9) + 0.05 * np.random.default_rng(seed).standard_normal(8000)
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format=form)
    return out.getvalue()


MEDIA: dict[str, Callable[[int], bytes]] = {
    ".jpg": lambda seed: picture(seed, "JPEG"),
    ".png": lambda seed: picture(seed, "PNG"),
    ".wav": lambda seed: sound(seed, "WAV"),
    ".flac": lambda seed: sound(seed, "FLAC"),
}


def texts(seed: int, count: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [
        f"{number} " + " ".join(draw.choices(["sea", "tide", "calm", "full", "fair"], k=30)) for number in range(count)
    ]


def table(path: Path, seed: int) -> None:
    """A shard of texts, of the kind that the suffix names."""
    rows = texts(seed)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": rows}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".tar":
        shard(path, {f"{number}.txt": row.encode() for number, row in enumerate(rows)})
    else:
        path.write_bytes(lines)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit."""
    place, out = draw.randrange(8 * len(data)), bytearray(data)
    out[place // 8] ^= 1 << place % 8
    return bytes(out)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Of any length, and at least a byte short."""
    return data[: draw.randrange(len(data))]


def read(data: bytes, suffix: str) -> Any:
    """What the product makes of a file: an array, or the reason why it is none."""
    try:
        return np.asarray((Images(size=16, patch=4) if suffix in (".jpg", ".png") else Audio()).read(data)[0])
    except BadSample as why:
        return str(why)


def read_usual(data: bytes, suffix: str) -> Any:
    """What Pillow or soundfile makes of it; None where it refuses."""
    try:
        if suffix in (".jpg", ".png"):
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        return soundfile.read(io.BytesIO(data))[0]
    except Exception:
        return None


def alike(a: Any, b: Any) -> bool:
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the files in a folder."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def opened(path: Path, cache: Path, kind: Any = Text, share: float = 1.0, **options: Any) -> Mixture:
    """The data behind a path, as a run opens it."""
    found = Data(max_bad_fraction=share, cache=str(cache), **options).open_data([str(path)], {kind.field: kind()})
    assert isinstance(found, Mixture)
    return found


def passed(where: str) -> tuple[list[str], Counter[str]]:
    """The first pass of a stream of texts: the file of each place that cannot be used, and how many rows each gave."""
    found = Data(paths=[where], stream=8, max_bad_fraction=1.0).open_data([where], {"text": Text()})
    named: list[str] = []
    rows: Counter[str] = Counter()
    for item in takewhile(lambda item: item.mark[0] == 0, found.flows[0].read(0, None)):
        file = next(file for file in found.flows[0].shards if item.name.startswith(file))
        if isinstance(item.sample["text"], BadSample):
            named.append(file)
        else:
            rows[file] += 1
    return named, rows


def listed(run: Path) -> list[dict[str, Any]]:
    """What RUN/bad/samples.jsonl names."""
    path = run / "bad" / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(file, row or member) of each line."""
    return sorted((Path(row["path"]).name, row.get("row", row.get("member"))) for row in rows)
