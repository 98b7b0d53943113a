"""A run of a few small steps of an objective, and the gradients of one step of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from selfsup.kernel import Batch, Plugins, Run, compose, loop
from selfsup.kernel.config import Settings, nest

BATCH = 6  # shared evenly by 2 and 3 processes, unevenly by microbatches
SMALL = {
    "train.batch": BATCH,
    "train.microbatch": 0,
    "train.steps": 3,
    "train.device": "cpu",
    "train.precision": "fp32",
    "train.clip": 0.0,
    "train.timeout": 60.0,
    "data.workers": 0,
}


def settings(name: str, more: Mapping[str, Any], dropout: bool = False) -> Settings:
    """The objective's preset "tiny" with few samples a step, and `more` by dotted name on top.

    Without `dropout`, options with "drop" in their name are 0: the loop seeds them per process and microbatch,
    so that equality holds without them alone.
    """
    plugins = Plugins()
    layers = [{"objective": {"name": name}, "preset": "tiny"}, nest(SMALL), nest(more)]
    out = compose.resolve(plugins, *layers)
    if dropout:
        return out
    sections = [out["objective"], out["backbone"], *(own.get("backbone", {}) for own in out["towers"].values())]
    for section in sections:
        section |= {key: 0.0 for key, value in section.items() if "drop" in key and isinstance(value, float)}
    return out


def begin(name: str, more: Mapping[str, Any] | None = None, dropout: bool = False, folder: Path | None = None) -> Run:
    """A run at its first step, or after the newest checkpoint in `folder`."""
    return compose.start(Plugins(), settings(name, more or {}, dropout), folder, resume=folder is not None)


def gradients(run: Run, parts: list[Batch], number: int = 0) -> tuple[loop.Report, dict[str, Tensor]]:
    """What the loop reports of one step over these microbatches, and the gradients that its optimizer is given."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in run.objective.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.detach().clone()

    hook = run.optimizer.register_step_pre_hook(keep)
    try:
        return loop.take_step(run, run.step(number), parts, 0.0), found
    finally:
        hook.remove()


def shared_gradients(name: str, more: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The loss and gradients of the first step, computed by all processes together, as floats and arrays."""
    run = begin(name, more)
    report, found = gradients(run, run.loader.read(0))
    return float(report.loss), {key: value.numpy() for key, value in found.items()}
