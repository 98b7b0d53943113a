"""When a Triton kernel can run, and how many programs it takes."""

from __future__ import annotations

import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def can_launch(*tensors: Tensor) -> bool:
    """On a GPU, or anywhere under Triton's interpreter; otherwise an op takes its CPU path."""
    return INTERPRETED or all(t.is_cuda for t in tensors)


def programs(items: int, block: int) -> tuple[int]:
    """The grid in which every program takes `block` of the items."""
    return (-(-items // block),)
