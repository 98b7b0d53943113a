"""R11: what is wrong with the data is left out, counted and named, up to a share; digests find what still decodes.

A sample that cannot be decoded is skipped and stands once in RUN/bad/samples.jsonl, however often the run was resumed;
a row of a table costs no other row, a shard no other shard. A flipped bit that still decodes is found where a
SHA256SUMS lies beside the data, and nowhere else: what the usual readers make of it is measured beside.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import runs
import spoiled
from pyarrow import parquet
from result import Result


def measure(work: Path, full: bool) -> Iterator[Result]:
    work.mkdir(parents=True, exist_ok=True)
    yield from truncated(60 if full else 8)
    yield nans()
    yield from flipped(work / "flips", 200 if full else 12)
    yield from rows_of_tables(work / "rows", 20 if full else 3)
    yield from streams(work / "streams", 20 if full else 3)
    yield photos_in_a_run(work / "photos", 3 if full else 2)
    if full:
        yield rows_in_a_run(work / "texts")
        yield too_many(work / "many")
        yield vanishing(work / "gone")


def truncated(count: int) -> Iterator[Result]:
    """Files that are cut at any length."""
    for suffix, make in spoiled.MEDIA.items():
        draw, refused, other, usual = random.Random(0), 0, 0, 0
        for seed in range(count):
            whole = make(seed)
            data = spoiled.cut(whole, draw)
            found, stock = spoiled.read(data, suffix), spoiled.read_usual(data, suffix)
            refused += isinstance(found, str)
            # What is cut off may be nothing that is decoded: a checksum, a mark of the end.
            other += spoiled.alike(found, spoiled.read(whole, suffix))
            usual += stock is not None and not spoiled.alike(stock, spoiled.read_usual(whole, suffix))
        figure = (
            f"{refused} refused with a reason, {other} of the same values, {count - refused - other} of other values"
        )
        stock = f"{usual} of {count} of other values or shorter, without a word"
        yield Result("R11", f"{suffix} cut", count, refused + other, figure, stock)


def nans() -> Result:
    """NaN and infinity among the values of a sound."""
    wave, bad = np.zeros(8000, np.float32), 0
    for value in (np.nan, np.inf, -np.inf):
        spoilt = wave.copy()
        spoilt[17] = value
        found = _read_array(spoilt)
        bad += isinstance(found, str) and "NaN or infinite" in found
    return Result("R11", "NaN or infinity in sound", 3, bad, f"{bad} of 3 refused with a reason")


def _read_array(wave: Any) -> Any:
    from selfsup.kernel.errors import BadSample
    from selfsup.plugins.modalities.audio import Audio

    try:
        return Audio().read(wave)
    except BadSample as why:
        return str(why)


def flipped(work: Path, count: int) -> Iterator[Result]:
    """One bit in every third file of a folder with digests: those and no others are refused."""
    from selfsup.plugins.modalities.audio import Audio
    from selfsup.plugins.modalities.image import Image
    from selfsup.plugins.modalities.text import Text

    for suffix in (*spoiled.MEDIA, ".parquet", ".jsonl", ".tar"):
        folder, draw, silent = work / suffix[1:], random.Random(1), 0
        folder.mkdir(parents=True)
        for seed in range(3 * count):
            path = folder / f"{seed:04}{suffix}"
            if suffix in spoiled.MEDIA:
                path.write_bytes(spoiled.MEDIA[suffix](seed))
            else:
                spoiled.table(path, seed)
        spoiled.write_sums(folder)
        kind = Text if suffix not in spoiled.MEDIA else Image if suffix in (".jpg", ".png") else Audio
        false = len(spoiled.opened(folder, work / "cache", kind).refused)
        chosen = sorted(folder.glob(f"*{suffix}"))[::3]
        for path in chosen:
            whole = path.read_bytes()
            data = spoiled.flip(whole, draw)
            path.write_bytes(data)
            silent += _silent(whole, data, suffix)
        began = time.perf_counter()
        refused = {one.path for one in spoiled.opened(folder, work / "cache", kind).refused}
        took = time.perf_counter() - began
        found = len(refused & set(map(str, chosen)))
        figure = (
            f"{found} of {count} refused by name, {false + len(refused) - found} false alarms, opened in {took:.1f} s"
        )
        stock = f"{silent} of {count} read as other values without a word"
        yield Result(
            "R11", f"a bit flipped in {suffix}, with digests", count, found * (found == len(refused)), figure, stock
        )
        shutil.rmtree(folder)


def _silent(whole: bytes, data: bytes, suffix: str) -> bool:
    """Whether the usual reader gives other values without an error."""
    if suffix in spoiled.MEDIA:
        found = spoiled.read_usual(data, suffix)
        return found is not None and not spoiled.alike(found, spoiled.read_usual(whole, suffix))
    try:
        return _values(data, suffix) != _values(whole, suffix)
    except Exception:
        return False


def _values(data: bytes, suffix: str) -> Any:
    import io
    import tarfile

    import pyarrow.json

    if suffix == ".parquet":
        return parquet.read_table(pa.BufferReader(data)).to_pylist()
    if suffix == ".jsonl":
        return pyarrow.json.read_json(pa.BufferReader(data)).to_pylist()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, file.read()) for m in tar if (file := tar.extractfile(m))]


def rows_of_tables(work: Path, count: int) -> Iterator[Result]:
    """Lines that are cut, are no UTF-8, or nest brackets without end; shards with a bad page or footer."""
    spoils = {
        "cut": lambda line: line[: len(line) // 2],
        "invalid UTF-8": lambda line: line[:12] + b"\xff\xfe" + line[12:],
        "100,000 brackets": lambda line: b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    }
    for name, spoil in spoils.items():
        lines = [json.dumps({"text": text}).encode() for text in spoiled.texts(0, 10 * count)]
        bad = sorted(random.Random(2).sample(range(len(lines)), count))
        for row in bad:
            lines[row] = spoil(lines[row])
        path = work / name / "a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"\n".join(lines) + b"\n")
        source = spoiled.opened(path, work / "cache")
        right = [one.row for one in source.refused] == bad and len(source) == len(lines) - count
        yield Result(
            "R11", f"lines of jsonl: {name}", count, count * right, f"{len(source.refused)} named by file and row"
        )
    damages = {
        "footer": lambda data: data[:-20] + bytes(20),
        "page": lambda data: data[:60] + b"\xff" * 100 + data[160:],
        "emptied": lambda data: b"",
        "cut": lambda data: data[: len(data) // 2],
    }
    for name, damage in damages.items():
        folder = work / f"parquet {name}"
        folder.mkdir()
        for seed in range(3 * count):
            spoiled.table(folder / f"{seed:03}.parquet", seed)
        bad = sorted(folder.iterdir())[::3]
        for path in bad:
            path.write_bytes(damage(path.read_bytes()))
        source = spoiled.opened(folder, work / "cache")
        named = [one.path for one in source.refused] == list(map(str, bad))
        yield Result("R11", f"parquet: {name}", count, count * named, f"{len(source)} rows of the others are read")


def streams(work: Path, count: int) -> Iterator[Result]:
    """Every third shard of a stream: its damage is named once in a pass, and the other shards are read whole."""
    draw = random.Random(3)
    spoils = {
        "line of .jsonl": lambda data: data.replace(b'"text": "7 ', b'"text", "7 ', 1),
        ".jsonl.gz cut": lambda data: data[: len(data) // 2],
        "page of .parquet": lambda data: data[:60] + b"\xff" * 100 + data[160:],
        ".tar cut": lambda data: data[: 512 * draw.randrange(4, 80)],
        "bit flipped in .tar, with digests": lambda data: spoiled.flip(data, draw),
    }
    for name, spoil in spoils.items():
        suffix = name[name.index(".") :].partition(" ")[0].rstrip(",")
        folder = work / name
        folder.mkdir(parents=True)
        for seed in range(3 * count):
            spoiled.table(folder / f"{seed:03}{suffix}", seed)
        if "digests" in name:
            spoiled.write_sums(folder)
        bad = [str(path) for path in sorted(folder.glob(f"*{suffix}"))[::3]]
        for path in map(Path, bad):
            path.write_bytes(spoil(path.read_bytes()))
        named, rows = spoiled.passed(f"{folder}/*{suffix}")
        whole = sum(rows[str(path)] == 40 for path in folder.glob(f"*{suffix}") if str(path) not in bad)
        right = count if sorted(named) == bad and whole == 2 * count else 0
        figure = f"{len(named)} named, {sum(rows[path] for path in bad)} of their rows used, {whole} shards whole"
        yield Result("R11", f"streams: {name}", count, right, figure)


def photos_in_a_run(work: Path, times: int) -> Result:
    """Damaged photos within a run that is resumed: all are in the list, none twice."""
    folder, run = photos(work, 40)
    bad = sorted(folder.iterdir())[::8]
    for number, path in enumerate(bad):
        path.write_bytes(path.read_bytes()[:200] if number % 2 else b"no photo at all" * 20)
    for part in range(times):
        train(run, folder, 5 * (part + 1)).finish()
    found = spoiled.names(spoiled.listed(run))
    right = found == [(path.name, None) for path in bad]
    return Result("R11", "photos damaged, run resumed", 5, 5 * right, f"{len(found)} lines, no line twice")


def rows_in_a_run(work: Path) -> Result:
    """The same for rows of a table."""
    work.mkdir()
    path = work / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in spoiled.texts(0, 100)]
    lines[3] = lines[50] = '{"text": "cut'
    path.write_text("\n".join(lines))
    for steps in (2, 4):
        runs.train(work / "bert", "--data", str(path), "--max-bad-fraction", "0.02", steps=steps).finish()
    found = spoiled.names(spoiled.listed(work / "bert"))
    right = found == [(path.name, 3), (path.name, 50)]
    return Result("R11", "rows damaged, run resumed", 2, 2 * right, f"{len(found)} lines with file and row")


def too_many(work: Path) -> Result:
    """More than --max-bad-fraction allows: the run ends with the list, and every sample is in its folder too."""
    folder, run = photos(work, 40)
    for path in sorted(folder.iterdir())[::8]:
        path.write_bytes(b"no photo at all" * 20)
    job = train(run, folder, 40, share="0.05")
    code, said = job.wait(), job.said()
    right = code == 1 and "allows; remove them" in said and f"{folder}/" in said and len(spoiled.listed(run)) >= 3
    return Result(
        "R11", "more than --max-bad-fraction", 1, int(right), f"exit code {code}, {len(spoiled.listed(run))} named"
    )


def vanishing(work: Path) -> Result:
    """One of two shards is deleted within a run: what it held is skipped and named, and the run goes on."""
    shards = work / "shards"
    shards.mkdir(parents=True)
    for number in range(2):
        spoiled.shard(shards / f"{number}.tar", {f"{i:02}.png": spoiled.picture(i, "PNG") for i in range(20)})
    job = train(work / "run", shards, 60, share="1")
    runs.wait_for_step(work / "run", job, 3)
    (shards / "1.tar").unlink()
    job.finish()
    found = spoiled.names(spoiled.listed(work / "run"))
    right = 0 < len(found) <= 20 and all(name == "1.tar" for name, _ in found)
    return Result(
        "R11", "a shard vanishes within a run", 1, int(right), f"{len(found)} of its 20 samples met and named"
    )


def photos(work: Path, count: int) -> tuple[Path, Path]:
    """(A folder of them, where a run may go.)"""
    folder = work / "photos"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(spoiled.picture(number, "PNG"))
    return folder, work / "run"


def train(run: Path, data: Path, steps: int, share: str = "0.5") -> runs.Job:
    more = ("--data", str(data), "--max-bad-fraction", share)
    return runs.train(run, *more, steps=steps, sets=spoiled.MODEL, plugin="mae")
