"""The hidden tokens of each row side by side, and which tokens to hide, by exact count.

Everything here is a function of the row alone, with static shapes and no wait for the host.

Shapes: B batch, T tokens, M capacity (the most tokens that a row can hide), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsup.kernel import Stream

SLACK = 1e-6  # tokens: a tenth of ten is one, though in floating point (1 - 0.9) * 10 < 1


def random_mask(draw: Stream, real: Tensor, share: float) -> Tensor:
    """Hide `hidden_count` tokens of every row, all sets of them alike likely: [B, T] bool.

    `real` [B, T] bool says which tokens are not padding; they come first in their row.
    """
    tokens = real.sum(1, keepdim=True)  # [B, 1]
    visible = ((1 - share) * tokens.double() + SLACK).long().clamp(min=1)  # [B, 1], as `hidden_count` has it
    # A row draws the same keys however long its neighbours are: padding sorts last, and so is never hidden.
    keys = draw.bits(real.shape[1]).masked_fill(~real, 2**32)  # [B, T]
    order = keys.argsort(dim=1, stable=True)  # [B, T]
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    return torch.zeros_like(real).scatter(1, order, (place >= visible) & (place < tokens))


def hidden_count(tokens: int, share: float) -> int:
    """How many of a row's tokens `random_mask` hides: at least this share, and not the last one. Grows with the row."""
    return tokens - max(1, int((1 - share) * tokens + SLACK))


def pack(hidden: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the hidden tokens of each row are: index [B, M] in order, and valid [B, M] for those that are any."""
    index = (~hidden).byte().argsort(dim=1, stable=True)[:, :size]  # [B, M]
    valid = torch.arange(size, device=hidden.device) < hidden.sum(1, keepdim=True)  # [B, M]
    return index, valid


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each row of x [B, T, D] that index [B, M] names: [B, M, D]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]  # [B, 1]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, -1)
