"""Start the command line as people do, wait, kill it, go on with it, and say whether two runs ended alike."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from distributions import install, on_path

from selfsup.kernel import state

# A model of a few thousand weights whose step takes some ms; dropout is on, as it is in a run of people.
SMALL = (
    "train.batch=4 modality.length=32 modality.tokenizer=bytes backbone.width=32 backbone.depth=1 backbone.heads=2 "
    "backbone.dropout=0.1 checkpoints.steps=2 data.workers=0"
)
WORDS = ["the", "sea", "is", "calm", "tonight", "the", "tide", "is", "full", "and", "fair"]
PATIENCE = 300.0  # seconds: longer waits are a hang, which is a fault that was not survived
CLI = ("-m", "selfsup.cli")
start_process: Callable[..., Any] = subprocess.Popen  # the short tests fork (conftest.py), which is quicker


class Hung(Exception):
    """A process did not do in time what was waited for."""


class Job:
    """A process with all that it starts, and what it says in a file."""

    started: ClassVar[list[Job]] = []

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.began = time.time()
        self.started.append(self)
        with log.open("wb") as file:
            self.process = start_process(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that killing it kills its workers
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code; what still runs then is killed."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Hung(f"it was still running after {timeout:.0f} s:\n{self.said()[-2000:]}") from None

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends in this time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return not self.running

    def finish(self, code: int = 0, timeout: float = PATIENCE) -> str:
        """What it said, once it ended with this code."""
        if (found := self.wait(timeout)) != code:
            raise RuntimeError(f"exit code {found} instead of {code}:\n{self.said()[-4000:]}")
        return self.said()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and all that it started; SIGKILL also waits for its end."""
        if not self.running:
            return  # its pid may be another's by now
        if number == signal.SIGKILL:
            send(self.pid, signal.SIGSTOP)  # so that it starts nothing more meanwhile
        for pid in family(self.pid):
            send(pid, number)
        if number == signal.SIGKILL:
            self.process.wait(60)


def end_all() -> None:
    """Kill what was started and still runs."""
    for job in Job.started:
        if job.running:
            job.kill()
    Job.started.clear()


def family(pid: int) -> list[int]:
    """A process, its children and theirs; torchrun gives each of its own a session, so that a group is not enough."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:  # which grows
        found += parents.get(one, [])
    return found


def send(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def train(
    folder: Path,
    *more: str,
    steps: int = 8,
    sets: str = SMALL,
    plugin: str = "bert",
    start: Sequence[str] = CLI,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """The one command of a run, which is also the command that goes on with it."""
    command = [sys.executable, *start, *words(folder, *more, steps=steps, sets=sets, plugin=plugin)]
    return Job(command, log_of(folder), environment)


def torchrun(
    folder: Path,
    processes: int,
    *more: str,
    steps: int = 8,
    sets: str = SMALL,
    plugin: str = "bert",
    restarts: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """The same command under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [sys.executable, *launch, f"--max-restarts={restarts}", *CLI]
    return Job([*start, *words(folder, *more, steps=steps, sets=sets, plugin=plugin)], log_of(folder), environment)


def words(folder: Path, *more: str, steps: int, sets: str, plugin: str = "bert") -> list[str]:
    """Of the command; the data are few, so that a process takes its first step soon."""
    chosen = [word for option in sets.split() for word in ("--set", option)]
    data = [] if "--data" in more else ["--data", str(texts(folder.parent / "texts"))]
    own = ["--plugin", plugin, "--preset", "tiny", "--resume", *data, *chosen, "--steps", str(steps)]
    return ["train", *own, "--out", str(folder), *more]


def texts(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """A folder of text files, which is made if it is not there."""
    if not folder.exists():
        draw, work = random.Random(seed), folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}")
        work.mkdir(parents=True)
        for number in range(count):
            (work / f"{number:03d}.txt").write_text(" ".join(draw.choices(WORDS, k=200)))
        with suppress(OSError):  # made by another thread meanwhile
            work.rename(folder)
    return folder


def log_of(folder: Path) -> Path:
    """Where the newest process of a run writes what it says."""
    return folder.with_name(f"{folder.name}.log")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def steps_done(folder: Path) -> int:
    return 1 + max((row["step"] for row in rows(folder)), default=-1)


def first_step(folder: Path, job: Job) -> float | None:
    """Seconds from the start of a process to its first step done; None if it did none."""
    times = [row["time"] - job.began for row in rows(folder) if "loss" in row]
    return min((seconds for seconds in times if seconds > 0), default=None)


