"""Time and memory of a call, on a GPU or a CPU, and the ceilings of the machine in the same run.

On a GPU a time is that between two events, after a write that empties the L2 cache; on a CPU it is that of a clock.
Contestants take turns, so that what slows the machine slows all of them; the median of the turns counts. A replay is
a CUDA graph of the same call, in which no time passes between launches. Memory is the most that was allocated at once
during a call, above what was there before it: outputs, gradients and what lies between.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Timed = Callable[[], Any]
FLUSHED = 2**28  # bytes; more than the L2 cache of any GPU
FEWEST = 3  # turns of a call that takes longer than its share of the time


@dataclass(frozen=True)
class Times:
    """Of the turns of one contestant, in milliseconds."""

    median: float
    low: float  # the first and third quartile
    high: float
    turns: int


class Meter:
    """Measures calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.cache = torch.empty(FLUSHED if self.gpu else 0, dtype=torch.int8, device=device)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def once(self, f: Timed) -> float:
        """Milliseconds of one call."""
        if not self.gpu:
            start = time.perf_counter()
            f()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.cache.zero_()
        start_event.record()
        f()
        end_event.record()
        self.wait()
        return float(start_event.elapsed_time(end_event))

    def in_turns(
        self, calls: Mapping[str, Timed], rounds: int, seconds: float, fresh: Mapping[str, Timed] | None = None
    ) -> dict[str, Times]:
        """Medians of `rounds` turns, fewer of calls that would take longer than `seconds` in all.

        `fresh` of a name runs before each of its calls, outside the time.
        """
        taken: dict[str, list[float]] = {name: [] for name in calls}
        turns: dict[str, int] = {}
        for name, f in calls.items():
            first = self._prepared(name, f, fresh)
            turns[name] = max(FEWEST, min(rounds, int(1e3 * seconds / max(first, 1e-6))))
        for turn in range(max(turns.values(), default=0)):
            for name, f in calls.items():
                if turn < turns[name]:
                    taken[name].append(self._prepared(name, f, fresh))
        return {name: _summed_up(values) for name, values in taken.items()}

    def _prepared(self, name: str, f: Timed, fresh: Mapping[str, Timed] | None) -> float:
        if fresh and name in fresh:
            fresh[name]()
        return self.once(f)

    def waits(self, f: Timed) -> bool:
        """Whether a call makes the host wait for the GPU, as far as torch sees."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            f()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
            self.wait()
        return False

    def replayed(self, f: Timed, rounds: int) -> Times:
        """Times of a CUDA graph of the call, which must not wait for the host."""
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                f()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        self.once(graph.replay)
        return _summed_up([self.once(graph.replay) for _ in range(rounds)])

    def memory(self, f: Timed) -> int:
        """Bytes above what is allocated before the call."""
        if not self.gpu:
            return _memory_of_cpu(f)
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        f()
        self.wait()
        return int(torch.cuda.max_memory_allocated(self.device) - before)


def _summed_up(values: list[float]) -> Times:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Times(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered))


def _memory_of_cpu(f: Timed) -> int:
    """By the events of torch's own allocator, which see what ops allocate inside as well."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = f()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        now += event.nbytes()
        most = max(most, now)
    return most


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best, as measured."""

    flops: float  # a second, of one large matrix product
    bytes: float  # a second, read and written, of one large copy

    def floor(self, flops: float, bytes: float) -> float:
        """Milliseconds that no method can beat by much."""
        return 1e3 * max(flops / self.flops, bytes / self.bytes)


def ceilings(meter: Meter, kind: torch.dtype, small: bool) -> Ceilings:
    """Of a square matrix product in a type, and of a copy: the first quartile, as a ceiling is what can be reached."""
    side, length = (8192, 2**32) if meter.gpu and not small else (1024, 2**26)
    a, b = (torch.randn(side, side, device=meter.device).to(kind) for _ in range(2))
    source = torch.randint(-128, 127, (length,), dtype=torch.int8, device=meter.device)
    target = torch.empty_like(source)
    calls: dict[str, Timed] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for f in calls.values():
        f()
    times = meter.in_turns(calls, rounds=20 if meter.gpu else 7, seconds=5)
    return Ceilings(2 * side**3 / times["product"].low * 1e3, 2 * length / times["copy"].low * 1e3)


def bare(products: tuple[tuple[int, int, int], ...], kind: torch.dtype, device: torch.device) -> Timed:
    """The products that a case must take, and nothing else; equal shapes share their arrays."""
    arrays: dict[tuple[int, int], Tensor] = {}
    for a, b, c in products:
        for shape in ((a, b), (b, c)):
            if shape not in arrays:
                arrays[shape] = torch.randn(shape, device=device).to(kind)

    def run() -> None:
        for a, b, c in products:
            torch.mm(arrays[a, b], arrays[b, c])

    return run
