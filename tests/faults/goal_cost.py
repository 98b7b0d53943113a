"""What safety costs: how long training waits for a checkpoint, how fast damage is looked for, how soon a run is back."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from result import Result

from selfsup.kernel import Plugins, compose, hookimpl, loop, state

MODEL = {
    True: {"width": 256, "depth": 4, "heads": 4},  # 4 layers of 256 and 30,522 words: 139 MB with the optimizer's
    False: {"width": 64, "depth": 1, "heads": 2},
}


class Watch:
    """Seconds of each step, and of the part of it that began a checkpoint."""

    def __init__(self, run: loop.Run, every: int) -> None:
        self.every, self.steps, self.pauses = every, [], []
        self.last = time.perf_counter()
        self.save = run.save
        run.save = self.timed  # type: ignore[method-assign]

    def timed(self, wait: bool = True) -> Path | None:
        began = time.perf_counter()
        written = self.save(wait)
        if not wait:
            self.pauses.append(time.perf_counter() - began)
        return written

    @hookimpl(trylast=True)
    def step_finished(self, run: loop.Run) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now


def start(folder: Path, full: bool, every: int, steps: int, resume: bool = False) -> loop.Run:
    settings: dict[str, Any] = {
        "objective": {"name": "bert"},
        "modality": {"length": 128, "vocabulary": 30522 if full else 300},
        "backbone": MODEL[full],
        "data": {"workers": 0},
        "console": {"style": "off"},
        "train": {"batch": 16 if full else 4, "steps": steps},
        "checkpoints": {"steps": every},
    }
    return compose.start(Plugins(), compose.resolve(Plugins(), settings), folder, resume)


def measure(work: Path, full: bool) -> list[Result]:
    every, steps = (6, 36) if full else (3, 12)
    run = start(work, full, every, steps)
    run.plugins.register(watch := Watch(run, every), "watch")
    loop.train(run)
    folder = state.folders(work / "checkpoints")[0]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    # Without the first checkpoint, for which memory is fetched, and the last, for which nothing is left to do beside.
    pause = statistics.median(watch.pauses[1:])
    quiet = [s for n, s in enumerate(watch.steps[1:], 2) if n % every not in (0, 1)]
    step = statistics.median(quiet)
    after = statistics.median(watch.steps[every::every])  # a step beside which a checkpoint is written
    share = pause / step
    figure = (
        f"{1e3 * pause:.0f} ms for {size:.0f} MB beside a step of {1e3 * step:.0f} ms ({100 * share:.1f} %); the step "
        f"beside the writing takes {after / step:.2f} times as long; of the 10 minutes between two: {100 * pause / 600:.4f} %"
    )
    began = time.perf_counter()
    assert state.verify(folder) is None
    digest = time.perf_counter() - began
    began = time.perf_counter()
    again = start(work, full, every, steps, resume=True)
    back = time.perf_counter() - began
    assert again.first == steps
    torch.set_num_threads(torch.get_num_threads())
    return [
        Result("cost", "a checkpoint is begun", len(watch.pauses), len(watch.pauses), figure),
        Result("cost", "a checkpoint is verified", 1, 1, f"{1e3 * digest:.0f} ms for {size:.0f} MB"),
        Result(
            "cost", "a run is resumed", 1, int(back < 10), f"{back:.1f} s from the start to the state of step {steps}"
        ),
    ]