def wait_until(true: Callable[[], Any], job: Job, what: str, timeout: float = PATIENCE, pause: float = 0.02) -> bool:
    """Whether it came true while the process ran."""
    end = time.monotonic() + timeout
    while job.running:
        if true():
            return True
        if time.monotonic() > end:
            job.kill()
            raise Hung(f"no {what} after {timeout:.0f} s:\n{job.said()[-2000:]}")
        time.sleep(pause)
    return bool(true())


def wait_for_step(folder: Path, job: Job, step: int = 1, timeout: float = PATIENCE) -> bool:
    """Until so many steps are done; False if the process ended before."""
    return wait_until(lambda: steps_done(folder) >= step, job, f"step {step}", timeout)


def wait_for_progress(folder: Path, job: Job, timeout: float = PATIENCE) -> bool:
    """Until this process has done a step; False if it ended before."""
    path = folder / "metrics.jsonl"

    def touched() -> tuple[int, int] | None:
        try:
            return (found := path.stat()).st_mtime_ns, found.st_size
        except FileNotFoundError:
            return None

    # Lines of steps that will be done again are dropped first: only a file that grew tells of a step.
    seen = [touched()]

    def grew() -> bool:
        before, now = seen[0], touched()
        seen[0] = now
        return now is not None and now != before and now[1] > (before[1] if before else 0)

    return wait_until(grew, job, "step", timeout)


def processes_of(job: Job) -> dict[int, int]:
    """The processes that torchrun started: rank -> pid."""
    found = {}
    for pid in family(job.pid)[1:]:
        with suppress(OSError):  # it ended meanwhile
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            rank = next((v.partition("=")[2] for v in variables if v.startswith("RANK=")), None)
            if rank is not None and parent == job.pid:
                found[int(rank)] = pid
    return found


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and facts of the newest checkpoint that verifies."""
    found, _ = state.newest(folder / "checkpoints")
    if found is None:
        raise RuntimeError(f"{folder.name} has no checkpoint that verifies")
    return state.load(found)


def difference(ours: Path, theirs: Path) -> str | None:
    """What differs at the end of two runs, bit by bit: weights, optimizer, learning rates, losses; None if nothing."""
    (a, facts), (b, other) = newest(ours), newest(theirs)
    for key in ("step", "optimizer", "skipped"):
        if facts[key] != other[key]:
            return f"{key}: {facts[key]} and {other[key]}"
    for group in ("model", "optimizer"):
        if a[group].keys() != b[group].keys():
            return f"names of tensors in {group}"
        for name in a[group]:
            if not torch.equal(a[group][name], b[group][name]):
                return f"{group} {name}"
    logs = [[(row["step"], row["loss"], row["lr"]) for row in rows(f) if "loss" in row] for f in (ours, theirs)]
    return None if logs[0] == logs[1] else "steps, losses or learning rates in metrics.jsonl"


# A service of a distribution that nobody installed: it lies on PYTHONPATH, and writes which samples each step saw. It
# also stops the run after the step that FAULTS_STOP_AT names, as a signal would.
IDS = """
import contextlib, json, os
from selfsup.kernel.hookspecs import hookimpl

class Ids:
    @hookimpl
    def step_finished(self, run, report):
        row = {"step": report.step.number, "ids": report.ids.tolist()}
        with contextlib.suppress(OSError), open(run.folder / f"ids-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(row) + chr(10))
        if run.done == int(os.environ.get("FAULTS_STOP_AT", "0")):
            run.stop("SIGTERM")
"""


def listening(work: Path) -> dict[str, str]:
    """The environment in which every run writes the samples of its steps to RUN/ids-RANK.jsonl."""
    install(work / "plugins", "faults-ids", "[selfsup.services]\nids = faults_ids:Ids\n", faults_ids=IDS)
    return on_path(work / "plugins")


def samples(folder: Path) -> tuple[dict[int, list[int]], int]:
    """(The samples of each step over all processes, how many steps were done once more after a kill).

    A step counts as it was done last.
    """
    seen: dict[int, dict[str, list[int]]] = {}
    again = 0
    for path in sorted(folder.glob("ids-*.jsonl")):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # torn by a kill
                row = json.loads(line)
                again += path.name in seen.get(row["step"], {}) and path.name == "ids-0.jsonl"
                seen.setdefault(row["step"], {})[path.name] = row["ids"]
    return {step: [i for name in sorted(own) for i in own[name]] for step, own in sorted(seen.items())}, again
