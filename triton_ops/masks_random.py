"""Hide tokens at random, an exact number in every row.

He et al. 2021, "Masked autoencoders are scalable vision learners", https://arxiv.org/abs/2111.06377, section 3: patches
are drawn uniformly, without replacement. Of a row of n tokens

    max(1, floor((1 - share) n + slack))      are seen: those of least random word, the first ones of equal words

and the others are hidden. Words are those of `Stream.bits(T)`, so that a row is masked alike in any batch and however
long its neighbours are. Where the authors sort twice, for a mask and its inverse, here one launch gives the mask, the
visible and the hidden tokens, each in the order of the row, and the inverse: it reads B T bytes, and writes 18 B T.

Shapes: B rows of T tokens, K of which are seen and M hidden in a row without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsup.kernel import Stream
from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from ._masks import (
    EXACTLY,
    LONGEST,
    NOWHERE,
    Masked,
    bits_of,
    block_of,
    bound_of,
    check_rows,
    check_share,
    dealt,
    empty,
    exact,
    keys_of,
    repeated,
    store_masked,
)
from ._triton import tl, triton
from .philox import random_bits, signed

SLACK = 1e-6  # tokens: a tenth of ten is one, though in floating point (1 - 0.9) * 10 < 1


def random_mask(draw: Stream, real: Tensor, share: float) -> Masked:
    """Hide `hidden_count` tokens of every row, all sets of them alike likely.

    Takes T words of the stream. Has no gradient, and makes nothing wait for a GPU.

    Args:
        draw: a stream for each of B rows.
        real: bool [B, T]; which tokens are not padding.
        share: of a row's tokens, how many to hide at least; above 0, below 1.
    """
    check_rows(draw, real)
    check_share(share)
    start = draw.take(real.shape[1])
    return Masked(*torch.ops.selfsup.random_mask(draw.ids, real, share, 1, *draw.key, start))


def random_mask_reference(draw: Stream, real: Tensor, share: float) -> Masked:
    """What `random_mask` must equal; sorts every row."""
    return _masked(draw.bits(real.shape[1]), real, share)


def hidden_count(tokens: int, share: float) -> int:
    """M: how many of a row's tokens are hidden: at least this share, and not the last one. Grows with the row."""
    return max(0, tokens - max(1, int((1 - share) * tokens + SLACK)))


def _masked(words: Tensor, real: Tensor, share: float) -> Masked:
    """The mask that words [B, T] of 32 bits make."""
    tokens = real.sum(1, keepdim=True)  # [B, 1]
    visible = ((1 - share) * tokens.double() + SLACK).long().clamp(min=1)  # [B, 1], as `hidden_count` has it
    # A row draws the same keys however long its neighbours are: padding sorts last, and so is never hidden.
    order = words.masked_fill(~real, 2**32).argsort(dim=1, stable=True)  # [B, T]
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    hidden = torch.zeros_like(real).scatter(1, order, (place >= visible) & (place < tokens))
    return dealt(hidden, real, real.shape[1] - hidden_count(real.shape[1], share))


@torch.library.custom_op("selfsup::random_mask", mutates_args=())
def _random_mask(
    ids: Tensor, real: Tensor, share: float, frames: int, low: int, high: int, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A mask drawn for the first frame of real [B, F S], and repeated in all."""
    space = real.shape[1] // frames
    if real.is_cpu and frames > 1:  # a GPU would have to be waited for
        every = real.reshape(len(real), frames, space)
        if ((every != every[:, :1]).any(2) & every.any(2)).any():
            raise ContractError("a frame has other real tokens than the first one, and is not all padding")
    if not can_launch(ids, real) or space > LONGEST:
        one = _masked(random_bits(ids, space, (low, high), start), real[:, :space], share)
        return (*(repeated(one, real, frames) if frames > 1 else one),)
    found = empty(real, frames * hidden_count(space, share))
    if real.numel():
        lanes, warps = block_of(space)
        sizes = (frames, space, space - hidden_count(space, share))
        numbers = (bits_of(1 - share), bits_of(SLACK), signed((low, high)), start, *sizes)
        with on_device_of(real):
            _random_mask_kernel[(len(real) * frames,)](
                ids.contiguous(), real.contiguous(), *found, *numbers, BLOCK=lanes, num_warps=warps, **EXACTLY
            )
    return (*found,)


@_random_mask.register_fake
def _(
    ids: Tensor, real: Tensor, share: float, frames: int, low: int, high: int, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*empty(real, frames * hidden_count(real.shape[1] // frames, share)),)


@triton.jit(do_not_specialize=["seen", "slack", "key", "start", "F", "S", "K"])
def _random_mask_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    real_ptr,
    hidden_ptr,
    keep_ptr,
    hide_ptr,
    keep_real_ptr,
    hide_real_ptr,
    restore_ptr,
    seen,
    slack,
    key,
    start,
    F,
    S,
    K,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    first = tl.load(real_ptr + (item - item % F) * S + token, mask=token < S, other=0) != 0
    real = tl.load(real_ptr + item * S + token, mask=token < S, other=0) != 0
    tokens = tl.sum(first.to(tl.int32), 0)
    visible = tl.maximum((exact(seen) * tokens.to(tl.float64) + exact(slack)).to(tl.int32), 1)
    keys = tl.where(first, keys_of(tl.load(ids_ptr + item // F), start, key, BLOCK), NOWHERE)
    hidden = first & (keys >= bound_of(keys, visible, BLOCK))
    store_masked(
        hidden,
        first,
        real,
        token,
        item,
        hidden_ptr,
        keep_ptr,
        hide_ptr,
        keep_real_ptr,
        hide_real_ptr,
        restore_ptr,
        F,
        S,
        K,
    )
