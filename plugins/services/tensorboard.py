"""Write curves for TensorBoard to RUN/tensorboard: `--set tensorboard.every=1`, then `tensorboard --logdir runs`.

`train/` holds the loss, the gradient's norm, the learning rate and the metrics, `throughput/` what passes in a second,
and what services measure has its own name, such as `validation/loss`; all against the step, as in `metrics.jsonl`.
A run that goes on takes back the points of steps that it does again. On a GPU the values are read every few steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.errors import ConfigError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.common.readings import Reading, Readings

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

    from selfsup.kernel.loop import Report, Run

NAME = "tensorboard"


class TensorBoard:
    """Curves for TensorBoard, where asked for; on the first process."""

    def __init__(
        self, *, every: Annotated[int, about("steps between two points of a curve; 0: write nothing", ge=0)] = 0
    ) -> None:
        self.every = every
        self.writer: SummaryWriter | None = None

    @hookimpl
    def run_composed(self, run: Run) -> None:
        """Look whether the package is there, before anything is trained."""
        if self.every:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError:
                raise ConfigError(
                    f"tensorboard.every = {self.every} needs the package tensorboard: "
                    "pip install 'selfsup[tensorboard]', or --set tensorboard.every=0"
                ) from None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Open a file of events, before which those of steps that will be done again no longer count."""
        if not self.every or run.folder is None or distributed.rank() > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._giving_up():  # before step 0 there may have been a measurement, under -1
            self.writer = SummaryWriter(run.folder / NAME, purge_step=run.first or -1)
        self.readings = Readings(self.every)
        self.readings.start()

    @hookimpl(tryfirst=True)  # before a service that may stop the run
    def step_finished(self, run: Run, report: Report) -> None:
        """Keep the step's numbers on the device; write them at once on a CPU, every few steps on a GPU."""
        if self.writer:
            self._add(run, self.readings.keep(run, report))

    @hookimpl
    def measured(self, run: Run, values: Mapping[str, float]) -> None:
        """Add what was measured, under the number of the step that had just been done."""
        if self.writer:
            self._put(dict(values), run.done - 1, time.time())
            self.readings.start()

    @hookimpl
    def checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Steps behind a checkpoint are never done again: their points must be there."""
        if self.writer:
            self._add(run, self.readings.read())
            with self._giving_up():
                self.writer.flush()

    @hookimpl(tryfirst=True)
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Write what is left."""
        if not self.writer:
            return
        try:
            self._add(run, self.readings.read())
        except RuntimeError:  # the device that failed the run cannot be read either
            if error is None:
                raise
        finally:
            self._close()

    def _add(self, run: Run, readings: Sequence[Reading]) -> None:
        """The points of steps."""
        for r in readings:
            curves = {"loss": r.loss, "norm": r.norm, "lr": r.lr, **r.metrics}
            steps = r.samples_per_second / run.batch
            rates = {
                "samples per second": r.samples_per_second,
                **{f"{unit} per second": much * steps for unit, much in r.amount.items()},
            }
            points = {f"train/{name}": value for name, value in curves.items()}
            self._put(points | {f"throughput/{name}": value for name, value in rates.items()}, r.step, r.time)

    def _put(self, points: Mapping[str, float], step: int, when: float) -> None:
        with self._giving_up():
            for name, value in points.items():
                if self.writer:
                    self.writer.add_scalar(name, value, step, walltime=when)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """A log never stops a run: where it cannot be written, say so once and write no more."""
        try:
            yield
        except OSError as cause:
            print(f"warning: the curves for TensorBoard end here: {cause.strerror or cause}", file=sys.stderr)
            self._close()

    def _close(self) -> None:
        writer, self.writer = self.writer, None
        if writer:
            with suppress(OSError):  # what is still buffered cannot be written either
                writer.close()
