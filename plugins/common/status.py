"""The file `status` in the folder of a run: its first word says how the run went, the rest of the line is for people.

RUNNING      a process works on it, or was killed while it did
DONE         all steps are done
PREEMPTED    stopped from outside, by a signal or Ctrl-C; the same command with --resume goes on
FAILED       an error ended it
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NAME = "status"


def write(folder: Path, status: str) -> None:
    """Replace the status, as one act."""
    work = folder / f".{NAME}.{os.getpid()}"
    with suppress(OSError):  # a full disk ends no run
        work.write_text(status + "\n", "utf-8")
        work.replace(folder / NAME)


def read(folder: Path) -> str:
    """The line; empty where there is none."""
    try:
        return (folder / NAME).read_text("utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""
