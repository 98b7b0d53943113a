"""The kernels of contrast.py: its equations on a GPU, tile by tile, with the same result each time.

One kernel sums over keys for a block of rows and keeps a running maximum; another redoes the similarities of such a
block and multiplies their gradient G with the keys. Which of the two sets of vectors is called the rows is free, so
the two serve for sums and gradients on either side. Where blocks of rows are too few to fill a GPU, the keys are
divided among several programs, whose results are added afterwards, in order.

G is computed relative to the largest weight, so that it fits 16 bits, in which it enters the product. exp is taken
to base 2, which is what the hardware has. A row or key past the end has a maximum of +inf and a weight of 0, one
without negatives a maximum of -inf: either way what does not count is replaced by 0 at last, whatever it came to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._launch import dot, power, precision, stages

PROGRAMS = 264  # at least as many as any GPU of today runs at once, two each
LOG2E = tl.constexpr(1.4426950408889634)


def sums(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, t, c, u) of contrast.py."""
    x = _aligned(x)
    y, key_ids = (x, row_ids) if y is None else (_aligned(y), key_ids)
    r, t = _sums_of_rows(x, y, scale, bias, row_ids, key_ids)
    c, u = _sums_of_rows(y, x, scale, bias, key_ids, row_ids) if columns else (r.new_empty(0), r.new_empty(0))
    return r, t, c, u


