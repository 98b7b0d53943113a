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
from typing import Any


def everything(*_: Any) -> bool:
    return True


def manifest(path: Path, *_: Any) -> bool:
    return path.name == "manifest.json"


def moments() -> dict[str, tuple[str, Any, str, Callable[..., bool]]]:
    """Name -> (before or after, whose, function, with which arguments).

    Each comes in a run that the one before it killed.
    """
    import torch

    from selfsup.kernel import compose, loader, loop, state

    return {
        "before anything is made": ("before", compose, "modalities", everything),
        "before the model is made": ("before", compose, "build", everything),
        "while batches are made": ("after", loader.Loader, "places", everything),
        "before the forward pass": ("before", loop, "to_device", everything),
        "before the backward pass": ("before", torch.Tensor, "backward", everything),
        "before the optimizer": ("before", loop, "scale_gradients", everything),
        "after the optimizer": ("after", loop, "take_step", everything),
        "before a checkpoint is written": ("before", state, "_write", everything),
        "between its tensors": ("after", state, "save_file", everything),
        "before its manifest": ("before", Path, "write_text", manifest),
        "after its manifest": ("after", Path, "write_text", manifest),
        "before its rename": ("after", state, "_write", everything),
        "after its rename": ("before", state, "verify", everything),
        "before a checkpoint is loaded": ("before", state, "load", everything),
        "before old ones are deleted": ("before", state, "retain", everything),
        "while old ones are deleted": ("after", state.shutil, "rmtree", everything),
        "at the end": ("after", loop, "train", everything),
    }


def arm(moment: str, time: int) -> None:
    """Replace the function of a moment by one that kills this process at its `time`-th call."""
    when, owner, name, matters = moments()[moment]
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
