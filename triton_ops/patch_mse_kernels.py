"""The kernels of patch_mse.py: errors of rows, their sum, and the gradient.

A program takes blocks of rows in turn, each row whole in its registers, and keeps of each lane of rows a sum of errors
and, by Welford's rule, the mean and the squares of its targets. A last program adds up what all have found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import narrow, programs
from ._launch import power as power_of_two
from ._triton import tl, triton
from .take_patches import counts, grid
from .take_patches_kernels import TILE, cell, pixel

PROGRAMS = 1056  # eight on each processor of a large GPU
BLOCK = 4096  # values behind one program that scales


def tile(rows: int, width: int) -> dict[str, int]:
    """Blocks of whole rows, as many as a program holds."""
    values = power_of_two(width, 16, 2**30)
    block = power_of_two(rows, 1, max(1, min(16, TILE // values)))
    return {"BR": block, "BD": values, "num_warps": 8 if block * values > TILE else 4}


def losses(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None,
    patch: int,
    normalize: bool,
    eps: float,
    power: int,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, spread, count, errors) of patch_mse.py."""
    (tokens, width), rows = counts(patches.shape, patch), index.numel()
    loss, spread, count = (guess.new_empty((), dtype=torch.float32) for _ in range(3))
    kept = guess.new_empty(guess.shape if wanted else 0)
    options = tile(max(1, rows), width)
    number = min(PROGRAMS, max(1, triton.cdiv(rows, options["BR"])))
    sums = loss.new_empty(4, number)
    index = index.contiguous()
    counted = index if valid is None else valid.contiguous()
    cells = grid(patches, patch)
    _errors_kernel[(number,)](
        *(guess, patches, index, counted, kept, sums, rows, index.shape[1], tokens, cells.shape[2], eps),
        *guess.stride(),
        *cells.stride(),
        D=width,
        PATCH=patch,
        C=cells.shape[5],
        VALID=valid is not None,
        NORMALIZE=normalize,
        POWER=power,
        WANTED=wanted,
        **options,
    )
    _sum_kernel[(1,)](sums, loss, spread, count, number, D=width, BLOCK=power_of_two(PROGRAMS, 1, 2**30))
    return loss, spread, count, kept


def scaled(kept: Tensor, grad: Tensor, count: Tensor, factor: float) -> Tensor:
    """kept * grad * factor / count."""
    out = torch.empty_like(kept, memory_format=torch.contiguous_format)
    if kept.numel():
        launch = programs(kept.numel(), BLOCK)
        _scale_kernel[launch](kept.contiguous(), grad, count, out, factor, kept.numel(), BLOCK=BLOCK)
    return out


@triton.jit(do_not_specialize=["N", "M", "T", "columns", "eps"])
def _errors_kernel(  # type: ignore[no-untyped-def]
    guess_ptr,
    x_ptr,
    index_ptr,
    valid_ptr,
    kept_ptr,
    sums_ptr,
    N,
    M,
    T,
    columns,
    eps,
    g_b,
    g_m,
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
    VALID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POWER: tl.constexpr,
    WANTED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    v = tl.arange(0, BD)  # [BD]
    inside = (v < D)[None, :]
    there = (v.to(tl.int64) * g_d)[None, :]
    here = pixel(v, x_i, x_j, x_c, PATCH, C)[None, :]
    number = tl.zeros([BR], tl.float32)  # of rows that counted in each lane
    total = tl.zeros([BR], tl.float32)
    mean = tl.zeros([BR], tl.float32)
    squares = tl.zeros([BR], tl.float32)
    for first in range(tl.program_id(0) * BR, N, tl.num_programs(0) * BR):
        row = first + tl.arange(0, BR)  # [BR], of B * M
        b, m = (row // M).to(tl.int64), (row % M).to(tl.int64)
        t = tl.load(index_ptr + row, mask=row < N, other=0)
        counts = row < N
        if VALID:
            counts = counts & (tl.load(valid_ptr + row, mask=row < N, other=0) != 0)
        known = (t >= 0) & (t < T)
        mask = counts[:, None] & inside
        where = (b * x_b + cell(tl.where(known, t, 0), columns, x_down, x_across))[:, None] + here
        x = tl.load(x_ptr + where, mask=mask & known[:, None], other=0.0).to(tl.float32)
        guess = tl.load(guess_ptr + (b * g_b + m * g_m)[:, None] + there, mask=mask, other=0.0).to(tl.float32)
        average = tl.sum(x, 1) / D  # [BR]
        centred = tl.where(inside, x - average[:, None], 0.0)
        apart = tl.sum(centred * centred, 1)  # [BR]
        target = x
        if NORMALIZE:
            variance = apart / (D - 1) + eps
            target = centred * (1 / tl.sqrt(variance))[:, None]
            apart = apart / variance
            average = average * 0
        error = tl.where(mask, tl.where(known[:, None], guess - target, float("nan")), 0.0)
        if POWER == 1:
            total += tl.sum(tl.abs(error), 1)
            error = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
        else:
            total += tl.sum(error * error, 1)
        if WANTED:
            place = kept_ptr + (row.to(tl.int64) * D)[:, None] + v[None, :]
            tl.store(place, narrow(error, kept_ptr.dtype.element_ty), mask=(row < N)[:, None] & inside)
        number += tl.where(counts, 1.0, 0.0)
        off = average - mean
        mean += tl.where(counts, off / tl.maximum(number, 1.0), 0.0)
        squares += tl.where(counts, apart + D * off * (average - mean), 0.0)
    count = tl.sum(number, 0)
    middle = tl.sum(number * mean, 0) / tl.maximum(count, 1.0)
    squares += D * number * (mean - middle) * (mean - middle)
    sums = sums_ptr + tl.program_id(0)
    tl.store(sums, count)
    tl.store(sums + tl.num_programs(0), tl.sum(total, 0))
    tl.store(sums + 2 * tl.num_programs(0), middle)
    tl.store(sums + 3 * tl.num_programs(0), tl.sum(squares, 0))


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(sums_ptr, loss_ptr, spread_ptr, count_ptr, N, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    item = tl.arange(0, BLOCK)
    number = tl.load(sums_ptr + item, mask=item < N, other=0.0)
    total = tl.load(sums_ptr + N + item, mask=item < N, other=0.0)
    mean = tl.load(sums_ptr + 2 * N + item, mask=item < N, other=0.0)
    squares = tl.load(sums_ptr + 3 * N + item, mask=item < N, other=0.0)
    count = tl.sum(number, 0)
    size = tl.maximum(count, 1.0)
    middle = tl.sum(number * mean, 0) / size
    squares += D * number * (mean - middle) * (mean - middle)
    tl.store(loss_ptr, tl.sum(total, 0) / (size * D))
    tl.store(spread_ptr, tl.sum(squares, 0) / (size * D))
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["factor", "N"])
def _scale_kernel(kept_ptr, grad_ptr, count_ptr, out_ptr, factor, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad_ptr) * factor / tl.maximum(tl.load(count_ptr), 1.0)
    kept = tl.load(kept_ptr + item, mask=item < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + item, narrow(kept * scale, out_ptr.dtype.element_ty), mask=item < N)
