"""What safety costs: how long training waits for a checkpoint, how long a look for damage takes, and a resume."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from result import Result

from selfsup.kernel import Plugins, compose, hookimpl, loop, state

MODEL = {  # in the long form or not
    True: {"width": 256, "depth": 4, "heads": 4},
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
    # Without the first checkpoint, for which memory is fetched.
    pause = statistics.median(watch.pauses[1:])
    step = statistics.median(s for n, s in enumerate(watch.steps[1:], 2) if n % every > 1)
    beside = statistics.median(watch.steps[every::every])  # a step during which a checkpoint is written
    began = time.perf_counter()
    assert state.verify(folder) is None
    digest = time.perf_counter() - began
    began = time.perf_counter()
    assert start(work, full, every, steps, resume=True).first == steps
    back = time.perf_counter() - began
    waited = f"{1e3 * pause:.0f} ms for {size:.0f} MB, {100 * pause / step:.1f} % of a step of {1e3 * step:.0f} ms"
    return [
        Result("cost", "a checkpoint is begun", 1, int(pause < 0.05 * step or not full), waited),
        Result("cost", "a checkpoint is written meanwhile", 1, 1, f"that step takes {beside / step:.2f} times as long"),
        Result("cost", "a checkpoint is verified", 1, 1, f"{1e3 * digest:.0f} ms for {size:.0f} MB"),
        Result("cost", "a run is resumed", 1, int(back < 10), f"{back:.1f} s until its state is back"),
    ]
