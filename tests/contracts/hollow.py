"""An objective's loss computed with tensors that have shapes and types but no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from selfsup.kernel import Batch, Loss, Modality, Run, Signal, Stream, Tower, stream


def without_values(run: Run, batch: Batch) -> Loss:
    """The loss of a batch. Whatever asks a tensor for a value (`item`, `nonzero`, boolean indexing) raises."""
    towers = [module for module in run.objective.modules() if isinstance(module, Tower)]
    for modality in {id(tower.modality): tower.modality for tower in towers if tower.modality}.values():
        modality.view = _Views(modality)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in run.objective.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(_hollow(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = _hollow(buffer)
        loss: Loss = run.objective({key: _hollow(value) for key, value in batch.items()}, run.step(0))
    return loss


class _Views:
    """A modality's `view` that gives the shapes of real views."""

    def __init__(self, modality: Modality) -> None:
        self.view = modality.view

    def __call__(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float = 1.0) -> Signal:
        with unset_fake_temporarily():
            real = Signal(*(None if part is None else torch.ones(part.shape, dtype=part.dtype) for part in _parts(raw)))  # type: ignore[arg-type]
            shown = self.view(real, extent, stream(0, "view", torch.arange(len(raw.x))), strength)
        hollow: Signal = _hollow(shown)
        return hollow


def _parts(signal: Signal) -> tuple[Tensor | None, ...]:
    return signal.x, signal.segments, signal.positions, signal.edges


def _hollow(value: Any) -> Any:
    """The same without values; called where tensors are made without them."""
    if isinstance(value, Signal):
        return Signal(*map(_hollow, _parts(value)))
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if isinstance(value, Tensor) else value