def gradients(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    r: Tensor,
    t: Tensor,
    a: Tensor,
    c: Tensor,
    u: Tensor,
    b: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for x, y, scale and bias: empty where not `wanted`."""
    twice, width, x = y is None, x.shape[1], _aligned(x)
    largest = torch.cat([a, b]).abs().amax()
    largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
    a, b = (a / largest, b / largest) if bias is not None else (a / largest * (-r).exp(), b / largest * (-c).exp())
    y, key_ids, u, b = (x, row_ids, t, a) if y is None else (_aligned(y), key_ids, u, b)
    d_x, d_y, d_scale, d_bias = (like.new_empty(0) for like in (x, x, scale, scale))
    if any((wanted[0], wanted[2], wanted[3])):
        d_rows, pull, mass = _gradient_of_rows(x, y, scale, bias, row_ids, key_ids, (t, a), (u, b))
        d_x = (d_rows[:, :width] * (scale * largest)).to(x.dtype) if wanted[0] else d_x
        d_scale = pull.sum() * largest / (2 if twice else 1) if wanted[2] else d_scale
        d_bias = mass.sum() * largest if wanted[3] else d_bias
    if wanted[1] and not twice:
        d_rows, _, _ = _gradient_of_rows(y, x, scale, bias, key_ids, row_ids, (u, b), (t, a))
        d_y = (d_rows[:, :width] * (scale * largest)).to(x.dtype)
    return d_x, d_y, d_scale, d_bias


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and of a width that loads of 16 bytes divide: without them registers overflow."""
    gap = -x.shape[1] % 16
    return F.pad(x, (0, gap)) if gap else x.contiguous()


def _sums_options(kind: torch.dtype, width: int) -> dict[str, Any]:
    size, depth, warps = (128, 64, 8) if kind.itemsize == 2 else (64, 32, 4)
    sizes = {"BN": size, "BM": size, "BD": power(width, 16, depth)}
    return {**sizes, "num_warps": warps, "num_stages": stages(3)}


def _gradient_options(kind: torch.dtype, width: int) -> dict[str, Any]:
    """BO columns of the gradient are in registers at once; where they are fewer than D, similarities are redone."""
    large = kind.itemsize == 2
    sizes = {"BN": 64, "BM": 64 if large else 32, "BD": power(width, 16, 32)}
    return {**sizes, "BO": power(width, 16, 256 if large else 128), "num_warps": 8, "num_stages": 2}


def _divided(blocks: int, keys: int, size: int) -> int:
    """Among how many programs the keys of a block of rows are divided."""
    return max(1, min(PROGRAMS // blocks, -(-keys // (4 * size))))


def _sums_of_rows(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, row_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    N, M, D = len(x), len(y), x.shape[1]
    options = _sums_options(x.dtype, D)
    blocks = triton.cdiv(N, options["BN"])
    parts = _divided(blocks, M, options["BM"])
    out, top = scale.new_empty(parts, N), scale.new_empty(parts if bias is None else 0, N)
    arrays = (x, y, scale, *_or_any((bias, row_ids, key_ids), scale), out, top)
    flags = {"KIN": row_ids is not None, "SIGMOID": bias is not None, "PRECISION": precision(x.dtype)}
    _sums_kernel[(blocks, parts)](*arrays, N, M, D=D, **flags, **options)
    if bias is not None:
        return out.sum(0), top.flatten()
    t = top.amax(0)
    total = (out * torch.exp(top - t.clamp(min=torch.finfo(t.dtype).min))).sum(0)
    return total.clamp(min=1).log(), t


def _gradient_of_rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    of_rows: tuple[Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_j G_ij y_j [N, D], sum_j G_ij x_i . y_j [N], sum_j G_ij [N]), given (maxima, weights) of both sides."""
    N, M, D = len(x), len(y), x.shape[1]
    options = _gradient_options(x.dtype, D)
    blocks, wide = triton.cdiv(N, options["BN"]), triton.cdiv(D, options["BO"])
    parts = _divided(blocks * wide, M, options["BM"])
    out, pull, mass = scale.new_empty(parts, N, D), scale.new_empty(parts, N), scale.new_empty(parts, N)
    sides = {"ROWS": len(of_rows[1]) > 0, "KEYS": len(of_keys[1]) > 0}
    ends = [part.contiguous() for part in (*of_rows, *of_keys)]
    arrays = (x, y, scale, *_or_any((bias, row_ids, key_ids), scale), *ends, out, pull, mass)
    flags = {"KIN": row_ids is not None, "SIGMOID": bias is not None, "PRECISION": precision(x.dtype)}
    _gradient_kernel[(blocks, wide, parts)](*arrays, N, M, D=D, **flags, **sides, **options)
    return out[0] if parts == 1 else out.sum(0), pull, mass


def _or_any(arrays: tuple[Tensor | None, ...], other: Tensor) -> list[Tensor]:
    """Contiguous; where there is none, another, that the kernel is told not to read."""
    return [other if array is None else array.contiguous() for array in arrays]


@triton.jit
def _similarities(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, rows, keys, N, M, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr
):
    """x_i . y_j of these rows and keys, 0 past the end of either."""
    s = tl.zeros([rows.shape[0], keys.shape[1]], tl.float32)
    for first in range(0, D, BD):
        depth = first + tl.arange(0, BD)
        x = tl.load(x_ptr + rows[:, None] * D + depth, mask=(rows[:, None] < N) & (depth < D), other=0.0)
        y = tl.load(y_ptr + keys * D + depth[:, None], mask=(keys < M) & (depth[:, None] < D), other=0.0)
        s = dot(x, y, s, PRECISION)
    return s


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) = max(x, 0) + 2 atanh(u / (2 + u)), u = exp(-|x|): a series that keeps small results exact."""
    u = tl.exp(-tl.abs(x))
    t = u / (2 + u)  # at most 1/3
    z = t * t
    series = 1 / 11 + z * (1 / 13 + z * (1 / 15))
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * series)))
    return tl.maximum(x, 0.0) + 2 * t * (1 + z * series)


@triton.jit(do_not_specialize=["N", "M"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row_ids_ptr,
    key_ids_ptr,
    out_ptr,
    top_ptr,
    N,
    M,
    D: tl.constexpr,
    KIN: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    part = tl.program_id(1)
    span = tl.cdiv(tl.cdiv(M, BM), tl.num_programs(1)) * BM
    scale = tl.load(scale_ptr)
    if KIN:
        row_ids = tl.load(row_ids_ptr + rows, mask=rows < N, other=0)
    if SIGMOID:
        bias = tl.load(bias_ptr)
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    for first in range(part * span, tl.minimum(part * span + span, M), BM):
        keys = first + tl.arange(0, BM).to(tl.int64)  # [BM]
        counts = (keys < M)[None, :]
        if KIN:
            counts = counts & (row_ids[:, None] != tl.load(key_ids_ptr + keys, mask=keys < M, other=0)[None, :])
        s = _similarities(x_ptr, y_ptr, rows, keys[None, :], N, M, D, BD, PRECISION)  # [BN, BM]
        if SIGMOID:
            total += tl.sum(tl.where(counts, _softplus(s * scale + bias), 0.0), 1)
        else:
            s = tl.where(counts, s * scale, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.maximum(new, -3e38)  # exp2(-inf - base) is 0
            total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
            top = new
    place = part.to(tl.int64) * N + rows
    tl.store(out_ptr + place, total, mask=rows < N)
    if not SIGMOID:
        tl.store(top_ptr + place, top, mask=rows < N)


@triton.jit(do_not_specialize=["N", "M"])
def _gradient_kernel(  # type: ignore[no-untyped-def]  # noqa: C901
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row_ids_ptr,
    key_ids_ptr,
    row_tops_ptr,
    row_weights_ptr,
    key_tops_ptr,
    key_weights_ptr,
    out_ptr,
    pull_ptr,
    mass_ptr,
    N,
    M,
    D: tl.constexpr,
    KIN: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BO: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    column = tl.program_id(1) * BO + tl.arange(0, BO)  # [BO]
    part = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(M, BM), tl.num_programs(2)) * BM
    scale = tl.load(scale_ptr)
    if KIN:
        row_ids = tl.load(row_ids_ptr + rows, mask=rows < N, other=0)
    if SIGMOID:
        bias = tl.load(bias_ptr)
    if ROWS:
        row_weights = tl.load(row_weights_ptr + rows, mask=rows < N, other=0.0)
        if not SIGMOID:
            row_tops = tl.load(row_tops_ptr + rows, mask=rows < N, other=float("inf"))
    acc = tl.zeros([BN, BO], tl.float32)
    pull = tl.zeros([BN], tl.float32)
    mass = tl.zeros([BN], tl.float32)
    for first in range(part * span, tl.minimum(part * span + span, M), BM):
        keys = first + tl.arange(0, BM).to(tl.int64)  # [BM]
        counts = (keys < M)[None, :]
        if KIN:
            counts = counts & (row_ids[:, None] != tl.load(key_ids_ptr + keys, mask=keys < M, other=0)[None, :])
        s = _similarities(x_ptr, y_ptr, rows, keys[None, :], N, M, D, BD, PRECISION)  # [BN, BM]
        g = tl.zeros([BN, BM], tl.float32)
        if ROWS:
            if SIGMOID:
                g += row_weights[:, None]
            else:
                g += row_weights[:, None] * tl.exp2((s * scale - row_tops[:, None]) * LOG2E)
        if KEYS:
            weight = tl.load(key_weights_ptr + keys, mask=keys < M, other=0.0)[None, :]
            if SIGMOID:
                g += weight
            else:
                key_tops = tl.load(key_tops_ptr + keys, mask=keys < M, other=float("inf"))
                g += weight * tl.exp2((s * scale - key_tops[None, :]) * LOG2E)
        if SIGMOID:
            g *= tl.sigmoid(s * scale + bias)
        g = tl.where(counts, g, 0.0)
        pull += tl.sum(g * s, 1)
        mass += tl.sum(g, 1)
        inside = (keys[:, None] < M) & (column < D)
        y = tl.load(y_ptr + keys[:, None] * D + column, mask=inside, other=0.0)  # [BM, BO]
        acc = dot(g.to(y.dtype), y, acc, PRECISION)
    place = part.to(tl.int64) * N + rows
    tl.store(out_ptr + place[:, None] * D + column, acc, mask=(rows[:, None] < N) & (column < D))
    if tl.program_id(1) == 0:
        tl.store(pull_ptr + place, pull, mask=rows < N)
        tl.store(mass_ptr + place, mass, mask=rows < N)
