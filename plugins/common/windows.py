"""Data that is read front to back: too large to convert, or of a length that nobody knows.

A flow has no end: its shards come one after another in a random order, and after the last one the next pass begins in
another order. Its samples are shuffled within windows: window t of W samples holds the numbers t * W to (t + 1) * W of
the flow. So which sample stands at each place of a run is a function of the seed and the place alone, as for any other
data, and any number of workers and processes sees the same. Each of them reads the flow for itself and holds two
windows of it.

Where a window begins is known once the window before was read. These marks travel to the main process and into
checkpoints, so that a run that goes on begins to read there; without them it reads the same from the beginning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from selfsup.kernel.contracts import Sample
from selfsup.kernel.errors import BadSample, DataError
from selfsup.kernel.loader import Part
from selfsup.kernel.random import shuffled, tag, untag

HELD = 2  # windows of each flow that are kept: a batch may straddle two
MARKED = 4  # windows of each flow whose beginnings are remembered: workers run ahead of the step that is saved
Mark = Any  # JSON; None is the beginning


class Item(NamedTuple):
    """One sample of a flow."""

    name: str  # what a person finds it by
    sample: Sample
    mark: Mark  # where the next one begins
    read: int  # samples as they are stored that were read so far, this one's among them
    bad: Mapping[int, str] = MappingProxyType(
        {}
    )  # number of a stored sample -> why it could not be used in making this one


class Flow(Protocol):
    """An endless row of samples. Must pickle: it goes to data workers."""

    notes: Sequence[str]

    def read(self, seed: int, mark: Mark) -> Iterator[Item]:
        """The samples from a mark on."""


class Shards(ABC):
    """A flow of samples that lie in shards."""

    notes: Sequence[str] = ()

    def __init__(self, where: str, shards: Sequence[str]) -> None:
        self.where, self.shards = where, shards

    @abstractmethod
    def open(self, shard: int, state: Any) -> Iterator[tuple[str, Sample, Any]]:
        """(name, sample, state at which the next one begins) for each sample of a shard from a state on, None: all."""

    def read(self, seed: int, mark: Mark) -> Iterator[Item]:
        """The samples from a mark on: [pass, place of the shard in it, state within the shard, samples read so far]."""
        begun, first, state, read = mark or (0, 0, None, 0)
        for turn in count(begun):
            before = read if first == 0 and state is None else -1
            order = shuffled(np.arange(len(self.shards)), len(self.shards), seed, f"shards {turn}").tolist()
            for place in range(first, len(order)):
                try:
                    for name, sample, after in self.open(order[place], state):
                        read += 1
                        yield Item(name, sample, [turn, place, after, read], read)
                except DataError:
                    raise
                except Exception as cause:  # whatever a disk, a network and a parser may raise
                    # Not left out: what cannot be read at this moment may be read at another, by another worker.
                    raise DataError(
                        f"the stream cannot be read on in {self.shards[order[place]]}, after {read:,} samples: "
                        f"{type(cause).__name__}: {cause}; mend it and go on with --resume"
                    ) from cause
                state = None
            if read == before:
                raise DataError(f"there is no sample in {self.where!r}")
            first = 0


class Window:
    """The newest windows of one flow."""

    def __init__(self, flow: Flow, size: int) -> None:
        self.flow, self.size = flow, size
        self.marks: dict[int, tuple[Mark, int]] = {0: (None, 0)}  # window -> where it begins, samples read by then
        self.held: dict[int, list[Item]] = {}
        self.bad: dict[int, dict[int, str]] = {}  # window held -> what was unusable in reading it
        self.items: Iterator[Item] | None = None
        self.next = 0  # the window that `items` comes to

    def item(self, index: int, turn: int, seed: int) -> Item:
        """A sample of a window."""
        if turn not in self.held:
            known = max(t for t in self.marks if t <= turn)
            if self.items is None or not known <= self.next <= turn:
                self.items, self.next = self.flow.read(seed, self.marks[known][0]), known
            while self.next <= turn:
                self._read(self.items)
        return self.held[turn][index]

    def _read(self, items: Iterator[Item]) -> None:
        """Read one window more."""
        while len(self.held) >= HELD:
            del self.held[old := min(self.held)], self.bad[old]
        window = [next(items) for _ in range(self.size)]
        self.held[self.next] = window
        self.bad[self.next] = {number: why for item in window for number, why in item.bad.items()}
        self.next += 1
        self.mark(self.next, window[-1].mark, window[-1].read)

    def mark(self, turn: int, mark: Mark, read: int) -> None:
        """Remember where a window begins."""
        self.marks[turn] = mark, read
        for old in sorted(self.marks)[1:-MARKED]:  # the first one serves whoever looks back
            del self.marks[old]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}, "bad": {}, "items": None, "next": 0}


class Windows:
    """Flows in windows, whose sizes are their shares of the mixture: a `Source`, and `Endless`."""

    def __init__(self, flows: Sequence[Flow], sizes: Sequence[int], notes: Sequence[str]) -> None:
        self.flows, self.sizes, self.notes, self.seed = flows, sizes, notes, 0
        self.parts: Sequence[Part] = [Part(size, size) for size in sizes]
        self.windows = [Window(flow, size) for flow, size in zip(flows, sizes, strict=True)]
        self.ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        return self.at(index, 0)

    def at(self, index: int, turn: int) -> Sample:
        """A sample of a window; one that holds a BadSample in place of what is stored is one."""
        return usable(self._item(index, turn).sample)

    def where(self, ident: int) -> str:
        """shard.jsonl row 12"""
        turn, index = untag(ident)
        return self._item(int(index), int(turn)).name

    def name(self, ident: int) -> str:
        """sample 30,017 of the stream: which needs no reading; `where` says more"""
        if ident < 0:
            part, number = untag(-ident)
            return f"sample {number:,} as stored of the stream{self._named(part)}"
        turn, index = untag(ident)
        part, within = part_of(int(index), self.ends)
        return f"sample {turn * self.sizes[part] + within + 1:,} of the stream{self._named(part)}"

    @property
    def seen(self) -> int:
        """Samples as they are stored that were read so far."""
        return sum(max(read for _, read in window.marks.values()) for window in self.windows)

    def news(self) -> tuple[Any, dict[int, str]]:
        """(where the newest windows of each flow begin, what was found unusable in reading them)"""
        found: dict[int, str] = {}
        for part, window in enumerate(self.windows):
            # Numbers of stored samples are negative where a sample is made of several, so that no id is like them.
            found |= {-int(tag(part, n)): why for bad in window.bad.values() for n, why in bad.items()}
        return [[[turn, *known] for turn, known in window.marks.items()] for window in self.windows], found

    def recall(self, marks: Any) -> None:
        """Take back where windows begin."""
        for window, known in zip(self.windows, marks, strict=True):
            for turn, mark, read in known:
                window.mark(turn, mark, read)

    def _named(self, part: int) -> str:
        return f" {part + 1}" if len(self.flows) > 1 else ""

    def _item(self, index: int, turn: int) -> Item:
        part, within = part_of(index, self.ends)
        return self.windows[part].item(within, turn, self.seed)


def usable(sample: Sample) -> Sample:
    """The sample; raises the BadSample that a flow put into a field of it, whose bytes it would not read."""
    for stored in sample.values():
        if isinstance(stored, BadSample):
            raise stored
    return sample


def part_of(index: int, ends: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Which of several parts, each of which ends before the number in `ends`, has this sample, and its number there."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"sample {index} of {ends[-1]}")
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


def shares(window: int, weights: Sequence[float]) -> list[int]:
    """The window of each flow, by largest remainder; at least one sample each."""
    wanted = np.array(weights) / sum(weights) * window
    sizes = np.maximum(np.floor(wanted + 1e-9).astype(int), 1)
    for part in np.argsort(sizes - wanted, kind="stable")[: max(0, window - int(sizes.sum()))]:
        sizes[part] += 1
    return [int(size) for size in sizes]
