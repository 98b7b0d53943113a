"""Sample order, batches, workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .contracts import Sample


@dataclass(frozen=True)
class Part:
    """One of the data sets that a source joins: how many samples, and its share of the mixture."""

    size: int
    weight: float  # relative; 0 < weight


class Source(Protocol):
    """Samples by number, as `open_data` returns them. Must pickle: it goes to data workers."""

    parts: Sequence[Part]  # consecutive; their sizes add up to len()
    notes: Sequence[str]  # the first look at the data, for people: counts, sizes, what was left out and why

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Stored fields, not decoded: {"audio": path or {"bytes", "path"}, ...}, and "label" (int) where known."""

    def name(self, index: int) -> str:
        """What a person calls this sample: a path, a row of a file."""
