"""Which column of a table holds what: the data, names of files, labels."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfsup.kernel.contracts import Modality
from selfsup.kernel.errors import DataError, nearest

from .data_files import Names, Options, find_files

WORDS = ("string", "large_string", "bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))
LABEL_COLUMNS = ("label", "labels", "class", "category", "digit", "target", "cls")
USUAL = {
    "image": ("img", "picture", "photo"),
    "audio": ("wav", "speech", "sound", "recording"),
    "text": ("content", "contents", "document", "body", "article", "passage", "sentence", "utterance", "caption"),
    "code": ("content", "contents", "source", "source_code", "func_code_string", "whole_func_string", "text"),
}
WRITTEN = ("text", "code")  # a value of these that ends as the name of a file does may well be a sentence
ANYWHERE = ("path", "file", "file_path", "filepath", "file_name", "filename", "bytes")


def column_of(where: str, known: Sequence[str], name: str, modality: Modality, asked: str | None) -> str:
    """The column that holds a field: the one asked for, or found by its usual names."""
    if asked is not None:
        if asked not in known:
            raise DataError(f"{where!r} has no column {asked!r}; {_nearest(asked, known)}")
        return asked
    usual = (name, *USUAL.get(name, ()), *(s.lstrip(".") for s in modality.suffixes), *ANYWHERE)
    lower = {column.lower(): column for column in reversed(known)}
    found: str | None = next((lower[u] for u in usual if u in lower), None)
    if found is None:
        raise DataError(
            f"no column of {where!r} is known to hold {name}: it has {', '.join(known)}; "
            f"name one with --set data.column=NAME, or for ssl eval with --column NAME"
        )
    return found


def _nearest(asked: str, known: Sequence[str]) -> str:
    """What was probably meant, beside everything there is: columns are few, and a near name may mean another thing."""
    hint = nearest(asked, known)
    return f"{hint} It has {', '.join(known)}" if hint.endswith("?") else hint


def holds_paths(table: Any, column: str, modality: Modality, files: Sequence[str]) -> bool:
    """Whether the column holds names of files, rather than the data itself; a text does if the first one exists."""
    kind = getattr(table.features[column], "dtype", None)
    if kind not in ("string", "large_string") or not modality.suffixes:
        return False
    first: str = next((v for v in table[column] if v), "")
    if not first.lower().endswith(modality.suffixes):
        return False
    return modality.field not in WRITTEN or ("\n" not in first and bool(resolved([first], files, np.zeros(1))[0][0]))


def resolved(
    values: Sequence[str | None], files: Sequence[str], starts: np.ndarray[Any, Any]
) -> tuple[list[str], list[str]]:
    """The path of each value, "" where there is none; and the values without one.

    A path counts from the folder of its table; where it is not there, the one file of that name below the
    folder is taken (Common Voice keeps its clips in a folder of their own).
    """
    below: dict[str, dict[str, list[str]]] = {}
    found, missing = [], []
    for row, value in enumerate(values):
        folder = os.path.dirname(files[int(np.searchsorted(starts, row, side="right")) - 1]) or "."
        path = os.path.join(folder, os.path.expanduser(value or ""))
        if not (value and os.path.isfile(path)):
            if folder not in below:
                below[folder] = _by_name(folder)
            same = below[folder].get(os.path.basename(value or ""), [])
            path = same[0] if len(same) == 1 else ""
        found.append(path)
        if not path:
            missing.append(value or "no name")
    return found, missing


def _by_name(folder: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = defaultdict(list)
    for file in find_files(folder)[1]:
        out[os.path.basename(file)].append(file)
    return out


def labels_of(where: str, table: Any, data: str, options: Options) -> tuple[Names | None, str]:
    """(labels, what they come from)."""
    if options.pattern:
        names = [_file_name(value) for value in undecoded(table.select_columns([data]))[data]]
        return options.from_names(names, where), "by file name"
    asked, known = options.label, table.column_names
    column = asked or next((c for c in LABEL_COLUMNS if c in known and c != data), None)
    if column is None:
        return None, ""
    if column not in known:
        raise DataError(f"{where!r} has no column {column!r} for labels; {_nearest(column, known)}")
    kind = table.features[column]
    if hasattr(kind, "int2str"):  # a datasets.ClassLabel, -1 where there is none
        return [None if v is None or v < 0 else kind.int2str(v) for v in table[column]], f"column {column!r}"
    if getattr(kind, "dtype", None) not in WORDS:
        if asked:
            raise DataError(f"column {column!r} of {where!r} holds {kind}; labels are whole numbers or words")
        return None, ""
    return [None if v is None else str(v) for v in table[column]], f"column {column!r}"


def _file_name(value: Any) -> str:
    name = value.get("path") if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def undecoded(table: Any) -> Any:
    """The same table with images and sound as they are stored."""
    for column, kind in (table.features or {}).items():  # a stream may not know them
        if getattr(kind, "decode", False) and type(kind).__name__ != "Json":  # a column of several types is text else
            table = table.cast_column(column, type(kind)(decode=False))
    return table
