"""The command, called here or in a process of its own, with throw-away distributions of plugins on its path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributions import TOYS, install, on_path
from forked import Forked

from selfsup.cli.main import main


class Command:
    """`ssl` in a folder of its own: `ssl("train", ...)` gives (stdout, stderr)."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.path, self.capsys = folder / "work", folder / "plugins", capsys
        self.folder.mkdir()
        self.path.mkdir()

    def distribution(self, name: str, entry_points: str, **modules: str) -> None:
        """Install a distribution by writing its metadata and modules, given by their text."""
        install(self.path, name, entry_points, **modules)

    def __call__(self, *args: object, code: int = 0) -> tuple[str, str]:
        """In this process; fails if the exit code is another one."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in args])
        out, err = self.capsys.readouterr()
        assert (ended.value.code or 0) == code, (out, err)
        return out, err

    def start(self, *args: object, **environment: str) -> subprocess.Popen[str]:
        """In a process of its own."""
        return self._start(subprocess.Popen, *args, **environment)

    def fork(self, *args: object) -> Forked:
        """In a process of its own that has imported everything: soon at its first step."""
        return self._start(Forked, *args)

    def _start(self, start: Callable[..., Any], *args: object, **environment: str) -> Any:
        return start(
            [sys.executable, "-m", "selfsup.cli", *map(str, args)],
            cwd=self.folder,
            env={**os.environ, **on_path(self.path), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture
def ssl(tmp_path, capsys, monkeypatch):
    """The command without further plugins."""
    command = Command(tmp_path, capsys)
    monkeypatch.chdir(command.folder)
    monkeypatch.syspath_prepend(command.path)
    monkeypatch.setenv("COLUMNS", "140")
    before = set(sys.modules)
    yield command
    for name in set(sys.modules) - before:
        if str(command.path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def toys(ssl):
    """The command with the toys installed."""
    shutil.copy(Path(__file__).with_name("toy_plugins.py"), ssl.path)
    ssl.distribution("toys", TOYS)
    return ssl
