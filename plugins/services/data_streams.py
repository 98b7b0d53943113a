"""What --data names, read front to back: tables and data sets of the hub through `datasets`, and tar shards.

Nothing is converted, copied or counted beforehand, so the data may be larger than the disk. It has no labels here, as
training needs none.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from selfsup.kernel.contracts import Modality, Sample
from selfsup.kernel.errors import BadSample, DataError
from selfsup.plugins.common.windows import Flow, Shards, Windows, shares

from .data_files import Fields, Options, megabytes
from .data_tables import (
    READERS,
    WRITTEN,
    column_of,
    from_hub,
    innermost,
    library,
    load_hub,
    quiet,
    suffix_of,
    undecoded,
)

CHUNK = 100  # rows of a table that are converted at once


class Tables(Shards):
    """Rows of tables."""

    def __init__(
        self, where: str, names: Sequence[str], table: Any, columns: Mapping[str, str], paths: Sequence[str]
    ) -> None:
        super().__init__(where, names)
        self.table, self.columns, self.paths = table, columns, paths

    def open(self, shard: int, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """The rows of a shard; a state: that of `datasets` before a chunk, its first row, how many to skip."""
        rows = self.table.shard(len(self.shards), shard)
        known, first, given = state or (rows.state_dict(), 0, 0)
        rows.load_state_dict(known)
        # Not iter(rows), which gives a data worker of torch its part of them only.
        for chunk in rows.iter(CHUNK):
            total = len(next(iter(chunk.values())))
            for n in range(given, total):
                sample = {name: self._stored(chunk[column][n], name, shard) for name, column in self.columns.items()}
                yield f"{self.shards[shard]} row {first + n}", sample, [known, first, n + 1]
            known, first, given = rows.state_dict(), first + total, 0

    def _stored(self, value: Any, name: str, shard: int) -> Any:
        """A value; a path without bytes counts from the folder of its table."""
        folder = Path(self.shards[shard]).parent
        if name in self.paths:
            return folder / os.path.expanduser(value or "")
        if isinstance(value, dict) and set(value) == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            return folder / value["path"]
        return value


class Tars(Shards):
    """Files in tar shards; those of one sample lie one after another, as webdataset has it."""

    def __init__(self, where: str, shards: Sequence[str], modalities: Fields, options: Options) -> None:
        super().__init__(where, shards)
        self.suffixes = {name: modality.suffixes for name, modality in modalities.items()}
        self.key, self.most = options.column, options.limits.row

    def open(self, shard: int, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """The samples of a shard; a state is the place of the header of what follows."""
        found: dict[str, Any] = {}
        group = ""
        with open(self.shards[shard], "rb") as file:
            file.seek(state or 0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # or tarfile would keep every header
                    name = member.name.removeprefix("./")
                    stem = os.path.join(os.path.dirname(name), os.path.basename(name).partition(".")[0])
                    if stem != group:
                        found, group = {}, stem
                    if (field := self._field(member, name)) is None:
                        continue
                    found[field] = self._stored(tar, member)
                    if len(found) == len(self.suffixes):
                        yield f"{self.shards[shard]}:{name}", found, tar.offset
                        found = {}
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
                    raise tarfile.ReadError(f"what follows byte {tar.offset:,} is no tar")

    def _stored(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
        """What a file of the tar holds; a BadSample in its place where that is too much."""
        if member.size > self.most:
            return BadSample(f"{member.size:,} bytes are more than the {self.most:,} that data.max_bytes allows")
        file = tar.extractfile(member)
        return {"bytes": file.read() if file else b"", "path": member.name.removeprefix("./")}

    def _field(self, member: tarfile.TarInfo, name: str) -> str | None:
        """What a file of the tar serves as."""
        base = os.path.basename(name)
        if not member.isfile() or not member.size or base.startswith("."):
            return None
        if self.key is not None and base.partition(".")[2] != self.key:
            return None
        return next((field for field, suffixes in self.suffixes.items() if name.lower().endswith(suffixes)), None)


def stream_tars(where: str, shards: Sequence[str], modalities: Fields, options: Options) -> Flow:
    """Tar shards, front to back."""
    flow = Tars(where, shards, modalities, options)
    size = megabytes(sum(os.path.getsize(shard) for shard in shards))
    flow.notes = [f"a stream of {len(shards)} tar{'s' * (len(shards) > 1)}, {size}, from {where}"]
    return flow


def stream_tables(where: str, files: Sequence[str], modalities: Fields, options: Options) -> Flow:
    """Local table files of one kind, front to back."""
    datasets = library(where)
    kind = READERS[suffix_of(files[0])]
    more = {"sep": "\t"} if suffix_of(files[0]) == ".tsv" else {}
    with quiet(datasets):
        try:
            files = [file for file in files if has_rows(file)]
            read = getattr(datasets.Dataset, f"from_{kind}")
            table = read([os.path.abspath(file) for file in files], streaming=True, **more) if files else None
        except Exception as cause:  # a builder raises whatever its parser does
            raise DataError(f"{where!r} cannot be read: {innermost(cause)}") from cause
        if table is None:
            raise DataError(f"there are no rows in {where!r}")
        size = megabytes(sum(os.path.getsize(file) for file in files))
        return _tables(where, files, table, modalities, options, f"{len(files)} {kind} files, {size}")


def stream_hub(where: str, modalities: Fields, options: Options) -> Flow:
    """USER/NAME or USER/NAME:SPLIT on the hub, read as it comes over the network."""
    datasets = library(where)
    with quiet(datasets), from_hub(where):
        full, table = load_hub(datasets, where, streaming=True)
        shards = [f"{full} shard {n}" for n in range(table.num_shards)]
        return _tables(where, shards, table, modalities, options, f"{len(shards)} shards on the hub")


def _tables(where: str, shards: Sequence[str], table: Any, modalities: Fields, options: Options, what: str) -> Tables:
    table = undecoded(table)
    first = next(iter(table), None)
    if first is None:
        raise DataError(f"there are no rows in {where!r}")
    columns = {name: column_of(where, list(first), name, m, options.column) for name, m in modalities.items()}
    folder = Path(shards[0]).parent
    paths = [name for name, column in columns.items() if _is_path(first[column], folder, modalities[name])]
    flow = Tables(where, shards, table.select_columns(sorted(set(columns.values()))), columns, paths)
    shown = " and ".join(f"column {column!r}" for column in columns.values())
    flow.notes = [f"a stream of {what}, from {shown} of {where}"]
    return flow


def _is_path(value: Any, folder: Path, modality: Modality) -> bool:
    """Whether the first value of a column names a file; a text may end as the name of a file does."""
    if not isinstance(value, str) or "\n" in value or not value.lower().endswith(modality.suffixes):
        return False
    with suppress(OSError):
        return modality.field not in WRITTEN or (folder / value).is_file()
    return False


def windows(flows: Sequence[Flow], weights: Sequence[float], window: int, names: Sequence[str]) -> Windows:
    """One stream of several, by weight."""
    sizes = shares(window, weights)
    notes = [note for flow in flows for note in flow.notes]
    if len(flows) > 1:
        notes += [
            "mixture: " + ", ".join(f"{100 * n / sum(sizes):.3g} % {w}" for n, w in zip(sizes, names, strict=True))
        ]
    return Windows(flows, sizes, [*notes, f"{sum(sizes):,} samples at a time are shuffled among each other"])


def has_rows(file: str) -> bool:
    """Whether a table holds anything; the builders of `datasets` fail on one without rows."""
    kind = READERS[suffix_of(file)]
    if kind == "parquet":
        from pyarrow.parquet import read_metadata

        return bool(read_metadata(file).num_rows)
    with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
        filled = sum(1 for _ in islice((line for line in lines if line.strip()), 2))
    return filled >= (2 if kind == "csv" else 1)  # a csv has a line of names
