"""Randomness as a function (law 1): Philox-4x32-10 of (run seed, purpose, epoch, sample id).

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://www.thesalmons.org/john/random123/papers/random123sc11.pdf. One call maps a counter of four
32-bit words and a key of two to four random words. Here

    key     = 64 bits of a hash of (seed, purpose)
    counter = (block, id low, id high, 0)

so a draw depends on the run's seed, on what it is for and on the sample, and on nothing else: not on
the batch, the worker, the process or what was drawn before a resume. `block` counts fours of words
within one stream. NumPy, torch on any device and Triton's `tl.philox` give the same bits.

An id carries the epoch in its high bits: `tag(epoch, sample)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
SAMPLE_BITS = 40  # 2**40 samples, 2**23 epochs

Words = TypeVar("Words", np.ndarray[Any, Any], Tensor)


def philox(counter: tuple[Words, ...], key: tuple[int, int]) -> tuple[Words, ...]:
    """Four words of counter -> four random words, elementwise.

    Words are 32-bit values held in int64 tensors, or in uint64 arrays: signed overflow wraps, and
    masking the low 32 bits of each half makes both the same.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        # Products of two 32-bit words fill 64 bits; as int64 they may come out negative, so the
        # shifted half is masked to undo the sign extension.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The Philox key of a purpose in a run."""
    digest = xxhash.xxh3_64_intdigest(f"{seed}\0{purpose}".encode())
    return digest & WORD, digest >> 32


def tag(epoch: Any, sample: Any) -> Any:
    """The id of a sample in an epoch: what draws are keyed by. Works on ints, arrays and tensors."""
    return (epoch << SAMPLE_BITS) | sample


def untag(ident: Any) -> tuple[Any, Any]:
    """(epoch, sample) of an id."""
    return ident >> SAMPLE_BITS, ident & ((1 << SAMPLE_BITS) - 1)


def words(ids: Tensor, count: int, key: tuple[int, int], start: int) -> Tensor:
    """The first `count` words of each of `ids` [B] from block `start` on: int64 [B, count]."""
    block = torch.arange(start, start + -(-count // 4), device=ids.device)[None]  # [1, blocks]
    counter = (block, (ids & WORD)[:, None], (ids >> 32)[:, None], torch.zeros_like(block))
    # The rounds mix rows with columns, so that each word comes out [B, blocks].
    return torch.stack(philox(counter, key), -1).flatten(1)[:, :count].contiguous()


FASTER: dict[str, Callable[[Tensor, int, tuple[int, int], int], Tensor]] = {}
"""By type of device, what makes the same words as `words` in less time."""


class Stream:
    """Random numbers for each of B samples; every call gives the next ones, [B, *shape].

    A stream is made where it is used, from (seed, purpose, ids), so replaying the calls replays the
    numbers. On CPU and GPU the bits and uniforms are equal; normals agree to the last digit or two.
    """

    def __init__(self, key: tuple[int, int], ids: Tensor) -> None:
        self.key, self.ids, self._block = key, ids, 0

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.ids.device

    def take(self, count: int) -> int:
        """Leave the next `count` words to what makes them itself, from (key, ids, the block returned)."""
        first, self._block = self._block, self._block + -(-count // 4)
        return first

    def bits(self, *shape: int) -> Tensor:
        """Uniform 32-bit words in an int64 tensor."""
        count = math.prod(shape)
        out = FASTER.get(self.device.type, words)(self.ids, count, self.key, self.take(count))
        return out.reshape(len(self.ids), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1), multiples of 2**-24."""
        return (self.bits(*shape) >> 8).float() * 2.0**-24

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 in [low, high)."""
        return low + (high - low) * self.uniform(*shape)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """True with this probability."""
        return self.uniform(*shape) < probability

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 (Box and Muller 1958)."""
        u, v = self.uniform(2, *shape).unbind(1)
        return (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel float32: -log(-log(u)), u in (0, 1)."""
        u = ((self.bits(*shape) >> 9).float() + 0.5) * 2.0**-23
        return -torch.log(-torch.log(u))

    def integers(self, high: int | Tensor, *shape: int) -> Tensor:
        """int64 in [0, high), `high` at most 2**31; a tensor broadcasts against [B, *shape].

        The high word of a 32 x 32-bit product (Lemire 2019): biased by less than high / 2**32.
        """
        return (self.bits(*shape) * high) >> 32

    def permutation(self, n: int) -> Tensor:
        """Each row a permutation of range(n): [B, n]."""
        return self.bits(n).argsort(dim=1, stable=True)


def stream(seed: int, purpose: str, ids: Tensor) -> Stream:
    """The stream of each sample in `ids` [B] int64 for a purpose."""
    return Stream(key_of(seed, purpose), ids)


def shuffled(index: np.ndarray[Any, Any], n: int, seed: int, purpose: str) -> np.ndarray[Any, Any]:
    """Where a random permutation of range(n) sends `index`, without making the permutation.

    A balanced Feistel network of four Philox rounds on the smallest even number of bits that holds n,
    walked until it lands below n (Black and Rogaway 2002). Costs the same for a thousand samples and
    for a trillion.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, key = (1 << half) - 1, key_of(seed, purpose)
    out = np.array(index, dtype=np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & np.uint64(mask)
        zero = np.zeros_like(right)
        for turn in range(4):
            word = philox((right, zero + np.uint64(turn), zero, zero), key)[0]
            left, right = right, left ^ (word & np.uint64(mask))
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= n
    return out.astype(np.int64)
