"""Batches made ahead by other processes, which may die, stop or run out of memory: what was lost is made again.

What a batch holds depends on its places alone, so any worker can make it, and a worker that was killed or stopped costs
some seconds: all of them are started anew and go on with the batches that did not come yet. What would happen again
ends the run in a sentence: a batch whose making killed its workers `TIMES` times, memory that does not suffice, and
shared memory (/dev/shm), through which batches come here, that is full.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from . import distributed
from .contracts import Signal
from .errors import DataError, SelfsupError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that end a run; Slurm can send the last ahead of its end
GRACE = 10.0  # seconds that a data worker lives on after a SIGTERM
LOOK = 2.0  # seconds without a batch after which the workers are looked at, and between two looks
TIMES = 3  # workers that a batch may cost
TOLD = "DataLoader "  # in what torch itself says of batches that did not come


class Lost(Exception):
    """The workers will not bring the next batch."""


def made_ahead(
    dataset: Dataset[Any], sampler: Iterable[Any], workers: int, timeout: float = 0, pin: bool = False
) -> Generator[Any, None, None]:
    """dataset[places] for each places of the sampler, in order, made by workers: whole batches, errors raised.

    `timeout`: the seconds that a batch may take; 0 for any number.
    """
    waiting: deque[Any] = deque()  # places that workers have and whose batches did not come yet
    rest, lost = iter(sampler), 0
    again: Iterator[Any] | None = None  # what was lost

    def given(places: Iterator[Any]) -> Iterator[Any]:
        for each in places:
            waiting.append(each)
            yield each

    while True:
        # What was lost is made one batch at a time, so that it is known which one costs workers.
        team = Team(dataset, given(again or rest), 1 if again else workers, 1 if again else 2, pin)
        try:
            while True:
                batch = team.next(timeout)
                lost = 0
                waiting.popleft()
                if isinstance(batch, SelfsupError):
                    raise batch
                yield batch
        except StopIteration:
            if not again:
                return
            again = None
        except Lost as why:
            team.kill()
            lost += 1
            _tell(why, lost, dataset, waiting)
            again = iter([*waiting, *(again or ())])
            waiting.clear()
        except Exception:
            team.kill()  # its traceback may keep them alive
            raise
        finally:
            team.end()


class Team:
    """Workers, and what they bring."""

    def __init__(self, dataset: Dataset[Any], places: Iterator[Any], workers: int, ahead: int, pin: bool) -> None:
        loader = DataLoader(
            Handed(dataset) if workers else dataset,
            sampler=places,
            batch_size=None,
            collate_fn=torch.nn.Identity(),  # it is a batch already
            num_workers=workers,
            worker_init_fn=worker_started,
            generator=torch.Generator(),  # or DataLoader would draw from the global one
            timeout=LOOK if workers else 0,
            prefetch_factor=ahead if workers else None,
            pin_memory=pin,
        )
        others, heard = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the workers know what to do with them
        try:
            self.batches: Iterator[Any] = iter(loader)
        except OSError as cause:  # no process more, no memory, no room in /dev/shm
            raise DataError(
                f"data workers cannot be started: {cause}; try fewer, --set data.workers=0 for none"
            ) from cause
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.workers = [child for child in multiprocessing.active_children() if child not in others]
        self.halted: set[int | None] = set()
        self.over = threading.Event()
        if workers:
            threading.Thread(target=self.watch, daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            # DataLoader would raise the death of a worker anywhere in this process: in the middle of a step.
            signal.signal(signal.SIGCHLD, heard or signal.SIG_DFL)

    def next(self, timeout: float) -> Any:
        """The next batch; Lost if there will be none."""
        waited = 0.0
        while True:
            try:
                return next(self.batches)
            except (RuntimeError, OSError, EOFError) as cause:
                if str(cause).startswith("Caught ") or (isinstance(cause, RuntimeError) and TOLD not in str(cause)):
                    raise  # from the data
                if not isinstance(cause, RuntimeError):  # the line to a worker broke, which is dead in a moment
                    time.sleep(LOOK)
            for worker in self.workers:
                if not worker.is_alive():
                    raise Lost(f"a data worker {_ended(worker.exitcode or 0, worker.pid in self.halted)}")
            waited += LOOK
            if timeout and waited >= timeout:
                raise Lost(f"data workers brought nothing for train.timeout = {timeout:g} s")

    def kill(self) -> None:
        """End the workers, whatever state they are in."""
        for worker in self.workers:
            worker.kill()

    def end(self) -> None:
        """Let the workers go, which a traceback may keep from happening by itself."""
        self.over.set()
        self.batches = iter(())

    def watch(self) -> None:
        """Kill a worker that was stopped: this process may be waiting for it where no timeout counts."""
        before: set[int | None] = set()
        while not self.over.wait(LOOK):
            stopped = {worker.pid for worker in self.workers if _state(worker.pid or 0) in "tT"}
            # Not at once: a run that was suspended as a whole (Ctrl-Z) may wake a moment before its workers do.
            self.halted |= stopped & before
            for worker in self.workers:
                if worker.pid in self.halted:
                    worker.kill()
            before = stopped


class Handed(Dataset[Any]):
    """Puts a batch into shared memory in the worker's own thread: in torch's, a failure would leave the run waiting."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, places: Any) -> Any:
        try:
            batch = self.dataset[places]
            _share(batch)
        except (MemoryError, RuntimeError) as cause:
            name = re.search(r"shared memory.*</(torch_[^>/]+)>", str(cause))
            if name:
                with suppress(OSError):
                    os.unlink(f"/dev/shm/{name[1]}")  # which torch leaves behind
                return DataError(
                    "/dev/shm is full, through which data workers hand over batches: give it more room "
                    "(docker run --shm-size=8g), or choose smaller batches, or fewer workers with --set data.workers=N"
                )
            if short_of_memory(cause):
                return DataError("a data worker ran out of memory; try fewer with --set data.workers=N")
            raise
        return batch


