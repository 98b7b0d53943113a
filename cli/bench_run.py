"""Check and measure cases one after the other; a row for each contestant, whatever became of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import bench_parity as parity
from .bench_case import Arrays, Call, Case, Draw, Peer
from .bench_measure import Ceilings, Meter, Timed, Times, bare

OURS, EAGER, COMPILED, BARE, TIMES = "ours", "eager", "compiled", "bare products", "times"
SHORT = 2.0  # milliseconds; what takes less is also measured without the gaps between its launches


@dataclass
class Row:
    """What became of one contestant: `state` is ok, wrong, failed, absent or skipped."""

    name: str
    state: str = "ok"
    note: str = ""
    error: float | None = None
    times: Times | None = None
    replay: float | None = None
    memory: int | None = None
    waits: bool | None = None  # for the host, on a GPU

    @property
    def ours(self) -> bool:
        """Whether it is the op, as it is or with one of its options."""
        return self.name.partition(",")[0] == OURS

    @property
    def least(self) -> float:
        """Milliseconds, with the gaps between launches or without; infinite where nothing was timed."""
        return min(self.times.median, self.replay or math.inf) if self.times else math.inf


@dataclass
class Result:
    """A case and its rows."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    floor: float | None = None  # milliseconds

    def row(self, name: str) -> Row | None:
        """Of this contestant."""
        return next((row for row in self.rows if row.name == name), None)

    def share(self, row: Row) -> float | None:
        """Of the time that products and bytes take at the least, in the time that was taken."""
        return self.floor / row.least if row.times and self.floor else None

    def failing(self) -> list[str]:
        """Why the op has not passed."""
        bad = [row for row in self.rows if row.state not in ("ok", "skipped") and (row.ours or row.name == TIMES)]
        return [f"{self.case.name}: {row.state}: {row.note}" for row in bad]


@dataclass(frozen=True)
class Plan:
    """How to measure; `peers` are the names wanted besides ours, None for all."""

    device: torch.device
    kind: torch.dtype
    rounds: int
    seconds: float  # of each contestant at most
    timed: bool
    peers: tuple[str, ...] | None


@dataclass(frozen=True)
class _Truth:
    """What a case's contestants are judged by: the results in float64, and the error of eager torch."""

    case: Case
    results: list[Tensor | None]
    kind: torch.dtype  # of the arrays
    eager: float | None = None

    def judge(self, row: Row, found: list[Tensor | None]) -> bool:
        """Note the error in the row; whether it is right."""
        row.error, missing = parity.error(found, self.results, self.case.spare)
        row.note = f"{missing} gradient{'s' * (missing > 1)} fewer" if missing else ""
        limit = parity.limit(self.kind, self.eager, ours=row.ours)
        if not row.error <= limit:
            row.state, row.note = "wrong", f"wrong by {row.error:.1e}, at most {limit:.1e} is right; not timed"
        return row.state == "ok"


class _Entry:
    """A contestant that takes part: its arrays and its call, forward and backward."""

    def __init__(self, f: Call, arrays: Arrays, case: Case, peer: Peer | None = None) -> None:
        self.f, self.peer, self.given = f, peer, parity.anew(arrays) if case.in_place else arrays
        self.spoils = peer is not None and peer.spoils
        self.fresh()

    def fresh(self) -> None:
        arrays = parity.anew(self.given) if self.spoils else self.given
        self.step = parity.step(self.f, arrays)

    def __call__(self) -> Any:
        return self.step()


