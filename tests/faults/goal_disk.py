"""R5: where a checkpoint cannot be written, the one before stays what it was, and the run goes on when there is room.

A disk of its own is filled, before the write and at ten places within it; no further file can be made on it; the
folder of checkpoints becomes read-only; a file may not grow beyond a limit. After each fault the old checkpoint is
compared bit by bit with what it was, and at last the run is finished, with room, by the same command.

The usual formats write over what is there, and may not write further than to the same places.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import disks
import runs
import stock
from result import Result

from selfsup.kernel import state

LAUNCHER = str(Path(__file__).with_name("fills_up.py"))
PLACES = [(place + 0.5) / 10 for place in range(10)]
SLACK = 20_000  # bytes for what else a run writes: its status, its settings, a line of metrics
STEPS = 8
KEEP = ("--set", "checkpoints.keep=9")


def measure(work: Path, full: bool) -> Iterator[Result]:
    runs.train(work / "whole", *KEEP, steps=STEPS).finish()
    if why := disks.missing():
        yield Result("R5", "a full disk", 0, 0, f"skipped: {why}")
    else:
        yield from filled(work, PLACES if full else PLACES[4:5], ["before", "while"] if full else ["while"])
        yield from rare(work) if full else ()
    trial = Trial(work / "whole", work / "limited")
    largest = max(path.stat().st_size for path in trial.files)
    for place in PLACES if full else PLACES[4:5]:
        trial.fault(limit=int(place * largest))
    yield trial.end("a file may not grow any further", usual_limits(work / "stock") if full else "")


def filled(work: Path, places: Sequence[float], times: Sequence[str]) -> Iterator[Result]:
    for time in times:
        with disks.small(work / "disk", 16) as disk:
            trial = Trial(work / "whole", disk / "run")
            for place in places:
                free = SLACK + int(place * (trial.size - 2 * SLACK))
                trial.fault(disks.full(disk, free), start=[LAUNCHER] if time == "while" else runs.CLI)
            yield trial.end(f"the disk is full {time} a checkpoint is written", speaks=True)


def rare(work: Path) -> Iterator[Result]:
    with disks.small(work / "disk", 16) as disk:
        trial = Trial(work / "whole", disk / "run")
        for _ in range(3):
            trial.fault(disks.without_names(disk))
        yield trial.end("no further file can be made on the disk")
    trial = Trial(work / "whole", work / "locked")
    for _ in range(3):
        trial.fault(disks.read_only(trial.folder / "checkpoints"))
    for _ in range(3):
        trial.fault(disks.read_only(trial.folder))
    yield trial.end("the folder is read-only")


@dataclass
class Trial:
    """A run that cannot write its next checkpoint, again and again."""

    whole: Path
    folder: Path
    faults: int = 0
    kept: int = 0  # times that the old checkpoint was untouched, and the run said why it stopped
    told: int = 0  # times that it said how many bytes are free and needed
    wrong: str | None = None
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """As the run was after half of its steps."""
        shutil.copytree(self.whole, self.folder)
        for folder in state.folders(self.folder / "checkpoints")[:-2]:
            shutil.rmtree(folder)
        self.old = state.folders(self.folder / "checkpoints")[0]
        self.files = sorted(path for path in self.old.rglob("*") if path.is_file())
        self.bytes = [path.read_bytes() for path in self.files]
        self.size = sum(map(len, self.bytes))

    def start(self, start: Sequence[str] = runs.CLI) -> runs.Job:
        """The command of the run, wherever its folder was moved to."""
        data = ("--data", str(self.whole.parent / "texts"))
        return runs.train(self.folder, *data, *KEEP, steps=STEPS, start=start)

    def fault(
        self,
        broken: AbstractContextManager[None] | None = None,
        limit: int | None = None,
        start: Sequence[str] = runs.CLI,
    ) -> None:
        """Go on with the run while something is broken."""
        self.faults += 1
        with broken or nullcontext():
            job = self.start(start)
            if limit is not None:
                resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (limit, limit))
            code, said = job.wait(), job.said()
        untouched = [path.read_bytes() for path in self.files if path.exists()] == self.bytes
        found, damaged = state.newest(self.folder / "checkpoints")
        foreseen = code != 0 and "written" in said and "not foreseen" not in said
        self.told += "free" in said and "need" in said
        if untouched and found == self.old and not damaged and foreseen:
            self.kept += 1
        else:
            self.wrong = f"exit code {code}, newest {found and found.name}, {damaged}: {said[-400:]}"

    def end(self, fault: str, usual: str = "", speaks: bool = False) -> Result:
        """Finish the run with room, and compare."""
        self.start().finish()
        self.wrong = self.wrong or runs.difference(self.folder, self.whole)
        if left := [path.name for path in (self.folder / "checkpoints").glob(".*")]:
            self.wrong = self.wrong or f"it left {', '.join(left)}"
        kept = min(self.kept, self.told) if speaks else self.kept
        end = "then bitwise equal" if self.wrong is None else f"then: {self.wrong}"
        bytes_told = f", free and needed bytes named {self.told} times" if speaks else ""
        figure = f"{self.faults - self.kept} of {self.faults} checkpoints lost{bytes_told}, {end}"
        return Result("R5", fault, self.faults, 0 if self.wrong else kept, figure, usual)


def usual_limits(work: Path) -> str:
    """How often a write that fails on its way leaves nothing that can be loaded."""
    told = []
    old, new = stock.tensors(1), stock.tensors(2)
    for name, (save, _) in stock.FORMATS.items():
        lost = 0
        for place in PLACES:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            save(old, work)
            largest = max(path.stat().st_size for path in work.rglob("*") if path.is_file())
            if (child := os.fork()) == 0:
                limited_save(name, work, int(place * largest))
            os.waitpid(child, 0)
            lost += all(stock.outcome(name, work, x) != "right" for x in (old, new))
        told.append(f"{name} {lost} of {len(PLACES)} lost")
    return ", ".join(told)


def limited_save(name: str, work: Path, limit: int) -> None:
    """In a process of its own, which this ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        stock.FORMATS[name][0](stock.tensors(2), work)
    finally:
        os._exit(0)
