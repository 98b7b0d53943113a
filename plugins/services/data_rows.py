"""The rows of one local table, front to back and from any row on; what cannot be read is said in its place.

Nothing is copied, converted or looked at beforehand. A line of a jsonl or csv file that no parser takes costs itself;
in a parquet file whose pages are damaged, what follows in their row group; in a .gz file, all that follows. Of a file
without a line of names, or with a footer that lies, nothing can be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from selfsup.kernel.errors import BadSample, DataError

from .data_refused import Limits, little_memory
from .data_sift import csv_rows, json_rows, one_value, opened, separator
from .data_tables import READERS, check_footer, innermost, suffix_of

CHUNK = 100  # rows of a parquet file that are converted at once


class Read(NamedTuple):
    """One row, or in its place why it, or more that follow, cannot be used."""

    first: int  # its number, from 0
    after: int  # that of the one to read next
    row: Mapping[str, Any] | BadSample

    @property
    def name(self) -> str:
        """row 12"""
        return f"row {self.first}" if self.after == self.first + 1 else f"rows {self.first} to {self.after - 1}"


def read_rows(file: str, first: int, columns: Sequence[str] | None, limits: Limits) -> Iterator[Read]:
    """The rows of a table from one on; of a parquet file these columns alone. BadSample: the rest of it is lost."""
    kind = READERS[suffix_of(file)]
    try:
        if kind == "parquet":
            yield from _parquet(file, first, columns, limits)
        else:
            yield from (_json if kind == "json" else _csv)(file, first, limits)
    except BadSample:
        raise
    except Exception as cause:  # a damaged footer raises whatever the library does
        raise damage(cause) from cause


def first_rows(file: str, limits: Limits) -> dict[str, Any]:
    """The names of the columns, each with a value of it where one is among the first rows; {} if there are no rows."""
    found: dict[str, Any] = {}
    for read in islice(read_rows(file, 0, None, limits), CHUNK):
        if not isinstance(read.row, BadSample):
            found |= {name: value for name, value in read.row.items() if found.get(name) is None}
    return found


def damage(cause: Exception) -> BadSample:
    """What is wrong with the bytes of a file; raises what is the fault of the machine, the disk or the network.

    That is not left out: what cannot be read at this moment may be read at another, by another worker.
    """
    if isinstance(cause, MemoryError | ImportError) or (isinstance(cause, OSError) and cause.errno):
        raise cause
    if isinstance(cause, BadSample):
        return cause
    return BadSample(str(cause) if isinstance(cause, DataError) else innermost(cause))


def _json(file: str, first: int, limits: Limits) -> Iterator[Read]:
    with little_memory(limits.memory):
        value = one_value(file)
    if value is not None:
        yield from (Read(n, n + 1, row) for n, row in enumerate(_listed(value)) if n >= first)
        return
    with opened(file, limits) as lines:
        for n, (_, why, row) in enumerate(json_rows(lines, limits, first)):
            if n >= first:
                yield Read(n, n + 1, BadSample(why) if why else row)


def _listed(value: Any) -> Iterator[Mapping[str, Any] | BadSample]:
    """The rows of a file that is one JSON value."""
    if not isinstance(value, list):
        raise BadSample("it is one object over several lines; a stream reads a list of objects, or an object a line")
    for row in value:
        if isinstance(row, str):
            yield {"text": row}  # as `datasets` names it
        else:
            yield row if isinstance(row, dict) else BadSample(f"a row is an object; this is a {type(row).__name__}")


def _csv(file: str, first: int, limits: Limits) -> Iterator[Read]:
    with opened(file, limits) as lines:
        rows = csv_rows(lines, limits, separator(file))
        _, why, names = next(rows, (b"", None, ()))
        if why:
            raise BadSample(f"its line of names cannot be read: {why}")
        for n, (_, why, row) in enumerate(rows):
            if n >= first:
                yield Read(n, n + 1, BadSample(why) if why else dict(zip(names, row, strict=True)))


def _parquet(file: str, first: int, columns: Sequence[str] | None, limits: Limits) -> Iterator[Read]:
    from pyarrow.parquet import ParquetFile

    check_footer(file, limits)
    with ParquetFile(file, page_checksum_verification=True) as table:
        if missing := [name for name in columns or () if name not in table.schema_arrow.names]:
            raise BadSample(f"it has no column {missing[0]!r}, but {', '.join(table.schema_arrow.names)}")
        begin = 0
        for group in range(table.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            if end > first:
                yield from _group(table, group, columns, (begin, first, end), limits)
            begin = end


def _group(
    table: Any, group: int, columns: Sequence[str] | None, span: tuple[int, int, int], limits: Limits
) -> Iterator[Read]:
    """The rows of a row group, which begins and ends at a row, from one on."""
    row, first, end = span
    try:
        batches = table.iter_batches(CHUNK, row_groups=[group], columns=columns)
        while True:
            with little_memory(limits.memory):
                batch = next(batches, None)
            if batch is None:
                break
            for n in range(batch.num_rows):
                if row >= first:
                    yield Read(row, row + 1, _values(batch, n))
                row += 1
        if row < end:
            raise BadSample(f"the footer promises {end - row:,} rows more")
    except Exception as cause:
        yield Read(max(row, first), end, damage(cause))


def _values(batch: Any, n: int) -> Mapping[str, Any] | BadSample:
    try:
        return {name: column[n].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as cause:
        return BadSample(f"invalid UTF-8 at byte {cause.start:,} of a value")
