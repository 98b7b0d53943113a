"""What a small model would save."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A weight [64, 32] drawn from the seed, a buffer [5], and no optimizer's."""
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"a.weight": torch.randn(64, 32, generator=generator), "b": torch.arange(5)}, "optimizer": {}}
