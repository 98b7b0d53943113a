"""R4: SIGTERM, SIGUSR1 and SIGINT, to one process or to torchrun, save the run at most one step later and say so.

Steps take a few tenths of a second here, and no checkpoint is due for another reason. When all has ended, the status
is PREEMPTED, the newest checkpoint is of the last step that was done, and the same command goes on to the end of a run
that nothing disturbed, bit by bit.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from launched import FAILING, Trial
from result import Result

from selfsup.kernel import state

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun passes on SIGUSR1 only if told to
STEPS = 40
SETS = "checkpoints.steps=100000"
CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}  # of `ssl train`; torchrun makes 1 of every failure


def measure(work: Path, full: bool) -> Iterator[Result]:
    processes = 4 if full else 2
    with Trial(work / "whole", steps=STEPS, sets=SETS) as whole:
        for job in whole.together(processes):
            job.finish()
    if not full:
        yield by_hand(work / "short", "SIGUSR1", processes, whole.folder)
        return
    yield alone(work / "alone")
    for to in ("torchrun", "process 0", f"process {processes - 1}"):
        for name in NAMES:
            yield sent(work / f"{name}-{to[-1]}", name, to, processes, whole.folder)


def by_hand(folder: Path, name: str, processes: int, whole: Path) -> Result:
    """A signal to the last of several processes, without torchrun."""
    with Trial(folder, steps=STEPS, sets=SETS) as at:
        jobs = at.together(processes, fault=("slow", "0", "3"))
        at.wait_for_steps(6, jobs[0])
        done, seconds, code = stop(jobs[-1], jobs[-1].pid, name, folder)
        codes = [*(job.wait() for job in jobs[:-1]), code]
        why = wrong(folder, done) + ("" if set(codes) == {CODES[name]} else f"exit codes {codes}")
        figure = f"saved {saved(folder) - done} steps later, after {seconds:.1f} s"
        for job in at.together(processes):
            job.finish()
        why += runs.difference(folder, whole) or ""
    return Result("R4", f"{name} to the last of {processes} processes", 1, int(not why), figure + why)


def sent(folder: Path, name: str, to: str, processes: int, whole: Path) -> Result:
    """One signal to torchrun or to one of its processes; then the run goes on to the end of `whole`."""
    with Trial(folder, steps=STEPS, sets=SETS) as at:
        job = at.launch(processes, HANDLED, fault=("slow", "0", "3"))
        at.wait_for_steps(6, job)
        target = job.pid if to == "torchrun" else at.ranks()[int(to.split()[1])]
        done, seconds, code = stop(job, target, name, folder)
        why = "" if not at.left_after(10) else f"{at.processes()} is left; "
        why += wrong(folder, done)
        figure = f"saved {saved(folder) - done} steps later, after {seconds:.1f} s; torchrun's exit code {code}"
        at.launch(processes).finish()
        why += runs.difference(folder, whole) or ""
    return Result("R4", f"{name} to {to}", 1, int(not why), f"{figure}, lost steps 0{f': {why}' if why else ''}")


def alone(folder: Path) -> Result:
    """Each signal to a run of one process, whose exit code is documented."""
    good, times = 0, []
    for name in NAMES:
        own = folder / name
        words = runs.words(own, steps=STEPS, sets=f"{runs.SMALL} {SETS}")
        job = runs.Job([sys.executable, FAILING, "slow", "0", "3", *words], runs.log_of(own))
        runs.wait_for_step(own, job, 6)
        done, seconds, code = stop(job, job.pid, name, own)
        good += code == CODES[name] and not wrong(own, done)
        times.append(seconds)
    listed = ", ".join(f"{name} {CODES[name]}" for name in NAMES)
    return Result("R4", "a signal to one process alone", len(NAMES), good, f"{listed}; within {max(times):.1f} s")


def stop(job: runs.Job, pid: int, name: str, folder: Path) -> tuple[int, float, int]:
    """Send it: (steps done by then, seconds until the checkpoint is there, exit code)."""
    os.kill(pid, signal.Signals[name])
    done, began = runs.steps_done(folder), time.monotonic()
    runs.wait_until(lambda: state.folders(folder / "checkpoints"), job, "checkpoint")
    seconds = time.monotonic() - began
    return done, seconds, job.wait()


def saved(folder: Path) -> int:
    """The step of the newest checkpoint that verifies."""
    return int(runs.newest(folder)[1]["step"])


def wrong(folder: Path, done: int) -> str:
    """What is not as promised."""
    found = (folder / "status").read_text().rstrip()
    if not found.startswith("PREEMPTED"):
        return f"the status is {found!r}; "
    if not saved(folder) == runs.steps_done(folder) <= done + 1:
        return f"{done} steps were done, then {runs.steps_done(folder)}, and {saved(folder)} saved; "
    return ""
