"""The folder of a run, known by its files alone: what it trains, how far it is, whether it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selfsup.kernel.config import read_toml
from selfsup.kernel.errors import ConfigError, nearest

from .run_claim import RUN_FILE
from .run_metrics import NAME, Log, read_log

DEPTH = 2  # levels below a folder at which runs are looked for
QUIET = 120.0  # seconds without a line after which nobody is thought to write
LONG = 30  # steps without a line after which nobody is thought to write, where steps take long


@dataclass
class Folder:
    """A run on disk."""

    path: Path
    written: frozenset[str] = frozenset()  # logs that some process here has open for writing
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.log = read_log(self.path / NAME)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What run.toml says; nothing where it is damaged."""
        return self._read[0]

    @property
    def problem(self) -> str | None:
        """Why run.toml cannot be read."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, Any], str | None]:
        try:
            settings = read_toml(self.path / RUN_FILE)
        except ConfigError as cause:
            return {}, str(cause).splitlines()[0]
        return settings, None if self._named(settings) else f"{self.path / RUN_FILE} names no objective"

    @staticmethod
    def _named(settings: Mapping[str, Any]) -> bool:
        return isinstance(settings.get("objective"), dict) and "name" in settings["objective"]

    def option(self, section: str, name: str) -> Any:
        """An option of run.toml; None where it is not there."""
        options = self.settings.get(section)
        return options.get(name) if isinstance(options, dict) else None

    @cached_property
    def checkpoint(self) -> int | None:
        """The step of the newest checkpoint that is there whole; that its digests are right is not looked at."""
        found = (self.path / "checkpoints").glob("step-*/manifest.json")
        return max((int(n) for file in found if (n := file.parent.name.removeprefix("step-")).isdigit()), default=None)

    @property
    def steps(self) -> int:
        """Steps done."""
        return max(self.log.steps, self.checkpoint or 0)

    @property
    def total(self) -> int | None:
        """Steps asked for."""
        steps = self.option("train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def age(self) -> float:
        """Seconds since the run did something: since its newest line, or since its files were written."""
        known = self.log.time or max(
            (p.stat().st_mtime for p in (self.path / RUN_FILE, self.path / "checkpoints") if p.exists()), default=0.0
        )
        return max(0.0, time.time() - known)

    @property
    def state(self) -> str:
        """running, active, done, stopped, no checkpoint, or damaged; `ssl runs --help` says what each means."""
        if os.path.realpath(self.path / NAME) in self.written:
            return "running"
        if self.problem:
            return "damaged"
        if self.total and (self.checkpoint or 0) >= self.total:
            return "done"
        # A run that ended in good order saved its last step. One on another machine cannot be asked.
        # A line of the future is of a clock that was put back since, and says nothing.
        fresh = self.log.time and self.log.time < time.time() + QUIET
        if fresh and self.checkpoint != self.steps and self.age < max(QUIET, LONG * (self.log.pace or 0)):
            return "active"
        return "no checkpoint" if self.checkpoint is None else "stopped"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file() and not file.is_symlink())

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        lowest = self.log.best("validation/loss", highest=False) if self.log.measured else None
        return {
            "run": str(self.path),
            "objective": self.option("objective", "name"),
            "modality": self.option("modality", "name"),
            "backbone": self.option("backbone", "name"),
            "data": self.option("data", "paths") or [],
            "steps": self.steps,
            "total": self.total,
            "state": self.state,
            "checkpoint": self.checkpoint,
            "loss": self.log.recent.get("loss"),
            "validation_loss": lowest and lowest[0],
            "validation_steps": lowest and lowest[1],
            "measured": self.log.last(),
            "metrics": {name: value for name, value in self.log.recent.items() if name != "loss"},
            "samples_per_second": self.log.rate,
            "age": round(self.age, 1),
            "bytes": self.size,
            "problem": self.problem,
        }


def find_runs(root: Path) -> list[Folder]:
    """The runs in a folder and up to two levels below it, those that did something last first."""
    places = list(_folders(root, DEPTH))
    written = writers()
    return sorted((Folder(place, written) for place in places), key=lambda run: (run.age, str(run.path)))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders that hold a run; nothing is looked for inside of one."""
    if (root / RUN_FILE).is_file() or any((root / "checkpoints").glob("step-*")):
        yield root
    elif depth > 0:
        for inner in _inside(root):
            if inner.is_dir() and inner.name[0] != ".":
                yield from _folders(inner, depth - 1)


def open_run(path: Path) -> Folder:
    """The run in this folder; ConfigError with the nearest one if there is none."""
    if not (path / RUN_FILE).is_file():
        near = nearest(path.name, [str(p.parent.name) for p in path.absolute().parent.glob(f"*/{RUN_FILE}")])
        raise ConfigError(f"{str(path)!r} is not the folder of a run; {near}")
    run = Folder(path, writers())
    if run.problem:
        raise ConfigError(run.problem)
    return run


def writers() -> frozenset[str]:
    """The logs of runs that a process of this machine has open for writing; only Linux tells, and only of one's own."""
    logs = (_written(handle) for table in Path("/proc").glob("[0-9]*/fd") for handle in _inside(table))
    return frozenset(filter(None, logs))


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not ours to read, or gone
        return []


def _written(handle: Path) -> str | None:
    """The log of a run behind a handle in /proc/PID/fd, if it is one and open for writing."""
    try:
        target = os.readlink(handle)
        wanted = target.endswith(f"/{NAME}") and _writes(handle.parent.with_name("fdinfo") / handle.name)
    except OSError:  # closed meanwhile
        return None
    return target if wanted else None


def _writes(info: Path) -> bool:
    """Whether a file was opened for writing, by its flags (octal) in /proc/PID/fdinfo."""
    flags = next((line.split()[1] for line in info.read_text().splitlines() if line.startswith("flags:")), "0")
    return bool(int(flags, 8) & (os.O_WRONLY | os.O_RDWR))
