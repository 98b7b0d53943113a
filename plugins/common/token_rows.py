"""Documents of ids as the rows and crops that training goes through.

Content comes in units: with `each`, a piece is its tokens between begin and end; otherwise it is predictions, so that m
units of begin, text, end show m + 1 tokens, the first of which the piece before has shown already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

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
