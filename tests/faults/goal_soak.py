"""R22: one run under faults of every kind, one after the other, started again by the same command and by nothing else.

The run goes through segments, of one process or of two under torchrun, and the data lose a sample at each border.
Within a segment processes are killed, asked to end, stopped, robbed of a data worker and of room on the disk, and the
newest checkpoint is damaged. At its end every segment is compared, bit by bit, with the same segment of a copy that
nothing disturbed; so no damage makes it go back to before its border, to steps of another number of processes. A last
copy never changes its number of processes: what it ends with is compared within a tolerance,
as several processes add in another order.

Goodput is the share of the time that went into steps which were kept.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

import disks
import goal_damage
import numpy as np
import runs
import torch
from result import Result

from selfsup.kernel import state

SETS = (
    "train.batch=16 modality.size=16 modality.patch=4 backbone.width=32 backbone.depth=2 backbone.heads=2 "
    "towers.decoder.backbone.width=16 towers.decoder.backbone.depth=1 towers.decoder.backbone.heads=2 "
    "checkpoints.keep=3 data.workers=1 data.max_bad_fraction=0.5 train.timeout=60"
)
IMAGES = 400
SHARE = 0.3  # of a segment's time that its steps are expected to get
TOLERANCE = 0.02  # by how much the mean loss of the last steps may differ where the number of processes changed
LAST = 100
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
FLIPPED = "a bit of the newest checkpoint flipped"
UNREADABLE, CHANGED = "a sample that cannot be read any more", "another number of processes"


@dataclass
class Event:
    """One fault."""

    kind: str
    survived: bool = False
    wrong: str | None = None


@dataclass
class Segment:
    """A stretch of the run with one number of processes."""

    processes: int
    end: int  # the step after which it is compared
    seconds: float  # for faults; then it is left alone
    events: list[Event] = field(default_factory=list)
    compared: bool = False
    wrong: str | None = None


def measure(work: Path, full: bool, minutes: float = 30.0) -> Iterator[Result]:
    soak = Soak(work, minutes * 60) if full else Soak(work, 0, [Segment(1, 24, 60)], ["SIGSTOP, then kill -9"])
    yield from soak.results()


class Soak:
    """The run that is disturbed, the copies that are not, and what happened."""

    def __init__(
        self, work: Path, seconds: float, segments: list[Segment] | None = None, kinds: list[str] | None = None
    ) -> None:
        self.work, self.draw = work, random.Random(0)
        self.images = images(work / "images")
        self.environment = runs.listening(work)
        self.faults: dict[str, Callable[[runs.Job, Event], None]] = {
            "kill -9": self.kill,
            **dict.fromkeys(SIGNALS, self.ask),
            "SIGSTOP, then kill -9": self.stop,
            FLIPPED: self.damage,
            "the newest checkpoint cut short": self.damage,
            "a full disk": self.fill,
            "kill -9 of a data worker": self.rob,
        }
        self.steps_between, self.total = 4, segments[-1].end if segments else 0
        self.segments = segments or self.planned(seconds)
        self.kinds = kinds or [kind for kind in self.faults if kind != "a full disk" or disks.missing() is None]
        self.first = 0  # step of the segment at hand
        self.wall = self.useful = 0.0
        self.deck: list[str] = []
        self.pause = 4.0 if seconds else 0.0  # seconds at most before a fault, after a step

    def planned(self, seconds: float) -> list[Segment]:
        """As many segments as there is time for, of one and two processes in turn."""
        trial = self.start(self.work / "trial", 1, 0, steps=120)
        trial.finish()
        pace = pace_of(self.work / "trial", 0)
        count = max(2, round(seconds / 180))
        each = seconds / (1 + 2 * SHARE) / count  # the copies take the rest
        self.steps_between = max(2, round(2 / pace))
        length = max(3 * self.steps_between, round(SHARE * each / pace))
        self.total = count * length
        return [Segment(1 + number % 2, (number + 1) * length, each) for number in range(count)]

    def start(self, folder: Path, processes: int, end: int, steps: int | None = None) -> runs.Job:
        """The command of the run."""
        how = {
            "steps": steps or self.total,
            "sets": f"{SETS} checkpoints.steps={self.steps_between}",
            "environment": {**self.environment, "FAULTS_STOP_AT": str(end if end < self.total else 0)},
            "plugin": "mae",
        }
        data = ("--data", str(self.images))
        return runs.train(folder, *data, **how) if processes == 1 else runs.torchrun(folder, processes, *data, **how)

    def results(self) -> Iterator[Result]:
        """Go through all segments; a line for each kind of fault, and one for all. Ctrl-C leaves what is done."""
        began, stopped = time.monotonic(), None
        with disks.small(self.work / "disk", 64) if disks.missing() is None else nullcontext() as disk:
            self.folder = (disk or self.work) / "run"
            try:
                through = all(self.go_through(number, segment) for number, segment in enumerate(self.segments))
            except KeyboardInterrupt as cause:
                through, stopped = False, cause
                runs.end_all()
            loss, weights = self.gaps() if through else (math.nan, math.nan)
            named = len(runs.newest(self.folder)[1]["skipped"]) if through else 0
        tried = [segment for segment in self.segments if segment.compared or segment.wrong]
        yield from self.kinds_of(tried, named)
        wrong = "".join(f"; {segment.wrong}" for segment in tried if segment.wrong)
        figure = (
            f"bitwise equal to a copy that nothing disturbed; goodput {self.useful / max(self.wall, 1e-9):.0%} of "
            f"{self.wall / 60:.1f} minutes under faults; at the end the mean loss is {loss:.2%} from that of a run "
            f"that never changed its number of processes, and the weights {weights:.1e}{wrong}"
        )
        equal = sum(segment.wrong is None for segment in tried)
        minutes = (time.monotonic() - began) / 60
        survived = equal if stopped or loss < TOLERANCE else 0
        yield Result("R22", f"segments of one run, {minutes:.0f} minutes", len(tried), survived, figure)
        if stopped:
            raise stopped

    def kinds_of(self, tried: list[Segment], named: int) -> Iterator[Result]:
        for kind in [*self.faults, UNREADABLE, CHANGED]:
            events = [event for segment in tried for event in segment.events if event.kind == kind]
            if events:
                wrong = "".join(f"; {event.wrong}" for event in events if event.wrong)
                more = f", {named} named in the checkpoint" if kind == UNREADABLE else ""
                survived = sum(event.survived for event in events)
                yield Result("R22", kind, len(events), survived, f"went on by the same command{more}{wrong}")

    def go_through(self, number: int, segment: Segment) -> bool:
        """Disturb the run until the segment ends, then take its copies there; False if it does not get there."""
        copy, steady = self.work / f"copy-{number}", self.work / "steady"
        self.first = first = self.segments[number - 1].end if number else 0
        if number:
            segment.events += [Event(CHANGED), Event(UNREADABLE)]
            (self.images / f"{number:03d}.png").write_bytes(self.draw.randbytes(200))
            shutil.copytree(self.folder, copy)
        began = time.monotonic()
        try:
            self.disturb(segment)
        except (runs.Hung, RuntimeError, TimeoutExpired) as cause:
            segment.wrong = f"after {[event.kind for event in segment.events][-3:]}: {str(cause)[-600:]}"
            for event in segment.events:
                event.survived = False
            return False
        self.wall += time.monotonic() - began
        for folder, processes in ((copy, segment.processes), (steady, 1))[: len(self.segments)]:
            self.start(folder, processes, segment.end).wait()
        segment.compared = True
        if differs := runs.difference(self.folder, copy):
            segment.wrong = (
                f"segment {number} of {segment.processes} processes, from step {first}, after "
                f"{[event.kind for event in segment.events]}: {differs}; the first step that differs is "
                f"{parted(self.folder, copy)}"
            )
        self.useful += pace_of(copy, first) * (segment.end - first)
        for event in segment.events:
            event.survived = event.survived and segment.wrong is None
        shutil.rmtree(copy)
        return True

    def disturb(self, segment: Segment) -> None:
        """Faults until the time is over; each meets a run that went on after the ones before it, or starts to."""
        until, job, failures = time.monotonic() + segment.seconds, None, 0
        while not self.reached(segment):
            if job is None or not job.running:
                job = self.start(self.folder, segment.processes, segment.end)
            fault = self.next_kind() if time.monotonic() < until else None
            early = fault == "kill -9" and self.draw.random() < 0.3  # while it starts
            if not early:
                if not runs.wait_for_progress(self.folder, job) and not self.reached(segment):
                    failures += 1
                    if failures > 2:
                        raise RuntimeError(f"three processes ended without a step:\n{job.said()[-500:]}")
                    continue
                failures = 0
                self.settle(segment)
            if fault is None:
                job.wait()
                continue
            if not self.pause:
                runs.wait_for_step(self.folder, job, 2 * self.steps_between + 1)  # behind a checkpoint
            time.sleep(self.draw.uniform(0, self.pause))
            if job.running:
                segment.events.append(Event(fault))
                self.faults[fault](job, segment.events[-1])
        if job and job.running:
            job.wait()
        self.settle(segment)

    def settle(self, segment: Segment) -> None:
        """The run went on: what happened before was survived."""
        for event in segment.events:
            event.survived = event.wrong is None

    def next_kind(self) -> str | None:
        """Every kind comes as often as the others, in any order."""
        if len(self.segments) == 1 and self.segments[0].events:
            return None
        if not self.deck:
            self.deck = self.draw.sample(self.kinds, len(self.kinds))
        return self.deck.pop()

    def reached(self, segment: Segment) -> bool:
        found, _ = state.newest(self.folder / "checkpoints")
        return found is not None and number_of(found) >= segment.end

    def kill(self, job: runs.Job, event: Event) -> None:
        job.kill()

    def stop(self, job: runs.Job, event: Event) -> None:
        job.kill(signal.SIGSTOP)
        time.sleep(1)
        job.kill()

    def ask(self, job: runs.Job, event: Event) -> None:
        """Of several processes only one is asked; the others stop with it."""
        found = runs.processes_of(job)
        runs.send(self.draw.choice(list(found.values())) if found else job.pid, SIGNALS[event.kind])
        job.wait()
        status = (self.folder / "status").read_text()
        if not status.startswith(("PREEMPTED", "DONE")):
            event.wrong = f"after a signal the status is {status.strip()}"

    def damage(self, job: runs.Job, event: Event) -> None:
        """Only where the segment has another checkpoint to go back to."""
        job.kill()
        newest, *older = state.folders(self.folder / "checkpoints") or [None]
        if newest and any(number_of(other) >= self.first and state.verify(other) is None for other in older):
            path = self.draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
            size = path.stat().st_size
            change = goal_damage.flipped(self.draw.randrange(8 * size)) if event.kind == FLIPPED else None
            (change or goal_damage.cut(self.draw.randrange(size)))(path)
        else:
            event.kind = "kill -9"

    def fill(self, job: runs.Job, event: Event) -> None:
        """For longer than a checkpoint takes to be due; whether the run goes on meanwhile or ends is its own affair."""
        with disks.full(self.folder.parent):
            job.ends_within(8)
        job.kill()

    def rob(self, job: runs.Job, event: Event) -> None:
        trainers = list(runs.processes_of(job).values()) or [job.pid]
        workers = [pid for trainer in trainers for pid in runs.family(trainer)[1:]]
        if workers:
            runs.send(self.draw.choice(workers))
        if not job.ends_within(12) and not runs.wait_for_progress(self.folder, job, timeout=120):
            event.wrong = "it neither ended nor went on"
        job.kill()

    def gaps(self) -> tuple[float, float]:
        """Of the mean loss of the last steps, and of the weights, between the run and its steady copy."""
        steady = self.work / ("steady" if len(self.segments) > 1 else self.folder)
        ours, theirs = (
            statistics.mean([row["loss"] for row in runs.rows(folder) if "loss" in row][-LAST:])
            for folder in (self.folder, steady)
        )
        a, b = (
            torch.cat([x.double().flatten() for _, x in sorted(runs.newest(folder)[0]["model"].items())])
            for folder in (self.folder, steady)
        )
        return abs(ours / theirs - 1), float((a - b).norm() / b.norm())


def parted(ours: Path, theirs: Path) -> int | None:
    """The first step whose losses differ between two runs."""
    a, b = ({row["step"]: row["loss"] for row in runs.rows(folder) if "loss" in row} for folder in (ours, theirs))
    return next((step for step in sorted(a | b) if a.get(step) != b.get(step)), None)


def number_of(checkpoint: Path) -> int:
    """The step of it."""
    return int(checkpoint.name.rpartition("-")[2])


def pace_of(folder: Path, first: int) -> float:
    """Seconds a step from the first one on, where nothing happens."""
    times = [row["time"] for row in runs.rows(folder) if "loss" in row and row["step"] >= first]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def images(folder: Path) -> Path:
    """Small grey photos of nothing."""
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        rows = draw.integers(0, 255, (4, 4), dtype=np.uint8)
        Image.fromarray(rows).resize((20, 20)).save(folder / f"{number:03d}.png")
    return folder
