"""Say where something is that takes long without a word: nobody can know whether it hangs, but a person may guess.

Opening data on a network disk that is gone waits for ever, and preparing a large corpus an hour: they look alike.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_stack

from .main import say

FIRST = 60.0  # seconds before the first note; from one to the next the time is doubled
OURS = Path(__file__).resolve().parent.parent


@contextmanager
def asked_for(what: str) -> Iterator[None]:
    """Say on stderr now and then where this thread is, until what is done within has ended."""
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, threading.get_ident(), over), name="patience", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(what: str, thread: int, over: threading.Event) -> None:
    pause = passed = FIRST
    while not over.wait(pause):
        if where := place(thread):
            say(f"note: {what} takes {passed:.0f} s so far; it is at {where}. If that stands still, Ctrl-C ends it")
        pause, passed = passed, 2 * passed


def place(thread: int) -> str:
    """Where a thread is: the innermost line, and that of ours; empty while it waits for others, which say more."""
    frames = extract_stack(sys._current_frames().get(thread))
    inner = frames[-1]
    own = next((one for one in reversed(frames) if OURS in Path(one.filename).parents), inner)
    if own.filename.endswith("kernel/distributed.py"):
        return ""
    called = "" if own is inner else f", called at {own.filename}:{own.lineno} ({own.name})"
    return f"{inner.filename}:{inner.lineno} ({inner.name}){called}"
