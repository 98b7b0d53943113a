"""Write `metrics.jsonl`: one JSON object a step, complete and in order however often the run was resumed.

    {"step": 0, "loss": 5.1, "norm": 2.0, "lr": 0.001, "samples_per_second": 310.0, "amount": {"s of audio": 8.0},
     "time": 1767225600.0, "metrics": {"accuracy": 0.1}}

`step` counts from 0, `time` is in seconds since 1970, what is not finite is null. On a GPU the values
are read every few steps only, as reading waits for the device (law 5).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
from torch import Tensor

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.hookspecs import hookimpl

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run

NAME = "metrics.jsonl"


class Metrics:
    """Append a line for each step to RUN/metrics.jsonl, on the first process."""

    def __init__(self, *, every: Annotated[int, about("steps between two readings of a GPU", ge=1)] = 10) -> None:
        self.every = every
        self.since = 0.0  # when the step before was done
        self.file: TextIO | None = None
        self.pending: list[tuple[dict[str, Any], list[str], Tensor]] = []

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Open the file, without the lines of steps that will be done again."""
        self.pending, self.since = [], time.perf_counter()
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
        if self.file is None:
            return
        now = time.perf_counter()
        seconds, self.since = max(now - self.since, 1e-9), now
        known = {
            "step": report.step.number,
            "lr": float(run.optimizer.param_groups[0]["lr"]),
            "samples_per_second": run.batch / seconds,
            "amount": {unit: much * distributed.world() for unit, much in report.amount.items()},
            "time": time.time(),
        }
        tensors = (report.loss, report.norm, *report.metrics.values())
        values = torch.stack([t.detach().float().reshape(()) for t in tensors])  # [2 + metrics]
        self.pending.append((known, list(report.metrics), values))
        if run.device.type == "cpu" or len(self.pending) >= self.every:
            self.flush()

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
        pending, self.pending = self.pending, []
        lines = [line(known, names, values.tolist()) for known, names, values in pending]
        if self.file and lines:
            try:
                self.file.write("".join(lines))
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


def line(known: dict[str, Any], names: list[str], values: list[float]) -> str:
    """One line of the file; `values` are the loss, the norm and the metrics called `names`."""
    loss, norm, *rest = (value if math.isfinite(value) else None for value in values)
    row = {"step": known["step"], "loss": loss, "norm": norm, **known, "metrics": dict(zip(names, rest, strict=True))}
    return json.dumps(row, allow_nan=False) + "\n"


def drop_from(path: Path, first: int) -> None:
    """Remove the lines of steps from `first` on, and one that was torn, all at once."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step(line) < first]
    if len(kept) < len(lines):
        work = path.with_name(f".{NAME}.{os.getpid()}")
        work.write_bytes(b"".join(kept))
        work.replace(path)


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that was torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
