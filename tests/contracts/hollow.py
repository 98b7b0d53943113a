"""An objective's loss computed with tensors that have shapes and types but no values: on the device "meta"."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from selfsup.kernel import Batch, Loss, Modality, Run, Signal, Stream, Tower, stream
from selfsup.kernel.loader import to_device

META = torch.device("meta")


def step_without_values(run: Run, batch: Batch) -> None:
    """Loss and gradient of a batch. Whatever asks a tensor for a value (`item`, `nonzero`, a boolean index) raises."""
    towers = [module for module in run.objective.modules() if isinstance(module, Tower)]
    for modality in {id(tower.modality): tower.modality for tower in towers if tower.modality}.values():
        modality.view = _Views(modality)
    run.objective.to(META)
    # Autocast knows no such device, and what it does to types is not the question here.
    with (
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
    ):
        loss: Loss = run.objective(to_device(batch, META), run.step(0))
        torch.autograd.backward([loss.total])


class _Views:
    """A modality's `view` that gives the shapes of real views."""

    def __init__(self, modality: Modality) -> None:
        self.view = modality.view

    def __call__(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float = 1.0) -> Signal:
        rest = (_ones(part) for part in (raw.segments, raw.positions, raw.edges))
        ids = torch.arange(len(raw.x))
        return self.view(Signal(_ones(raw.x), *rest), extent, stream(0, "view", ids), strength).to(META)


def _ones(part: Any) -> Any:
    return None if part is None else torch.ones(part.shape, dtype=part.dtype)
