"""Which pieces of which documents share a row, so that hardly a position is padding and none is cropped.

A row has `length` positions. A document that fits is one piece; a longer one is cut. Pieces are laid into rows by
first-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): from the longest to the shortest, each into
the first row that has room. As pieces are whole numbers of positions, equal ones are laid at once, so the cost grows
with the number of different lengths and not with that of documents.

How many pieces of which length there are, and so how many rows, is the same each time the data is gone through (each
turn). Which document takes the place of a piece of its length is drawn anew every turn, and a document of at least
`LONG` rows is cut at other places: it begins with a head of h units and ends with a tail of w - h, w what both can hold
of one row, h drawn uniformly; between them come full rows and one remainder. All of it is a function of (seed, turn).

Units: content, what a document is made of; a piece of n units takes n + `overhead` positions (special tokens around
it, or the token that it shares with the piece before).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from selfsup.kernel.errors import ConfigError
from selfsup.kernel.random import key_of, philox

Ints = np.ndarray[Any, Any]
LONG = 4  # rows that a document fills before it is cut at other places each turn
KEPT = 2  # turns whose order is remembered: a batch may straddle two


class Piece(NamedTuple):
    """A part of a document: so many units from `start` on."""

    document: int
    start: int
    units: int


class Layout:
    """The rows of every turn.

    sizes: [N] units of each document, at least 1. length: positions of a row. pieces: the most in one row.
    """

    def __init__(self, sizes: Ints | Sequence[int], length: int, overhead: int, pieces: int, seed: int) -> None:
        if length < 2 * overhead + 2:
            raise ConfigError(f"rows of {length} positions are too short; choose {2 * overhead + 2} or more")
        self.sizes, self.length, self.overhead, self.seed = np.asarray(sizes, np.int64), length, overhead, seed
        self.full, self.both = length - overhead, length - 2 * overhead  # units of one piece, and of two, in a row
        self.long = self.sizes >= LONG * self.full
        self.document, self.start, self.count = self._cut()
        taken = np.where(self.start < 0, length, self.count + overhead)  # [U] positions of each unit
        self.taken = taken.astype(np.int32)
        numbers = np.bincount(self.taken, minlength=length + 1)  # [length + 1]
        runs = first_fit_decreasing(numbers, length, pieces)
        self.patterns = [run.pattern for run in runs]
        self.firsts = np.cumsum([0, *(run.rows for run in runs)])  # [runs + 1] the first row of each run
        # Pieces stand in order of their length, the longest first; this is where each length begins.
        self.begins = np.concatenate([np.cumsum(numbers[::-1])[::-1][1:], [0]])  # [length + 1]
        self._orders: dict[int, Ints] = {}

    @property
    def rows(self) -> int:
        """How many rows a turn has."""
        return int(self.firsts[-1])

    @property
    def used(self) -> float:
        """The share of all positions that hold something."""
        return float(self.taken.sum() / max(1, self.rows * self.length))

    def row(self, turn: int, index: int) -> list[Piece]:
        """What stands in a row, from its beginning."""
        run = int(np.searchsorted(self.firsts, index, side="right")) - 1
        within, order = index - int(self.firsts[run]), self._order(turn)
        out: list[Piece] = []
        for taken, many, base in self.patterns[run]:
            first = int(self.begins[taken]) + base + within * many
            for unit in order[first : first + many]:
                out += self._pieces(turn, int(unit))
        return out

    def _pieces(self, turn: int, unit: int) -> list[Piece]:
        document, start, count = int(self.document[unit]), int(self.start[unit]), int(self.count[unit])
        if not self.long[document]:
            return [Piece(document, start, count)]
        head = self._head(turn, document)
        if start >= 0:
            return [Piece(document, head + start, count)]
        tail = self.both - head
        return [Piece(document, 0, head), Piece(document, int(self.sizes[document]) - tail, tail)]

    def _head(self, turn: int, document: int) -> int:
        word = int(_words(np.array([document]), self.seed, f"pack head {turn}")[0])
        return 1 + (word * (self.both - 1) >> 32)

    def _order(self, turn: int) -> Ints:
        """The units by length, in random order among equals: [U]."""
        if turn not in self._orders:
            while len(self._orders) >= KEPT:
                del self._orders[min(self._orders)]
            words = _words(np.arange(len(self.taken)), self.seed, f"pack {turn}")
            self._orders[turn] = np.lexsort((words, -self.taken))
        return self._orders[turn]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def _cut(self) -> tuple[Ints, Ints, Ints]:
        """Documents, starts (in long ones from the head's end; -1: head and tail) and counts of pieces, [U] each."""
        inner = self.sizes - self.both * self.long
        fulls = inner // self.full  # [N]
        rest = inner - fulls * self.full
        everyone = np.arange(len(self.sizes))
        number = np.arange(fulls.sum()) - np.repeat(np.cumsum(fulls) - fulls, fulls)  # of a full piece in its document
        left, ends = np.flatnonzero(rest), np.flatnonzero(self.long)
        document = np.concatenate([np.repeat(everyone, fulls), left, ends])
        start = np.concatenate([number * self.full, fulls[left] * self.full, np.full(len(ends), -1)])
        count = np.concatenate([np.full(len(number), self.full), rest[left], np.full(len(ends), self.both)])
        return document, start, count


@dataclass
class Run:
    """Rows that are filled alike, one after another."""

    rows: int
    room: int  # positions that are free in each
    pieces: int  # that each can still take
    pattern: list[tuple[int, int, int]] = field(default_factory=list)
    """(length, how many in each row, the number of the first among the pieces of that length)"""

    def after(self, rows: int) -> Run:
        """The same run without its first `rows`."""
        pattern = [(length, many, base + rows * many) for length, many, base in self.pattern]
        return Run(self.rows - rows, self.room, self.pieces, pattern)

    def take(self, length: int, most: int, base: int) -> tuple[list[Run], int]:
        """Lay up to `most` pieces into these rows, the first row first: (what comes of the run, how many went in)."""
        many = min(self.room // length, self.pieces)
        rows, rest = divmod(min(most, many * self.rows), many)
        out, behind = [], self
        for part, each, first in ((rows, many, base), (min(rest, 1), rest, base + rows * many)):
            if part:
                pattern = [*behind.pattern, (length, each, first)]
                out.append(Run(part, self.room - each * length, self.pieces - each, pattern))
                behind = behind.after(part)
        return [*out, *([behind] if behind.rows else [])], rows * many + rest


def first_fit_decreasing(numbers: Ints, length: int, pieces: int) -> list[Run]:
    """Lay `numbers[n]` pieces of every length n up to `length` into rows of `length` positions and at most `pieces`."""
    lengths = np.flatnonzero(numbers)[::-1].tolist()
    least = lengths[-1] if lengths else 0
    runs: list[Run] = []
    closed: list[Run] = []
    for n in lengths:
        left, laid, base = int(numbers[n]), [], 0
        for place, run in enumerate(runs):
            if not left:
                laid += runs[place:]
                break
            if run.room < n:
                laid.append(run)
                continue
            found, went = run.take(n, left, base)
            left, base = left - went, base + went
            laid += found
        if left:
            many = min(length // n, pieces)
            laid += Run(-(-left // many), length, pieces).take(n, left, base)[0]
        runs = [run for run in laid if run.room >= least and run.pieces]
        closed += [run for run in laid if run.room < least or not run.pieces]
    return closed + runs


def _words(numbers: Ints, seed: int, purpose: str) -> Ints:
    """A random 32-bit word for each number: uint64 of its shape."""
    low, zero = numbers.astype(np.uint64), np.zeros(len(numbers), np.uint64)
    return philox((zero, low & np.uint64(0xFFFFFFFF), low >> np.uint64(32), zero), key_of(seed, purpose))[0]
