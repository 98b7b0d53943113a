"""What the masks share: which tokens are seen, which are hidden, and where each of them goes.

A mask deals the tokens of a row to two hands, K to `keep` and M = T - K to `hide`. In a padded row the hands have room
left, which is that row's padding's: the first of it goes to `keep`, the rest to `hide`. So the two side by side are the
tokens of a row in another order, in every row, and `restore` is its inverse:

    cat([keep, hide], 1).gather(1, restore) = arange(T)

On a GPU no row is sorted to choose some of its tokens at random. A token's key is its random word, and its place
where words are equal; the n tokens of least key are those below the (n + 1)-th, which is found bit by bit, by counting
the keys below a bound: 33 + log2 T sums over a row in registers, where sorting takes log2 T (1 + log2 T) / 2 exchanges.

Shapes: B rows of T tokens; F frames of S tokens each where a mask is repeated in time, T = F S.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.kernel import Stream
from selfsup.kernel.errors import ContractError

from ._launch import power
from ._triton import tl, triton
from .philox import four_words

LONGEST = 4096  # tokens of a row that is kept in registers
EXACTLY = {"enable_fp_fusion": False}  # a product and a sum are rounded each, as in torch
NOWHERE = tl.constexpr(1 << 62)  # the key of what is not chosen


class Masked(NamedTuple):
    """What is hidden and what is not."""

    hidden: Tensor  # [B, T] bool
    keep: Tensor  # [B, K] int64, the visible tokens in order, and then padding
    hide: Tensor  # [B, M] int64, the hidden tokens in order, and then padding
    keep_real: Tensor  # [B, K] bool, which of `keep` are not padding
    hide_real: Tensor  # [B, M] bool, which of `hide` are not padding
    restore: Tensor  # [B, T] int64, where each token is in `keep` and `hide` side by side


def dealt(hidden: Tensor, real: Tensor, room: int) -> Masked:
    """The tokens of rows [B, T] dealt to a hand of `room` = K and one of T - K; in plain torch."""
    spare = room - (real & ~hidden).sum(1, keepdim=True)  # [B, 1]
    left = torch.where(real, ~hidden, (~real).cumsum(1) <= spare)  # [B, T]
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    before = left.cumsum(1)  # [B, T]
    restore = torch.where(left, before - 1, room + place - before)  # [B, T]
    order = torch.zeros_like(restore).scatter(1, restore, place.expand_as(restore))  # [B, T]
    keep, hide, keep_real, hide_real = (
        part.clone(memory_format=torch.contiguous_format)
        for whole in (order, real.gather(1, order))
        for part in (whole[:, :room], whole[:, room:])
    )
    return Masked(hidden, keep, hide, keep_real, hide_real, restore)


def repeated(one: Masked, real: Tensor, frames: int) -> Masked:
    """The mask of a frame [B, S] in every one of several frames: real [B, F S] is no longer than they are."""
    space, size, rest = one.hidden.shape[1], one.keep.shape[1], one.hide.shape[1]
    frame = torch.arange(frames, device=real.device)[:, None]  # [F, 1]
    keep, hide = ((x[:, None] + frame * space).flatten(1) for x in (one.keep, one.hide))
    seen = one.restore[:, None] < size  # [B, 1, S]
    after = torch.where(seen, frame * size, (frames - 1) * size + frame * rest)  # [B, F, S]
    restore = (one.restore[:, None] + after).flatten(1)
    return Masked(one.hidden.repeat(1, frames) & real, keep, hide, real.gather(1, keep), real.gather(1, hide), restore)


def empty(real: Tensor, count: int) -> Masked:
    """Room for a mask that hides `count` of each row's tokens."""
    rows, tokens = real.shape
    sizes = (tokens, tokens - count, count, tokens - count, count, tokens)
    kinds = (torch.bool, torch.int64, torch.int64, torch.bool, torch.bool, torch.int64)
    return Masked(*(real.new_empty(rows, size, dtype=kind) for size, kind in zip(sizes, kinds, strict=True)))


def check_rows(draw: Stream, real: Tensor) -> None:
    """Raise unless there is a stream for every row of a bool matrix."""
    if real.dtype != torch.bool or real.shape[:1] != draw.ids.shape or real.dim() != 2:
        given = f"{real.dtype} {list(real.shape)} for {len(draw.ids)} ids"
        raise ContractError(f"which tokens are real must be torch.bool [B, T], a row for every id, and is {given}")
    if real.device != draw.device:
        raise ContractError(f"the ids are on {draw.device}, and which tokens are real is on {real.device}")


def check_share(share: float) -> None:
    """Raise unless a share leaves something to be seen and something to be guessed."""
    if not 0 < share < 1:
        raise ContractError(f"the share that is hidden must be above 0 and below 1, and is {share}")


def block_of(tokens: int) -> tuple[int, int]:
    """(lanes, warps) of a program that holds a row."""
    lanes = power(tokens, 32, LONGEST)
    return lanes, power(max(1, lanes // 256), 1, 16)


def bits_of(number: float) -> int:
    """A float64 as an int64, in which a kernel takes it: Triton makes a float32 of a float."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


@triton.jit
def exact(bits):  # type: ignore[no-untyped-def]
    """The float64 of `bits_of`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def keys_of(ident, start, key, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK], no two alike, below 2**32 BLOCK, and in the order of a stream's words."""
    w0, w1, w2, w3 = four_words(ident, start + tl.arange(0, BLOCK // 4), key)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK], in the order of the stream
    return words.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def bound_of(keys, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What exactly `number` of the keys are below, or all of those that are somewhere."""
    low = tl.full((), 0, tl.int64)  # at most `number` of the keys are below
    step = tl.full((), 1 << 32, tl.int64) * BLOCK
    while step > 0:
        below = tl.sum((keys < low + step).to(tl.int32), 0)
        low = tl.where(below <= number, low + step, low)
        step = step >> 1
    return low


@triton.jit
def store_masked(  # type: ignore[no-untyped-def]
    hidden,  # [BLOCK], of the first frame
    first,  # [BLOCK], which of its tokens are real
    real,  # [BLOCK], which of this frame's are
    token,  # [BLOCK]
    item,  # row * F + frame
    hidden_ptr,
    keep_ptr,
    hide_ptr,
    keep_real_ptr,
    hide_real_ptr,
    restore_ptr,
    F,
    S,
    K,
):
    """Deal the tokens of a frame as `dealt` and `repeated` do."""
    frame, inside = item % F, token < S
    padding = inside & ~first
    seen = first & ~hidden
    spare = K - tl.sum(seen.to(tl.int32), 0)
    left = seen | (padding & (tl.cumsum(padding.to(tl.int32), 0) <= spare))
    before = tl.cumsum(left.to(tl.int32), 0)
    place = tl.where(left, before - 1, token - before)
    M = S - K
    own = item * S + token
    tl.store(hidden_ptr + own, (hidden & real).to(tl.uint8), mask=inside)
    tl.store(restore_ptr + own, tl.where(left, frame * K, F * K + frame * M) + place, mask=inside)
    tl.store(keep_ptr + item * K + place, frame * S + token, mask=inside & left)
    tl.store(hide_ptr + item * M + place, frame * S + token, mask=inside & ~left)
    tl.store(keep_real_ptr + item * K + place, real.to(tl.uint8), mask=inside & left)
    tl.store(hide_real_ptr + item * M + place, real.to(tl.uint8), mask=inside & ~left)
