"""Two processes that work together, started once and kept until the tests end."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

WORLD = 2
PATIENCE = 120.0  # seconds for one call


class Ranks:
    """Processes 0 and 1 of a gloo group."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = get_context("spawn")
        self.pipes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, rank, port), daemon=True).start()
            self.pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function, importable by name, in both processes at once; what each returned."""
        for pipe in self.pipes:
            pipe.send((function, args))
        out = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"process {rank} did not answer within {PATIENCE:.0f} s")
            value, failure = pipe.recv()
            if failure:
                raise RuntimeError(f"process {rank} failed:\n{failure}")
            out.append(value)
        return out


@cache
def ranks() -> Ranks:
    """The processes; started by the first call."""
    return Ranks()


def _serve(pipe: Connection, rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)
