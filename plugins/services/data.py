"""Open what --data names: folders, files, globs, tables, tar shards, names on the Hugging Face hub.

No manifest and no labels are needed. Labels are found where they are there, and serve evaluation only:
class folders, a column, or, with a regular expression, the file name. Several --data make a mixture in
proportion to their sizes; PATH@WEIGHT gives each its share instead, as in `--data clean@3 --data 'web/*.wav@1'`
(the end of a path counts as a weight only if it is a number and no file has that name).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Modality, Sample
from selfsup.kernel.errors import DataError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.loader import Part, Source
from selfsup.plugins.common.windows import part_of

from .data_files import Fields, Names, Options, find_files, kinds_of, open_files, says_about
from .data_refused import Limits, Refused
from .data_streams import stream_hub, stream_tables, stream_tars, windows
from .data_tables import READERS, open_hub, open_tables, suffix_of
from .data_tars import open_tars

Paths = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
Count = Annotated[int, about("how many", ge=0)]
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Piece(Protocol):
    """What one --data gives."""

    labels: Names | None
    notes: list[str]
    refused: list[Refused]

    def __len__(self) -> int:
        """How many samples there are."""

    def fetch(self, index: int) -> dict[str, Any]:
        """{field: stored}"""

    def name(self, index: int) -> str:
        """What a person calls this sample."""

    def place(self, index: int) -> dict[str, Any]:
        """{"path"}, and where in that file it lies"""


class Mixture:
    """Several pieces as one `Source`; `classes[label]` is the name of a label."""

    def __init__(self, pieces: Sequence[Piece], weights: Sequence[float | None], notes: Sequence[str] = ()) -> None:
        self.pieces, sizes = pieces, [len(piece) for piece in pieces]
        self.parts: Sequence[Part] = [Part(n, n if w is None else w) for n, w in zip(sizes, weights, strict=True)]
        self.refused = [one for piece in pieces for one in piece.refused]
        self.notes: Sequence[str] = [*(note for piece in pieces for note in piece.notes), *notes]
        self.ends = np.cumsum(sizes)
        names = [name for p in pieces for name in (p.labels if p.labels is not None else [None] * len(p))]
        self.classes: list[str] | None = sorted({n for n in names if n is not None}, key=_in_order) or None
        number = {name: label for label, name in enumerate(self.classes or ())}
        self.labels = np.array([number.get(name, -1) if name is not None else -1 for name in names], np.int64)
        for piece in pieces:
            piece.labels = None  # the numbers serve from here on; words would be copied to every worker

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        piece, within = self._find(index)
        sample = piece.fetch(within)
        return {**sample, "label": int(self.labels[index])} if self.labels[index] >= 0 else sample

    def name(self, index: int) -> str:
        """What a person calls this sample: a path, a row of a file, a member of a tar."""
        piece, within = self._find(index)
        return piece.name(within)

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """Files and rows that were refused when the data was opened: {"path", "row" or nothing, "reason"}."""
        rows = ({} if one.row is None else {"row": one.row} for one in self.refused)
        return [{"path": one.path, **row, "reason": one.reason} for one, row in zip(self.refused, rows, strict=True)]

    def place(self, index: int) -> dict[str, Any]:
        """{"path"}, and where in that file it lies: {"row"}, {"member", "offset"}."""
        piece, within = self._find(index)
        return piece.place(within)

    def _find(self, index: int) -> tuple[Piece, int]:
        part, within = part_of(index, self.ends)
        return self.pieces[part], within


class BuiltIn:
    """The sample that a modality brings."""

    def __init__(self, field: str, modality: Modality) -> None:
        self.field, self.samples = field, modality.sample()
        self.refused: list[Refused] = []
        # A sample that is made when it is asked for may know its labels beforehand.
        known = getattr(self.samples, "labels", None) or [sample.get("label") for sample in self.samples]
        self.labels: Names | None = [None if label is None else str(label) for label in known]
        self.notes = [
            f"no data was named: this is the built-in sample of {len(self.samples):,} {field} samples, to try things "
            f"out; name your own with --data, as in --data FOLDER ({', '.join(modality.suffixes) or 'tables'})"
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, index: int) -> dict[str, Any]:
        """{field: stored}"""
        return {self.field: self.samples[index][self.field]}

    def name(self, index: int) -> str:
        """built-in sample 12"""
        return f"built-in {self.field} sample {index}"

    def place(self, index: int) -> dict[str, Any]:
        """{"path"}: a name"""
        return {"path": self.name(index)}


class Data:
    """The service that opens --data."""

    fixed = ("paths", "column", "stream")  # a run that is resumed sees the same samples

    def __init__(
        self,
        *,
        paths: Annotated[
            Paths, about("folders, files, globs, tables, tars, hub names; PATH@WEIGHT for its share of a mixture")
        ] = [],  # noqa: B006 - never changed
        workers: Annotated[Count | Literal["auto"], about("processes that read and decode, from 0")] = "auto",
        max_bad_fraction: Annotated[
            float, about("share of samples that may be unusable before a run stops", ge=0, le=1)
        ] = 0.01,
        column: Annotated[str | None, about("column (tables) or key (tars) of the data; None finds it")] = None,
        label: Annotated[
            str | None,
            about(
                "column of labels, or, with a group in it, a regular expression on file names: ^(\\d)_; None finds it"
            ),
        ] = None,
        cache: Annotated[str | None, about("folder for converted tables; None is that of `datasets`")] = None,
        max_bytes: Annotated[int, about("of a row of a table or a member of a tar; a larger one is bad", ge=1)] = 10**9,
        max_ratio: Annotated[float, about("bytes unpacked for each that a .gz or parquet file has", gt=1)] = 200,
        max_memory: Annotated[float, about("bytes of memory that opening a table may take", ge=1e8)] = 8e9,
        stream: Annotated[
            int | None,
            about("read tables and tars front to back, shuffling so many samples at a time; None: no stream", ge=1),
        ] = None,
    ) -> None:
        self.paths, self.workers, self.max_bad_fraction = paths, workers, max_bad_fraction
        self.stream = stream
        self.options = Options(column, label, cache, max_bad_fraction, Limits(max_bytes, max_ratio, max_memory))

    @hookimpl(trylast=True)
    def open_data(self, paths: Sequence[str], modalities: Mapping[str, Modality]) -> Source:
        """The samples behind `paths`; the built-in sample if there are none."""
        window = self.stream if list(paths) == self.paths else None  # data to validate on is always whole
        if window and not paths:
            raise DataError("data.stream says how the data is read, and no data was named; name it with --data")
        if not paths:
            if len(modalities) > 1:
                raise DataError(
                    f"there is no built-in sample of {' with '.join(modalities)}; name your data with --data"
                )
            return Mixture([BuiltIn(*next(iter(modalities.items())))], [None])
        for spec in paths:
            if not spec.isascii() and any("\ud800" <= letter <= "\udfff" for letter in spec):
                raise DataError(f"--data {spec!r} is no UTF-8, which a run file cannot hold; rename it, or link to it")
        specs = [split_weight(spec) for spec in paths]
        weights = [weight for _, weight in specs]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            bare = next(path for path, weight in specs if weight is None)
            raise DataError(f"either every --data has a weight or none; {bare!r} has none")
        if window:
            if None in weights and len(weights) > 1:
                example = " ".join(f"--data {path}@1" for path, _ in specs)
                raise DataError(f"nobody knows how long streams are, so each needs its share, as in {example}")
            flows = [open_path(path, modalities, self.options, stream=True) for path, _ in specs]
            return windows(flows, [w or 1.0 for w in weights], window, [path for path, _ in specs])
        pieces = [open_path(path, modalities, self.options) for path, _ in specs]
        shares = [w or len(p) for w, p in zip(weights, pieces, strict=True)]
        mix = ", ".join(f"{100 * s / sum(shares):.3g} % {path}" for s, (path, _) in zip(shares, specs, strict=True))
        return Mixture(pieces, weights, [f"mixture: {mix}"] if len(pieces) > 1 else [])


def split_weight(spec: str) -> tuple[str, float | None]:
    """'web/*.wav@0.5' -> ('web/*.wav', 0.5); the whole is a path where there is no number, or a file of that name."""
    path, at, number = spec.rpartition("@")
    if not at or os.path.lexists(os.path.expanduser(spec)) or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
        return os.path.expanduser(spec), None
    if not float(number) > 0:
        raise DataError(f"the weight in {spec!r} is to be larger than 0; leave the data out instead")
    return os.path.expanduser(path), float(number)


def open_path(where: str, modalities: Fields, options: Options, stream: bool = False) -> Any:
    """What one --data names, a `Piece` or, read front to back, a `Flow`; DataError says what is there instead."""
    if _on_hub(where):
        return (stream_hub if stream else open_hub)(where, modalities, options)
    root, files = find_files(where)
    tables = {suffix: [f for f in files if suffix_of(f) == suffix] for suffix in READERS}
    kinds = {suffix: found for suffix, found in tables.items() if found}
    if tars := [file for file in files if file.lower().endswith(".tar")]:
        kinds[".tar"] = tars
    suffixes = tuple(suffix for m in modalities.values() for suffix in m.suffixes)
    # A README.md beside tables is no data.
    if any(file.lower().endswith(suffixes) and not (kinds and says_about(file)) for file in files):
        if stream:
            raise DataError(f"data.stream reads tables and tars, and {where!r} holds files of their own; leave it out")
        return open_files(where, root, files, modalities, options)
    if len(kinds) > 1:
        kinds.pop(".json", None)  # what lies beside other tables describes them
    if len(kinds) > 1:
        raise DataError(
            f"{where!r} holds {kinds_of(files)}, of which several could be meant; "
            f"name one kind, as in --data '{where.rstrip('/')}/**/*{next(iter(kinds))}'"
        )
    if not kinds:
        reads = "; ".join(f"{name} is read from {', '.join(m.suffixes) or 'tables'}" for name, m in modalities.items())
        raise DataError(
            f"there is no usable file in {where!r}, it holds {kinds_of(files)}. {reads}, "
            f"and from tables ({', '.join(READERS)}) and .tar shards"
        )
    suffix, found = next(iter(kinds.items()))
    if stream:
        return (stream_tars if suffix == ".tar" else stream_tables)(where, root, found, modalities, options)
    return (open_tars if suffix == ".tar" else open_tables)(where, root, found, modalities, options)


def _on_hub(where: str) -> bool:
    """USER/NAME, unless a folder USER is here: then a path was meant."""
    return bool(HUB.fullmatch(where)) and not os.path.isdir(where.partition("/")[0])


def _in_order(name: str) -> tuple[int, float, str]:
    """Numbers by value, then words."""
    return (0, int(name), name) if re.fullmatch(r"-?\d+", name) else (1, 0, name)
