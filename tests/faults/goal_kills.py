"""R1: killed at every named moment and started again with the same command, a run ends as if nothing had happened.

The moments are those of killed_at.py, from the import of modules to the end of the process. A chain of processes works
on one run: each is killed at the moment, the last one is left alone, and the run's end is compared, bit by bit, with
that of a run that nothing disturbed.

The usual formats are killed while they save over what is there, as examples of their documentation do.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import killed_at
import runs
import stock
from result import Result

LAUNCHER = str(Path(killed_at.__file__))
CHAINS, KILLS, STEPS = 4, 5, 40  # of each moment: 20 kills
SOME = ["after the optimizer", "between its tensors", "before a checkpoint is loaded"]


@dataclass
class Chain:
    """Processes that were killed, one after the other, and the one that ended the run."""

    moments: Sequence[str]
    kills: int = 0
    recovered: int = 0  # kills after which the next process came as far as it was to come
    wrong: str | None = None
    seconds: list[float] = field(default_factory=list)  # to the first step of the process that was left alone

    @property
    def equal(self) -> bool:
        return self.wrong is None


def measure(work: Path, full: bool) -> Iterator[Result]:
    runs.train(work / "whole", *evaluated(work), steps=STEPS if full else 8).finish()
    if not full:
        some = chain(work / "short", SOME, [1, 3, 1], 8)  # the first checkpoint is whole
        yield told("kill -9 at some moments, one after the other", [some])
        return
    every = []
    for moment in killed_at.moments():
        every += (chains := chains_of(work, moment))
        yield told(f"kill -9 {moment}", chains)
    yield told("kill -9, all of these moments", every, usual_kills(work / "stock", 30))


def chains_of(work: Path, moment: str) -> list[Chain]:
    """Kills at one moment, as many runs at a time as there are cores."""
    draw, often = random.Random(moment), killed_at.moments()[moment].often
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = []
        for number in range(CHAINS):
            times = [draw.randint(1, 3) if often else 1 for _ in range(KILLS)]
            kills = [moment] * KILLS
            if moment == "before a checkpoint is loaded":  # so there must be one
                kills, times = ["after its rename", *kills], [1, *times]
            folder = work / f"{moment.replace(' ', '-')}-{number}"
            started.append(pool.submit(chain, folder, kills, times, STEPS))
    return [made.result() for made in started]


def evaluated(work: Path) -> list[str]:
    """Options by which a run is evaluated every two steps; a run keeps one checkpoint, so that old ones are deleted."""
    held_out = f"validation.data={runs.texts(work / 'held-out', 2, seed=1)}"
    return [w for o in (held_out, "validation.every=2", "checkpoints.keep=1") for w in ("--set", o)]


def chain(folder: Path, moments: Sequence[str], times: Sequence[int], steps: int) -> Chain:
    """Kill a run at one moment after the other, finish it, and compare its end."""
    out = Chain(moments)
    options = evaluated(folder.parent)
    for moment, time in zip(moments, times, strict=True):
        job = runs.train(folder, *options, steps=steps, start=[LAUNCHER, moment, str(time)])
        code = job.wait()
        if code == 0:
            break  # the run was done before the moment came
        if code != -signal.SIGKILL:
            out.wrong = f"{moment}: exit code {code}: {job.said()[-300:]}"
            return out
        out.recovered += out.kills > 0
        out.kills += 1
    job = runs.train(folder, *options, steps=steps)
    try:
        job.finish()
        out.recovered += out.kills > 0
        out.wrong = runs.difference(folder, folder.parent / "whole") or unfinished(folder)
    except (RuntimeError, runs.Hung) as cause:
        out.wrong = str(cause)
    out.seconds = [s for s in [runs.first_step(folder, job)] if s is not None]
    return out


def unfinished(folder: Path) -> str | None:
    """What a run that is done leaves behind, or lacks."""
    if (folder / "status").read_text() != "DONE\n":
        return f"its status is {(folder / 'status').read_text()}"
    hidden = [path.name for path in (folder / "checkpoints").glob(".*")]
    return f"it left {', '.join(hidden)}" if hidden else None


def told(fault: str, chains: Sequence[Chain], usual: str = "") -> Result:
    kills = sum(chain.kills for chain in chains)
    recovered = sum(chain.recovered for chain in chains)
    survived = sum(chain.kills for chain in chains if chain.equal and chain.recovered == chain.kills)
    equal = sum(chain.equal for chain in chains)
    seconds = [second for chain in chains for second in chain.seconds]
    median = f"; {statistics.median(seconds):.1f} s (median) to the first step" if seconds else ""
    wrong = "".join(f"; {chain.wrong}" for chain in chains if chain.wrong)
    figure = f"{recovered} of {kills} recovered, {equal} of {len(chains)} runs bitwise equal{median}{wrong}"
    # No kill at all would be no trial, and must not look like a success.
    return Result("R1", fault, max(kills, 1), survived, figure, usual)


def usual_kills(work: Path, count: int) -> str:
    told = []
    for name in stock.FORMATS:
        command = [sys.executable, stock.__file__, name, str(work / name), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        told.append(f"{name} {done.stdout.strip()}")
    return ", ".join(told)
