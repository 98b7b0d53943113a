"""Everything that a run's folder tells of it, for a report: each step's figures, what it ran on, how it ended.

A run may still be going on, have been killed in the middle of a line, or miss any file but `run.toml`: what is not
there is left out, and nothing here fails for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .run_folder import Folder
from .run_metrics import NAME, Row, number, parsed

Series = tuple[list[int], list[float | None]]  # steps, and a value each; None is not finite


@dataclass(frozen=True)
class History:
    """A run, as its folder tells of it."""

    run: Folder
    environment: Mapping[str, Any]  # what it ran on; empty where that was not kept
    outcome: Mapping[str, Any]  # how it ended; empty while it goes on, or where it was killed
    rows: Sequence[Row]  # of metrics.jsonl: one for each step
    measured: Mapping[str, Series]

    @property
    def done(self) -> int:
        """How many steps it took."""
        return int(self.rows[-1]["step"]) + 1 if self.rows else 0

    @property
    def batch(self) -> float:
        """Samples behind a step."""
        return number(self.run.option("train", "batch")) or 0.0

    @property
    def data(self) -> Mapping[str, Any]:
        """The first look at the data: {"samples", "notes"}; empty where that was not kept."""
        found = self.environment.get("data")
        return found if isinstance(found, Mapping) else {}

    def series(self) -> dict[str, Series]:
        """Loss, metrics, learning rate and gradient norm by name, then what was measured now and then."""
        out: dict[str, Series] = {}
        for row in self.rows:
            metrics = row.get("metrics")
            named = {"loss": row.get("loss"), **(metrics if isinstance(metrics, Mapping) else {})}
            named |= {"gradient norm": row.get("norm"), "learning rate": row.get("lr")}
            for name, value in named.items():
                _add(out, name, row["step"], value)
        return {name: series for name, series in {**out, **self.measured}.items() if series[0]}

    def rates(self) -> dict[str, Series]:
        """Samples a second, and data a second in every other unit, of each step."""
        out: dict[str, Series] = {}
        for row in self.rows:
            rate, amounts = number(row.get("samples_per_second")), row.get("amount")
            if rate is None or not self.batch:
                continue
            _add(out, "samples / s", row["step"], rate)
            for unit, amount in (amounts if isinstance(amounts, Mapping) else {}).items():
                if (much := number(amount)) is not None:
                    _add(out, f"{unit} / s", row["step"], much * rate / self.batch)
        return out

    def seconds(self) -> float:
        """Time that the steps took, without what lay between them: evaluations, breaks before a resume."""
        rates = [number(row.get("samples_per_second")) for row in self.rows]
        return sum(self.batch / rate for rate in rates if rate)


def history(run: Folder) -> History:
    """Read a run's folder."""
    rows: dict[int, Row] = {}
    measured: dict[str, Series] = {}
    for row in _lines(run.path / NAME):
        found = row.get("measured")
        if isinstance(found, Mapping):
            for name, value in found.items():
                _add(measured, name, row["step"] + 1, value)  # after so many steps
        else:
            rows[row["step"]] = row
    environment, outcome = (_json(run.path / name) for name in ("environment.json", "outcome.json"))
    return History(run, environment, outcome, [rows[step] for step in sorted(rows)], measured)


def _add(series: dict[str, Series], name: str, step: int, value: Any) -> None:
    steps, values = series.setdefault(name, ([], []))
    steps.append(step)
    values.append(number(value))


def _lines(path: Path) -> Iterator[Row]:
    """The lines that are whole and have a step."""
    try:
        with path.open("rb") as file:
            for line in file:
                if row := parsed(line):
                    yield row
    except OSError:  # none was written yet
        return


def _json(path: Path) -> Mapping[str, Any]:
    """What a file holds; nothing where it is not there or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
