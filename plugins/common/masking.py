"""The hidden tokens of each row side by side, with static shapes and no wait for the host.

Shapes: B batch, T tokens, M capacity (the most tokens that a row can hide), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(hidden: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the hidden tokens of each row are: index [B, M] in order, and valid [B, M] for those that are any."""
    index = (~hidden).byte().argsort(dim=1, stable=True)[:, :size]  # [B, M]
    valid = torch.arange(size, device=hidden.device) < hidden.sum(1, keepdim=True)  # [B, M]
    return index, valid


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each row of x [B, T, D] that index [B, M] names: [B, M, D]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]  # [B, 1]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, -1)
