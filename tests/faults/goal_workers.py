"""R10: a data worker is killed, stopped, raises, runs out of memory or finds /dev/shm full, while a run goes on.

The faults come from outside: a worker of the run is found in the process table and sent a signal, or its memory is
limited, or the run has a /dev/shm of its own with little room. A run whose workers were replaced ends bit for bit like
one that nothing disturbed; one that cannot go on ends in a sentence. Either way no process is left, and no file in
/dev/shm. The usual DataLoader meets the same signals in the same run.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import runs
from result import Result

STEPS = 60
SHM = Path("/dev/shm")
DETECTED = 10.0  # seconds, as promised
CASES = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGSEGV": signal.SIGSEGV}
WORKERS = ("--set", "data.workers=2", "--set", "checkpoints.minutes=60")


def measure(work: Path, full: bool) -> Iterator[Result]:
    runs.train(work / "whole", *WORKERS, steps=STEPS).finish()
    times = 10 if full else 1
    for name, number in CASES.items() if full else [("SIGSTOP", signal.SIGSTOP)]:
        yield signalled(work, name, number, times)
    for name, limits in (("too little memory in a worker", "memory"), ("/dev/shm full", "shm")):
        if limits == "shm" and not may_mount():
            continue  # needs root
        yield refused(work, name, limits)


def signalled(work: Path, name: str, number: signal.Signals, times: int) -> Result:
    """Signals to one worker after the other of runs that go on."""
    survived, seconds, before, wrong = 0, [], shared_files(), ""
    for turn in range(times):
        folder = work / f"{name.replace(' ', '')}-{turn}"
        job = runs.train(folder, *WORKERS, steps=STEPS)
        runs.wait_for_step(folder, job, 2)
        workers = workers_of(job)
        began = time.monotonic()
        runs.send(workers[0], number)
        if runs.wait_until(lambda job=job: "all were started anew" in job.said(), job, "word of the worker"):
            seconds.append(time.monotonic() - began)
        job.finish()
        left = [pid for pid in workers if alive(pid)]
        wrong = runs.difference(folder, work / "whole") or (f"{len(left)} workers left" if left else "")
        survived += not wrong and bool(seconds) and seconds[-1] <= DETECTED
    leaked = len(shared_files() - before)
    slowest = f"{max(seconds):.1f} s" if seconds else "never"
    figure = f"replaced after at most {slowest}; bitwise the same end; {leaked} files left in /dev/shm"
    figure += f"; NOT: {wrong}" if wrong else ""
    return Result("R10", f"{name} to a data worker", times, 0 if leaked else survived, figure, usual(work, number))


def refused(work: Path, name: str, limits: str) -> Result:
    """What would happen again ends the run in a sentence."""
    folder, before = work / limits, shared_files()
    began = time.monotonic()
    job = runs.train(folder, *WORKERS, steps=STEPS, start=[__file__, limits])
    code = job.wait(120)
    seconds = time.monotonic() - began
    said = next((line for line in job.said().splitlines() if line.startswith("error: ")), "no error")
    wanted = "memory" if limits == "memory" else "/dev/shm is full"
    leaked = len(shared_files() - before)
    fine = code == 1 and wanted in said and not leaked and "Traceback" not in job.said()
    figure = f"exit code {code} {seconds:.0f} s after the start: {said[:90]}; {leaked} files left in /dev/shm"
    return Result("R10", name, 1, int(fine), figure)


def workers_of(job: runs.Job) -> list[int]:
    """The data workers of a run, the oldest first."""
    end = time.monotonic() + 30
    while len(found := runs.family(job.pid)[1:]) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process runs: one that ended and that nobody asked for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def shared_files() -> set[str]:
    return {name for name in os.listdir(SHM) if name.startswith("torch_")} if SHM.is_dir() else set()


def may_mount() -> bool:
    if os.geteuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


STOCK = """
import os, sys, time, torch
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 100000
    def __getitem__(self, index): return torch.ones(100)
for number, _ in enumerate(torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2)):
    if number == 5: print("going", flush=True)
    time.sleep(0.005)
"""


def usual(work: Path, number: signal.Signals) -> str:
    """The same signal to a worker of torch's DataLoader, as its documentation sets it up."""
    job = runs.Job([sys.executable, "-c", STOCK], work / f"stock-{number}.log")
    runs.wait_until(lambda: "going" in job.said(), job, "batch")
    began = time.monotonic()
    runs.send(workers_of(job)[0], number)
    while job.running and time.monotonic() - began < 30:
        time.sleep(0.05)
    told = f"ends with a traceback after {time.monotonic() - began:.1f} s" if not job.running else "hangs (30 s and on)"
    job.kill()
    return f"torch DataLoader {told}"


def little_memory() -> None:
    """A worker may take little more memory than it has when it begins, and each sample that it reads takes some."""
    from selfsup.kernel import loader, workers

    own, read, leaked = workers.worker_started, loader.Reader.read, []

    def leaking(self: loader.Reader, ident: int) -> object:
        leaked.append(bytearray(32 << 20))
        return read(self, ident)

    def started(number: int) -> None:
        own(number)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (512 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    workers.worker_started, loader.Reader.read = started, leaking


def small_shm() -> None:
    """A /dev/shm of its own, with room for the semaphores of two workers and a batch or two."""
    import ctypes

    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError("no namespace of mounts")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(SHM)], check=True)


if __name__ == "__main__":
    {"memory": little_memory, "shm": small_shm}[sys.argv[1]]()
    from selfsup.cli.main import main

    main(sys.argv[2:])
