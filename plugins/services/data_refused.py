"""What of the data was refused when it was opened: named, counted, and past a share a reason to stop."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from selfsup.kernel.errors import DataError, allow_bad, most_bad

SHOWN = 20
FREE = 64 << 20  # bytes that any file may unpack to, however small it is


@dataclass(frozen=True)
class Limits:
    """What a file may ask of this machine."""

    row: int = 1_000_000_000  # bytes of one row of a table or member of a tar
    ratio: float = 200.0  # bytes unpacked for each that is stored
    memory: float = 8e9  # bytes while a table is opened


class Unpacked(io.RawIOBase):
    """What a compressed file holds, as far as its size allows."""

    def __init__(self, inner: Any, size: int, limits: Limits) -> None:
        self.inner, self.size, self.limits = inner, size, limits
        self.left = max(FREE, int(limits.ratio * size))

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; DataError past the limit."""
        got = self.inner.read1(len(buffer))  # what is whole before the damage of a file that was cut
        self.left -= len(got)
        if self.left < 0:
            raise DataError(
                f"it unpacks to more than {self.limits.ratio:g} times its {self.size:,} bytes; where that is right, "
                f"raise data.max_ratio"
            )
        buffer[: len(got)] = got
        return len(got)

    def close(self) -> None:
        """Close the file too."""
        self.inner.close()
        super().close()


@dataclass(frozen=True)
class Refused:
    """A file, or a row of one, that cannot be used."""

    path: str
    reason: str
    row: int | None = None  # from 0
    whole: bool = True  # nothing else of the file can be used either

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.path if self.row is None else f"{self.path} row {self.row}"


def check_share(refused: Sequence[Refused], of: int, share: float, what: str) -> None:
    """DataError with the list where more than a share of all files or rows was refused, or nothing is left."""
    if not refused or (len(refused) <= most_bad(share, of) and len(refused) < of):
        return
    if of == 1:
        raise DataError(f"{refused[0].name!r} cannot be used: {refused[0].reason}")
    listed = "\n".join(f"  {one.name}: {one.reason}" for one in refused[:SHOWN])
    if len(refused) >= of:
        raise DataError(f"none of {of:,} {what} can be used:\n{listed}")
    raise DataError(
        f"{len(refused):,} of {of:,} {what} cannot be used, more than data.max_bad_fraction = {share:g} allows; mend "
        f"or remove them, or allow more, as in {allow_bad(len(refused), of)}:\n{listed}"
    )


def named(refused: Sequence[Refused], what: str, most: int = 3) -> list[str]:
    """A note on what was left out, the first of it by name; or nothing."""
    listed = "; ".join(f"{one.name}: {one.reason}" for one in refused[:most]) + ("; …" if len(refused) > most else "")
    return [f"{len(refused):,} {what}{'s' * (len(refused) > 1)} left out: {listed}"] if refused else []


@contextmanager
def little_memory(most: float) -> Iterator[None]:
    """Let this process grow by at most so many bytes meanwhile: a parser that a file has ask for more gets an error.

    Linux counts what is written to (RLIMIT_DATA), so maps of large files are free. Elsewhere nothing is bounded.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _data_now() + int(most)
    known = [limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_now() -> int:
    """The bytes that RLIMIT_DATA counts of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmData:"))
    return 1024 * int(line.split()[1])
