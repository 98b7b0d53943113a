"""Attention on a GPU that multiplies neither padding with text nor one packed sequence with the next.

xformers' memory-efficient attention takes all sequences of a batch end to end, with the offset at
which each starts (BlockDiagonalMask), and runs the flash kernels on the blocks of the diagonal only.

Its constructor wants the lengths on the host, which would make every step wait for the GPU (law 5).
The kernels themselves read the offsets from device memory, and from the host just two bounds: the
number of sequences and the longest length. So the mask is made once for a fixed capacity, from shapes
alone, and its offsets are replaced by a device tensor: `limit + 1` sequences a row (one of them the
padding), as long as the row at most; those that a row does not have are empty. Rows that hold more
sequences than the limit are met by `within`.

The offsets need the tokens of one sequence to lie next to each other, which `take` (MAE) does not
promise: `gathered` sorts each row by segment, and gives the order that undoes it.

Shapes: B batch, T tokens, H heads, K heads of keys and values, d width of a head, S = B * (limit + 1).
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError


@cache
def fmha() -> Any:
    """xformers' `ops.fmha`, or None where it cannot be imported."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns when its extension is for another torch; torch's own kernels serve then
    try:
        return importlib.import_module("xformers.ops.fmha")
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        log.setLevel(level)


def serves(x: Tensor) -> bool:
    """Whether blocks are to be used for tokens x: on an NVIDIA GPU, in half precision, with xformers installed."""
    if not x.is_cuda:
        return False
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return kind in (torch.bfloat16, torch.float16) and fmha() is not None


def counted(segments: Tensor) -> Tensor:
    """How many sequences each row of segments [B, T] holds, padding left out: [B]."""
    ordered = segments.sort(dim=1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (fresh & (ordered > 0)).sum(1)


def within(tokens: Signal, limit: int, remedy: str) -> Signal:
    """Refuse rows that hold more than `limit` sequences.

    On a CPU that is a ContractError. A GPU cannot be asked without waiting for it, so there such a
    row becomes NaN: the loss is not finite, and the run stops rather than learns across sequences.
    """
    if tokens.segments is None:
        return tokens
    count = counted(tokens.segments)  # [B]
    if count.device.type == "cpu":
        most = int(count.max()) if len(count) else 0
        if most > limit:
            raise ContractError(f"one row holds {most} packed sequences, and this backbone takes {limit}; {remedy}")
        return tokens
    too_many = (count > limit)[:, None, None]
    return Signal(tokens.x.masked_fill(too_many, torch.nan), tokens.segments, tokens.positions, tokens.edges)


def gathered(tokens: Signal) -> tuple[Signal, Tensor]:
    """Each row sorted by segment, in the old order within one; and the [B, T] index that restores the row."""
    segments = tokens.real() if tokens.segments is None else tokens.segments
    order = segments.argsort(dim=1, stable=True)
    return tokens.take(order), order.argsort(dim=1)


def starts(segments: Tensor, limit: int) -> Tensor:
    """Offsets of the sequences of sorted segments [B, T] laid end to end: [S + 1] int32.

    Sequence r of row b lies from starts[b * (limit + 1) + r] up to the next offset.
    """
    rows = len(segments)
    fresh = torch.zeros_like(segments)
    fresh[:, 1:] = (segments[:, 1:] != segments[:, :-1]).to(segments.dtype)
    run = fresh.cumsum(1).clamp(max=limit)  # [B, T] number of each token's sequence in its row
    lengths = torch.zeros(rows, limit + 1, dtype=torch.int32, device=segments.device)
    lengths.scatter_add_(1, run.long(), torch.ones_like(run, dtype=torch.int32))  # [B, limit + 1]
    ends = lengths.flatten().cumsum(0, dtype=torch.int32)  # [S]
    return torch.cat([ends.new_zeros(1), ends])  # [S + 1]


def block_mask(segments: Tensor, limit: int, causal: bool) -> Any:
    """The BlockDiagonalMask (or BlockDiagonalCausalMask) of sorted segments [B, T]."""
    rows, length = segments.shape
    bias = fmha().attn_bias
    kind = bias.BlockDiagonalCausalMask if causal else bias.BlockDiagonalMask
    mask = kind.from_seqlens([length] * (rows * (limit + 1)), device=torch.device("cpu"))
    mask.q_seqinfo.seqstart = mask.k_seqinfo.seqstart = starts(segments, limit)
    return mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """softmax(q k' / sqrt(d)) v within each block; q [B, H, T, d], k and v [B, K, T, d] -> [B, H, T, d]."""
    rows, heads, length, width = q.shape
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))  # [B, H, T, d]
    q, k, v = (t.transpose(1, 2).reshape(1, rows * length, heads, width) for t in (q, k, v))  # [1, B * T, H, d]
    out: Tensor = fmha().memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout)
    return out.view(rows, length, heads, width).transpose(1, 2)  # [B, H, T, d]
