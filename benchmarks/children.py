"""Processes that a stage starts, reads and ends in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

GRACE = 15.0  # seconds between the request to end and the end


class Child:
    """A process whose lines are read as they come, and that is asked to end when its time is over.

    Once they are read, `code` is what it returned, `over` whether its time was over, `complaint` the end of what it
    wrote to the standard error.
    """

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self.seconds, self.over, self.code, self.complaint = seconds, False, 0, ""
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout
        told: list[str] = []
        ear = threading.Thread(target=self._listen, args=(told,), daemon=True)
        ear.start()
        clocks = [threading.Timer(self.seconds, self._ask), threading.Timer(self.seconds + GRACE, self.process.kill)]
        for clock in clocks:
            clock.start()
        try:
            yield from self.process.stdout
            self.code = self.process.wait()
        finally:  # also where nobody reads on
            for clock in clocks:
                clock.cancel()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            ear.join(5)
        self.complaint = " / ".join([line.strip() for line in told if line.strip()][-3:])[-500:]

    def _listen(self, told: list[str]) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                told.append(line)
                sys.stderr.write(line)

    def _ask(self) -> None:
        self.over = True
        self.process.send_signal(signal.SIGINT)
