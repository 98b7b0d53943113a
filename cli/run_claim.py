"""One process works on a run at a time, and the file `status` in its folder says how it went.

What works on a run holds a lock that the system takes from it when it ends, however it ends. (A lock of the kind that
data workers do not inherit: one that outlives its run for a moment must not keep others out.)
"""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common import status

from .main import INTERRUPTED, PREEMPTED, Asked

LOCK = ".lock"
RUN_FILE = "run.toml"


class Claim:
    """A run that this process works on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ended(self, reason: str) -> int:
        """Write the status of a run that ended in good order, "done" or by a signal's name; return the exit code."""
        if reason == "done":
            status.write(self.folder, "DONE")
            return 0
        status.write(self.folder, f"PREEMPTED {reason}")
        return INTERRUPTED if reason == "SIGINT" else PREEMPTED


@contextmanager
def claim(folder: Path, resume: bool) -> Iterator[Claim]:
    """Hold the folder, which is made if need be, for a run of this process; of several, the first one does so.

    Raises ConfigError if it cannot be written, holds another run, or another process works on its run.
    """
    if not resume and ((folder / RUN_FILE).exists() or (folder / "checkpoints").exists()):
        raise ConfigError(f"{folder} already holds a run: go on with it by --resume, or choose another --out")
    first = os.environ.get("RANK", "0") == "0"  # it makes the folder, and knows what to remove
    path = (folder, *folder.parents)
    try:
        made = [each for each in path if not each.exists()]
        if first:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=next(each for each in path if each.exists())):
            pass
    except OSError as cause:
        raise ConfigError(
            f"the output folder {folder} cannot be written: {cause.strerror}; choose another with --out"
        ) from None
    if not first:
        yield Claim(folder)
        return
    with (folder / LOCK).open("a+", encoding="utf-8") as lock:
        _lock(lock.fileno(), folder)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        status.write(folder, "RUNNING")
        try:
            with _heeding():
                yield Claim(folder)
        except KeyboardInterrupt as cause:
            status.write(folder, f"PREEMPTED {cause if isinstance(cause, Asked) else 'interrupted at once'}")
            raise
        except BaseException as error:
            # Another process of this run may have said why already: here only the connection to it broke.
            if not status.read(folder).startswith("FAILED"):
                status.write(folder, f"FAILED {str(error).partition(chr(10))[0] or type(error).__name__}")
            _leave_nothing(folder, made)
            raise


@contextmanager
def _heeding() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end in good order what the loop does not listen for: all before the first step.

    Not one of several processes: it may wait for the others where no handler is called, and torchrun for it.
    """

    own = os.getpid()

    def heard(number: int, _: object) -> NoReturn:
        if os.getpid() != own:  # forked from it, as by a plugin's pool
            os._exit(128 + number)
        raise Asked(signal.Signals(number).name)

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGUSR1) if alone}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = (folder / LOCK).read_text("utf-8", errors="replace") or "another process"
        raise ConfigError(
            f"{owner} works on the run in {folder}; wait for it or end it, or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        pass


def _leave_nothing(folder: Path, made: list[Path]) -> None:
    """Remove a folder in which nothing was begun, and of those above it the ones that were made for it."""
    if {path.name for path in folder.iterdir()} <= {LOCK, status.NAME}:
        for name in (LOCK, status.NAME):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put something there meanwhile
            folder.rmdir()
            for path in made:
                if path != folder:
                    path.rmdir()
