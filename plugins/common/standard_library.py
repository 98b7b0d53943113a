"""Python's own documentation and source as small data sets of text and code: on every machine, the same for a version.

The label of a document is the package that it is of, where a package has `CLASS` documents or more.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from selfsup.kernel.contracts import Sample

# Tests, what distributions of Python leave out or add, and tables that are neither prose nor code.
SKIPPED = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__", "__phello__", "encodings", "pydoc_data"),
}
CLASS = 3
SHORTEST = 300  # characters of a module's documentation
LARGEST = 100_000  # characters of a source file
DOCSTRING = re.compile(r"^[ \t]*[rR]?(\"\"\"|''')(.*?)\1", re.S | re.M)


@cache
def documentation() -> Sequence[Sample]:
    """The topics of help(), and what each module of the standard library says about itself and its functions."""
    from pydoc_data.topics import topics

    found = [("topics", topics[name]) for name in sorted(topics)]
    for package, source in _modules():
        text = "\n\n".join(inspect.cleandoc(match[2]) for match in DOCSTRING.finditer(source))
        if len(text) >= SHORTEST:
            found.append((package, text))
    return _samples("text", found)


@cache
def source_code() -> Sequence[Sample]:
    """The modules of the standard library's packages."""
    return _samples("code", [(p, source) for p, source in _modules() if p and source.strip() and len(source) < LARGEST])


def _modules() -> Iterator[tuple[str, str]]:
    """(package or "", source) of the standard library, sorted by path."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, below, names in os.walk(root):
        below[:] = sorted(d for d in below if d not in SKIPPED and not d.startswith("config-"))
        package = os.path.relpath(folder, root).split(os.sep)[0].strip(".")
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # which says how this Python was built
                yield package, (Path(folder) / name).read_text("utf-8")


def _samples(field: str, found: Sequence[tuple[str, str]]) -> Sequence[Sample]:
    counts = Counter(package for package, _ in found)
    number = {package: i for i, package in enumerate(sorted(p for p in counts if p and counts[p] >= CLASS))}
    return [{field: text, **({"label": number[package]} if package in number else {})} for package, text in found]
