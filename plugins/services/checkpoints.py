"""When checkpoints are written and how many are kept; what they hold is the kernel's matter (`state.py`).

Every process must take the same decision at the same step, and only the first one's clock counts. To
ask it at every step would make all wait for it, so it says in how many steps to ask again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from selfsup.kernel import distributed, state
from selfsup.kernel.config import about
from selfsup.kernel.errors import DivergedError
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

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Start the clock."""
        self.saved, self.ask_at = run.first, run.first + 1
        self.saved_time = self.began = time.monotonic()

    @hookimpl(trylast=True)  # what others write about a step must be on disk before the step counts as done
    def step_finished(self, run: Run, report: Report) -> None:
        """Save if it is time."""
        done = run.done
        if run.folder is None:
            return
        due = bool(self.steps) and done % (self.steps or 1) == 0
        if done >= self.ask_at:
            wait = self._wait(done - run.first)
            due, self.ask_at = due or wait == 0, done + max(1, wait)
        if due:
            self._save(run)

    @hookimpl
    def checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Keep the newest good ones."""
        state.retain(folder.parent, self.keep)

    @hookimpl(trylast=True)  # after the watchdog has looked at the last steps
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Save the final state."""
        if error is None and run.folder is not None and run.done > self.saved:
            self._save(run)

    def _wait(self, taken: int) -> int:
        """In how many steps to ask again, 0 for "save now": as the first process says, after `taken` steps."""
        now = time.monotonic()
        left = self.saved_time + 60 * self.minutes - now
        pace = max((now - self.began) / taken, 1e-6)  # seconds a step
        # Half the way there: a pace that slows down is noticed in time.
        wait = max(1, min(1000, int(left / pace / 2))) if left > 0 else 0
        return int(distributed.total(torch.tensor(wait if distributed.rank() == 0 else 0)))

    def _save(self, run: Run) -> None:
        broken = not_finite(run)
        if distributed.anyone(bool(broken)):
            names = ", ".join(broken[:3]) or "another process knows which"
            raise DivergedError(
                f"after {run.done} steps the state is not finite ({names}) and was not saved; the checkpoints in "
                f"{run.folder} are from before. Often optimizer.lr is too high"
            )
        run.save()
        self.saved, self.saved_time = run.done, time.monotonic()


def not_finite(run: Run) -> list[str]:
    """Names of the parameters and optimizer states that are not finite, and of the buffers that hold a NaN.

    A buffer may hold infinities by design: a mask that is added to scores.
    """
    names, fine = [], []
    for name, tensor, trained in _state(run):
        if tensor.is_floating_point() and tensor.numel():
            local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's shard
            good = local.isfinite() if trained else ~local.isnan()
            names.append(name)
            fine.append(good.all().to(run.device))
    return [name for name, ok in zip(names, torch.stack(fine).tolist(), strict=True) if not ok] if fine else []


def _state(run: Run) -> Iterator[tuple[str, Any, bool]]:
    """(name, tensor, whether training changes it by gradients) of all that a checkpoint would hold."""
    yield from ((name, p.detach(), True) for name, p in run.objective.named_parameters())
    kept = run.objective.state_dict()
    yield from ((name, b, False) for name, b in run.objective.named_buffers() if name in kept)
    for values in run.optimizer.state.values():
        yield from ((f"optimizer {name}", t, True) for name, t in values.items() if isinstance(t, Tensor))
