"""The gradients of contrast.py on a GPU: a kernel for G, in the panels of contrast_kernels.py.

G is computed from similarities that are made anew, 2 N M D operations before the 4 of its products with x and y; where
the keys are the rows, N N D before 2 N N D. Without columns each number costs one exponential, otherwise two. In
float16 G is relative to the largest of the weights a and b, which may be too small for its range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .contrast_kernels import aligned, contiguous, counted, finish, multiply_panels, options_for, similarities

LOG2E = tl.constexpr(1.4426950408889634)


def gradients(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    r: Tensor,
    t: Tensor,
    a: Tensor,
    c: Tensor,
    u: Tensor,
    b: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, y and scale: empty where not `wanted`."""
    alone, kind, width, x = y is None, x.dtype, x.shape[1], aligned(x)
    y, key_ids, u, c, b = (x, row_ids, t, r, a) if y is None else (aligned(y), key_ids, u, c, b)
    largest = torch.cat([a, b]).abs().amax().clamp(min=1e-30) if kind == torch.float16 else None
    arrays = (x, y, scale, *contiguous(row_ids, key_ids, t, r, a, u, c, b, largest, other=scale))
    flags = {"KIN": row_ids is not None, "KEYS": len(b) > 0, "ALONE": alone, "RELATIVE": largest is not None}
    options = {**flags, **options_for(x)}

    pulls = []

    def write(g: Tensor, rows: slice, keys: slice) -> None:
        grid = tuple(triton.cdiv(size, options["BN"]) for size in g.shape)
        pulls.append(scale.new_empty(grid))
        sizes = (rows.start, rows.stop, keys.start, keys.stop, g.stride(0))
        _gradient_kernel[grid](*arrays, g, pulls[-1], *sizes, **options)

    d_x = scale.new_zeros(x.shape) if wanted[0] else None
    d_y = scale.new_zeros(y.shape) if wanted[1] and not alone else None
    multiply_panels(x, y, alone, d_x, d_y, write)
    factor = scale if largest is None else scale * largest
    of_x, of_y = (x.new_empty(0) if d is None else finish(d, factor, width, kind) for d in (d_x, d_y))
    if not wanted[2]:
        return of_x, of_y, scale.new_empty(0)
    pull = torch.cat([part.flatten() for part in pulls]).sum()
    return of_x, of_y, pull if largest is None else pull * largest


@triton.jit
def _top_and_weight(top_ptr, sum_ptr, weight_ptr, count, largest, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """(t, a exp(-r)) of a block of rows or keys, of which there are `count`: [BN] each."""
    lane = tl.arange(0, BN)
    top = tl.load(top_ptr + lane, mask=lane < count, other=0.0)
    weight = tl.load(weight_ptr + lane, mask=lane < count, other=0.0) / largest
    weight *= tl.exp2(-tl.load(sum_ptr + lane, mask=lane < count, other=0.0) * LOG2E)
    # All similarities of a row without negatives are -inf, and relative to +inf their exponential is 0.
    return tl.where(top == float("-inf"), float("inf"), top), weight


@triton.jit(do_not_specialize=["start", "stop", "first", "last"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    scale_ptr,
    row_ids_ptr,
    key_ids_ptr,
    t_ptr,
    r_ptr,
    a_ptr,
    u_ptr,
    c_ptr,
    b_ptr,
    largest_ptr,
    out_ptr,
    pull_ptr,
    start,
    stop,
    first,
    last,
    pitch,
    D: tl.constexpr,
    KIN: tl.constexpr,
    KEYS: tl.constexpr,
    ALONE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row = start + tl.program_id(0).to(tl.int64) * BN
    key = first + tl.program_id(1).to(tl.int64) * BN
    pull_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if ALONE and key < row:  # the tile across the diagonal writes this one too
        tl.store(pull_ptr, 0.0)
        return
    rows, keys = tl.minimum(stop - row, BN).to(tl.int32), tl.minimum(last - key, BN).to(tl.int32)
    lane = tl.arange(0, BN)
    product = similarities(x_ptr + row * D, y_ptr + key * D, rows, keys, D, BN, BD, PRECISION)  # [BN, BN]
    counts = counted(row_ids_ptr + row, key_ids_ptr + key, rows, keys, KIN, BN)
    s = tl.where(counts, product * tl.load(scale_ptr), float("-inf"))
    largest = tl.load(largest_ptr) if RELATIVE else 1.0
    t, a = _top_and_weight(t_ptr + row, r_ptr + row, a_ptr + row, rows, largest, BN)
    g = a[:, None] * tl.exp2((s - t[:, None]) * LOG2E)
    if KEYS:
        u, b = _top_and_weight(u_ptr + key, c_ptr + key, b_ptr + key, keys, largest, BN)
        g += b[None, :] * tl.exp2((s - u[None, :]) * LOG2E)
    # Each pair of rows counts once: above the diagonal is what is below it, but a tile on it has both.
    tl.store(pull_ptr, tl.sum(g * product) * (0.5 if ALONE and key == row else 1.0))
    g = g.to(out_ptr.dtype.element_ty)
    inside = (lane < rows)[:, None] & (lane < keys)[None, :]
    tl.store(out_ptr + (row - start) * pitch + (key - first) + lane[:, None] * pitch + lane, g, mask=inside)
    if ALONE and key > row and key < stop:
        inside = inside & (lane < stop - key)
        tl.store(out_ptr + (key - first) * pitch + (row - start) + lane * pitch + lane[:, None], g, mask=inside)
