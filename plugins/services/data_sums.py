"""Digests that lie beside the data: SHA256SUMS, as `sha256sum` writes it, and FILE.sha256.

They are looked for beside each file, above it up to the folder that --data names, and beside that folder. What they
name and is used is checked; a flipped bit that still decodes is found in no other way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from selfsup.kernel import distributed
from selfsup.kernel.errors import DataError

from .data_refused import Refused

SUMS, OWN = "SHA256SUMS", ".sha256"
LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
ESCAPED = re.compile(r"\\([\\nr])")
DIFFERS = "its SHA-256 is not the one beside it"
THREADS = 4
MEET = 20.0  # seconds
BLOCK = 1 << 20


def check_sums(root: str, files: Sequence[str]) -> tuple[list[Refused], list[str]]:
    """The files that differ from a digest beside them, and a note on what was checked, if anything was.

    Processes that run together call this together: those of a machine share the work, and all learn all that was found.
    """
    began, wanted, error = time.perf_counter(), {}, ""
    try:
        wanted = digests(root, files)
    except DataError as cause:
        error = str(cause)
    told = [json.loads(said) for said in distributed.everyone(json.dumps([_check_own(wanted), error]))]
    for _, error in told:
        if error:
            raise DataError(error)
    found = {file: reason for own, _ in told for file, reason in own.items()}
    refused = [Refused(file, found[file]) for file in files if file in found]
    if not wanted:
        return refused, []
    seconds, size = time.perf_counter() - began, sum(map(_size, wanted))
    right = f"{len(wanted.keys() - found):,} of {len(files):,} files are as their SHA-256 says"
    return refused, [f"{right}, {size / 1e6:,.1f} MB checked in {seconds:.1f} s"]


def _check_own(wanted: Mapping[str, str]) -> dict[str, str]:
    """{file: why it is refused}, of this process's share of what is wanted."""
    own = sorted(wanted, key=_size)
    if distributed.world() > 1:  # each machine reads its own disk
        own = own[int(os.environ.get("LOCAL_RANK", "0")) :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        going = {file: pool.submit(_digest, file) for file in own}
        # A process that is done meets the others now and then: none waits longer for one than train.timeout allows.
        while distributed.anyone(bool(wait(going.values(), timeout=MEET).not_done)):
            pass
    return {file: _reason(got) for file in own if (got := going[file].result()) != wanted[file]}


def digests(root: str, files: Sequence[str]) -> dict[str, str]:
    """What is said of the digests of files: {file: hexadecimal}."""
    known: dict[str, dict[str, str]] = {}
    out: dict[str, str] = {}
    for file in files:
        if os.path.isfile(own := file + OWN):
            said = _read(Path(own))
            if os.path.basename(file) not in said:
                raise DataError(f"{own} names {', '.join(said) or 'nothing'}, not {os.path.basename(file)}")
            out[file] = said[os.path.basename(file)]
            continue
        for folder in _above(root, os.path.dirname(file)):
            if folder not in known:
                path = Path(folder or ".") / SUMS
                known[folder] = _read(path) if path.is_file() else {}
            name = os.path.relpath(file, folder or ".")
            if name in known[folder]:
                out[file] = known[folder][name]
                break
    return out


def _above(root: str, folder: str) -> Iterator[str]:
    """The folder of a file, those above it down from `root`, and the one that holds `root`."""
    last = os.path.abspath(root or ".")
    here = os.path.abspath(folder or ".")
    while True:
        yield here
        if here == last or not here.startswith(last):
            break
        here = os.path.dirname(here)
    yield os.path.dirname(last)


def _read(path: Path) -> dict[str, str]:
    """{name: digest}; DataError where a line is of another form."""
    out = {}
    try:
        lines = path.read_text("utf-8", "surrogateescape").split("\n")
    except OSError as cause:
        raise DataError(f"{path} cannot be read: {cause.strerror or cause}") from None
    for number, line in enumerate(lines, 1):
        if line and line[0] != "#":
            if not (match := LINE.fullmatch(line)):
                raise DataError(
                    f"line {number} of {path} is not of the form 'digest  name', as `sha256sum` writes it; "
                    f"mend it, or remove the file to go without digests"
                )
            name = ESCAPED.sub(_plain, match[3]) if match[1] else match[3]
            out[os.path.normpath(name)] = match[2].lower()
    return out


def _plain(match: re.Match[str]) -> str:
    return {"n": "\n", "r": "\r"}.get(match[1], match[1])


def sha256(file: str) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stored:
        while block := stored.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest(file: str) -> str:
    """The digest of a file, or what kept it from being read."""
    try:
        return sha256(file)
    except OSError as cause:
        return cause.strerror or str(cause)


def _size(file: str) -> int:
    return os.path.getsize(file) if os.path.exists(file) else 0


def _reason(got: str) -> str:
    return DIFFERS if len(got) == 64 else f"it cannot be read: {got}"
