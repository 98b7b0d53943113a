"""Watch for a loss or a gradient that is not finite: name the step, the samples and the parameters, keep the batch.

The loop has left such an update out already. What is read of a GPU is read every few steps (law 5), so
the run may go on that far before it stops; its weights are those from before the bad step all the same.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import DivergedError, SelfsupError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.random import untag

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run


class Watchdog:
    """Stop the run, or go on without the step, when its loss or gradient is not finite."""

    def __init__(
        self,
        *,
        policy: Annotated[Literal["stop", "skip"], about("stop the run, or skip the step and go on")] = "stop",
        patience: Annotated[int, about("steps skipped in a row that stop the run all the same", ge=1)] = 10,
        every: Annotated[int, about("steps between two readings of a GPU", ge=1)] = 10,
        keep: Annotated[int, about("bad batches written to RUN/bad, at most", ge=0)] = 10,
    ) -> None:
        self.policy, self.patience, self.every, self.keep = policy, patience, every, keep
        self.pending: list[Report] = []
        self.row = self.kept = 0  # bad steps in a row; batches on disk

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Begin with nothing seen."""
        self.pending, self.row, self.kept = [], 0, 0

    @hookimpl
    def step_finished(self, run: Run, report: Report) -> None:
        """Look at the step at once on a CPU, every few steps on a GPU."""
        self.pending.append(report)
        if run.device.type == "cpu" or len(self.pending) >= self.every:
            self.look(run)

    @hookimpl
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Look at the steps that are left."""
        if error is None:
            self.look(run)

    def look(self, run: Run) -> None:
        """Read whether the pending steps were finite; DivergedError as the policy says."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        for report, fine in zip(pending, torch.stack([r.finite for r in pending]).tolist(), strict=True):
            self.row = 0 if fine else self.row + 1
            if not fine:
                self._bad_step(run, report)

    def _bad_step(self, run: Run, report: Report) -> None:
        fact = facts(run, report)
        message = sentence(fact)
        if run.folder and self.kept < self.keep:
            self.kept += 1
            message += f"; {keep_batch(run, report, fact)}"
        if self.policy == "stop":
            raise DivergedError(f"{message}. Often optimizer.lr is too high. To go on: --set watchdog.policy=skip")
        if self.row >= self.patience:
            raise DivergedError(f"{message}. {self.row} steps in a row were skipped; optimizer.lr may be too high")
        if distributed.rank() == 0:
            print(f"warning: {message}. It was skipped", file=sys.stderr)


def facts(run: Run, report: Report) -> dict[str, Any]:
    """What is known of a bad step: its number, loss, gradient norm, samples and parameters, as JSON holds it."""
    broken = (~report.norms.isfinite()).tolist()
    epochs, indices = untag(report.ids)
    samples = [
        {"id": ident, "epoch": epoch, "index": index, "name": run.source.name(run.loader.reader.key(ident))}
        for ident, epoch, index in zip(report.ids.tolist(), epochs.tolist(), indices.tolist(), strict=True)
    ]
    numbers = {"step": report.step.number, "loss": float(report.loss), "norm": float(report.norm)}
    names = [name for name, bad in zip(run.parameter_names, broken, strict=True) if bad]
    return {**numbers, "parameters": names, "trained": len(broken), "samples": samples}


def sentence(fact: Mapping[str, Any]) -> str:
    """The facts in a sentence, for people."""
    where = f"step {fact['step']}: the loss is {fact['loss']:.4g}"
    if fact["parameters"]:
        where += f", the gradient is not finite in {_some(fact['parameters'], 3)} of {fact['trained']} parameters"
    return f"{where}; its samples are {_some([s['name'] for s in fact['samples']], 8)}"


def keep_batch(run: Run, report: Report, fact: Mapping[str, Any]) -> str:
    """Write this process's share of the step's batch to RUN/bad/step-N; say where, or why not."""
    folder = Path(str(run.folder)) / "bad" / f"step-{report.step.number}"
    numbers = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in fact.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = f"batch-{distributed.rank()}"
        (folder / f"{mine}.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), "utf-8")
        save_file(dict(tensors(run.loader.read(report.step.number))), folder / f"{mine}.safetensors")
    except (OSError, SelfsupError) as cause:
        return f"the batch could not be written to {folder}: {cause}"
    return f"the batch is in {folder}"


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within a batch, by its dotted name: "0.audio.x" is that of the first microbatch."""
    items: Any = ()
    if isinstance(value, Tensor):
        yield name, value.detach().cpu().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, Signal):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, part in items:
        yield from tensors(part, f"{name}.{key}" if name else str(key))


def _some(names: list[str], most: int) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
