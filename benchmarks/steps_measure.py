"""Measure steps of training of everyone in a contest, on one device.

A step fetches the batch, computes the loss under autocast and its gradient, and updates with AdamW (fused). Steps run
back to back and the device is waited for at the end of each turn alone, so that what the host does beside counts only
where it is in the way. Contestants take turns; the median counts. Findings come one by one, as dicts to be merged: what
was found before a time is over, or before something breaks, is kept.

    MFU = FLOPs of the model for a sample * samples a second / FLOPs a second of one large matrix product

FLOPs of the model are those that torch counts (products and attention, causal or not) in the other side's eager step,
forward and backward, less what no method needs. Whoever leaves out more of them than that shows more.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from contest import Contest, Side
from steps_profile import busy, profiled
from torch.utils.flop_counter import FlopCounterMode

from selfsup.cli.bench_measure import Meter, ceilings
from selfsup.kernel.precision import autocast
from selfsup.plugins.services.triton import Triton

Found = dict[str, Any]
PHASES = ("data", "forward", "backward", "optimizer")
CLOSE = {"fp32": 5e-3, "bf16": 0.2}  # of the loss: what may lie between both sides; bf16 flips choices near a tie
CHECKED = 4  # samples that losses are compared and FLOPs are counted on


@dataclass(frozen=True)
class Plan:
    """How to measure one contest."""

    device: torch.device
    batch: int
    precision: str = "bf16"
    backend: str = "inductor"  # of torch.compile; "" leaves it out
    rounds: int = 5  # turns of each
    turn: float = 0.6  # seconds of a turn, about
    most: int = 64  # times the batch: no larger one is tried
    until: float = float("inf")  # of time.monotonic(): nothing new begins past it

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


class Entrant:
    """One side in training."""

    def __init__(self, side: Side, contest: Contest, plan: Plan) -> None:
        self.model, self.loss_of = side
        self.contest, self.plan, self.number = contest, plan, 0
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, fused=True)

    def step(self, mark: Callable[[str], None] = lambda phase: None) -> None:
        """One step; `mark` hears when each phase is over."""
        self.contest.fetch()
        mark("data")
        with autocast(self.plan.device, self.plan.precision):
            loss = self.loss_of(self.number)
        mark("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        mark("optimizer")

    def turn(self, steps: int, wait: Callable[[], None]) -> float:
        """Seconds a step."""
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait()
        return (time.perf_counter() - start) / steps

    def phases(self, wait: Callable[[], None]) -> dict[str, float]:
        """Seconds of each phase of one step, by events on a GPU and by the clock elsewhere."""
        marks: list[Any] = []

        def mark(_: str) -> None:
            marks.append(torch.cuda.Event(enable_timing=True) if self.plan.gpu else time.perf_counter())
            if self.plan.gpu:
                marks[-1].record()

        wait()
        mark("")
        self.step(mark)
        wait()
        gpu = self.plan.gpu
        taken = [a.elapsed_time(b) / 1e3 if gpu else b - a for a, b in pairwise(marks)]
        return dict(zip(PHASES, taken, strict=True))

    def bytes(self) -> int:
        """What the model and its optimizer hold between two steps."""
        state = [v for own in self.optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor)]
        held = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.untyped_storage().nbytes() for t in held if t.device.type == self.plan.device.type)

    def drop(self) -> None:
        """What a step that broke off left behind."""
        self.optimizer.zero_grad(set_to_none=True)


class Measured:
    """A contest, everyone in it, and what was found so far."""

    def __init__(self, contest: Contest, plan: Plan) -> None:
        self.contest, self.plan, self.meter = contest, plan, Meter(plan.device)
        del self.meter.cache  # no L2 cache is emptied between steps, and memory is counted
        self.entrants = {name: Entrant(side, contest, plan) for name, side in contest.sides().items()}
        self.per_sample = self.needless = self.ceiling = 0.0

    def findings(self) -> Iterator[Found]:
        yield self.described()
        try:
            with torch.no_grad():
                yield self.checked()
            self.per_sample = self.counted()
        except Exception as why:  # of the others' code, as a rule: ours is measured all the same
            self.entrants = {name: entrant for name, entrant in self.entrants.items() if name.startswith("ours")}
            yield {"notes": [f"only ours is timed, as its loss cannot be compared: {said(why)}"]}
        yield self.limits()
        self.contest.fill(self.plan.batch)
        yield from self.fitted()
        yield from self.timed("")
        for name in list(self.entrants):
            yield from self.attempt(name, self.looked_into)
        for name in list(self.entrants):
            yield from self.attempt(name, self.largest)
        self.tidy()
        self.contest.fill(self.batch)
        if self.plan.backend and time.monotonic() < self.plan.until:
            yield from self.compiled()

    def described(self) -> Found:
        contest, ours = self.contest, self.contest.ours
        attention = getattr(getattr(contest.theirs, "config", None), "_attn_implementation", None)
        return {
            "device": torch.cuda.get_device_name(self.plan.device) if self.plan.gpu else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peer": contest.peer,
            "attention_of_peer": attention,
            "parameters": sum(p.numel() for p in ours.parameters()),
            "precision": self.plan.precision,
            "unit": contest.unit,
            "amount": contest.amount,
            "absent": contest.absent(),
        }

    def checked(self) -> Found:
        """Both losses in both precisions; who is wrong takes no part."""
        self.contest.fill(min(CHECKED, self.plan.batch))
        found: dict[str, dict[str, float]] = {}
        for precision in dict.fromkeys(("fp32", self.plan.precision)):
            with autocast(self.plan.device, precision):
                losses = {name: float(loss) for name, loss in self.contest.checked().items()}
            found[precision] = losses
            for name, loss in losses.items():
                if not abs(loss - losses["ours"]) <= CLOSE[precision] * abs(losses["ours"]):
                    why = f"the loss of {name} is {loss:.6g} and ours {losses['ours']:.6g} in {precision}"
                    self.entrants.pop(name, None)
                    return {"loss": found, "sides": {name: {"state": "wrong", "note": f"{why}; not timed"}}}
        return {"loss": found}

    def counted(self) -> float:
        """FLOPs that the model needs for a sample, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            with autocast(self.plan.device, self.plan.precision):
                loss = self.contest.loss_of_theirs(0)
            loss.backward()  # type: ignore[no-untyped-call]
        self.contest.theirs.zero_grad(set_to_none=True)
        self.needless = self.contest.needless
        return counter.get_total_flops() / self.contest.samples - self.needless

    def limits(self) -> Found:
        """FLOPs of a sample, and the ceiling of the machine in this run."""
        kind = torch.bfloat16 if self.plan.precision == "bf16" else torch.float32
        self.ceiling = ceilings(Meter(self.plan.device), kind, small=not self.plan.gpu).flops
        flops = {"model": self.per_sample, "needless": self.needless}
        if self.contest.unit == "tokens":
            flops["6ND"] = 6 * sum(p.numel() for p in self.contest.ours.parameters()) * self.contest.amount
        return {"flops_of_sample": flops, "ceiling": self.ceiling}

    def fitted(self) -> Iterator[Found]:
        """Halve the batch until everyone can take a step with it; who breaks for another reason is left out."""
        self.batch = self.plan.batch
        for name in list(self.entrants):
            while name in self.entrants:
                try:
                    self.entrants[name].step()
                    self.meter.wait()
                    break
                except torch.OutOfMemoryError as why:
                    note, halved = said(why), self.batch > 1
                except Exception as why:  # one who breaks keeps nobody else from being measured
                    note, halved = said(why), False
                self.entrants[name].drop()
                self.tidy()
                if halved:
                    self.batch //= 2
                    self.contest.fill(self.batch)
                    yield {"notes": [f"a batch of {2 * self.batch} does not fit {name}: {note}"]}
                else:
                    del self.entrants[name]
                    yield {"sides": {name: {"state": "failed", "note": note}}}
        yield {"batch": self.batch}

    def timed(self, suffix: str) -> Iterator[Found]:
        """Everyone in turns; who breaks is left out from then on."""
        first: dict[str, float] = {}
        taken: dict[str, list[float]] = {name: [] for name in self.entrants}
        for name in list(self.entrants):
            start = time.perf_counter()
            yield from self.guarded(name, suffix, lambda name: first.update({name: self.warmed(name)}))
            yield {"sides": {name + suffix: {"seconds_to_warm": time.perf_counter() - start}}}
        before = graphs() if suffix else 0
        for turn in range(self.plan.rounds):
            for name in list(self.entrants):
                yield from self.guarded(name, suffix, lambda name: taken[name].append(self.turn(name, first[name])))
            if turn and time.monotonic() > self.plan.until:
                break
        for name in list(self.entrants):
            yield from self.guarded(name, suffix, lambda name: self.row(name, taken[name]))
        if suffix and graphs() > before:
            yield {"notes": [f"{graphs() - before} graphs were compiled while the clock ran"]}

    def guarded(self, name: str, suffix: str, measure: Callable[[str], Found | None]) -> Iterator[Found]:
        """A measurement without which a side has no figure."""
        try:
            found = measure(name)
        except Exception as why:  # as above
            found = {"state": "failed", "note": said(why)}
            self.entrants.pop(name).drop()
        if found:
            yield {"sides": {name + suffix: found}}

    def warmed(self, name: str) -> float:
        """Seconds of a step once what happens in the first ones alone has happened."""
        self.entrants[name].turn(2, self.meter.wait)
        return self.entrants[name].turn(1, self.meter.wait)

    def turn(self, name: str, seconds: float) -> float:
        return self.entrants[name].turn(max(1, min(20, int(self.plan.turn / seconds))), self.meter.wait)

    def row(self, name: str, taken: list[float]) -> Found:
        seconds, entrant = statistics.median(taken), self.entrants[name]
        rate = self.batch / seconds
        row = {
            "state": "ok",
            "seconds": seconds,
            "turns": taken,
            "samples_per_second": rate,
            "units_per_second": rate * self.contest.amount,
            "mfu": self.per_sample * rate / self.ceiling,  # 0 where the FLOPs could not be counted
        }
        if self.plan.gpu:
            row["peak_bytes"] = self.peak(entrant)
        return row

    def peak(self, entrant: Entrant) -> int:
        """Most bytes at once in a step: what this side holds, and what a step needs besides."""
        self.tidy()
        torch.cuda.reset_peak_memory_stats(self.plan.device)
        before = torch.cuda.memory_allocated(self.plan.device)
        entrant.step()
        self.meter.wait()
        return torch.cuda.max_memory_allocated(self.plan.device) - before + entrant.bytes()

    def looked_into(self, name: str) -> Found:
        """Where a step's time goes."""
        entrant = self.entrants[name]
        several = [entrant.phases(self.meter.wait) for _ in range(3)]
        phases = {phase: statistics.median(taken[phase] for taken in several) for phase in PHASES}
        seconds = entrant.turn(2, self.meter.wait)
        row: Found = {"phases": phases, **profiled(entrant.step, self.plan.gpu)}
        if self.plan.gpu:
            row["busy"] = busy(row, seconds)
            row["waits"] = self.waits(entrant)
        return row

    def waits(self, entrant: Entrant) -> dict[str, int]:
        """Where in a step the host waits for the GPU, as far as torch sees, and how often."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                entrant.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
        return {place: places.count(place) for place in dict.fromkeys(places)}

    def largest(self, name: str) -> Found:
        """The largest batch that takes two steps, found by doubling; 0 where not even this one does."""
        batch, fits, note = self.batch, 0, ""
        entrant = self.entrants[name]
        while batch <= self.plan.most * self.plan.batch and time.monotonic() < self.plan.until:
            try:
                self.contest.fill(batch)
                entrant.turn(2, self.meter.wait)
                fits, batch = batch, 2 * batch
            except torch.OutOfMemoryError:
                break
            except RuntimeError as why:  # a kernel that does not take such a size
                note = said(why)
                break
        else:
            note = "no larger one was tried"
        entrant.drop()
        self.tidy()
        return {"largest_batch": fits, **({"note_on_largest": note} if note else {})}

    def compiled(self) -> Iterator[Found]:
        """The same with torch.compile: ours by the repeated parts, as `train.compile` does; others' models whole."""
        torch._dynamo.reset()
        for name, entrant in self.entrants.items():
            if name == "ours":
                for backbone in self.contest.ours.backbones():
                    for unit in backbone.units():
                        unit.compile(backend=self.plan.backend)
            elif not name.startswith("ours"):
                entrant.model.compile(backend=self.plan.backend, dynamic=False)
        yield from self.timed(", compiled")

    def attempt(self, name: str, measure: Callable[[str], Found | None]) -> Iterator[Found]:
        """What a measurement gives of a side, or why it gives nothing; the rest goes on without it."""
        try:
            found = measure(name)
        except Exception as why:  # as above
            found = {"note": f"{measure.__name__}: {said(why)}"}
        self.entrants[name].drop()
        if found:
            yield {"sides": {name: found}}

    def tidy(self) -> None:
        """Give memory back."""
        if self.plan.gpu:
            gc.collect()
            torch.cuda.empty_cache()


def graphs() -> int:
    """How many were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def said(why: BaseException) -> str:
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return f"{type(why).__name__}: {lines[0][:200]}" if lines else type(why).__name__


def measure(make: Callable[..., Contest], plan: Plan) -> Iterator[Found]:
    """Everything about one contest, piece by piece."""
    if plan.gpu:
        torch.backends.cudnn.allow_tf32 = False  # where losses are compared in fp32; bf16 takes no notice
        torch.backends.cudnn.benchmark = True  # for everyone, as the others' trainers do
    Triton().run_started(run=SimpleNamespace(device=plan.device))  # type: ignore[arg-type]
    contest = make(device=plan.device)
    yield from Measured(contest, plan).findings()
