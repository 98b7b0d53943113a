"""Rows of parquet, jsonl and csv files, and of data sets on the Hugging Face hub, through the `datasets` library.

Tables are converted once to memory-mapped Arrow files in the cache of `datasets`, so any row is read at once
and workers share the memory. Sound and images stay undecoded. Nothing here goes to the network for local files.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.kernel.errors import DataError

from .data_columns import column_of, holds_paths, labels_of, resolved, undecoded
from .data_files import Fields, Names, Options, count_classes, left_out, megabytes
from .data_refused import FREE, Limits, Refused, check_share, little_memory, named
from .data_sift import Sifted, sift
from .data_sums import check_sums

READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
}


@dataclass
class Rows:
    """Rows of a table: {field: stored}, where a column of paths is resolved to files that exist."""

    table: Any  # a datasets.Dataset of the columns that hold data, not decoded
    columns: Mapping[str, str]  # field -> column
    paths: Mapping[str, np.ndarray[Any, Any]]  # field -> [N] bytes, of columns of paths
    rows: np.ndarray[Any, Any]  # [N] int64: the row of each sample
    files: Sequence[str]
    starts: np.ndarray[Any, Any]  # [files] int64: the first row of each file
    labels: Names | None
    dropped: Mapping[str, Sequence[int]] = field(default_factory=dict)  # file -> its rows that are not in the table
    notes: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, index: int) -> dict[str, Any]:
        """{field: Path, bytes, {"bytes", "path"} or whatever the column holds}"""
        out: dict[str, Any] = {name: Path(os.fsdecode(paths[index])) for name, paths in self.paths.items()}
        if len(out) < len(self.columns):
            row = self.table[int(self.rows[index])]
            out |= {name: self._stored(row[column], index) for name, column in self.columns.items() if name not in out}
        return out

    def name(self, index: int) -> str:
        """The file of a row's path, or: file row 12 (from 0)"""
        if self.paths:
            return os.fsdecode(next(iter(self.paths.values()))[index])
        file, row = self._place(index)
        return f"{file} row {row}"

    def place(self, index: int) -> dict[str, Any]:
        """{"path"} of a file of its own, or {"path", "row"} of its table"""
        file, row = self._place(index)
        return {"path": self.name(index)} if self.paths else {"path": file, "row": row}

    def _place(self, index: int) -> tuple[str, int]:
        row = int(self.rows[index])
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, row = self.files[number], row - int(self.starts[number])
        for gone in self.dropped.get(file, ()):  # in order
            row += gone <= row
        return file, row

    def _stored(self, value: Any, index: int) -> Any:
        """A value; a path without bytes is taken from the folder of its file."""
        if isinstance(value, dict) and set(value) == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            return Path(self._place(index)[0]).parent / value["path"]
        return value


def open_tables(where: str, root: str, files: Sequence[str], modalities: Fields, options: Options) -> Rows:
    """The rows of local table files of one kind; files and rows that cannot be read are left out, and named."""
    datasets = library(where)
    refused, notes = check_sums(root, files)
    check_share(refused, len(files), options.share, "files")
    wrong = {one.path for one in refused}
    cache = Path(options.cache or datasets.config.HF_DATASETS_CACHE)
    with quiet(datasets), little_memory(options.limits.memory):
        looked = [_looked(file, cache, options.limits) for file in files if file not in wrong]
        refused += [found for found in looked if isinstance(found, Refused)]
        sound = [found for found in looked if isinstance(found, Sifted) and found.rows]
        parts = _read(datasets, sound, options.cache)
        refused += [part for part in parts if isinstance(part, Refused)]
        tables = [(found.file, part) for found, part in zip(sound, parts, strict=True) if not isinstance(part, Refused)]
        check_share(refused, len(files), options.share, "files")
        rows = [Refused(found.file, reason, row) for found in sound for row, reason in found.bad]
        check_share(rows, len(rows) + sum(found.rows for found in sound), options.share, "rows")
        if not tables:
            raise DataError(f"there are no rows in {where!r}")
        files, parts = [file for file, _ in tables], [part for _, part in tables]
        table = datasets.concatenate_datasets(parts)
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        size = sum(os.path.getsize(file) for file in files)
        out = _rows(where, table, files, starts, modalities, options, megabytes(size))
    out.dropped = {found.file: [row for row, _ in found.bad] for found in sound if found.bad}
    out.refused = [*refused, *rows]
    out.notes += [*notes, *named(refused, "file"), *named(rows, "row")]
    return out


def _looked(file: str, cache: Path, limits: Limits) -> Sifted | Refused:
    """What can be known of a table before a parser reads it all."""
    kind = READERS[suffix_of(file)]
    try:
        return _footer(file, limits) if kind == "parquet" else sift(file, kind, cache, limits)
    except Exception as cause:  # a damaged footer raises whatever the library does
        return Refused(file, str(cause) if isinstance(cause, DataError) else innermost(cause))


def _footer(file: str, limits: Limits) -> Sifted:
    """A parquet file by its footer."""
    return Sifted(file, file, check_footer(file, limits))


