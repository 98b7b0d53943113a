"""The random words of many samples in one launch, where plain torch takes about a hundred.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://www.thesalmons.org/john/random123/papers/random123sc11.pdf. Word j of sample b is

    out[b, 4 i + r] = Philox-4x32-10(counter = (start + i, id low, id high, 0), key)[r]

as in `selfsup.kernel.random`, with equal bits. Shapes: B samples, N words, G = ceil(N / 4) counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsup.kernel.random import words

from ._launch import can_launch, on_device_of, programs
from ._triton import tl, triton

BLOCK = 256  # counters behind one program


def random_bits(ids: Tensor, count: int, key: tuple[int, int], start: int = 0) -> Tensor:
    """Uniform 32-bit words for each sample: int64 [B, count].

    Args:
        ids: int64 [B], at least 0; see `selfsup.kernel.random.tag`.
        count: words for each sample, N.
        key: two 32-bit words, from `selfsup.kernel.random.key_of`.
        start: the first value of the counter, below 2**32 - N / 4; fours of words already drawn.
    """
    out: Tensor = torch.ops.selfsup.random_bits(ids, count, *key, start)
    return out


random_bits_reference = words
"""What `random_bits` must equal, in torch's int64 arithmetic."""


@torch.library.custom_op("selfsup::random_bits", mutates_args=())
def _random_bits(ids: Tensor, count: int, low: int, high: int, start: int) -> Tensor:
    if not can_launch(ids):
        return words(ids, count, (low, high), start)
    ids = ids.contiguous()
    out = ids.new_empty(len(ids), count)
    if groups := len(ids) * -(-count // 4):
        key = signed((low, high))
        with on_device_of(ids):
            _random_bits_kernel[programs(groups, BLOCK)](ids, out, key, start, len(ids), count, BLOCK=BLOCK)
    return out


@_random_bits.register_fake
def _(ids: Tensor, count: int, low: int, high: int, start: int) -> Tensor:
    return ids.new_empty(len(ids), count)


def signed(key: tuple[int, int]) -> int:
    """The key as a kernel takes it, one signed integer: Triton gives another type to what exceeds int64."""
    low, high = key
    return low | (high - (high >> 31 << 32)) << 32


@triton.jit
def four_words(ident, counter, key):  # type: ignore[no-untyped-def]
    """The words that each counter makes in the stream of an id; of one shape, or one of them a number."""
    counter = (counter + ident * 0).to(tl.uint32)
    zero = counter * 0
    return tl.philox(key, counter, ident.to(tl.uint32) + zero, (ident >> 32).to(tl.uint32) + zero, zero)


@triton.jit(do_not_specialize=["key", "start", "B", "N"])
def _random_bits_kernel(ids_ptr, out_ptr, key, start, B, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    G = tl.cdiv(N, 4)
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], of B * G counters
    row, group = item // G, item % G
    ident = tl.load(ids_ptr + row, mask=row < B, other=0)
    w0, w1, w2, w3 = four_words(ident, start + group, key)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [4 * BLOCK], in the order of the stream
    lane = tl.program_id(0).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    row, column = lane // (4 * G), lane % (4 * G)
    tl.store(out_ptr + row * N + column, words.to(tl.int64), mask=(row < B) & (column < N))
