"""A run of a few small steps of an objective, and the gradients of one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from selfsup.kernel import Batch, Objective, Plugins, Run, compose, loop
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
        return loop.take_step(run, run.step(number), parts), found
    finally:
        hook.remove()


def exact_gradients(
    name: str, more: Mapping[str, Any], places: list[list[int]] | None = None, still: bool = False
) -> tuple[float, dict[str, Any]]:
    """The loss and gradients of the first step of a model in float64, as a float and arrays.

    Over microbatches of these places; by default, over this process's share of the batch. `still` holds the
    statistics of batch norms. (In float32, batch norm over few samples turns rounding into other gradients.)
    """
    with patch.object(compose, "build", partial(_build_double, compose.build)):
        run = begin(name, more)
    for module in run.objective.modules():
        if still and "BatchNorm" in type(module).__name__:
            module.eval()
    run.optimizer = torch.optim.SGD(run.parameters, lr=0.0, fused=True)  # the recipe's may hold float32 state
    parts = run.loader.read(0) if places is None else [run.loader.reader[part] for part in places]
    report, found = gradients(run, parts)
    return float(report.loss), {key: value.numpy() for key, value in found.items()}


def _build_double(build: Callable[..., Objective], *args: Any) -> Objective:
    objective = build(*args).double()
    for module in objective.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
    return objective


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Data and draws come in float32."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
