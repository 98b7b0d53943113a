"""Tar shards as samples (the webdataset form, or any tar of media files), read where they lie.

Only the headers are read on opening; a sample is one seek and one read, so shards are neither unpacked nor
copied. The `datasets` library is not used here: its reader copies every shard into a cache, refuses a tar
whose first members differ in suffix, and needs torchcodec for sound.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfsup.kernel.errors import BadSample, DataError

from .data_files import (
    Fields,
    Names,
    Options,
    class_folders,
    count_classes,
    kinds_of,
    left_out,
    match_fields,
    megabytes,
)
from .data_refused import Limits, Refused, check_share, little_memory, named
from .data_sums import check_sums

LABEL = 1 << 20  # bytes of a member that may hold a label
LABEL_KEYS = ("label", "labels", "class", "category", "cls")


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies: in which shard, where it begins, how long it is."""

    shard: int
    name: str
    start: int
    size: int


@dataclass
class Tars:
    """Members of tar shards: {field: {"bytes", "path"}}."""

    shards: Sequence[str]
    names: Mapping[str, np.ndarray[Any, Any]]  # field -> [N] bytes
    spans: Mapping[str, np.ndarray[Any, Any]]  # field -> [N, 3] int64: shard, start, size
    labels: Names | None
    notes: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.spans.values())))

    def fetch(self, index: int) -> dict[str, Any]:
        """{field: {"bytes", "path"}}"""
        return {name: self._read(name, index) for name in self.spans}

    def name(self, index: int) -> str:
        """shard.tar:member"""
        name = next(iter(self.spans))
        return f"{self.shards[self.spans[name][index, 0]]}:{os.fsdecode(self.names[name][index])}"

    def place(self, index: int) -> dict[str, Any]:
        """{"path" of the shard, "member", "offset" of its bytes}"""
        name = next(iter(self.spans))
        shard, start, _ = (int(x) for x in self.spans[name][index])
        return {"path": self.shards[shard], "member": os.fsdecode(self.names[name][index]), "offset": start}

    def _read(self, name: str, index: int) -> dict[str, Any]:
        shard, start, size = (int(x) for x in self.spans[name][index])
        with open(self.shards[shard], "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise BadSample(f"the tar ends after {len(data)} of its {size} bytes")
        return {"bytes": data, "path": os.fsdecode(self.names[name][index])}


def open_tars(where: str, root: str, shards: Sequence[str], modalities: Fields, options: Options) -> Tars:
    """The members of tar shards that the modalities read; with several fields, paired by name up to the first dot."""
    refused, notes = check_sums(root, shards)
    wrong = {one.path for one in refused}
    members: list[Member] = []
    with little_memory(options.limits.memory):
        for number, shard in enumerate(shards):
            if shard not in wrong:
                found, damage = _index(number, shard, options.limits)
                members += found
                refused += damage
    check_share([one for one in refused if one.whole], len(shards), options.share, "shards")
    notes += named(refused, "shard or member")
    kept = [m for m in members if m.size]
    usable = kept if options.column is None else [m for m in kept if _key(m) == options.column]
    chosen = match_fields([f"{m.shard}/{m.name}" for m in usable], modalities)  # pairs lie in one shard
    first = [usable[i] for i in next(iter(chosen.values()))]
    if not first:
        reads = " and ".join(f"{name} ({', '.join(m.suffixes)})" for name, m in modalities.items())
        wanted = f" with the key {options.column!r}" if options.column else ""
        raise DataError(f"no member of {where!r}{wanted} is {reads}; it holds {kinds_of(m.name for m in members)}")
    labels = _labels(first, members, shards, where, options)
    used = {usable[i] for index in chosen.values() for i in index}
    classes = f" in {count_classes(labels)} classes" if labels else ""
    total = sum(usable[i].size for index in chosen.values() for i in index)
    what = " with ".join(f"{name} files" for name in modalities)
    origin = where if list(shards) == [where] else f"{len(shards)} tars of {where}"
    notes.insert(0, f"{len(first):,} {what}{classes}, {megabytes(total)}, from {origin}")
    others = [os.path.splitext(m.name)[1].lower() or "without a suffix" for m in kept if m not in used]
    empty = [os.path.basename(m.name) for m in members if not m.size]
    notes += left_out({"empty": empty, "beside the samples": others}, "member")
    return Tars(
        shards,
        {name: np.array([os.fsencode(usable[i].name) for i in index]) for name, index in chosen.items()},
        {name: np.array([_span(usable[i]) for i in index], np.int64) for name, index in chosen.items()},
        labels,
        notes,
        refused,
    )


def _span(member: Member) -> tuple[int, int, int]:
    return member.shard, member.start, member.size


def _index(number: int, shard: str, limits: Limits) -> tuple[list[Member], list[Refused]]:
    """The files of one shard, in its order; one that ends early gives what it holds."""
    found: list[Member] = []
    refused: list[Refused] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for m in tar:
                tar.members = []  # type: ignore[attr-defined]  # of a million, the library's own list fills gigabytes
                if not m.isfile() or os.path.basename(m.name).startswith("."):
                    continue
                if m.issparse() or m.size > limits.row:
                    why = f"it has {m.size:,} bytes, more than data.max_bytes = {limits.row:,} allows"
                    why = "it is sparse: what is stored is not what it holds" if m.issparse() else why
                    refused.append(Refused(f"{shard}:{m.name}", why, whole=False))
                else:
                    found.append(Member(number, m.name.removeprefix("./"), m.offset_data, m.size))
    except (tarfile.TarError, EOFError, OSError, ValueError, MemoryError, RecursionError) as cause:
        if not found:
            return found, [Refused(shard, f"it cannot be read as an uncompressed tar: {cause}")]
        refused.append(Refused(shard, f"it is damaged after its {len(found):,} first files: {cause}", whole=False))
    return found, refused


def _key(member: Member) -> str:
    """webdataset's name of a member within its sample: what follows the first dot."""
    return os.path.basename(member.name).partition(".")[2]


def _group(member: Member) -> tuple[int, str]:
    folder, base = os.path.split(member.name)
    return member.shard, os.path.join(folder, base.partition(".")[0])


def _labels(
    samples: Sequence[Member], members: Sequence[Member], shards: Sequence[str], where: str, options: Options
) -> Names | None:
    """By file name, by a member beside the sample (.cls, or .json with a label), or by class folder."""
    named = options.from_names([m.name for m in samples], where)
    if named:
        return named
    asked = (options.label,) if options.label else LABEL_KEYS
    beside: dict[tuple[int, str], str] = {}
    for m in members:
        if 0 < m.size <= LABEL and (_key(m) in asked or _key(m) == "json"):
            text = _text(shards[m.shard], m)
            if (label := _from_json(text, asked) if _key(m) == "json" else text) is not None:
                beside[_group(m)] = label
    if beside:
        return [beside.get(_group(m)) for m in samples]
    if options.label:
        raise DataError(f"no sample of {where!r} has a label {options.label!r}, neither as a member nor in its .json")
    return class_folders([m.name for m in samples])


def _text(shard: str, member: Member) -> str:
    with open(shard, "rb") as file:
        file.seek(member.start)
        return file.read(member.size).decode("utf-8", "replace").strip()


def _from_json(text: str, keys: Sequence[str]) -> str | None:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):  # brackets nested without end
        return None
    found = next((facts[key] for key in keys if key in facts), None) if isinstance(facts, dict) else None
    return str(found) if isinstance(found, str | int) else None