class Bench:
    """Measures on one device, in one run."""

    def __init__(self, plan: Plan, ceilings: Ceilings | None, meter: Meter) -> None:
        self.plan, self.ceilings, self.meter = plan, ceilings, meter
        self.broken = ""  # by what, if the GPU does nothing any more for this process

    def run(self, case: Case) -> Result:
        """One case: everyone is checked; those that are right are timed in turns; then their memory is measured."""
        result = Result(case)
        if self.broken:
            result.rows.append(Row(OURS, "failed", f"nothing runs on the GPU since {self.broken}"))
            return result
        try:
            arrays = case.make(Draw(self.plan.device, self.plan.kind, seed=1))
            entries = self._checked(result, arrays)
        except Exception as why:  # what is wrong with one case is said in its place, and the others follow
            result.rows.append(Row(OURS, "failed", _said(why)))
            return result
        finally:
            self._tidy(case.name)
        if self.plan.timed:
            try:
                self._time(result, entries)
            except Exception as why:  # as where all contestants together find no memory
                result.rows.append(Row(TIMES, "failed", _said(why)))
            self._tidy(case.name)
        return result

    def _tidy(self, after: str) -> None:
        """Give memory back; a GPU on which a kernel failed refuses everything from then on."""
        try:
            self.meter.wait()
            if self.meter.gpu:
                torch.cuda.empty_cache()
        except RuntimeError as why:
            self.broken = self.broken or f"{after}: {_said(why)}"

    def _wanted(self, name: str) -> bool:
        return self.plan.peers is None or any(name.startswith(wanted) for wanted in self.plan.peers)

    def _checked(self, result: Result, arrays: Arrays) -> dict[str, _Entry]:
        """Everyone that can be called and is right."""
        case, found = result.case, dict[str, _Entry]()
        results = parity.step(case.truth or case.reference, parity.exact(arrays))()
        truth = _Truth(case, results, parity.coarsest(arrays))
        eager = self._eager(truth, arrays, found)
        truth = replace(truth, eager=eager.error)
        with _poisoned():
            self._check(result, Row(OURS), lambda: _Entry(case.ours, arrays, case), truth, found)
        if self._wanted(EAGER):
            result.rows.append(eager)
        else:
            found.pop(EAGER, None)
        if self._wanted(COMPILED):
            torch._dynamo.reset()
            f = torch.compile(case.plain(), dynamic=False)
            self._check(result, Row(COMPILED), lambda: _Entry(f, arrays, case), truth, found)
        for name, peer in case.peers.items():
            if Row(name).ours or self._wanted(name):
                self._check_peer(result, Row(name), peer, arrays, truth, found)
        return found

    def _eager(self, truth: _Truth, arrays: Arrays, found: dict[str, _Entry]) -> Row:
        """The reference in the type of the arrays: it is the measure of the others' errors, and has no limit itself."""
        row = Row(EAGER)
        try:
            found[EAGER] = _Entry(truth.case.reference, arrays, truth.case)
            row.error, _ = parity.error(found[EAGER](), truth.results, truth.case.spare)
        except torch.OutOfMemoryError as why:
            found.pop(EAGER, None)
            row.state, row.note = "failed", _said(why)
        return row

    def _check_peer(
        self, result: Result, row: Row, peer: Peer, arrays: Arrays, truth: _Truth, found: dict[str, _Entry]
    ) -> None:
        if peer.only_gpu and not self.meter.gpu:
            result.rows.append(replace(row, state="skipped", note="runs on a GPU alone"))
            return
        try:
            f = peer.load()
        except Exception as why:  # whatever another's package raises on import
            result.rows.append(replace(row, state="absent", note=_said(why)))
            return
        given = list(peer.prepare(arrays)) if peer.prepare else arrays
        if peer.prepare:
            truth = replace(truth, results=parity.step(result.case.reference, parity.exact(given))())
        self._check(result, row, lambda: _Entry(f, given, result.case, peer), truth, found)

    def _check(
        self, result: Result, row: Row, make: Callable[[], _Entry], truth: _Truth, found: dict[str, _Entry]
    ) -> None:
        result.rows.append(row)
        try:
            entry = make()
            results = entry()
            self.meter.wait()
        except Exception as why:  # ours and others' alike: it is said, and the rest goes on
            row.state, row.note = "failed", _said(why)
            self._tidy(f"{row.name} in {truth.case.name}")
            return
        if entry.peer is not None and entry.peer.differs:
            row.note = entry.peer.differs
        elif not truth.judge(row, results):
            return
        found[row.name] = entry

    def _time(self, result: Result, entries: dict[str, _Entry]) -> None:
        case = result.case
        calls: dict[str, Timed] = dict(entries)
        if case.products:
            try:
                calls[BARE] = bare(case.products, self.plan.kind, self.plan.device)
                calls[BARE]()
                result.rows.append(Row(BARE, note="the matrix products alone, by torch"))
            except RuntimeError as why:
                calls.pop(BARE, None)
                result.rows.append(Row(BARE, "failed", _said(why)))
        if self.ceilings is not None:
            result.floor = self.ceilings.floor(case.flops, case.least)
        fresh = {name: entry.fresh for name, entry in entries.items() if entry.spoils}
        times = self.meter.in_turns(calls, self.plan.rounds, self.plan.seconds, fresh)
        for row in result.rows:
            row.times = times.get(row.name)
            if row.name in entries:
                entries[row.name].fresh()
                row.memory = self.meter.memory(entries[row.name])
        if self.meter.gpu:
            for row in result.rows:
                if row.name in entries and row.times is not None:
                    self._replay(row, entries[row.name])

    def _replay(self, row: Row, entry: _Entry) -> None:
        """Whether it waits for the host; what does not and is over soon, once more as a CUDA graph."""
        row.waits = self.meter.waits(entry)
        if row.waits:
            row.note = "; ".join(filter(None, [row.note, "makes the host wait"]))
        elif row.times is not None and row.times.median < SHORT and not entry.spoils:
            try:
                row.replay = self.meter.replayed(entry, self.plan.rounds).median
            except RuntimeError as why:
                row.note = "; ".join(filter(None, [row.note, f"no CUDA graph: {_said(why)}"]))


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that a result left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?i).*determinis")  # it is not determinism that is asked for
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _said(why: BaseException) -> str:
    """One line of an error."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return f"{type(why).__name__}: {lines[0][:160]}" if lines else type(why).__name__


def run_all(bench: Bench, cases: Sequence[Case], until: float | None) -> Iterator[Result]:
    """All cases; those that begin past the time `until` (of time.monotonic) are said to be left out."""
    for case in cases:
        if until is not None and time.monotonic() > until:
            yield Result(case, [Row(OURS, "skipped", "the time given was over")])
        else:
            yield bench.run(case)
