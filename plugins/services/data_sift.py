"""Lines of jsonl and csv files that no parser takes, found one by one before a parser sees them.

The parsers behind `datasets` give up a whole file for one line that is cut short, and crash the process over brackets
nested deep enough. So every line is looked at first: a file of which all lines are good is read as it is, of another
one a copy without the bad lines, and a .gz is unpacked as far as limits allow. What was found is kept in the cache of
tables, by path, size and time of change, so it costs once.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import xxhash

from selfsup.kernel.errors import BadSample, DataError

from .data_refused import Limits, Unpacked

VERSION = 1  # of what is kept
DEPTH = 100  # brackets within brackets
MOST = 10_000  # bad lines of a file; one with more is refused whole
SPAN = 1_000  # lines of one csv record
BLOCK = 1 << 20
MARK = b"\xef\xbb\xbf"
ESCAPE = b"\\u"
SURROGATES = (b"\\ud", b"\\uD")
CUT = (EOFError, zlib.error, gzip.BadGzipFile)  # what a damaged .gz leads to
Line = tuple[bytes, "str | None"]  # as it is stored, and why it cannot be used
Row = tuple[bytes, "str | None", Any]  # the same of one or more lines, and their object or fields


@dataclass
class Sifted:
    """What was found in a file."""

    file: str
    read: str  # the path to read: the file itself, or a copy of its good rows
    rows: int = 0  # good ones
    bad: list[tuple[int, str]] = field(default_factory=list)  # (row from 0, reason)


def sift(file: str, kind: str, cache: Path, limits: Limits) -> Sifted:
    """Look at every row of a table of kind "json" or "csv"; DataError where the whole file is to be refused."""
    facts = os.stat(file)
    said = f"{VERSION} {os.path.abspath(file)} {facts.st_size} {facts.st_mtime_ns} {limits}"
    place = cache / "selfsup" / xxhash.xxh3_128_hexdigest(said.encode("utf-8", "surrogateescape"))
    known = place.with_suffix(".found")
    if (found := _known(known)) is None:
        place.parent.mkdir(parents=True, exist_ok=True)
        found = _sifted(file, kind, place.with_suffix(".csv" if kind == "csv" else ".jsonl"), limits)
        work = known.with_suffix(f".{os.getpid()}")
        work.write_text(json.dumps(asdict(found)), "utf-8")
        work.replace(known)
    return found


def _known(path: Path) -> Sifted | None:
    try:
        found = Sifted(**json.loads(path.read_text("utf-8")))
        return found if os.path.exists(found.read) else None
    except (OSError, ValueError, TypeError):
        return None


def _sifted(file: str, kind: str, copy: Path, limits: Limits) -> Sifted:
    if kind == "json" and one_value(file) is not None:
        return Sifted(file, file, 1)
    work, packed = copy.with_suffix(f".{os.getpid()}"), file.endswith(".gz")
    try:
        found = _through(file, kind, limits, work if packed else None)
        if not (packed or found.bad):
            return found
        if not packed:  # now it is known that a copy is needed
            _through(file, kind, limits, work)
        work.replace(copy)
        return Sifted(file, str(copy), found.rows, found.bad)
    finally:
        work.unlink(missing_ok=True)


def _through(file: str, kind: str, limits: Limits, copy: Path | None) -> Sifted:
    """Go through a file once; its good rows go to `copy` if there is one."""
    found = Sifted(file, file)
    with opened(file, limits) as lines, open(copy or os.devnull, "wb") as out:
        rows = json_rows(lines, limits) if kind == "json" else csv_rows(lines, limits, separator(file))
        try:
            for number, (raw, reason, _) in enumerate(rows):
                if reason is None:
                    found.rows += 1
                    out.write(raw if raw.endswith(b"\n") else raw + b"\n")
                else:
                    found.bad.append((number - (kind == "csv"), reason))  # the names stand in no row
                if len(found.bad) > MOST:
                    raise DataError(f"more than {MOST:,} of its rows cannot be used, such as row {number}: {reason}")
        except CUT as cause:
            found.bad.append((found.rows + len(found.bad), f"the file is damaged from here on: {cause}"))
    found.rows -= kind == "csv" and found.rows > 0  # the line of names
    return found


def opened(file: str, limits: Limits) -> IO[bytes]:
    """The bytes of a file, unpacked as far as limits allow."""
    if not file.endswith(".gz"):
        return open(file, "rb")
    return io.BufferedReader(Unpacked(gzip.open(file), os.path.getsize(file), limits), BLOCK)


def one_value(file: str) -> Any:
    """The one JSON value over several lines, such as a list of objects, that a file is; None of an object a line."""
    if file.lower().endswith(".gz"):
        return None
    with open(file, "rb") as stored:
        head = stored.read(BLOCK).removeprefix(MARK).lstrip()
        if not (head.startswith(b"[") or (file.lower().endswith(".json") and _begins(head))):
            return None
        stored.seek(0)
        try:
            value = json.loads(stored.read().removeprefix(MARK))
        except RecursionError:
            raise DataError(f"brackets are nested more than {DEPTH} deep") from None
        except ValueError:
            return None
    if not shallow(value):
        raise DataError(f"brackets are nested more than {DEPTH} deep")
    return value


def _begins(head: bytes) -> bool:
    """Whether the first line is no object by itself."""
    try:
        from_json(head.partition(b"\n")[0])
    except BadSample:
        return True
    return False


def _lines(file: IO[bytes], limits: Limits) -> Iterator[Line]:
    """Each line, without a byte order mark, and whether it is too long: of such a one there is the beginning alone."""
    mark = MARK
    while line := file.readline(limits.row + 1):
        raw = rest = line.removeprefix(mark)
        mark = b""
        if len(raw) > limits.row:
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(BLOCK)
            yield raw[:BLOCK], f"it has more than the {limits.row:,} bytes that data.max_bytes allows"
        else:
            yield raw, None


def json_rows(file: IO[bytes], limits: Limits, first: int = 0) -> Iterator[Row]:
    """Each line that is not blank: an object. Those before the row `first` are not looked at."""
    filled = (line for line in _lines(file, limits) if line[0].strip())
    for number, (raw, long) in enumerate(filled):
        value = None
        if number >= first and not long:
            try:
                value = from_json(raw)
            except BadSample as why:
                long = str(why)
        yield raw, long, value


def from_json(raw: bytes) -> dict[str, Any]:
    """The object in a line; BadSample says why there is none that every parser takes."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_once)
        if ESCAPE in raw and any(half in raw for half in SURROGATES):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as cause:
        raise BadSample(f"invalid UTF-8 at byte {cause.start:,} of the row") from None
    except UnicodeEncodeError:
        raise BadSample("it holds half of a surrogate pair, which no UTF-8 can hold") from None
    except RecursionError:
        raise BadSample(f"brackets are nested more than {DEPTH} deep") from None
    except ValueError as cause:
        raise BadSample(f"this is no JSON: {cause}") from None
    if not isinstance(value, dict):
        raise BadSample(f"a row is an object, as in {{...}}; this is a {type(value).__name__}")
    if raw.count(b"[") + raw.count(b"{") > DEPTH and not shallow(value):
        raise BadSample(f"brackets are nested more than {DEPTH} deep")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which every name stands there once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands there twice")
    return made


