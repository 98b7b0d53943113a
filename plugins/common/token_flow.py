"""Documents of a stream as ids: packed into rows as they come, or one at a time.

How long the documents of a stream are nobody knows beforehand, so rows are filled from front to back: what does not fit
into the rest of a row goes on in the next one. A document is cut where a row ends, and nothing is left out; rows of
documents whose lengths are known (`packing.py`) are laid so that few are cut. A row is a function of all documents
before it, so each data worker tokenises the whole stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from selfsup.kernel.contracts import Sample
from selfsup.kernel.errors import BadSample, DataError

from .plain_text import Empty, decode
from .token_rows import Frame, Ids, Row
from .vocabulary import Vocabulary
from .windows import Flow, Item, Mark, Windows, usable

TRIES = 100_000  # samples in a row that may be unusable before the stream is
LEAST = 16  # units of a document for which it is worth going on in the rest of a row


class Reading:
    """How a stored text becomes ids."""

    def __init__(self, field: str, vocabulary: Vocabulary, max_bytes: int) -> None:
        self.field, self.vocabulary, self.max_bytes = field, vocabulary, max_bytes

    def ids(self, sample: Sample) -> Ids:
        """All of a document, [n] with n > 0; BadSample says why not."""
        ids: Ids = self.vocabulary.encode([decode(usable(sample)[self.field], self.max_bytes)])[0]
        if not len(ids):
            raise Empty("the tokenizer makes no token of it")
        return ids


class Rows:
    """The rows of `length` positions that the documents of a flow fill one after another: a `Flow`."""

    def __init__(self, flow: Flow, reading: Reading, frame: Frame, length: int, pieces: int) -> None:
        self.flow, self.reading, self.frame, self.length, self.pieces = flow, reading, frame, length, pieces
        self.notes: Sequence[str] = flow.notes

    def read(self, seed: int, mark: Mark) -> Iterator[Item]:
        """The rows from a mark on: [where the document begins that goes on, how many units rows before show of it]."""
        before, start = mark or (None, 0)
        used = 0  # samples read when one was usable
        row, name, bad = Filling(self.frame, self.length, self.reading.vocabulary.pad or 0), "", {}
        for item in self.flow.read(seed, before):
            try:
                ids = self.reading.ids(item.sample)
            except BadSample as why:
                if not isinstance(why, Empty):
                    bad[item.read] = f"{item.name}: {why}"
                before, used = item.mark, give_up(item, used)
                continue
            used = item.read
            units = self.frame.units(len(ids))
            while start < units:
                room = self.length - row.used - self.frame.overhead
                if room < min(LEAST, units - start) or row.count == self.pieces:
                    yield Item(name, {self.reading.field: row.done()}, [before, start], item.read, bad)
                    row, bad = Filling(self.frame, self.length, row.pad), {}
                    continue
                name = name if row.count else f"row that begins with {item.name}"
                count = min(room, units - start)
                row.add(ids, start, count)
                start += count
            before, start = item.mark, 0


class Filling:
    """A row that is being filled."""

    def __init__(self, frame: Frame, length: int, pad: int) -> None:
        self.frame, self.pad, self.used, self.count = frame, pad, 0, 0
        self.ids, self.segments, self.positions = (np.zeros(length, kind) for kind in ("i8", "i4", "i8"))
        self.ids[:] = pad

    def add(self, ids: Ids, start: int, count: int) -> None:
        """Put a piece of a document behind what is there."""
        piece = self.frame.piece(ids, start, count)
        here = slice(self.used, self.used + len(piece))
        self.count += 1
        self.ids[here], self.segments[here], self.positions[here] = piece, self.count, np.arange(len(piece))
        self.used += len(piece)

    def done(self) -> Row:
        """The row."""
        return Row(self.ids, self.segments, self.positions)


class Filled:
    """The documents of a flow that are not empty: a `Flow`."""

    def __init__(self, flow: Flow, field: str) -> None:
        self.flow, self.field = flow, field
        self.notes: Sequence[str] = flow.notes

    def read(self, seed: int, mark: Mark) -> Iterator[Item]:
        """The documents from a mark on."""
        used = 0
        for item in self.flow.read(seed, mark):
            stored = item.sample[self.field]
            if stored is None or (isinstance(stored, str) and not stored.strip()):
                used = give_up(item, used)
            else:
                used = item.read
                yield item


def give_up(item: Item, used: int) -> int:
    """The number of samples read when one was usable last; DataError if that was long ago."""
    used = used or item.read  # the first of this process
    if item.read - used >= TRIES:
        raise DataError(f"{TRIES:,} samples in a row hold no text that can be used, the last is {item.name}")
    return used


class Packed(Windows):
    """Windows of rows."""

    workers = 1  # more of them would all tokenise the same


class Single(Windows):
    """Windows of documents, of which only those that are asked for are tokenised."""

    reading: Reading

    def at(self, index: int, turn: int) -> Sample:
        """The ids of a document."""
        return {self.reading.field: self.reading.ids(super().at(index, turn))}


def rows_of(source: Windows, reading: Reading, frame: Frame, length: int, most: int) -> Packed:
    """A stream of documents as one of rows; its windows hold as many rows as those of the source hold documents."""
    flows = [Rows(flow, reading, frame, length, most) for flow in source.flows]
    packed = Packed(flows, source.sizes, [*source.notes, f"a sample is a row of {length:,} tokens"])
    packed.seed = source.seed
    return packed


def documents_of(source: Windows, reading: Reading) -> Single:
    """A stream of texts as one of ids."""
    single = Single([Filled(flow, reading.field) for flow in source.flows], source.sizes, source.notes)
    single.seed, single.reading = source.seed, reading
    return single
