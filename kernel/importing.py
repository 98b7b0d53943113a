"""Import a stranger's module under watch: one that hangs or ends the process is named instead.

After NOTE seconds a line says what is being imported, after GIVE_UP it is given up. Both come from SIGALRM, which
is used only where nobody else uses it: on the main thread, no handler set and no timer running. A data worker, which
sets a timer of its own when it is told to end, imports no plugin by name.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

NOTE, GIVE_UP = 10.0, 60.0  # seconds


@contextmanager
def watched(what: str, without: str, ours: bool = False) -> Iterator[None]:
    """For an import: TimeoutError if it hangs, SystemExit if it would end the process at once.

    Our own are only slow, on a slow disk, and waited for.
    """
    with _kept_alive(), _timed(what, without, math.inf if ours else GIVE_UP):
        yield


@contextmanager
def _timed(what: str, without: str, limit: float) -> Iterator[None]:
    taken = threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]
    if taken or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return
    began = time.monotonic()

    def heard(*_: Any) -> None:
        if time.monotonic() - began >= limit:
            raise TimeoutError(f"the import was given up after {limit:g} s")
        # Not print: one may be under way, which no other may enter.
        os.write(2, f"still importing {what}; without it: {without}\n".encode())

    signal.signal(signal.SIGALRM, heard)
    signal.setitimer(signal.ITIMER_REAL, NOTE, GIVE_UP - NOTE)  # again and again, should it catch the error
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def _kept_alive() -> Iterator[None]:
    """`os._exit`, which nobody can catch, becomes an exception in this thread of this process."""
    end, here, within = os._exit, (os.getpid(), threading.get_ident()), True

    def refused(status: int) -> NoReturn:
        if within and here == (os.getpid(), threading.get_ident()):
            raise SystemExit(f"os._exit({status})")
        end(status)

    os._exit = refused
    try:
        yield
    finally:
        within, os._exit = False, end
