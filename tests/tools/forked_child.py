"""A child as a pool makes it: forked from this process, with its handlers."""

from __future__ import annotations

import os
import signal
import time


def terminated() -> int:
    """How a child that sleeps ends on SIGTERM: its exit code, or minus a signal."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, b"!")  # a signal that comes within the fork would be lost
        time.sleep(30)
        os._exit(0)
    os.read(read, 1)
    os.kill(child, signal.SIGTERM)
    os.close(read)
    os.close(write)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
