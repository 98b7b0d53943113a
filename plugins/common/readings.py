"""The numbers of each step, for logs: on a GPU they are read every few steps only, as reading waits for it (law 5)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfsup.kernel import distributed

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run


@dataclass(frozen=True)
class Reading:
    """What a log holds of a step."""

    step: int
    loss: float
    norm: float  # of the gradient
    lr: float
    samples_per_second: float  # since the reading before
    amount: Mapping[str, float]  # unit -> how much data the step took, over all processes
    time: float  # seconds since 1970
    metrics: Mapping[str, float]


class Readings:
    """Keep the numbers of every `every`-th step on the device until `patience` steps wait to be read."""

    def __init__(self, every: int = 1, patience: int = 10) -> None:
        self.every, self.patience = every, patience
        self.pending: list[tuple[dict[str, Any], list[str], Tensor]] = []
        self.since, self.steps = 0.0, 0  # when the clock was started, and steps since then

    def start(self) -> None:
        """Start the clock: what took time before, such as a measurement, is no part of the next step."""
        self.since, self.steps = time.perf_counter(), 0

    def keep(self, run: Run, report: Report) -> list[Reading]:
        """Keep a step; give what it was time to read: on a CPU the step itself."""
        self.steps += 1
        if report.step.number % self.every:
            return []
        now = time.perf_counter()
        known = {
            "step": report.step.number,
            "lr": float(run.optimizer.param_groups[0]["lr"]),
            "samples_per_second": run.batch * self.steps / max(now - self.since, 1e-9),
            "amount": {unit: much * distributed.world() for unit, much in report.amount.items()},
            "time": time.time(),
        }
        self.since, self.steps = now, 0
        tensors = (report.loss, report.norm, *report.metrics.values())
        values = torch.stack([t.detach().float().reshape(()) for t in tensors])  # [2 + metrics]
        self.pending.append((known, list(report.metrics), values))
        due = run.device.type == "cpu" or len(self.pending) * self.every >= self.patience
        return self.read() if due else []

    def read(self) -> list[Reading]:
        """Everything that is kept; waits for the device."""
        pending, self.pending = self.pending, []
        return [_reading(known, names, *values.tolist()) for known, names, values in pending]


def _reading(known: dict[str, Any], names: list[str], loss: float, norm: float, *metrics: float) -> Reading:
    return Reading(loss=loss, norm=norm, metrics=dict(zip(names, metrics, strict=True)), **known)
