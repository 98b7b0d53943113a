"""The hooks that a service may implement, in the order in which a run calls them.

A service is a class named by an entry point of the group `selfsup.services`; its keyword-only
`__init__` arguments are the options of the section with its name: `[watchdog]` in a run file,
`--set watchdog.policy=skip` on the command line. Implementations may take any subset of a hook's
arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .contracts import Modality, Objective, Step
    from .loader import Source
    from .loop import Report, Run

hookspec = HookspecMarker("selfsup")
hookimpl = HookimplMarker("selfsup")


@hookspec(firstresult=True)
def open_data(paths: Sequence[str], modalities: Mapping[str, Modality]) -> Source | None:
    """Return the samples behind what a user named with --data; the first service to answer decides.

    An empty `paths` asks for the built-in sample. `modalities` is by field ("audio", "image").
    """


@hookspec(firstresult=True)
def build_optimizer(objective: Objective, batch: int) -> Optimizer | None:
    """Return the optimizer for a global batch of this size; the first service to answer decides."""


@hookspec
def run_composed(run: Run) -> None:
    """Called once when all is made and nothing is written: find here that a setting cannot work, before it costs."""


@hookspec
def calibrating(run: Run, number: int) -> None:
    """Called before each batch that `Objective.calibrate` asks for, before the first step of all."""


@hookspec
def calibrated(run: Run) -> None:
    """Called when `Objective.calibrate` has ended, however it did and whether or not it asked for a batch."""


@hookspec
def run_started(run: Run) -> None:
    """Called once, after a checkpoint was loaded and before the first step."""


@hookspec
def step_started(run: Run, step: Step) -> None:
    """Called before every step: set learning rates here, as a function of the step alone."""


@hookspec
def step_finished(run: Run, report: Report) -> None:
    """Called after every step. The report's tensors are on the device: read them rarely."""


@hookspec
def measured(run: Run, values: Mapping[str, float]) -> None:
    """Called on the first process with what a service measured after `run.done` steps: {"validation/loss": 1.9}."""


@hookspec
def checkpoint_saved(run: Run, folder: Path) -> None:
    """Called on the first process when a checkpoint was written by all: at the end of the step after, or later."""


@hookspec
def run_finished(run: Run, error: BaseException | None) -> None:
    """Called once, however the run ended."""
