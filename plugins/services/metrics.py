"""Write `metrics.jsonl`: one JSON object a step, complete and in order however often the run was resumed.

    {"step": 0, "loss": 5.1, "norm": 2.0, "lr": 0.001, "samples_per_second": 310.0, "amount": {"s of audio": 8.0},
     "time": 1767225600.0, "metrics": {"accuracy": 0.1}}

`step` counts from 0, `time` is in seconds since 1970, what is not finite is null. On a GPU the values
are read every few steps only, as reading waits for the device (law 5).

What a service measured (a validation loss, a kNN accuracy) has a line of its own, under the number of the step
that had just been done; -1 says that it was measured before the first one:

    {"step": 99, "measured": {"validation/loss": 1.9}, "time": 1767225700.0}

So a run that goes on from a checkpoint after 100 steps keeps this line, and one that goes on from an earlier
checkpoint drops it and measures again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.common.readings import Reading, Readings

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run

NAME = "metrics.jsonl"


class Metrics:
    """Append a line for each step and each measurement to RUN/metrics.jsonl, on the first process."""

    def __init__(self, *, every: Annotated[int, about("steps between two readings of a GPU", ge=1)] = 10) -> None:
        self.every = every
        self.file: TextIO | None = None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Open the file, without the lines of steps that will be done again."""
        self.readings = Readings(patience=self.every)
        self.readings.start()
        if run.folder is None or distributed.rank() > 0:
            return
        try:
            drop_from(run.folder / NAME, run.first)
            self.file = (run.folder / NAME).open("a", encoding="utf-8")
        except OSError as cause:
            self._give_up(cause)

    @hookimpl(tryfirst=True)  # before a service that may stop the run
    def step_finished(self, run: Run, report: Report) -> None:
        """Keep the step's numbers on the device; write them at once on a CPU, every few steps on a GPU."""
        if self.file is not None:
            self._write(map(line, self.readings.keep(run, report)))

    @hookimpl
    def measured(self, run: Run, values: Mapping[str, float]) -> None:
        """Write what was measured after the lines of the steps that were done."""
        if self.file is None:
            return
        self.flush()
        row = {"step": run.done - 1, "measured": {name: finite(v) for name, v in values.items()}, "time": time.time()}
        self._write([json.dumps(row, allow_nan=False) + "\n"])
        self.readings.start()

    @hookimpl
    def checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Steps behind a checkpoint are never done again: their lines must be there."""
        self.flush()

    @hookimpl(tryfirst=True)
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Write what is left."""
        try:
            self.flush()
        except RuntimeError:  # the device that failed the run cannot be read either
            if error is None:
                raise
        finally:
            if self.file:
                self.file.close()
            self.file = None

    def flush(self) -> None:
        """Read what is on the device and write it."""
        if self.file is not None:
            self._write(map(line, self.readings.read()))

    def _write(self, lines: Iterable[str]) -> None:
        text = "".join(lines)
        if self.file and text:
            try:
                self.file.write(text)
                self.file.flush()
            except OSError as cause:
                self._give_up(cause)

    def _give_up(self, cause: OSError) -> None:
        """A log never stops a run: say so once and write no more, so that only the last line can be torn."""
        print(f"warning: {NAME} ends here, it cannot be written: {cause.strerror}", file=sys.stderr)
        if self.file:
            with suppress(OSError):  # what is still buffered cannot be written either
                self.file.close()
        self.file = None


def line(reading: Reading) -> str:
    """One line of the file."""
    row: dict[str, Any] = asdict(reading)
    row |= {name: finite(row[name]) for name in ("loss", "norm", "lr")}
    row["metrics"] = {name: finite(value) for name, value in reading.metrics.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """As JSON holds it: None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def drop_from(path: Path, first: int) -> None:
    """Remove the lines of steps from `first` on, and one that was torn, all at once."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if first and _step(line) < first]  # from 0 on: also what was measured before
    if len(kept) < len(lines):
        work = path.with_name(f".{NAME}.{os.getpid()}")
        work.write_bytes(b"".join(kept))
        work.replace(path)


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that was torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
