"""Documents of ids as what training goes through: packed rows, or one document at a time.

Content comes in units: with `each`, a piece is its tokens between begin and end; otherwise it is predictions, so that m
units of begin, text, end show m + 1 tokens, the first of which the piece before has shown already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup.kernel.contracts import Sample
from selfsup.kernel.errors import DataError
from selfsup.kernel.loader import Part, Source

from .corpus import Corpus
from .packing import Layout

Ids = np.ndarray[Any, Any]


class Row(NamedTuple):
    """One packed row of T positions."""

    ids: Ids  # [T] int64
    segments: Ids  # [T] int32: 0 padding, 1.. by sequence
    positions: Ids  # [T] int64


class Frame(NamedTuple):
    """What stands around documents, or around each of their pieces."""

    begin: int
    end: int
    each: bool

    @property
    def overhead(self) -> int:
        """Positions that a piece takes beyond its units."""
        return 2 if self.each else 1

    def units(self, tokens: Any) -> Any:
        """The units of documents of so many tokens."""
        return tokens if self.each else tokens + 1

    def piece(self, ids: Ids, start: int, count: int) -> Ids:
        """`count` units of a document from `start` on: int64 [count + overhead]."""
        if self.each:
            return np.concatenate([[self.begin], ids[start : start + count], [self.end]]).astype(np.int64)
        first = [self.begin] if start == 0 else []
        last = [self.end] if start + count == len(ids) + 1 else []
        inner = ids[max(0, start - 1) : start + count]
        return np.concatenate([first, inner, last]).astype(np.int64)

    def crop(self, ids: Ids, length: int, share: float) -> Ids:
        """At most `length` positions of a document, from `share` of the possible starts on."""
        units = self.units(len(ids))
        count = min(units, length - self.overhead)
        return self.piece(ids, int(share * (units - count + 1)), count)


class Documents:
    """The usable documents one by one, as ids on disk: a `Source`."""

    def __init__(self, field: str, corpus: Corpus, source: Source, notes: Sequence[str] = ()) -> None:
        self.field, self.corpus, self.documents, self.notes = field, corpus, source, notes
        self.bounds = np.searchsorted(corpus.numbers, np.cumsum([0, *(part.size for part in source.parts)]))
        sizes = np.diff(self.bounds).tolist()
        if 0 in sizes:
            raise DataError(f"data set {sizes.index(0) + 1} of {len(sizes)} holds no {field} that can be used")
        self.parts: Sequence[Part] = _weighted(source.parts, sizes)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> Sample:
        return {self.field: self.corpus.ids(index)}

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """What was refused when the data was opened, and samples that are no document: {"path", ..., "reason"}."""
        place = getattr(self.documents, "place", lambda number: {"path": self.documents.name(number)})
        reasons = self.corpus.facts.reasons.items()
        refused: list[dict[str, Any]] = getattr(self.documents, "left_out", [])
        return refused + [{**place(int(number)), "reason": reason} for number, reason in reasons]

    def name(self, index: int) -> str:
        """What the source calls the document."""
        return self.documents.name(int(self.corpus.numbers[index]))


class Packed:
    """Documents packed into rows, laid anew every turn, each part of a mixture by itself: a `Source`, and `Relaid`."""

    def __init__(self, single: Documents, frame: Frame, pad: int, layout: Callable[[Ids], Layout]) -> None:
        self.single, self.frame, self.pad, self.documents = single, frame, pad, single.documents
        bounds = zip(single.bounds[:-1], single.bounds[1:], strict=True)
        self.layouts = [layout(frame.units(single.corpus.sizes[first:last])) for first, last in bounds]
        rows = [layout.rows for layout in self.layouts]
        self.ends = np.cumsum(rows)
        self.parts: Sequence[Part] = _weighted(single.documents.parts, rows)
        length = self.layouts[0].length
        cut = int((single.corpus.sizes > length - 2).sum())
        over = f"; {cut:,} {'documents are' if cut > 1 else 'document is'} longer and cut" if cut else ""
        count = f"{len(self):,} rows of {length:,} tokens, {100 * self.used:.1f} % of them in use{over}"
        self.notes: Sequence[str] = [*single.notes, count]

    @property
    def used(self) -> float:
        """The share of all positions that hold a token."""
        return float(sum(layout.rows * layout.used for layout in self.layouts) / len(self))

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """As of the documents."""
        return self.single.left_out

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        return self.at(index, 0)

    def at(self, index: int, turn: int) -> Sample:
        """The row of this number when its part is gone through for the `turn`-th time, from 0."""
        ids, segments, positions = (np.zeros(self.layouts[0].length, kind) for kind in ("i8", "i4", "i8"))
        ids[:] = self.pad
        place = 0
        for number, (document, start, count) in enumerate(self._pieces(index, turn), 1):
            piece = self.frame.piece(self.single.corpus.ids(document), start, count)
            here = slice(place, place + len(piece))
            ids[here], segments[here], positions[here] = piece, number, np.arange(len(piece))
            place += len(piece)
        return {self.single.field: Row(ids, segments, positions)}

    def name(self, index: int) -> str:
        """row 12, which begins with the document ..., when the data is gone through first."""
        first, *others = self._pieces(index, 0)
        more = f" and {len(others)} more" if others else ""
        return f"row {index}: {self.single.name(first[0])}{more}"

    def _pieces(self, index: int, turn: int) -> list[tuple[int, int, int]]:
        """(document, start, count) in units, by document of the whole corpus."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self.ends, index, side="right"))
        within, first = int(index - self.ends[part] + self.layouts[part].rows), int(self.single.bounds[part])
        return [(first + p.document, p.start, p.units) for p in self.layouts[part].row(turn, within)]


def _weighted(parts: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    """The parts with other sizes: natural weights follow the sizes, those that a user gave stay."""
    return [Part(n, n if part.weight == part.size else part.weight) for part, n in zip(parts, sizes, strict=True)]
