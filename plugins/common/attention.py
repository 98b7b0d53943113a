"""Multi-head attention, and which keys a query may see.

    out = softmax(q k' / sqrt(d) + bias) v          Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

with K <= H heads of keys and values, each shared by H / K heads of queries (grouped keys, Ainslie et
al. 2023, https://arxiv.org/abs/2305.13245). What a query may see is worked out once for all layers
(`Scope`): nothing is masked where nothing needs to be, so that torch takes its fastest kernel.

Shapes: B batch, T tokens, S tokens of the context, D width, M places asked for, H heads, K heads of keys and
values, d = D / H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ConfigError

from .block_attention import attend_blocks
from .masking import pick
from .positions import rotate


class Scope(NamedTuple):
    """What all layers share: which keys a query may see, and how positions enter attention."""

    causal: bool = False  # keys up to the query's own place in the row; not used together with a mask
    mask: Tensor | None = None  # [B or 1, H or 1, T, T] bool (True: may see) or float (added to the logits)
    turn: tuple[Tensor, Tensor] | None = None  # rotary cosines and sines, [B or 1, 1, T, d] each
    blocks: Any = None  # xformers' mask of sequences laid end to end; replaces causal and mask
    context: Tensor | None = None  # [B, S, D] what cross-attention looks at
    context_mask: Tensor | None = None  # [B, 1, T, S] bool
    only: Tensor | None = None  # [B, M] places of the queries that are asked for; None: all

    def asking(self, index: Tensor) -> Scope:
        """The same for the queries at index [B, M] alone; neither causal nor with blocks or a context."""
        return self._replace(mask=None if self.mask is None else rows(self.mask, index), only=index)


def self_mask(tokens: Signal, causal: bool, bias: Tensor | None = None) -> Tensor | None:
    """Which keys of its own row a query may see, and the bias on them; None where `causal` alone says it.

    Equal segments see each other. So padding (segment 0) sees padding, itself at least, and no row of
    the softmax is empty.
    """
    may: Tensor | None = None
    if tokens.segments is not None and not undivided(tokens.segments):
        may = tokens.segments[:, None, :, None] == tokens.segments[:, None, None, :]  # [B, 1, T, T]
    if causal and (may is not None or bias is not None):
        length = tokens.x.shape[1]
        lower = torch.ones(length, length, dtype=torch.bool, device=tokens.x.device).tril()  # [T, T]
        may = lower[None, None] if may is None else may & lower
    if bias is None:
        return may
    return bias if may is None else bias.masked_fill(~may, -torch.inf)


def undivided(segments: Tensor) -> bool:
    """Whether each row of segments [B, T] is one sequence, as far as can be known without waiting for a device."""
    return segments.device.type == "cpu" and bool((segments == segments[:, :1]).all())


def cross_mask(tokens: Signal, context: Signal) -> Tensor | None:
    """Which tokens of the context a query may see: [B, 1, T, S] bool, or None for all.

    Equal segments, where both sides have them; all that is not padding, where one side has none. A
    query left with nothing to see (its context is empty, or it is padding itself) sees everything,
    so that its softmax is not empty.
    """
    ours, theirs = tokens.segments, context.segments
    if theirs is None:
        return None
    may = (theirs > 0)[:, None, None, :]  # [B, 1, 1, S]
    if ours is not None:
        may = may & (ours[:, None, :, None] == theirs[:, None, None, :])  # [B, 1, T, S]
    may = may | ~may.any(-1, keepdim=True)
    return may.expand(-1, -1, tokens.x.shape[1], -1)  # [B, 1, T, S]


class SelfAttention(nn.Module):
    """Attention of tokens to their own row.

    `qkv.weight` holds the rows of queries [D], keys [K d] and values [K d], in this order, each head
    by head; `out` projects the heads back.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head = head_width(width, heads, kv_heads)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        """[B, T, D] -> [B, T, D], or where not all queries are asked for [B, M, D]."""
        q, k, v = self.project(x, scope.only)
        if scope.turn is not None:
            cosines, sines = (part if scope.only is None else rows(part, scope.only) for part in scope.turn)
            q, k = rotate(q, (cosines, sines)), rotate(k, scope.turn)
        dropout = self.dropout if self.training else 0.0
        if scope.blocks is not None:
            y = attend_blocks(q, k, v, scope.blocks, dropout)
        else:
            y = attend(q, k, v, scope.mask, scope.causal and scope.mask is None, dropout)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # [B, T, D]
        return out

    def project(self, x: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T or M, d], keys and values [B, K, T, d] of x [B, T, D]."""
        if only is None:
            heads = self.qkv(x).unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B, H + 2K, T, d]
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
            return q, k, v
        parts = [self.heads * self.head, 2 * self.kv_heads * self.head]
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
        asked, seen = (
            F.linear(y, weight, bias).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for y, weight, bias in zip((pick(x, only), x), self.qkv.weight.split(parts), biases, strict=True)
        )
        k, v = seen.chunk(2, 1)
        return asked, k, v


class CrossAttention(nn.Module):
    """Attention of tokens to a context. `kv.weight` holds the rows of keys, then of values."""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head = head_width(width, heads, kv_heads)
        self.q = nn.Linear(width, width, bias)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D] looks at context [B, S, D] -> [B, T, D]."""
        q = self.q(x).unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B, H, T, d]
        k, v = self.kv(context).unflatten(-1, (-1, self.head)).transpose(1, 2).chunk(2, 1)  # [B, K, S, d]
        y = attend(q, k, v, mask, False, self.dropout if self.training else 0.0)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # [B, T, D]
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention; q [B, H, T, d], k and v [B, K, S, d] -> [B, H, T, d]."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Those of x [B or 1, H or 1, T, S] that index [B, M] names: [B, H or 1, M, S]."""
    index = index[:, None, :, None]
    return x.expand(len(index), -1, -1, -1).gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def head_width(width: int, heads: int, kv_heads: int) -> int:
    """D / H; raises ConfigError where heads do not divide the width, or their keys do not divide the heads."""
    if width % heads:
        raise ConfigError(f"backbone.heads = {heads} does not divide backbone.width = {width}")
    if heads % kv_heads:
        raise ConfigError(f"backbone.kv_heads = {kv_heads} does not divide backbone.heads = {heads}")
    return width // heads