def check_footer(file: str, limits: Limits) -> int:
    """The rows of a parquet file; DataError where its footer promises more than the file may hold."""
    from pyarrow.parquet import read_metadata

    footer, size = read_metadata(file), os.path.getsize(file)
    groups = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    most = max(FREE, limits.ratio * size)
    if sum(groups) > most or footer.num_rows > most:
        raise DataError(
            f"it promises {footer.num_rows:,} rows of {megabytes(sum(groups))}, more than {limits.ratio:g} times its "
            f"{megabytes(size)}; where that is right, raise data.max_ratio"
        )
    return int(footer.num_rows)


def open_hub(where: str, modalities: Fields, options: Options) -> Rows:
    """USER/NAME or USER/NAME:SPLIT on the hub; the split is `train` unless it is named."""
    datasets = library(where)
    with from_hub(where):
        full, table = load_hub(datasets, where, cache_dir=options.cache)
    with quiet(datasets):
        size = megabytes(table.dataset_size or 0)
        return _rows(full, table, [full], np.zeros(1, np.int64), modalities, options, size)


def load_hub(datasets: Any, where: str, **how: Any) -> tuple[str, Any]:
    """(USER/NAME:SPLIT, its table); no script that comes with the data is run."""
    name, _, split = where.partition(":")
    # Releases of the library before 4 would ask whether to run one.
    table = datasets.load_dataset(name, split=split or "train", trust_remote_code=False, **how)
    return f"{name}:{split or 'train'}", table


@contextmanager
def from_hub(where: str) -> Iterator[None]:
    """Whatever the network, the hub and a builder raise becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as cause:
        raise DataError(
            f"there is no file or folder {where!r}, and the hub does not give a data set of that name: "
            f"{innermost(cause)}"
        ) from cause


def _read(datasets: Any, found: Sequence[Sifted], cache: str | None) -> list[Any]:
    """A table, or why there is none, of each file. If they cannot be read together, each is tried by itself."""
    try:
        return _together(datasets, found, cache) if found else []
    except Exception as cause:  # a builder raises whatever its parser does
        if len(found) == 1:
            return [Refused(found[0].file, innermost(cause))]
    return [table for one in found for table in _read(datasets, [one], cache)]


def _together(datasets: Any, found: Sequence[Sifted], cache: str | None) -> list[Any]:
    """One table per file. `DatasetDict.from_*` reads local files without the calls home of `load_dataset`."""
    suffix = suffix_of(found[0].file)
    more = {"sep": "\t"} if suffix == ".tsv" else {}
    read = getattr(datasets.DatasetDict, f"from_{READERS[suffix]}")
    named = {f"file{number}": [glob.escape(os.path.abspath(one.read))] for number, one in enumerate(found)}
    return list(read(named, cache_dir=cache, **more).values())


def suffix_of(file: str) -> str:
    """The suffix of a table, with a .gz behind it."""
    base = os.path.basename(file).lower()
    return next((s for s in sorted(READERS, key=len, reverse=True) if base.endswith(s)), "")


def _rows(
    where: str,
    table: Any,
    files: Sequence[str],
    starts: np.ndarray[Any, Any],
    modalities: Fields,
    options: Options,
    size: str,
) -> Rows:
    columns = {name: column_of(where, table.column_names, name, m, options.column) for name, m in modalities.items()}
    rows = np.arange(len(table))
    reasons: dict[str, list[str]] = {}
    paths: dict[str, list[str]] = {}
    for name, column in columns.items():
        if holds_paths(table, column, modalities[name], files):
            paths[name], missing = resolved(table[column], files, starts)
            reasons[f"not where column {column!r} says"] = missing
            wrong = {one.path for one in check_sums(os.path.dirname(files[0]), [p for p in paths[name] if p])[0]}
            reasons["not as their SHA-256 says"] = sorted(wrong)
            paths[name] = ["" if path in wrong else path for path in paths[name]]
    here = np.array([all(p[i] for p in paths.values()) for i in rows], dtype=bool)
    if not here.any():
        gone = next(iter(reasons.values()))
        raise DataError(f"none of the files that {where!r} names exists beside or below it, such as {gone[0]!r}")
    labels, origin = labels_of(where, table, next(iter(columns.values())), options)
    rows = rows[here]
    out = Rows(
        undecoded(table.select_columns(sorted(set(columns.values())))),
        columns,
        {name: np.array([os.fsencode(found[i]) for i in rows]) for name, found in paths.items()},
        rows,
        files,
        starts,
        None if labels is None else [labels[i] for i in rows],
    )
    shown = " and ".join(f"column {column!r}" for column in columns.values())
    classes = f" in {count_classes(out.labels)} classes ({origin})" if out.labels else ""
    if paths:
        size = megabytes(sum(os.path.getsize(found[i]) for found in paths.values() for i in rows))
    out.notes.append(f"{len(out):,} rows{classes}, {size}, from {shown} of {where}")
    out.notes.extend(left_out(reasons))
    return out


def library(where: str) -> Any:
    """The library `datasets`."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"reading {where!r} needs the library `datasets`: pip install 'selfsup[data]'") from None
    return datasets


@contextmanager
def quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and log lines of `datasets` meanwhile: notes and errors say what there is to say."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def innermost(cause: BaseException) -> str:
    """The first line of what went wrong first."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
