"""What --data names, read front to back: local tables and tar shards, and data sets of the hub through `datasets`.

Nothing is converted, copied or counted beforehand, so the data may be larger than the disk. It has no labels here, as
training needs none.

What is damaged in a file is left out, and stands in the stream as a sample that says so: every worker and process comes
to the same one, and it is counted and named like any other that cannot be used. A digest beside a shard is checked
before the first sample of it, in each process, as each reads all of the shard anyway; once, unless the file changes.
"""

from __future__ import annotations

import os
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfsup.kernel.contracts import Modality, Sample
from selfsup.kernel.errors import BadSample, DataError
from selfsup.plugins.common.windows import Flow, Shards, Windows, shares

from .data_columns import WRITTEN, column_of, undecoded
from .data_files import Fields, Options, megabytes
from .data_refused import Refused, check_share
from .data_rows import damage, first_rows, read_rows
from .data_sums import DIFFERS, digests, sha256
from .data_tables import from_hub, library, load_hub, quiet, suffix_of

CHUNK = 100  # rows of a table of the hub that are converted at once
END = "end"  # the state of a shard of which nothing follows


class Columns:
    """Which columns of a table hold what."""

    def __init__(self, columns: Mapping[str, str], paths: Sequence[str]) -> None:
        self.columns, self.paths = columns, paths  # field -> column; the fields that are names of files

    @property
    def names(self) -> list[str]:
        """Each column once."""
        return sorted(set(self.columns.values()))

    def __str__(self) -> str:
        return " and ".join(f"column {column!r}" for column in self.columns.values())

    def sample(self, row: Mapping[str, Any], folder: Path) -> Sample:
        """What a row holds; a path without bytes counts from the folder of its table."""
        return {name: self._stored(row.get(column), name, folder) for name, column in self.columns.items()}

    def _stored(self, value: Any, name: str, folder: Path) -> Any:
        if name in self.paths:
            return folder / os.path.expanduser(value or "")
        if isinstance(value, dict) and set(value) == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            return folder / value["path"]
        return value