def short_of_memory(cause: BaseException) -> bool:
    """Whether there was too little memory, as Python or torch say it."""
    return isinstance(cause, MemoryError) or "can't allocate memory" in str(cause)


def worker_started(_: int) -> None:
    """Workers end with their parent, which may need them for one more step: Ctrl-C is for it alone, and a SIGTERM, as
    torchrun, `timeout` and schedulers send it to a whole group of processes, ends a worker only some seconds later.
    """
    distributed.end_with_parent(signal.SIGKILL)  # torch's workers look for it too, but not while they are stuck
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, GRACE))  # then SIGALRM ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # SIGUSR1 is for the parent alone too


def _tell(why: Lost, lost: int, dataset: Dataset[Any], waiting: Sequence[Any]) -> None:
    """Say what was lost; DataError where it would be lost again."""
    if lost == TIMES:
        named = getattr(dataset, "called", str)(waiting[0]) if waiting else "nothing"
        raise DataError(f"{lost} times in a row {why}, while it made {named}") from None
    print(f"warning: {why}; all were started anew, and nothing is lost", file=sys.stderr, flush=True)


def _share(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(value, dict | Signal):
        _share([*(value if isinstance(value, dict) else vars(value)).values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _share(part)


def _ended(code: int, halted: bool) -> str:
    """How a process ended, for people."""
    if halted:
        return "was stopped"
    if code >= 0:
        return f"ended with exit code {code}"
    why = {signal.SIGKILL: ", as the system does where memory is short", signal.SIGBUS: ", as where /dev/shm is full"}
    return f"was killed by {signal.Signals(-code).name}{why.get(signal.Signals(-code), '')}"


def _state(pid: int) -> str:
    """R running, S sleeping, T stopped ...; "?" where nobody can tell."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "?"
