"""The kernels of gumbel_quantize.py: a program has a row of V logits, and makes its noise from the sample's words.

Word j of a sample is the noise of its j-th logit, j = (frame * G + group) * V + entry. Words come in fours from one
counter, so a row that begins within a four has the few words before it made too, and not used. -log(u) is kept from 0,
which a GPU's logarithm near 1 might give. The result is the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import dot, narrow, power
from ._triton import tl, triton

PARTS, PROGRAMS = 16, 264  # of the rows whose gradients are added up for an entry, and of all programs that do so


def choose(
    logits: Tensor, codebook: Tensor, ids: Tensor | None, key: tuple[int, int], start: int
) -> tuple[Tensor, Tensor]:
    """The chosen entries [B, M, G, D] and their numbers [B, M, G]."""
    (B, M, G, V), D = logits.shape, codebook.shape[2]
    vectors, codes = codebook.new_empty(B, M, G, D), logits.new_empty(B, M, G, dtype=torch.int64)
    if rows := B * M * G:
        words = (logits if ids is None else ids.contiguous(), _word(key), start, M * G)
        arrays = (logits.contiguous(), codebook.contiguous(), *words, vectors, codes)
        sizes = {"G": G, "V": V, "D": D, "BD": power(D, 1, 8192), "NOISY": ids is not None, **_options(V)}
        _choose_kernel[(rows,)](*arrays, **sizes)
    return vectors, codes


def gradients(
    grad: Tensor,
    logits: Tensor,
    codebook: Tensor,
    codes: Tensor,
    ids: Tensor | None,
    key: tuple[int, int],
    start: int,
    temperature: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients for logits and codebook: empty where not `wanted`."""
    B, M, G, V = logits.shape
    to_logits, to_codebook = logits.new_empty(0), codebook.new_empty(0)
    if wanted[0]:
        to_logits = logits.new_empty(logits.shape)
        if rows := B * M * G:
            of_groups = grad.flatten(0, 1).transpose(0, 1).to(temperature.dtype)  # [G, B M, D]
            along = torch.bmm(of_groups, codebook.to(temperature.dtype).transpose(1, 2))  # [G, B M, V]
            words = (logits if ids is None else ids.contiguous(), _word(key), start, M * G)
            arrays = (logits.contiguous(), along, temperature, *words, to_logits, B * M)
            _scores_kernel[(rows,)](*arrays, G=G, V=V, NOISY=ids is not None, **_options(V))
    if wanted[1]:
        to_codebook = _of_codebook(grad.contiguous(), codes.contiguous(), codebook)
    return to_logits, to_codebook


