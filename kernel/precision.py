"""Device, autocast, compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .contracts import Objective
from .errors import ConfigError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; "auto" is this process's GPU where there is one."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
    else:
        try:
            device = torch.device("cpu" if name == "auto" else name)
        except RuntimeError:
            raise ConfigError(f"there is no device {name!r}; known: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"the device {name!r} was asked for, and torch {torch.__version__} sees no GPU here")
        torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """What forward passes run in: bf16 where asked for, and by default on a GPU."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def compile_units(objective: Objective) -> None:
    """Compile the repeated parts of every backbone, each once for all its copies.

    Not the objective: a step's number in a compiled frame recompiles it every step.
    """
    for backbone in objective.backbones():
        for unit in backbone.units():
            unit.compile()
