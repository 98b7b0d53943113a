"""Run the command line while the clock jumps, or while no log can be written.

    python odd_things.py clock SECONDS train --plugin ...
    python odd_things.py logs FIRST train --plugin ...

The clock is put forward and back by so many seconds at every other look at it; each write to a log after the FIRST ones
fails as on a full disk. What the product calls is replaced here, before it runs.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

LOGS = ("metrics.jsonl", "outcome.json", "environment.json")


def jump(seconds: float) -> None:
    own, looks = time.time, count()
    time.time = lambda: own() + seconds * (next(looks) % 3 - 1)


class Full(io.StringIO):
    """A file on a disk that is full after some writes."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(text)


def fill(first: int) -> None:
    own: Callable[..., Any] = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Full(first) if path.name in LOGS and "a" in mode else own(path, mode, *args, **options)

    Path.open = opened  # type: ignore[method-assign, assignment]
    from tensorboard.summary.writer import event_file_writer as events

    def failing(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events.EventFileWriter.add_event = failing


if __name__ == "__main__":
    {"clock": jump, "logs": fill}[sys.argv[1]](float(sys.argv[2]))
    from selfsup.cli.main import main

    main(sys.argv[3:])