def _of_codebook(grad: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    (G, V, D), rows = codebook.shape, grad.shape[0] * grad.shape[1]
    options = _entry_options(V, D)
    blocks = G * triton.cdiv(V, options["BV"]), triton.cdiv(D, options["BD"])
    parts = max(1, min(PARTS, PROGRAMS // (blocks[0] * blocks[1]), triton.cdiv(rows, 4 * options["BN"])))
    out = grad.new_empty(parts, G, V, D, dtype=torch.float32)
    _codebook_kernel[(blocks[0], blocks[1], parts)](grad, codes, out, rows, G=G, V=V, D=D, **options)
    return out.sum(0).to(codebook.dtype)


def _word(key: tuple[int, int]) -> int:
    """As one signed integer: Triton gives another type to what exceeds int64."""
    return key[0] | (key[1] - (key[1] >> 31 << 32)) << 32


def _options(entries: int) -> dict[str, Any]:
    """LANES for a row, and three more where it may begin within a four."""
    lanes = power(entries + (3 if entries % 4 else 0), 16, 8192)
    return {"LANES": lanes, "num_warps": power(lanes // 128, 1, 8)}


def _entry_options(entries: int, width: int) -> dict[str, Any]:
    return {"BV": power(entries, 16, 32), "BD": power(width, 16, 32), "BN": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, key, start, each, row, V: tl.constexpr, NOISY: tl.constexpr, LANES: tl.constexpr
):
    """(entry [LANES], its logit and noise: -inf where there is no such entry) of a row, of `each` a sample has."""
    entry = tl.arange(0, LANES)
    if NOISY:
        word = row % each * V
        if V % 4 != 0:
            entry -= (word % 4).to(tl.int32)
    x = tl.load(logits_ptr + row * V + entry, mask=(entry >= 0) & (entry < V), other=float("-inf")).to(tl.float32)
    if NOISY:
        counter = (start + word // 4 + tl.arange(0, LANES // 4)).to(tl.uint32)
        zero = counter * 0
        ident = tl.load(ids_ptr + row // each)
        low, high = zero + ident.to(tl.uint32), zero + (ident >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, counter, low, high, zero)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [LANES], in the order of the stream
        u = ((words >> 9).to(tl.float32) + 0.5) * (1 / 8388608)
        x -= tl.log(tl.maximum(-tl.log(u), 5.9e-8))
    return entry, x


@triton.jit(do_not_specialize=["key", "start", "each"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    codebook_ptr,
    ids_ptr,
    key,
    start,
    each,
    vectors_ptr,
    codes_ptr,
    G: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    NOISY: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry, x = _scores(logits_ptr, ids_ptr, key, start, each, row, V, NOISY, LANES)
    best = tl.max(x, 0)
    # The first of equals; what holds NaN alone is bounded, as it must not be looked up elsewhere.
    code = tl.minimum(tl.min(tl.where((x == best) & (entry >= 0), entry, V - 1), 0), V - 1).to(tl.int64)
    column = tl.arange(0, BD)
    vector = tl.load(codebook_ptr + (row % G * V + code) * D + column, mask=column < D)
    tl.store(vectors_ptr + row * D + column, vector, mask=column < D)
    tl.store(codes_ptr + row, code)


@triton.jit(do_not_specialize=["key", "start", "each", "N"])
def _scores_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    along_ptr,
    temperature_ptr,
    ids_ptr,
    key,
    start,
    each,
    out_ptr,
    N,
    G: tl.constexpr,
    V: tl.constexpr,
    NOISY: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry, x = _scores(logits_ptr, ids_ptr, key, start, each, row, V, NOISY, LANES)
    temperature = tl.load(temperature_ptr)
    e = tl.exp((x - tl.max(x, 0)) / temperature)
    p = e / tl.sum(e, 0)
    there = (entry >= 0) & (entry < V)
    along = tl.load(along_ptr + (row % G * N + row // G) * V + entry, mask=there, other=0.0)
    g = p * (along - tl.sum(p * along, 0)) / temperature
    tl.store(out_ptr + row * V + entry, narrow(g, out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _codebook_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    codes_ptr,
    out_ptr,
    N,
    G: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradients of the rows of a part that chose each of BV entries, added up by a product with their choices."""
    group = tl.program_id(0) // tl.cdiv(V, BV)
    entry = tl.program_id(0) % tl.cdiv(V, BV) * BV + tl.arange(0, BV)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    part = tl.program_id(2).to(tl.int64)
    span = tl.cdiv(tl.cdiv(N, BN), tl.num_programs(2)) * BN
    acc = tl.zeros([BV, BD], tl.float32)
    for first in range(part * span, tl.minimum(part * span + span, N), BN):
        n = first + tl.arange(0, BN).to(tl.int64)
        code = tl.load(codes_ptr + n * G + group, mask=n < N, other=-1)
        at = (n[:, None] * G + group) * D + column[None, :]
        grad = tl.load(grad_ptr + at, mask=(n[:, None] < N) & (column[None, :] < D), other=0.0).to(tl.float32)
        acc = dot((entry[:, None] == code[None, :]).to(tl.float32), grad, acc, "ieee")
    at = ((part * G + group) * V + entry[:, None]) * D + column[None, :]
    tl.store(out_ptr + at, acc, mask=(entry[:, None] < V) & (column[None, :] < D))
