"""Python in a process that is forked from one which has imported torch and selfsup: as real to kill, and there at once.

A new interpreter computes for four seconds before its first step, and the tests start some hundred. What only a new
one can show, such as an import that is missing, is shown by test_packaging.py and by what torchrun starts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel.distributed", "safetensors.torch"),
        *("selfsup.kernel.compose", "selfsup.triton_ops", "selfsup.cli.main", "selfsup.cli.train"),
        *("selfsup.plugins.common.quantize", "selfsup.plugins.common.vocabulary", "tokenizers"),
    ]
)


class Forked:
    """What `subprocess.Popen([sys.executable, ...])` is for a new interpreter, as far as the tests need it.

    What it writes goes to the file `stdout`, or to two of its own, from where `communicate` has it.
    """

    def __init__(
        self,
        command: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        start_new_session: bool = False,
        stdout: BufferedIOBase | int | None = None,
        **_: Any,
    ) -> None:
        _, *arguments = map(str, command)
        if stdout is None or isinstance(stdout, int):  # such as subprocess.PIPE
            folder = tempfile.mkdtemp(prefix="forked-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.files = [str(Path(folder) / name) for name in ("out", "err")]
        else:
            self.files = [stdout.name] * 2  # type: ignore[attr-defined]
        environment = dict(os.environ if env is None else env)
        given = (arguments, environment, str(cwd or Path.cwd()), self.files, start_new_session)
        self.process = FORKING.Process(target=_run, args=given)
        self.process.start()
        self.pid = self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        """How it ended, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it runs."""
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, once it has ended."""
        self.wait(timeout)
        out, err = (Path(name).read_text(errors="replace") for name in self.files)
        return out, err


def together(count: int, command: Sequence[object], **how: Any) -> list[Forked]:
    """So many processes that find each other as those of torchrun do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = dict(how.pop("env", os.environ)) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [Forked(command, env=base | {"RANK": str(n), "LOCAL_RANK": str(n)}, **how) for n in range(count)]


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: list[str], leads: bool) -> None:
    """What `python ARGUMENTS` does, in this process."""
    if leads:
        os.setsid()
    for number, name in zip((1, 2), files, strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # that of a new interpreter, for the data workers it starts
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<given>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [what, *rest]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
