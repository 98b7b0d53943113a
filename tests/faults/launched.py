"""Runs under torchrun: start them, watch the processes of one of them however they are orphaned, leave none behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs

MARK = "FAULTS_TRIAL"  # in the environment of every process of a trial
FAILING = str(Path(__file__).with_name("failing_in.py"))
SMALL = runs.SMALL.replace("workers=0", "workers=1").replace("batch=4", "batch=12")
LAUNCH = (sys.executable, "-m", "torch.distributed.run")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    state: str  # of /proc: R S D T Z
    rank: int | None  # where torchrun started it, or what it started
    command: str


class Trial:
    """One run, its folder, and the launchers that work on it."""

    def __init__(self, folder: Path, *, steps: int = 30, sets: str = "") -> None:
        self.folder, self.steps, self.sets = folder, steps, f"{SMALL} {sets}"
        self.mark = uuid.uuid4().hex
        self.jobs: list[runs.Job] = []

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes():
            with suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        for job in self.jobs:
            job.kill()

    def launch(
        self,
        processes: int,
        *options: str,
        fault: Sequence[str] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> runs.Job:
        """Start torchrun on this run: `fault` as failing_in.py takes it, `before` a command that starts commands."""
        options = options if any("rdzv" in option for option in options) else ("--standalone", *options)
        start = [FAILING, *fault] if fault else ["-m", "selfsup.cli"]
        program = ["--no-python", sys.executable, *start]
        words = runs.words(self.folder, steps=self.steps, sets=self.sets)
        command = [*before, *LAUNCH, *options, f"--nproc-per-node={processes}", *program, *words]
        log = self.folder.with_name(f"{self.folder.name}-{len(self.jobs)}.log")
        self.jobs.append(runs.Job(command, log, {**(environment or {}), MARK: self.mark}))
        return self.jobs[-1]

    def together(self, processes: int, *, fault: Sequence[str] = ()) -> list[runs.Job]:
        """Start processes that find each other as those of torchrun do, and that nobody starts again."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), MARK: self.mark}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        start = [FAILING, *fault] if fault else ["-m", "selfsup.cli"]
        words = runs.words(self.folder, steps=self.steps, sets=self.sets)
        jobs = []
        for number in range(processes):
            log = self.folder.with_name(f"{self.folder.name}-{len(self.jobs)}.log")
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            jobs.append(runs.Job([sys.executable, *start, *words], log, shared | own))
            self.jobs.append(jobs[-1])
        return jobs

    def processes(self) -> list[Process]:
        """All that live and were started by this trial, whoever their parent is by now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it ended meanwhile
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"{MARK}={self.mark}" not in variables:
                    continue
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                ranks = [int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if state != "Z":
                    found.append(Process(int(folder.name), int(parent), state, ranks[0] if ranks else None, command))
        return found

    def ranks(self) -> dict[int, int]:
        """The processes that train: rank -> pid; their data workers are not among them."""
        own = [process for process in self.processes() if process.rank is not None]
        pids = {process.pid for process in own}
        return {process.rank: process.pid for process in own if process.parent not in pids and process.rank is not None}

    def status(self) -> str:
        with suppress(OSError):
            return (self.folder / "status").read_text().rstrip("\n")
        return ""

    def wait_for_steps(self, count: int, job: runs.Job) -> None:
        """Until so many are done; the fault comes next."""
        if not runs.wait_for_step(self.folder, job, count):
            raise RuntimeError(f"it ended before step {count}:\n{job.said()[-3000:]}")

    def wait(self, true: Callable[[], Any], seconds: float) -> float | None:
        """In how many seconds it came true; None if it did not."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if true():
                return time.monotonic() - began
            time.sleep(0.05)
        return None

    def left_after(self, seconds: float) -> list[Process]:
        """What of it still lives then; returns as soon as nothing does."""
        self.wait(lambda: not self.processes(), seconds)
        return self.processes()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its exit code has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
