"""When checkpoints are written and how many are kept; what they hold is the kernel's matter (`state.py`).

Every process must take the same decision at the same step, and only the first one's clock counts. To
ask it at every step would make all wait for it, so it says in how many steps to ask again.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import torch

from selfsup.kernel import distributed, state
from selfsup.kernel.config import about
from selfsup.kernel.errors import SelfsupError
from selfsup.kernel.hookspecs import hookimpl

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run


class Checkpoints:
    """Save the run every few steps or minutes and at its end, however it ends but by an error."""

    def __init__(
        self,
        *,
        steps: Annotated[int | None, about("steps between two checkpoints; minutes count besides", ge=1)] = None,
        minutes: Annotated[float, about("minutes between two checkpoints", gt=0)] = 10.0,
        keep: Annotated[int, about("how many of the newest good ones to keep", ge=1)] = 2,
    ) -> None:
        self.steps, self.minutes, self.keep = steps, minutes, keep
        self.saved = self.ask_at = 0  # steps done at the newest checkpoint; when to ask the clock
        self.saved_time = self.began = 0.0
        self.tidying: Thread | None = None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Start the clock."""
        self.saved, self.ask_at = run.first, run.first + 1
        self.saved_time = self.began = time.monotonic()

    @hookimpl(trylast=True)  # what others write about a step must be on disk before the step counts as done
    def step_finished(self, run: Run, report: Report) -> None:
        """Commit what was written meanwhile; begin to save if it is time."""
        done = run.done
        if run.folder is None:
            return
        run.saved()
        due = bool(self.steps) and done % (self.steps or 1) == 0
        if done >= self.ask_at:
            wait = self._wait(done - run.first)
            due, self.ask_at = due or wait == 0, done + max(1, wait)
        # Where steps are left out one after the other, the state may be useless though finite: it is not to take the
        # place of those from before.
        if due and bool(report.finite):
            self._save(run)

    @hookimpl
    def checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Keep the newest good ones, beside training: which are good, their digests say."""
        self._tidied()
        self.tidying = Thread(target=state.retain, args=(folder.parent, self.keep), daemon=True)
        self.tidying.start()

    @hookimpl(trylast=True)  # after the watchdog has looked at the last steps
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Save the final state."""
        if error is None and run.folder is not None:
            if run.done > self.saved:
                self._save(run)
            run.saved(wait=True)
        elif distributed.world() == 1:  # what was begun before an error is good; of several, others may have ended
            with suppress(SelfsupError):
                run.saved(wait=True)
        self._tidied()

    def _tidied(self) -> None:
        if self.tidying:
            self.tidying.join()

    def _wait(self, taken: int) -> int:
        """In how many steps to ask again, 0 for "save now": as the first process says, after `taken` steps."""
        now = time.monotonic()
        left = self.saved_time + 60 * self.minutes - now
        pace = max((now - self.began) / taken, 1e-6)  # seconds a step
        # Half the way there: a pace that slows down is noticed in time.
        wait = max(1, min(1000, int(left / pace / 2))) if left > 0 else 0
        return int(distributed.total(torch.tensor(wait if distributed.rank() == 0 else 0)))

    def _save(self, run: Run) -> None:
        self.saved, self.saved_time = run.done, time.monotonic()
        run.save(wait=False)