def shallow(value: Any) -> bool:
    """Whether nothing lies more than `DEPTH` levels deep in what JSON gave."""
    level = [value]
    for _ in range(DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return True
    return False


def separator(file: str) -> str:
    """What stands between the fields of a table in text."""
    return "\t" if file.lower().endswith(".tsv") else ","


def csv_rows(file: IO[bytes], limits: Limits, between: str) -> Iterator[Row]:
    """The line of names, then each record; where a quote swallows what follows, its first line alone is bad."""
    waiting: deque[Line] = deque()
    lines, width = _lines(file, limits), 0

    def more() -> Line | None:
        return waiting.popleft() if waiting else next(lines, None)

    for raw, long in iter(more, None):
        if not raw.strip():
            continue
        taken = [(raw, long)]
        fields, reason = _record(taken, more, between)
        if reason is None and width and len(fields) != width:
            reason = f"it has {len(fields)} fields, and there are {width} names"
        if reason:
            waiting.extendleft(reversed(taken[1:]))
            taken = taken[:1]
        width = width or len(fields)
        yield b"".join(raw for raw, _ in taken), reason, fields


def _record(taken: list[Line], more: Callable[[], Line | None], between: str) -> tuple[list[str], str | None]:
    """The fields of the record that begins with the first line, and why it is none; lines it needs join `taken`."""

    def texts() -> Iterator[str]:
        for number in count():
            if number == len(taken):
                if number == SPAN or (line := more()) is None:
                    return
                taken.append(line)
            raw, long = taken[number]
            if long:
                raise csv.Error(long)
            yield raw.decode()

    try:
        return next(csv.reader(texts(), delimiter=between, strict=True)), None
    except UnicodeDecodeError as cause:
        return [], f"invalid UTF-8 at byte {cause.start:,} of the row"
    except csv.Error as cause:
        return [], f"this is no record: {cause}"
