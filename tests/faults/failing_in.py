"""Run the command line, and let one process of a run fail in a named way at a step; it does so once in a run's life.

python failing_in.py KIND RANK STEP train --plugin ... --out FOLDER

raises    an exception that nobody foresaw
hangs     in Python, for ever
locked    in C code that keeps Python's lock, for ever
starves   as a data worker that never answers would let it: waits for a lock that nobody opens
slow      from this step on it takes twenty times as long; no failure
stock     nothing fails; processes meet in torchrun's store as plain torch lets them
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

SLOWER = 20


def fail(kind: str) -> None:
    if kind == "raises":
        raise RuntimeError("a fault was injected")
    if kind == "hangs":
        while True:
            time.sleep(0.1)
    if kind == "locked":
        ctypes.PyDLL(None).sleep(100_000)
    if kind == "starves":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


def arm(kind: str, rank: str, step: int, folder: Path) -> None:
    from selfsup.kernel import distributed, loop

    if kind == "stock":
        distributed.meeting = lambda store: store  # type: ignore[assignment]
        distributed.end_with_parent = lambda number: None  # type: ignore[assignment]
        return
    own, mark = loop.take_step, folder / f".injected-{kind}"

    def replaced(run: Any, at: Any, parts: Any) -> Any:
        began = time.monotonic()
        report = own(run, at, parts)
        if kind == "slow" and at.number >= step:
            time.sleep((SLOWER - 1) * (time.monotonic() - began))
        elif kind != "slow" and at.number == step and not mark.exists():
            mark.touch()
            fail(kind)
        return report

    if os.environ.get("RANK", "0") == rank:
        loop.take_step = replaced


if __name__ == "__main__":
    kind, rank, step, *words = sys.argv[1:]
    arm(kind, rank, int(step), Path(words[words.index("--out") + 1]))
    from selfsup.cli.main import main

    main(words)
