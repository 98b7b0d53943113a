"""What one kind of fault did to a run, as the long command tabulates it and the short tests assert it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """Faults of one kind: how many there were, how many were survived as promised, and what was measured."""

    goal: str  # of docs/faults.md: "R6"
    fault: str  # "one bit flipped"
    injected: int
    survived: int
    figure: str  # what the goal asks for: "0 of 300 silently wrong"
    stock: str = ""  # what the usual library did under the same fault in the same run
