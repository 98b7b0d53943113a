"""Hide blocks of a grid of patches, an exact number of patches in every image.

Bao, Dong, Piao and Wei 2021, "BEiT: BERT pre-training of image transformers", https://arxiv.org/abs/2106.08254,
algorithm 1; iBOT and DINOv2 hide by it, too. Of T = H W patches, C = round(share T) are hidden, by block after block.
Given |M| hidden patches, the next block has an area and a shape

    s uniform in [least, max(least, C - |M|)]      r = aspect^(1 - 2 u), u uniform in [0, 1)
    a = round(sqrt(s r)) rows                      b = round(sqrt(s / r)) columns

and a place uniform among those in the grid. r is as likely as 1 / r, as in the authors' code; the algorithm as it is
printed does not say so. What differs from it, and why:

* It goes on until more than C patches are hidden. Here the block that would hide too many is cut short, at its first
  rows or at its last, one as likely as the other, so that arrays have one shape and the head one size.
  (The authors' code refuses such a block and gives up after ten, which hides fewer than C patches, and not as many in
  every image.)
* A block that is longer than the grid is as long as the grid.
* After `ATTEMPTS` - 1 blocks the next one is the whole grid, cut short: no loop is without end. Of 100,000 images of
  14 x 14 patches none came to that at a share of 0.4, where 3.9 blocks are the mean and 13 were the most; of 20,000
  none did at 0.75, with 11.5 blocks, and 0.7 % at 0.9.

Block i of an image is made of words 4 i to 4 i + 3 of its stream, in float64, with sums and products that are rounded
alike everywhere; exp is one of these. On a GPU a program takes an image, and its loop ends when enough is hidden. One
launch reads nothing but the ids and writes 18 B T bytes.

Shapes: B images of T patches, in H rows of W, K of which are seen and C hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selfsup.kernel import Stream
from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from ._masks import EXACTLY, LONGEST, Masked, bits_of, block_of, check_share, dealt, empty, exact, store_masked
from ._triton import tl, triton
from .philox import four_words, random_bits, signed

ATTEMPTS = tl.constexpr(64)
TERMS = tl.constexpr(15)  # of the series of exp: 2e-14 off at sqrt(1 / 0.3), 5e-9 at sqrt(1 / 0.02)


def block_mask(
    draw: Stream, rows: int, columns: int, share: float = 0.4, *, least: int = 16, aspect: float = 0.3
) -> Masked:
    """Hide `block_count` patches of every image, in blocks.

    Takes 4 * ATTEMPTS words of the stream. Has no gradient, and makes nothing wait for a GPU.

    Args:
        draw: a stream for each of B images.
        rows: of patches, H.
        columns: of patches, W.
        share: of the patches, how many to hide; above 0, below 1.
        least: patches in the smallest block, at least 1.
        aspect: the least ratio of a block's sides, in [0.02, 1]; the largest is its inverse.
    """
    check_share(share)
    if min(rows, columns, least) < 1 or not 0.02 <= aspect <= 1:
        given = f"{rows} x {columns} patches, least = {least}, aspect = {aspect}"
        raise ContractError(f"a grid and its blocks have at least one patch, and aspect is in [0.02, 1]: {given}")
    start = draw.take(4 * ATTEMPTS.value)
    arguments = (rows, columns, block_count(rows * columns, share), least, -math.log(aspect) / 2)
    return Masked(*torch.ops.selfsup.block_mask(draw.ids, *arguments, *draw.key, start))


def block_mask_reference(
    draw: Stream, rows: int, columns: int, share: float = 0.4, *, least: int = 16, aspect: float = 0.3
) -> Masked:
    """What `block_mask` must equal."""
    words = draw.bits(ATTEMPTS.value, 4)
    return _masked(words, rows, columns, block_count(rows * columns, share), least, -math.log(aspect) / 2)


def block_count(patches: int, share: float) -> int:
    """C: how many patches are hidden; at least one, and not the last one."""
    return min(max(1, round(share * patches)), patches - 1)


def blocks(words: Tensor, need: Tensor, rows: int, columns: int, least: int, half: float) -> tuple[Tensor, ...]:
    """(first row, first column, rows, columns) of the block that four words [B, 4] make: int64 [B] each.

    need: int64 [B], how many patches are still to be hidden. half: log(1 / aspect) / 2.
    """
    u, v = ((words[:, i] >> 8).double() * 2.0**-24 for i in (0, 1))  # [B]
    side = ((need.clamp(min=least) - least) * u + least).sqrt()
    exponent = half * (1 - 2 * v)
    ratio = torch.ones_like(side)  # exp(exponent), the square root of r
    for k in range(TERMS.value, 0, -1):
        ratio = exponent * ratio * (1 / k) + 1
    height = (side * ratio + 0.5).long().clamp(1, rows)
    width = (side / ratio + 0.5).long().clamp(1, columns)
    top, left = words[:, 2] * (rows - height + 1) >> 32, words[:, 3] * (columns - width + 1) >> 32
    return top, left, height, width


def _masked(words: Tensor, rows: int, columns: int, count: int, least: int, half: float) -> Masked:
    """The mask that words [B, ATTEMPTS, 4] make."""
    patch = torch.arange(rows * columns, device=words.device)  # [T]
    row, column = patch // columns, patch % columns  # [T]
    hidden = torch.zeros(len(words), rows * columns, dtype=torch.bool, device=words.device)
    for attempt, four in enumerate(words.unbind(1)):
        need = count - hidden.sum(1)  # [B]
        if words.is_cpu and not need.any():  # a GPU would have to be waited for
            break
        top, left, height, width = (x[:, None] for x in blocks(four, need, rows, columns, least, half))  # [B, 1]
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # [B, T]
        fresh = ~hidden & (inside | (attempt == ATTEMPTS.value - 1))
        rank = fresh.cumsum(1)  # [B, T]
        rank = torch.where((four[:, :1] & 1).bool(), rank - 1, rank[:, -1:] - rank)
        hidden = hidden | (fresh & (rank < need[:, None]))
    return dealt(hidden, torch.ones_like(hidden), rows * columns - count)


@torch.library.custom_op("selfsup::block_mask", mutates_args=())
def _block_mask(
    ids: Tensor, rows: int, columns: int, count: int, least: int, half: float, low: int, high: int, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    patches = rows * columns
    if not can_launch(ids) or patches > LONGEST:
        words = random_bits(ids, 4 * ATTEMPTS.value, (low, high), start).view(-1, ATTEMPTS.value, 4)
        return (*_masked(words, rows, columns, count, least, half),)
    found = empty(ids[:, None].expand(-1, patches), count)
    if len(ids):
        lanes, warps = block_of(patches)
        numbers = (rows, columns, count, least, bits_of(half), signed((low, high)), start)
        with on_device_of(ids):
            _block_mask_kernel[(len(ids),)](ids.contiguous(), *found, *numbers, BLOCK=lanes, num_warps=warps, **EXACTLY)
    return (*found,)


@_block_mask.register_fake
def _(
    ids: Tensor, rows: int, columns: int, count: int, least: int, half: float, low: int, high: int, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*empty(ids[:, None].expand(-1, rows * columns), count),)


@triton.jit(do_not_specialize=["H", "W", "count", "least", "half", "key", "start"])
def _block_mask_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    hidden_ptr,
    keep_ptr,
    hide_ptr,
    keep_real_ptr,
    hide_real_ptr,
    restore_ptr,
    H,
    W,
    count,
    least,
    half,
    key,
    start,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    row, column, inside = patch // W, patch % W, patch < H * W
    ident = tl.load(ids_ptr + image)
    hidden = patch < 0
    attempt, need = 0, count
    while need > 0:
        w0, w1, w2, w3 = four_words(ident, start + attempt, key)
        # In float64, as in `blocks`; products with powers of two are exact.
        u, v = (w0 >> 8).to(tl.float64) * 2.0**-24, (w1 >> 8).to(tl.float64) * 2.0**-24
        side = tl.sqrt((tl.maximum(need, least) - least).to(tl.float64) * u + least.to(tl.float64))
        exponent = exact(half) * (1 - 2 * v)
        ratio = tl.full((), 1.0, tl.float64)
        for i in tl.static_range(TERMS):
            ratio = exponent * ratio * tl.full((), 1.0 / (TERMS - i), tl.float64) + 1
        height = tl.minimum(tl.maximum((side * ratio + 0.5).to(tl.int32), 1), H)
        width = tl.minimum(tl.maximum((side / ratio + 0.5).to(tl.int32), 1), W)
        top = (w2.to(tl.int64) * (H - height + 1) >> 32).to(tl.int32)
        left = (w3.to(tl.int64) * (W - width + 1) >> 32).to(tl.int32)
        block = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        fresh = (block | (attempt == ATTEMPTS - 1)) & inside & (hidden == 0)
        number = fresh.to(tl.int32)
        rank, total = tl.cumsum(number, 0), tl.sum(number, 0)
        rank = tl.where((w0 & 1) != 0, rank - 1, total - rank)
        hidden = hidden | (fresh & (rank < need))
        need -= tl.minimum(total, need)
        attempt += 1
    store_masked(
        hidden,
        inside,
        inside,
        patch,
        image,
        hidden_ptr,
        keep_ptr,
        hide_ptr,
        keep_real_ptr,
        hide_real_ptr,
        restore_ptr,
        1,
        H * W,
        H * W - count,
    )
