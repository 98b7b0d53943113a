"""R13, R14: a process that dies, stops, fails or hangs is noticed, nothing of it stays, and the run ends the same.

torchrun starts processes on one machine; one of them meets a fault at a step. It is noticed when a process other than
the victim ends or, where the victim hangs, when it is ended. Then torchrun starts all again, and at the end weights,
optimizer, losses and learning rates are those of a run that nothing disturbed, bit by bit.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import runs
from launched import Trial, gone
from result import Result

TIMEOUT = 5.0  # of the collectives and data workers, or without a sign of life: what a fault's notice may take, and 5 s
LONG = 120.0  # for the one of the two that the fault is not about
NOTICE, LEFT = 5.0, 60.0  # the goal: noticed within the timeout and this; nothing is left after this
FAILS_AT = 15  # the step
AGENT = 30.0  # seconds that torchrun waits for a process that does not end


@dataclass(frozen=True)
class Fault:
    name: str
    how: str  # a signal's name, or a kind of failing_in.py
    notice: float  # seconds within which it must be noticed
    sets: str = ""

    @property
    def sent(self) -> bool:
        return self.how.startswith("SIG")

    @property
    def ends_itself(self) -> bool:
        """Whether the victim is the one that notices."""
        return self.how in ("hangs", "starves")

    def bound(self) -> float:
        return self.notice + NOTICE


COLLECTIVES = f"train.timeout={TIMEOUT} hangs.seconds={LONG}"
HANGS = Fault("a process hangs in Python", "hangs", TIMEOUT, f"train.timeout={LONG} hangs.seconds={TIMEOUT}")
FAULTS = [
    Fault("kill -9 of one process", "SIGKILL", TIMEOUT, COLLECTIVES),
    Fault("an exception in one process", "raises", TIMEOUT, COLLECTIVES),
    HANGS,
    Fault("a process waits for a lock for ever", "starves", TIMEOUT, f"train.timeout={LONG} hangs.seconds={TIMEOUT}"),
    Fault("a process hangs and holds Python's lock", "locked", TIMEOUT, COLLECTIVES),
    Fault("SIGSTOP of one process", "SIGSTOP", TIMEOUT, COLLECTIVES),
]


@dataclass(frozen=True)
class Outcome:
    """How one trial went; `why` is empty where it went as promised."""

    why: str
    noticed: float = 0.0
    recovered: float = 0.0
    left: int = 0


def measure(work: Path, full: bool) -> Iterator[Result]:
    processes, times = (4, 4) if full else (3, 1)  # the sum of two numbers has but one order
    with Trial(work / "whole") as whole:
        for job in whole.together(processes):
            job.finish()
    if not full:
        yield told(HANGS, [by_hand(work / "hangs", HANGS, processes, whole.folder)])
        return
    for fault in FAULTS:
        stock = stock_restarts(work / "stock", processes, times) if fault.how == "SIGKILL" else ""
        tried = [trial(work / f"{fault.how}-{n}", fault, processes, n, whole.folder) for n in range(times)]
        yield told(fault, tried, stock)
    yield slow(work / "slow", processes, whole.folder)
    yield clean(work / "clean", processes, 100)


def by_hand(folder: Path, fault: Fault, processes: int, whole: Path) -> Outcome:
    """As `trial`, without torchrun: when all have ended, all are started again."""
    with Trial(folder, sets=fault.sets) as at:
        jobs = at.together(processes, fault=(fault.how, "1", str(FAILS_AT)))
        began = injected(at, fault, 0, jobs[0])
        codes = [job.wait() for job in jobs]
        noticed, status = time.time() - began, at.status()
        for job in at.together(processes):
            job.finish()
        if 0 in codes or noticed > fault.bound() or "hung" not in status:
            return Outcome(f"exit codes {codes} after {noticed:.1f} s, status {status!r}", noticed)
        return Outcome(runs.difference(folder, whole) or "", noticed, time.time() - began)


def trial(folder: Path, fault: Fault, processes: int, number: int, whole: Path) -> Outcome:
    victim = number % processes
    with Trial(folder, sets=fault.sets) as at:
        job = at.launch(
            processes, "--max-restarts=1", fault=() if fault.sent else (fault.how, str(victim), str(FAILS_AT))
        )
        at.wait_for_steps(1, job)
        first = at.ranks()
        began = injected(at, fault, first[victim], job)
        others = [pid for rank, pid in first.items() if rank != victim or fault.ends_itself]
        at.wait(lambda: any(map(gone, others)), fault.bound() + AGENT)
        noticed = time.time() - began
        again = at.wait(partial(started_again, at, first), LEFT + AGENT)
        recovered = time.time() - began
        code = job.wait()
        left = at.left_after(LEFT)
        if code or again is None:
            return Outcome(f"exit code {code}: {job.said()[-2000:]}")
        if noticed > fault.bound():
            return Outcome(f"noticed after {noticed:.1f} s", noticed)
        why = f"{left} is left" if left else runs.difference(folder, whole) or ""
        return Outcome(why if at.status() == "DONE" else at.status(), noticed, recovered, len(left))


def injected(at: Trial, fault: Fault, victim: int, job: runs.Job) -> float:
    """Let it happen; when it did."""
    if fault.sent:
        at.wait_for_steps(FAILS_AT, job)
        os.kill(victim, signal.Signals[fault.how])
        return time.time()
    mark = at.folder / f".injected-{fault.how}"
    runs.wait_until(mark.exists, job, "fault")
    return mark.stat().st_mtime


def started_again(at: Trial, first: dict[int, int]) -> bool:
    """Whether all are there anew, and have done a step."""
    now = at.ranks()
    if len(now) < len(first) or set(now.values()) & set(first.values()):
        return at.status() == "DONE"
    return runs.steps_done(at.folder) > FAILS_AT + 1


def told(fault: Fault, tried: list[Outcome], stock: str = "") -> Result:
    good = [outcome for outcome in tried if not outcome.why]
    figure = f"left behind: {sum(outcome.left for outcome in tried)}"
    if good:
        noticed, recovered = ([getattr(o, name) for o in good] for name in ("noticed", "recovered"))
        figure = (
            f"noticed within {max(noticed):.1f} s (bound {fault.bound():.0f} s), training again after "
            f"{statistics.median(recovered):.1f} s, same digest {len(good)}/{len(tried)}, {figure}"
        )
    reasons = "; ".join(outcome.why for outcome in tried if outcome.why)
    return Result("R13", fault.name, len(tried), len(good), f"{figure}{f': {reasons}' if reasons else ''}", stock)


def stock_restarts(folder: Path, processes: int, times: int) -> str:
    """The same kills where processes meet in torchrun's store as plain torch lets them."""
    recovered = 0
    for number in range(times):
        with Trial(folder / str(number), sets=f"train.timeout={TIMEOUT}") as at:
            job = at.launch(processes, "--max-restarts=1", fault=("stock", "0", "0"))
            at.wait_for_steps(9, job)
            os.kill(at.ranks()[number % processes], signal.SIGKILL)
            recovered += job.wait() == 0
    return f"plain init_process_group under torchrun: {recovered}/{times} recovered"


def slow(folder: Path, processes: int, whole: Path) -> Result:
    """No fault, but one process takes twenty times as long: it is not ended, and nothing differs."""
    with Trial(folder, sets=f"train.timeout={TIMEOUT} hangs.seconds={TIMEOUT}") as at:
        job = at.launch(processes, fault=("slow", str(processes - 1), "5"))
        code, left = job.wait(), at.left_after(LEFT)
        same = code == 0 and not left and runs.difference(folder, whole) is None
    figure = "not ended, same digest" if same else f"exit code {code}: {job.said()[-1000:]}"
    return Result("R13", "one process is 20 times slower", 1, int(same), figure)


def clean(folder: Path, processes: int, times: int) -> Result:
    """Runs of a few steps that nothing disturbs."""
    codes = []
    for number in range(times):
        with Trial(folder / str(number), steps=3) as at:
            codes.append(at.launch(processes).wait())
            codes[-1] = codes[-1] or 1000 * (at.status() != "DONE" or bool(at.left_after(LEFT)))
    good = codes.count(0)
    return Result("R14", f"none: {processes} processes end", times, good, f"exit code 0 in {good}/{times}")
