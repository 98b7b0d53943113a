"""Name what could not be used, once: a line of JSON for each file, row or sample in RUN/bad/samples.jsonl.

    {"path": "photos/7.jpg", "reason": "the image cannot be decoded: ...", "step": 12}
    {"path": "texts.jsonl", "row": 81, "reason": "invalid UTF-8 at byte 14 of the row", "step": 0}
    {"path": "0.tar", "member": "7.wav", "offset": 1536, "reason": "the file is empty", "step": 3}

    {"path": "held-out/3.jpg", "reason": "the file is empty", "of": "validation", "step": 100}

`of` names what is no data of training, and `step` says how many steps had been done. A resumed run goes on with the
list and repeats nothing of it, nor does a stream that comes to the same place again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup.kernel import distributed
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.loader import Endless

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run

NAME = "bad/samples.jsonl"
STREAMED = re.compile(r"(?P<path>.+?)(?: row (?P<row>\d+)|(?<=\.tar):(?P<member>[^:]+))?: (?P<reason>.+)", re.S)
Key = frozenset[tuple[str, Any]]


class Quarantine:
    """List the samples that could not be used in RUN/bad/samples.jsonl, on the first process."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.listed: set[Key] = set()
        self.seen = 0  # of the samples that the run has met

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Read the list of a run that goes on; add what was refused when the data was opened."""
        self.path, self.listed, self.seen = None, set(), 0
        if run.folder is None or distributed.rank() > 0:
            return
        self.path = run.folder / NAME
        self.listed = known(self.path)
        self.add(run, getattr(run.source, "left_out", []))
        self.look(run)

    @hookimpl(tryfirst=True)  # before a checkpoint holds that they were met
    def step_finished(self, run: Run, report: Report) -> None:
        """Add what the step met."""
        self.look(run)

    @hookimpl(tryfirst=True)
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Add what ended the run."""
        self.look(run)

    def look(self, run: Run) -> None:
        """Add the samples that are new."""
        if self.path and len(run.skipped) > self.seen:
            met = list(run.skipped.items())[self.seen :]
            self.seen = len(run.skipped)
            self.add(run, (told(run.source, index, reason) for index, reason in met))

    def add(self, run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
        """List what is new of these; on other processes nothing."""
        new = {key(row): row for row in rows if key(row) not in self.listed}
        self.listed |= set(new)
        if not new or self.path is None:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**row, "step": run.done}) + "\n" for row in new.values())
        except OSError as cause:  # a list never stops a run
            print(f"warning: {NAME} ends here, it cannot be written: {cause.strerror}", file=sys.stderr)
            self.path = None


def told(source: Any, index: int, reason: str) -> dict[str, Any]:
    """Where a sample lies, and why it cannot be used."""
    # Only who reads a stream knows where in it a sample lies: the reason says so.
    if isinstance(source, Endless) and (found := STREAMED.fullmatch(reason)):
        row = {"row": int(found["row"])} if found["row"] else {"member": found["member"]} if found["member"] else {}
        return {"path": found["path"], **row, "reason": found["reason"]}
    return {**place(source, index), "reason": reason}


def place(source: Any, index: int) -> dict[str, Any]:
    """Where a sample lies; its name where the source does not tell."""
    found: dict[str, Any] = source.place(index) if hasattr(source, "place") else {"path": source.name(index)}
    return found


def key(row: Mapping[str, Any]) -> Key:
    """What makes two lines the same."""
    return frozenset((name, row[name]) for name in ("path", "row", "member", "of") if name in row)


def known(path: Path) -> set[Key]:
    """What the list of a run holds; a line that was torn when the run was killed is cut off."""
    try:
        whole = path.read_bytes()
    except OSError:
        return set()
    lines, end = whole.splitlines(keepends=True), len(whole)
    if lines and not lines[-1].endswith(b"\n"):
        end -= len(lines.pop())
    out: set[Key] = set()
    for line in lines:
        try:
            out.add(key(json.loads(line)))
        except (ValueError, TypeError, RecursionError):  # somebody else's
            continue
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)
    return out
