"""The kernels of take_patches.py: one reads tokens where an index says, one writes gradients where it says.

An image is a grid of patches and each patch a grid of pixels: a token is at `cell` and its values at `pixel` from there
on. Tokens [B, T, D] are a grid of one row, so that one kernel serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import narrow, power
from ._triton import tl, triton
from .take_patches import counts, grid

PROGRAMS = 1056  # that sums over samples are divided among: eight on each processor of a large GPU
TILE = 4096  # values in the registers of a program


def tile(rows: int, width: int, held: int = TILE) -> dict[str, int]:
    """Blocks of rows and of their values: rows in one piece where they are short enough, as many as a program holds."""
    values = power(width, 16, 1024)
    return {"BR": power(rows, 1, min(16, held // values)), "BD": values}


def take(x: Tensor, index: Tensor, positions: Tensor | None, patch: int, missing: float) -> Tensor:
    """The op on a GPU; a token that does not exist is all `missing`."""
    tokens, width = counts(x.shape, patch)
    out = x.new_empty(*index.shape, width)
    if not out.numel():
        return out
    cells, where = grid(x, patch), (x if positions is None else positions)
    strides = (0, *where.stride())[-3:]  # those of [T, D] are those of every sample
    options = tile(index.numel(), width)
    launch = (triton.cdiv(index.numel(), options["BR"]), triton.cdiv(width, options["BD"]))
    _take_kernel[launch](
        *(x, index.contiguous(), where, out, index.numel(), index.shape[1], tokens, cells.shape[2], missing),
        *cells.stride(),
        *strides,
        D=width,
        PATCH=patch,
        C=cells.shape[5],
        POSITIONS=positions is not None,
        **options,
    )
    return out


def scatter(grad: Tensor, index: Tensor, shape: list[int], patch: int, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradient on a GPU. For the sum over samples these are divided into parts, which are added in order."""
    (samples, count), (tokens, width) = index.shape, counts(tuple(shape), patch)
    d_x = grad.new_empty(shape if wanted[0] else 0)
    options = tile(tokens, width)
    blocks = triton.cdiv(tokens, options["BR"])
    parts = min(samples, max(1, PROGRAMS // max(1, blocks))) if wanted[1] else samples
    sums = grad.new_empty((parts, tokens, width) if wanted[1] else 0, dtype=torch.float32)
    if samples * tokens * width and any(wanted):
        cells = grid(d_x, patch) if wanted[0] else grad.new_empty(1).expand(1, 1, tokens, 1, 1, 1)
        _scatter_kernel[(blocks * parts, triton.cdiv(width, options["BD"]))](
            *(grad, index.contiguous(), d_x, sums, samples, count, tokens, cells.shape[2], -(-samples // parts)),
            *grad.stride(),
            *cells.stride(),
            D=width,
            PATCH=patch,
            C=cells.shape[5],
            X=wanted[0],
            SUM=wanted[1],
            **options,
            BK=power(count, 16, 64),
        )
    return d_x, sums.sum(0) if wanted[1] else sums


@triton.jit
def cell(t, columns, down, across):  # type: ignore[no-untyped-def]
    """Where token t of a sample begins, of a grid with these strides."""
    return (t // columns) * down + (t % columns) * across


@triton.jit
def pixel(v, i, j, c, PATCH: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where value v of a token is, from its begin on."""
    if PATCH == 0:
        return v.to(tl.int64) * c
    return (v // (PATCH * C)).to(tl.int64) * i + (v // C % PATCH).to(tl.int64) * j + (v % C).to(tl.int64) * c


@triton.jit(do_not_specialize=["N", "K", "T", "columns", "missing"])
def _take_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    index_ptr,
    positions_ptr,
    out_ptr,
    N,
    K,
    T,
    columns,
    missing,
    x_b,
    x_down,
    x_across,
    x_i,
    x_j,
    x_c,
    p_b,
    p_t,
    p_d,
    D: tl.constexpr,
    PATCH: tl.constexpr,
    C: tl.constexpr,
    POSITIONS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR], of B * K
    v = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    t = tl.load(index_ptr + row, mask=row < N, other=-1)
    known = (t >= 0) & (t < T)
    b, t = row // K, tl.where(known, t, 0)
    inside = (v < D)[None, :]
    start = b * x_b + cell(t, columns, x_down, x_across)
    mask = known[:, None] & inside
    x = tl.load(x_ptr + start[:, None] + pixel(v, x_i, x_j, x_c, PATCH, C)[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if POSITIONS:
        where = (b * p_b + t * p_t)[:, None] + (v.to(tl.int64) * p_d)[None, :]
        x += tl.load(positions_ptr + where, mask=mask, other=0.0).to(tl.float32)
    x = narrow(tl.where(known[:, None], x, missing), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + v[None, :], x, mask=(row < N)[:, None] & inside)


@triton.jit
def next_of(index_ptr, t, last, K, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each token of t the first place after `last` in index [K] that names it; K where there is none."""
    found = last * 0 + K
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        named = tl.load(index_ptr + k, mask=k < K, other=-1)
        hit = (named[None, :] == t[:, None]) & (k[None, :] > last[:, None])
        found = tl.minimum(found, tl.min(tl.where(hit, k[None, :], K), 1))
    return found


@triton.jit(do_not_specialize=["B", "K", "T", "columns", "span"])
def _scatter_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    index_ptr,
    x_ptr,
    sums_ptr,
    B,
    K,
    T,
    columns,
    span,
    g_b,
    g_k,
    g_d,
    x_b,
    x_down,
    x_across,
    x_i,
    x_j,
    x_c,
    D: tl.constexpr,
    PATCH: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,
    SUM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(T, BR)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BR + tl.arange(0, BR)  # [BR], of T
    v = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    inside = (t < T)[:, None] & (v < D)[None, :]
    there = (v.to(tl.int64) * g_d)[None, :]
    here = cell(t, columns, x_down, x_across)[:, None] + pixel(v, x_i, x_j, x_c, PATCH, C)[None, :]
    total = tl.zeros([BR, BD], tl.float32)
    for turn in range(0, tl.minimum(span, B - part * span)):
        b = part * span + turn
        acc = tl.zeros([BR, BD], tl.float32)
        k = next_of(index_ptr + b * K, t, tl.full([BR], -1, tl.int32), K, BK)
        while tl.min(k, 0) < K:
            mask = (k < K)[:, None] & inside
            acc += tl.load(grad_ptr + b * g_b + (k.to(tl.int64) * g_k)[:, None] + there, mask=mask, other=0.0)
            k = next_of(index_ptr + b * K, t, k, K, BK)
        if X:
            tl.store(x_ptr + b * x_b + here, narrow(acc, x_ptr.dtype.element_ty), mask=inside)
        if SUM:
            total += acc
    if SUM:
        tl.store(sums_ptr + ((part * T + t) * D)[:, None] + v[None, :], total, mask=inside)
