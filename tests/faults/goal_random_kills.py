"""R2: killed at random times, again and again, a run takes all its steps, each on the samples that were meant for it.

One process, killed with all that it started and started again with the same command; and two processes under torchrun,
which starts both again when one of them is killed. A service outside the product writes which samples each step saw.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import runs
from result import Result

MEAN = 3.0  # seconds between two kills
SETS = runs.SMALL.replace("checkpoints.steps=2", "checkpoints.steps=10").replace("workers=0", "workers=1")


def measure(work: Path, full: bool) -> Iterator[Result]:
    if not full:
        yield alone(work, steps=60, mean=0.05, most=2)
        return
    yield alone(work, steps=2000, mean=MEAN, most=1000)
    yield together(work, steps=1000, mean=MEAN)


def alone(work: Path, steps: int, mean: float, most: int) -> Result:
    """At most so many kills; every third counts from the start of its process, which has done no step then."""
    how = {"steps": steps, "sets": SETS, "environment": runs.listening(work)}
    runs.train(work / "whole", **how).finish()
    draw, folder, kills = random.Random(0), work / "killed", 0
    while kills < most:
        job = runs.train(folder, **how)
        if steps < 100:  # a checkpoint later each time, or the kill would be no trial
            runs.wait_for_step(folder, job, 12 * (kills + 1))
        elif kills % 3 != 2:
            runs.wait_for_progress(folder, job)
        time.sleep(draw.expovariate(1 / mean))
        if not job.running:
            job.finish()
            break
        job.kill()
        kills += 1
    runs.train(folder, **how).finish()
    return told("kill -9 at random times, one process", kills, folder, work / "whole", steps)


def together(work: Path, steps: int, mean: float) -> Result:
    """Kill one of two processes at a time; torchrun starts them again."""
    how = {"steps": steps, "sets": SETS, "environment": runs.listening(work)}
    whole, folder, draw, kills = work / "whole-2", work / "killed-2", random.Random(0), 0
    runs.torchrun(whole, 2, **how).finish()
    job = runs.torchrun(folder, 2, restarts=1000, **how)
    while runs.wait_for_progress(folder, job):
        time.sleep(draw.expovariate(1 / mean))
        found = runs.processes_of(job)
        if job.running and len(found) == 2:
            runs.send(found[draw.randrange(2)])
            kills += 1
    job.finish()
    return told("kill -9 of one of two processes at random times, under torchrun", kills, folder, whole, steps)


def told(fault: str, kills: int, folder: Path, whole: Path, steps: int) -> Result:
    ours, again = runs.samples(folder)
    theirs, _ = runs.samples(whole)
    lost, doubled = ((counted(a) - counted(b)).total() for a, b in ((theirs, ours), (ours, theirs)))
    wrong = runs.difference(folder, whole) or (None if ours == theirs else "the samples of a step")
    end = "ends bitwise equal" if wrong is None else f"ends unequal: {wrong}"
    redone = f"{again / steps:.0%} of {steps} steps done again"
    samples = f"{lost} samples lost, {doubled} seen twice"
    return Result("R2", fault, max(kills, 1), kills if wrong is None else 0, f"{end}; {redone}; {samples}")


def counted(steps: dict[int, list[int]]) -> Counter[int]:
    return Counter(sample for ids in steps.values() for sample in ids)
