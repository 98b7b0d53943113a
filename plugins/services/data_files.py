"""Files of a folder or a glob as samples: found, sorted, sifted, and labelled by folder or file name."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.kernel.contracts import Modality
from selfsup.kernel.errors import ConfigError, DataError, nearest

from .data_refused import Limits, Refused, check_share
from .data_sums import check_sums

ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|authors|citation|changelog)\b", re.I)
SPLITS = frozenset({"train", "training", "valid", "validation", "val", "dev", "test", "testing", "eval"})
Fields = Mapping[str, Modality]
Names = Sequence["str | None"]


@dataclass(frozen=True)
class Options:
    """What the section [data] says about reading one set of samples."""

    column: str | None = None
    label: str | None = None
    cache: str | None = None
    share: float = 0.01  # of files or rows that may be refused
    limits: Limits = field(default_factory=Limits)

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """`label` as a regular expression on file names; None where it names a column."""
        if self.label is None or "(" not in self.label:
            return None
        try:
            pattern = re.compile(self.label)
        except re.error as cause:
            raise ConfigError(f"data.label = {self.label!r} is no regular expression: {cause}") from None
        if pattern.groups != 1:
            raise ConfigError(f"data.label = {self.label!r} has {pattern.groups} groups; one is to hold the label")
        return pattern

    def from_names(self, names: Iterable[str], where: str) -> Names | None:
        """The label of each file by the regular expression; None without one."""
        if (pattern := self.pattern) is None:
            return None
        matches = [pattern.search(os.path.basename(name)) for name in names]
        labels = [match[1] if match else None for match in matches]
        if not any(label is not None for label in labels):
            example = os.path.basename(next(iter(names), ""))
            raise DataError(f"data.label = {self.label!r} matches no file name of {where}, such as {example!r}")
        return labels


@dataclass
class Files:
    """One file a sample and field. Paths are kept as bytes arrays, which workers share without copying them."""

    paths: Mapping[str, np.ndarray[Any, Any]]  # field -> [N] bytes
    labels: Names | None
    notes: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.paths.values())))

    def fetch(self, index: int) -> dict[str, Any]:
        """{field: Path}; a str would be a text."""
        return {name: Path(os.fsdecode(paths[index])) for name, paths in self.paths.items()}

    def name(self, index: int) -> str:
        """The path."""
        return os.fsdecode(next(iter(self.paths.values()))[index])

    def place(self, index: int) -> dict[str, Any]:
        """{"path"}"""
        return {"path": self.name(index)}


def open_files(where: str, root: str, files: Sequence[str], modalities: Fields, options: Options) -> Files:
    """The media files among `files`; empty ones and those of another kind are left out, and noted."""
    sizes = [os.path.getsize(file) if os.path.exists(file) else -1 for file in files]
    filled = [file for file, size in zip(files, sizes, strict=True) if size > 0]
    about = _about(root, filled, modalities)
    kept = [file for file in filled if file not in about]
    usable = sorted(set().union(*match_fields(kept, modalities).values()))
    refused, checked = check_sums(root, [kept[i] for i in usable])
    check_share(refused, len(usable), options.share, "files")
    wrong = {one.path for one in refused}
    kept = [file for file in kept if file not in wrong]
    chosen = match_fields(kept, modalities)
    used = set().union(*chosen.values())
    reasons = {
        "empty": [os.path.basename(f) for f, size in zip(files, sizes, strict=True) if size == 0],
        "broken links": [os.path.basename(f) for f, size in zip(files, sizes, strict=True) if size < 0],
        "not as their SHA-256 says": [os.path.basename(one.path) for one in refused],
        "about the data": [os.path.basename(f) for f in about],
        "of another kind": [_suffix(f) for i, f in enumerate(kept) if i not in used],
    }
    if not used:
        raise DataError(f"no sample of {where!r} is whole; {'; '.join(left_out(reasons))}")
    out = Files(
        {name: np.array([os.fsencode(kept[i]) for i in index]) for name, index in chosen.items()},
        _labels([kept[i] for i in next(iter(chosen.values()))], root, where, options),
        refused=refused,
    )
    total = sum(os.path.getsize(kept[i]) for i in used)
    classes = f" in {count_classes(out.labels)} {_origin(options)}" if out.labels else ""
    what = " with ".join(f"{name} file{'s' * (len(out) != 1)}" for name in modalities)
    out.notes.append(f"{len(out):,} {what}{classes}, {megabytes(total)}, from {where}")
    out.notes.extend([*checked, *left_out(reasons)])
    return out


def _about(root: str, files: Sequence[str], modalities: Fields) -> list[str]:
    """Texts that lie at the top of a folder to describe it, unless they are all that there is."""
    usable = [f for f in files if any(f.lower().endswith(modality.suffixes) for modality in modalities.values())]
    about = [f for f in usable if says_about(f) and os.path.dirname(f) == root.rstrip("/")]
    return about if len(about) < len(usable) else []


def match_fields(names: Sequence[str], modalities: Fields) -> dict[str, list[int]]:
    """Which names serve each field, by suffix: {field: [N] indices}; several fields are paired by name up to a dot."""
    lower = [name.lower() for name in names]
    serves = {
        field: [i for i, name in enumerate(lower) if name.endswith(modality.suffixes)]
        for field, modality in modalities.items()
    }
    if len(modalities) == 1:
        return serves
    stems = [{_stem(names[i]): i for i in reversed(index)} for index in serves.values()]
    both = [stem for stem in stems[0] if all(stem in other for other in stems[1:])]
    return {field: [of[stem] for stem in sorted(both)] for field, of in zip(modalities, stems, strict=True)}


def says_about(file: str) -> bool:
    """Whether a file describes the data beside it, by its name."""
    return ABOUT.match(os.path.basename(file)) is not None


def class_folders(names: Sequence[str]) -> Names | None:
    """The folder of each name if every name lies one level below one of several, splits (train/...) aside."""
    parts = [[p for p in name.split("/")[:-1] if p] for name in names]
    inner = [p[1:] if p and p[0].lower() in SPLITS else p for p in parts]
    if any(len(p) != 1 for p in inner) or len({p[0] for p in inner}) < 2:
        return None
    return [p[0] for p in inner]


def find_files(where: str) -> tuple[str, list[str]]:
    """(root, all files sorted) of a folder, a file or a glob; DataError says what is there instead."""
    if os.path.isdir(where):
        return where, list(_walk(where))
    if os.path.exists(where):
        return os.path.dirname(where), [where]
    if glob.has_magic(where):
        found = _below(where) if "**" in where.split(os.sep) else sorted(glob.glob(where))
        if not found:
            raise DataError(f"no file matches {where!r}; {_around(glob_parent(where))}")
        files = sorted({f for hit in found for f in (_walk(hit) if os.path.isdir(hit) else [hit])})
        return os.path.commonpath([os.path.dirname(f) for f in files] or [where]), files
    parent, name = os.path.split(where.rstrip("/"))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    if not os.path.isdir(parent or "."):
        raise DataError(f"there is no {where!r}")
    raise DataError(f"there is no {where!r}; in {parent or '.'}: {nearest(name, _visible(parent or '.'))}")


def _below(pattern: str) -> list[str]:
    """The files that a pattern with ** matches. `glob` would follow links that lead back up, each time anew."""
    root = glob_parent(pattern)
    parts = os.path.relpath(pattern, root).split(os.sep)
    return [file for file in _walk(root) if _matches(os.path.relpath(file, root).split(os.sep), parts)]


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a path, or a folder above it, matches a pattern, both in pieces."""
    if not parts:
        return True
    if parts[0] == "**":
        return any(_matches(names[start:], parts[1:]) for start in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def glob_parent(pattern: str) -> str:
    """The folder above the first wildcard."""
    parent = os.path.dirname(pattern)
    while glob.has_magic(parent):
        parent = os.path.dirname(parent)
    return parent or "."


def kinds_of(files: Iterable[str], most: int = 5) -> str:
    """'12 .mp3, 3 .txt': what a list of files consists of."""
    counts = Counter(_suffix(f) for f in files).most_common(most + 1)
    shown = [f"{n:,} {suffix}" for suffix, n in counts[:most]]
    return ", ".join(shown + ["more kinds"] * (len(counts) > most)) or "nothing"


def left_out(reasons: Mapping[str, Sequence[str]], what: str = "file") -> list[str]:
    """['3 files left out: 2 empty (a.wav, b.wav), 1 of another kind (.txt)'], or nothing."""
    parts = [f"{len(names):,} {why} ({_some(names)})" for why, names in reasons.items() if names]
    total = sum(map(len, reasons.values()))
    return [f"{total:,} {what}{'s' * (total > 1)} left out: {', '.join(parts)}"] if parts else []


def count_classes(labels: Names | None) -> int:
    """How many different labels there are."""
    return len({label for label in labels or () if label is not None})


def megabytes(size: float) -> str:
    """A number of bytes as people write it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"


def _labels(files: Sequence[str], root: str, where: str, options: Options) -> Names | None:
    named = options.from_names(files, where)
    return named or class_folders([os.path.relpath(file, root or ".").replace(os.sep, "/") for file in files])


def _origin(options: Options) -> str:
    return "classes, by file name" if options.pattern else "class folders"


def _walk(root: str) -> Iterable[str]:
    """Every file below a folder, sorted, links followed once; hidden ones are skipped."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(d for d in below if not d.startswith("."))
        if real not in seen:
            yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))
        seen.add(real)


def _stem(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without a suffix"


def _some(names: Sequence[str], most: int = 3) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:most] + ["…"] * (len(distinct) > most))


def _visible(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def _around(folder: str) -> str:
    if not os.path.isdir(folder):
        return f"there is no folder {folder!r}"
    return f"{folder} holds {kinds_of(f for f in _walk(folder))}"
