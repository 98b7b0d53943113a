"""Train some steps and save, or resume from checkpoints and compare bit by bit; alone or under torchrun.

    python reshard.py save RUN PARALLEL          python reshard.py load RUN PARALLEL [RUN PARALLEL ...]

"load" writes RUN/PARALLEL-WORLD.txt: "equal", or the first tensor that differs from what the checkpoint holds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from selfsup.kernel import Plugins, compose, distributed, loop, state

STEPS = 3
SETTINGS: dict[str, Any] = {
    "objective": {"name": "bert"},
    "modality": {"length": 32, "vocabulary": 300},
    "backbone": {"width": 24, "depth": 2, "heads": 2},  # widths that few numbers of processes divide
    "data": {"workers": 0},
    "console": {"style": "off"},
}


def start(folder: Path, parallel: str, resume: bool) -> loop.Run:
    plugins = Plugins()
    train = {"batch": 24, "steps": STEPS, "parallel": parallel, "timeout": 60}
    return compose.start(plugins, compose.resolve(plugins, SETTINGS, {"train": train}), folder, resume)


def difference(run: loop.Run, folder: Path) -> str:
    """The first tensor of the run that is not what the checkpoint holds; the optimizer's numbers included."""
    kept, facts = state.load(folder)
    moments = {f"{name}:{key}": t for name, p in run.objective.named_parameters() for key, t in moments_of(run, p)}
    for group, have in (("model", run.objective.state_dict()), ("optimizer", moments)):
        if have.keys() != kept[group].keys():
            return f"{group} has other names"
        for name, tensor in have.items():
            if not torch.equal(loop.whole(tensor.detach()), kept[group][name]):
                return f"{group} {name}"
    return "equal" if run.done == facts["step"] == STEPS else f"step {run.done}"


def moments_of(run: loop.Run, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [(key, t) for key, t in run.optimizer.state.get(parameter, {}).items() if isinstance(t, torch.Tensor)]


def main(what: str, *given: str) -> None:
    for name, parallel in zip(given[::2], given[1::2], strict=True):
        folder = Path(name)
        run = start(folder, parallel, what == "load")
        if what == "save":
            loop.train(run)
        else:
            said = difference(run, state.folders(folder / "checkpoints")[0])
            if distributed.rank() == 0:
                (folder / f"{parallel}-{distributed.world()}.txt").write_text(said)


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as the command line does, and why: cli/main.py
