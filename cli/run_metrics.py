"""What `metrics.jsonl` says of a run, read from its end: thousands of lines cost no more than some.

    {"step": 99, "loss": 3.1, "norm": 2.0, "samples_per_second": 310.0, "metrics": {"accuracy": 0.1}, "time": 1.7e9}
    {"step": 99, "measured": {"validation/loss": 1.9, "online/knn": 0.6}, "time": 1.7e9}

The file may belong to a run that is being written or was killed: lines that do not parse are passed over.
"""

from __future__ import annotations

import json
import math
import mmap
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
RECENT = 10  # steps at the end whose mean stands for the end: one step's loss is as noisy as its batch is small
BLOCK = 1 << 16  # bytes that are read at first
Row = dict[str, Any]


@dataclass
class Log:
    """The end of a run's log, and everything that was measured."""

    steps: int = 0  # that have a line
    time: float | None = None  # of the newest line, in seconds since 1970
    recent: dict[str, float] = field(default_factory=dict)  # loss and metrics: means over the newest steps
    rate: float | None = None  # samples a second: the median of the newest steps
    pace: float | None = None  # seconds a step, likewise
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (after so many steps, values)

    def names(self) -> set[str]:
        """What there is a figure of."""
        return {*self.recent, *(name for _, values in self.measured for name in values)}

    def last(self) -> dict[str, float]:
        """The newest value of everything that was measured."""
        return {name: value for _, values in self.measured for name, value in values.items()}

    def best(self, name: str, highest: bool) -> tuple[float, int] | None:
        """The best value and after how many steps: of what was measured, else of the end of the run."""
        found = [(values[name], -steps) for steps, values in self.measured if name in values]
        if not found:
            return (self.recent[name], self.steps) if name in self.recent else None
        value, steps = max(found) if highest else min(found, key=lambda pair: (pair[0], -pair[1]))
        return value, -steps


def read_log(path: Path) -> Log:
    """The log in a file; an empty one where there is no file, or none that can be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _log(_newest(content), list(_measured(content)))
    except (OSError, ValueError):  # an empty file cannot be mapped
        return Log()


def _log(rows: list[Row], measured: list[Row]) -> Log:
    times = [row["time"] for row in [*rows[:1], *measured[-1:]] if number(row.get("time")) is not None]
    names = dict.fromkeys(name for row in rows for name in _figures(row))
    recent = {name: [v for row in rows if (v := number(_figures(row).get(name))) is not None] for name in names}
    rates = [v for row in rows if (v := number(row.get("samples_per_second")))]
    clock = [v for row in rows if (v := number(row.get("time"))) is not None]
    return Log(
        steps=rows[0]["step"] + 1 if rows else 0,
        time=max(times, default=None),
        recent={name: statistics.fmean(values) for name, values in recent.items() if values},
        rate=statistics.median(rates) if rates else None,
        # Not the mean: a clock that was set in between would be most of it.
        pace=statistics.median(later - earlier for later, earlier in pairwise(clock)) if len(clock) > 1 else None,
        measured=[(row["step"] + 1, found) for row in measured if (found := _finite(row["measured"]))],
    )


def _newest(content: mmap.mmap) -> list[Row]:
    """The rows of the newest steps, newest first."""
    size, block = len(content), BLOCK
    while True:
        lines = content[max(0, size - block) :].splitlines()[int(block < size) :]  # the first one may be half a line
        found = [row for line in reversed(lines) if (row := parsed(line)) and "loss" in row][:RECENT]
        if len(found) == RECENT or block >= size:
            return found
        block *= 8


def _measured(content: mmap.mmap) -> Iterator[Row]:
    """The rows of what was measured, oldest first: found by a search, as they are few among many."""
    place = content.find(b'"measured"')
    while place >= 0:
        start, end = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
        row = parsed(content[start : end if end >= 0 else len(content)])
        if row and isinstance(row.get("measured"), dict):
            yield row
        place = content.find(b'"measured"', end) if end >= 0 else -1


def parsed(line: bytes) -> Row | None:
    """The row of a line; None where the line is torn or of something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # brackets nested without end
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    with suppress(OverflowError):  # a number of hundreds of digits
        return float(value) if math.isfinite(value) else None
    return None


def _figures(row: Row) -> Row:
    metrics = row.get("metrics")
    return {"loss": row.get("loss"), **(metrics if isinstance(metrics, dict) else {})}


def _finite(values: Row) -> dict[str, float]:
    return {name: v for name, value in values.items() if (v := number(value)) is not None}
