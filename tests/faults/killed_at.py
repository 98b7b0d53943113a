"""Run the command line and kill this very process, as `kill -9` does, when it comes to a named moment.

    python killed_at.py MOMENT TIME train --plugin ...

TIME counts how often the moment has come: 1 is the first. The product has no part in this: what it calls at
each moment is replaced here, before it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

IMPORT = "while modules are imported"
IMPORTED = "selfsup.kernel.compose"  # of which modules


def everything(*_: Any) -> bool:
    return True


def named(name: str) -> Callable[..., bool]:
    """A file of this name is the first argument."""
    return lambda path, *_: Path(path).name == name


def begins(name: str) -> Callable[..., bool]:
    """The name of the file that is the first argument begins so."""
    return lambda path, *_: Path(path).name.startswith(name)


def done(_: Any, status: str) -> bool:
    return status == "DONE"


class Moment(NamedTuple):
    """When a process is killed: before or after a call of whose function, with which arguments."""

    when: str
    owner: Any
    name: str
    matters: Callable[..., bool] = everything
    often: bool = False  # in one process


def moments() -> dict[str, Moment]:
    """All of them, by name. Each comes in a run that the one before it killed."""
    import torch

    from selfsup.cli import outcome
    from selfsup.kernel import compose, loader, loop, saving, state
    from selfsup.plugins.common import status
    from selfsup.plugins.services import metrics, validation

    manifest = named("manifest.json")
    return {
        IMPORT: Moment("before", None, IMPORTED),
        "before anything is made": Moment("before", compose, "modalities"),
        "before the model is made": Moment("before", compose, "build"),
        "before the settings are written": Moment("before", outcome, "_replace", named("run.toml")),
        "while batches are made": Moment("after", loader.Loader, "places", often=True),
        "before the forward pass": Moment("before", loop, "to_device", often=True),
        "before the backward pass": Moment("before", torch.Tensor, "backward", often=True),
        "before the optimizer": Moment("before", loop, "scale_gradients", often=True),
        "after the optimizer": Moment("after", loop, "take_step", often=True),
        "after the line of a step": Moment("after", metrics.Metrics, "_write", often=True),
        "while it is evaluated": Moment("before", validation, "score", often=True),
        "before a checkpoint is written": Moment("before", saving.Saver, "_write", often=True),
        "between its tensors": Moment("after", saving, "save_file", often=True),
        "before its manifest": Moment("before", Path, "write_text", manifest, often=True),
        "after its manifest": Moment("after", Path, "write_text", manifest, often=True),
        "before its rename": Moment("before", Path, "rename", begins(".step-"), often=True),
        "after its rename": Moment("after", Path, "rename", begins(".step-"), often=True),
        "before a checkpoint is loaded": Moment("before", state, "read"),
        "before old ones are deleted": Moment("before", state, "retain", often=True),
        "while old ones are deleted": Moment("after", state.shutil, "rmtree", begins("step-"), often=True),
        "before the outcome is written": Moment("before", outcome, "_replace", named("outcome.json")),
        "before the end": Moment("before", status, "write", done),
        "at the end": Moment("after", loop, "train"),
    }


class Finder:
    """Asked for the module that stands for all, it kills."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == IMPORTED:
            os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, time: int) -> None:
    """Replace the function of a moment by one that kills this process at its `time`-th call."""
    if moment == IMPORT:
        sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
        return
    when, owner, name, matters, _ = moments()[moment]
    own, left = getattr(owner, name), [time]

    def replaced(*args: Any, **options: Any) -> Any:
        left[0] -= matters(*args)
        kill = left[0] == 0 and matters(*args)
        if kill and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = own(*args, **options)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, replaced)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    from selfsup.cli.main import main

    main(sys.argv[3:])