class Hub(Shards):
    """Rows of a data set on the hub."""

    def __init__(self, where: str, names: Sequence[str], table: Any, columns: Columns) -> None:
        super().__init__(where, names)
        self.table, self.columns = table, columns

    def open(self, shard: int, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """The rows of a shard; a state: that of `datasets` before a chunk, its first row, how many to skip."""
        rows = self.table.shard(len(self.shards), shard)
        known, first, given = state or (rows.state_dict(), 0, 0)
        rows.load_state_dict(known)
        # Not iter(rows), which gives a data worker of torch its part of them only.
        for chunk in rows.iter(CHUNK):
            total = len(next(iter(chunk.values())))
            for n in range(given, total):
                sample = self.columns.sample({name: chunk[name][n] for name in self.columns.names}, Path())
                yield f"{self.shards[shard]} row {first + n}", sample, [known, first, n + 1]
            known, first, given = rows.state_dict(), first + total, 0


class Local(Shards):
    """Files, of which what is damaged is left out."""

    def __init__(self, where: str, shards: Sequence[str], fields: Sequence[str], options: Options) -> None:
        super().__init__(where, shards)
        self.fields, self.share, self.limits = fields, options.share, options.limits
        self.digests: dict[str, str] = {}
        self.right: set[tuple[str, int, int]] = set()  # path, size and time of change of what is as its digest says
        self.lost: dict[str, Refused] = {}  # shards that were gone through in vain

    @abstractmethod
    def samples(self, file: str, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """As `open`; BadSample, or what `damage` takes for one, says why the rest of a file is lost."""

    def open(self, shard: int, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """What can be used of a shard, and in the place of what cannot, why."""
        file, why = self.shards[shard], None
        used, after = state is not None, ""
        if state == END:
            return
        try:
            self._check(file)
            for name, sample, known in self.samples(file, state):
                bad = next((stored for stored in sample.values() if isinstance(stored, BadSample)), None)
                used, why, after = used or not bad, why or bad, f" after {name.removeprefix(file).lstrip(': ')}"
                yield name, sample, known
        except Exception as cause:
            why = damage(cause)
            lost = BadSample(f"{why}; the rest of the file is left out")
            yield f"{file}{after}", dict.fromkeys(self.fields, lost), END
        if why and not used:
            self.lost[file] = Refused(file, str(why))
            check_share(list(self.lost.values()), len(self.shards), self.share, "shards")

    def _check(self, file: str) -> None:
        if file in self.digests:
            facts = os.stat(file)
            if (this := (file, facts.st_size, facts.st_mtime_ns)) not in self.right:
                if sha256(file) != self.digests[file]:
                    raise BadSample(DIFFERS)
                self.right.add(this)

    def look(self, root: str, what: str, origin: str) -> None:
        """Find digests, and note what there is to say before anything is read."""
        self.digests, total = digests(root, self.shards), len(self.shards)
        size = megabytes(sum(os.path.getsize(file) for file in self.shards))
        self.notes = [f"a stream of {total:,} {what}{'s' * (total > 1)}, {size}, from {origin}"]
        if self.digests:
            named = f"{len(self.digests):,} of {total:,} files have a SHA-256, checked before each is read"
            self.notes = [*self.notes, named]


class Tables(Local):
    """Rows of local tables."""

    columns: Columns

    def samples(self, file: str, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """The rows of a table; a state is the number of the next one."""
        folder = Path(file).parent
        for read in read_rows(file, state or 0, self.columns.names, self.limits):
            if isinstance(read.row, BadSample):
                yield f"{file} {read.name}", dict.fromkeys(self.fields, read.row), read.after
            else:
                yield f"{file} {read.name}", self.columns.sample(read.row, folder), read.after


class Tars(Local):
    """Files in tar shards; those of one sample lie one after another, as webdataset has it."""

    def __init__(self, where: str, shards: Sequence[str], modalities: Fields, options: Options) -> None:
        super().__init__(where, shards, list(modalities), options)
        self.suffixes = {name: modality.suffixes for name, modality in modalities.items()}
        self.key = options.column

    def samples(self, shard: str, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """The samples of a tar; a state is the place of the header of what follows."""
        found: dict[str, Any] = {}
        group = ""
        with open(shard, "rb") as file:
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
                        yield f"{shard}:{name}", found, tar.offset
                        found = {}
                file.seek(tar.offset)
                # tarfile takes a broken header for the end, and a tar that was cut before a header for a whole one.
                if (end := file.read(tarfile.BLOCKSIZE)).strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
                    said = "is no tar" if end else "is nothing, not even the mark of its end: it was cut"
                    raise BadSample(f"what follows byte {tar.offset:,} {said}")

    def _stored(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
        """What a file of the tar holds; a BadSample in its place where that is too much."""
        if member.issparse():
            return BadSample("it is sparse: what is stored is not what it holds")
        if member.size > (most := self.limits.row):
            return BadSample(f"{member.size:,} bytes are more than the {most:,} that data.max_bytes allows")
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


def stream_tars(where: str, root: str, shards: Sequence[str], modalities: Fields, options: Options) -> Flow:
    """Tar shards, front to back."""
    flow = Tars(where, shards, modalities, options)
    flow.look(root, "tar", where)
    return flow


def stream_tables(where: str, root: str, files: Sequence[str], modalities: Fields, options: Options) -> Flow:
    """Local table files of one kind, front to back."""
    if (suffix := suffix_of(files[0])) == ".parquet":
        library(where)  # brings what reads them
    flow, wrong = Tables(where, files, list(modalities), options), []
    for file in files:
        try:
            if first := first_rows(file, options.limits):
                break
        except BadSample as why:  # said again when its turn comes
            wrong.append(Refused(file, str(why)))
        except OSError as cause:
            raise DataError(f"{file!r} cannot be read: {cause.strerror}") from cause
    else:
        check_share(wrong, len(wrong), options.share, "files")
        raise DataError(f"there are no rows in {where!r}")
    flow.columns = _columns(where, first, Path(file).parent, modalities, options)
    flow.look(root, f"{suffix} file", f"{flow.columns} of {where}")
    return flow


def stream_hub(where: str, modalities: Fields, options: Options) -> Flow:
    """USER/NAME or USER/NAME:SPLIT on the hub, read as it comes over the network."""
    datasets = library(where)
    with quiet(datasets), from_hub(where):
        full, table = load_hub(datasets, where, streaming=True)
        table = undecoded(table)
        if (first := next(iter(table), None)) is None:
            raise DataError(f"there are no rows in {where!r}")
        columns = _columns(where, first, Path(), modalities, options)
        shards = [f"{full} shard {n}" for n in range(table.num_shards)]
        flow = Hub(where, shards, table.select_columns(columns.names), columns)
        flow.notes = [f"a stream of {len(shards)} shards on the hub, from {columns} of {where}"]
    return flow


def _columns(where: str, first: Mapping[str, Any], folder: Path, modalities: Fields, options: Options) -> Columns:
    found = {name: column_of(where, list(first), name, m, options.column) for name, m in modalities.items()}
    return Columns(found, [name for name, column in found.items() if _is_path(first[column], folder, modalities[name])])


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
