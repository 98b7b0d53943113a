"""End a process that hangs: say where it stands, and leave nothing of it behind.

These are signs of life: a step begins or ends, the objective or a tower is called (a validation does so batch after
batch), something is measured, a checkpoint is saved, or the files below RUN/checkpoints change. Without one for
`seconds`, or ten times the longest silence that one has ended, a process is taken to hang. It prints the stack of
every thread, marks the run FAILED and ends, with all processes that it started; torchrun then starts the run again.

The time is counted in ticks of a thread, so that a process that was stopped for a while (Ctrl-Z, a suspended job) does
not count as hung when it goes on. That thread needs Python's lock. Where the lock itself is held for good, faulthandler
prints the stacks and ends the process, much later: its clock does not stop.

An objective that fits something to some data before the first step, in `calibrate`, is watched while it does, and each
of its batches is a sign. What comes before, opening and preparing data, may be silent for hours with good reason.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.contracts import Step, Tower
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.common import status

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from selfsup.kernel.loop import Report, Run

TICK = 5.0  # seconds between two looks, at most
FIRST = 3  # times as long as any other may the first step take, which compiles
SLOWER = 10  # times the longest silence so far: what is waited at least
LOCKED = 6  # times the limit: what faulthandler waits
STDERR = 2  # not sys.stderr: the thread that hangs may hold its lock


class Signs:
    """Counts what shows that a process lives."""

    def __init__(self) -> None:
        self.count = self.steps = 0

    def note(self, *_: Any) -> None:
        """One more."""
        self.count += 1


@dataclass
class Silence:
    """The time without a sign of life, of which a tick counts at most twice its length."""

    limit: float
    tick: float
    now: float = 0.0
    longest: float = 0.0  # that a sign has ended

    def passed(self, seconds: float, alive: bool, first: bool) -> bool:
        """Some time went by, with or without a sign, `first` while no step was done: whether the process hangs."""
        patience = FIRST if first else 1
        if alive:
            self.longest, self.now = max(self.longest, self.now / patience), 0.0
        else:
            self.now += min(seconds, 2 * self.tick)
        return self.now > max(self.limit * patience, SLOWER * self.longest)


class Hangs:
    """Watch for signs of life, in every process."""

    def __init__(
        self,
        *,
        seconds: Annotated[
            float | None, about("without a sign of life, after which a process is ended; none: train.timeout", gt=0)
        ] = None,
    ) -> None:
        self.seconds, self.signs = seconds, Signs()
        self.handles: list[RemovableHandle] = []
        self.over, self.started = threading.Event(), False
        self.thread: threading.Thread | None = None

    @hookimpl
    def calibrating(self, run: Run, number: int) -> None:
        """Begin to watch, and then a sign of life."""
        if number == 0:
            self._begin(run)
        self.signs.count += 1

    @hookimpl
    def calibrated(self) -> None:
        """Watch no more."""
        self._end()

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Begin to watch."""
        self.started = True
        self._begin(run)

    @hookimpl
    def step_started(self, run: Run, step: Step) -> None:
        """A sign of life."""
        self.signs.count += 1

    @hookimpl
    def step_finished(self, run: Run, report: Report) -> None:
        """A sign of life."""
        self.signs.count += 1
        self.signs.steps += 1

    @hookimpl
    def measured(self, run: Run) -> None:
        """A sign of life."""
        self.signs.count += 1

    @hookimpl
    def checkpoint_saved(self, run: Run, folder: Path) -> None:
        """A sign of life."""
        self.signs.count += 1

    @hookimpl(trylast=True)  # the last checkpoint may hang too
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Watch no more."""
        self._end()

    def _begin(self, run: Run) -> None:
        self.signs, self.over = Signs(), threading.Event()
        towers = [module for module in run.objective.modules() if isinstance(module, Tower)]
        self.handles = [module.register_forward_pre_hook(self.signs.note) for module in (run.objective, *towers)]
        limit = self.seconds or float(run.config["train"]["timeout"])
        faulthandler.dump_traceback_later(LOCKED * limit, exit=True, file=STDERR)
        self.thread = threading.Thread(target=self._watch, args=(run, limit), name="hangs", daemon=True)
        self.thread.start()

    def _end(self) -> None:
        self.over.set()
        if self.thread:
            self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        for handle in self.handles:
            handle.remove()

    def _watch(self, run: Run, limit: float) -> None:
        silence = Silence(limit, min(TICK, limit / 10))
        seen, files, before = self.signs.count, "", time.monotonic()
        while not self.over.wait(silence.tick):
            faulthandler.dump_traceback_later(LOCKED * limit, exit=True, file=STDERR)
            now, alive = time.monotonic(), self.signs.count != seen
            if not alive and silence.now > limit / 2:  # a checkpoint may be under way
                alive, files = files not in ("", found := listing(run)), found
            elif alive:
                files = ""
            hung = silence.passed(now - before, alive, first=self.signs.steps == 0)
            seen, before = self.signs.count, now
            if hung and not self.over.is_set():
                end(run, f"step {run.done}" if self.started else "its calibration", silence.now, limit)


def listing(run: Run) -> str:
    """The files of the checkpoints, with their sizes and times."""
    found = []
    for path in sorted((run.folder / "checkpoints").rglob("*")) if run.folder else ():
        with suppress(OSError):  # removed meanwhile
            facts = path.stat()
            found.append(f"{path} {facts.st_size} {facts.st_mtime_ns}")
    return "\n".join(found) or "none"


def end(run: Run, doing: str, silent: float, limit: float) -> None:
    """Say where this process hangs, mark the run FAILED and end the process and all that it started."""
    what = f"{doing} did not end and nothing else happened for {silent:.0f} s; it is at {place()}"
    who = f"process {distributed.rank()} of {distributed.world()}" if distributed.world() > 1 else "this process"
    more = f"--set hangs.seconds={10 * limit:g}"
    advice = f"It is ended, and goes on from the newest checkpoint with --resume. If it was only slow: {more}"
    os.write(STDERR, f"\nerror: {who} hangs: {what}. {advice}\n".encode())
    faulthandler.dump_traceback(file=STDERR, all_threads=True)
    # A thread of its own: the disk may be what hangs.
    marking = threading.Thread(target=mark, args=(run, f"FAILED {who} hung: {what}"), daemon=True)
    marking.start()
    for child in descendants(os.getpid()):
        with suppress(OSError):  # it ended by itself
            os.kill(child, signal.SIGKILL)
    marking.join(5.0)
    os._exit(1)


def mark(run: Run, line: str) -> None:
    """Write the status of the run, unless another process has said already why it failed."""
    if run.folder and not status.read(run.folder).startswith("FAILED"):
        status.write(run.folder, line)


def place() -> str:
    """Where the main thread is: the innermost line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "an unknown place"


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that they started, as Linux tells."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found + [further for child in found for further in descendants(child)]
