"""The sums of contrast.py on a GPU: one pass over the similarities, for rows and keys alike.

A program takes a block of rows against a span of keys, tile by tile, and keeps a running maximum and sum for its rows.
Of each tile it also writes the maximum and sum of every column, where those are wanted. A second kernel merges what
programs found, in order. These partial results have room in PARTIALS numbers: there are as many rows in a launch as
that allows, and further launches are merged with those before.

Where the keys are the rows, a program begins at the diagonal, and what it finds of the columns right of its block is
about further rows: N N D operations instead of 2 N N D. N M numbers cost one exponential each, two with columns.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import programs
from ._triton import tl, triton
from .contrast_kernels import aligned, contiguous, counted, options_for, similarities

PROGRAMS = 264  # at least as many as any GPU of today runs at once, two each
SPAN = 16  # tiles of a program at most, so that programs are many, and end at about the same time
PARTIALS = 2**23
MERGED = {"BS": 16, "BL": 128, "num_warps": 4}  # partial results, and what they are of, that a program merges at once
LOG2E = tl.constexpr(1.4426950408889634)


def sums(
    x: Tensor, y: Tensor | None, scale: Tensor, row_ids: Tensor | None, key_ids: Tensor | None, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, t, c, u) of contrast.py."""
    alone, x = y is None, aligned(x)
    y, key_ids = (x, row_ids) if y is None else (aligned(y), key_ids)
    r, t, c, u = (scale.new_empty(n) for n in (len(x), len(x), *2 * [len(y) if columns else 0]))
    of_keys = (r, t) if alone else (c, u) if columns else None
    flags = {"KIN": row_ids is not None, "COLUMNS": of_keys is not None, "ALONE": alone}
    options = {**flags, **options_for(x)}
    block = options["BN"]
    span = _span(len(x), len(y), block)
    parts = triton.cdiv(len(y), span)
    arrays = (x, y, scale, *contiguous(row_ids, key_ids, other=scale))
    for start, stop in _launches(len(x), len(y) if of_keys else 0, parts, block):
        blocks = triton.cdiv(stop - start, block)
        for_rows = scale.new_empty(2, parts, stop - start)
        for_keys = scale.new_empty(2, blocks if of_keys else 0, len(y))
        sizes = (start, stop, len(y), span)
        _sums_kernel[blocks, parts](*arrays, *for_rows, *for_keys, *sizes, **options)
        if of_keys:
            _merge(for_keys, *of_keys, start + block if alone else 0, block if alone else 0, continued=start > 0)
        _merge(for_rows, r[start:stop], t[start:stop], 0, 0, continued=alone)
    return r, t, c, u


def _span(rows: int, keys: int, block: int) -> int:
    """How many keys a program takes: fewer where programs would be too few to fill a GPU."""
    tiles = -(-rows // block) * -(-keys // block)
    return max(1, min(SPAN, tiles // PROGRAMS)) * block


def _launches(rows: int, columns: int, parts: int, block: int) -> list[tuple[int, int]]:
    """(first, last) of the rows of each launch."""
    size = max(1, PARTIALS // (columns + parts * block)) * block
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _merge(found: Tensor, r: Tensor, t: Tensor, bound: int, step: int, continued: bool) -> None:
    """Merge maxima and sums [2, S, L] into r and t [L]; what slot i says of places before bound + i step is none."""
    grid = programs(len(r), MERGED["BL"])
    _merge_kernel[grid](*found, r, t, *found.shape[1:], bound, step, CONTINUED=continued, **MERGED)


@triton.jit(do_not_specialize=["start", "stop", "M", "span"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    scale_ptr,
    row_ids_ptr,
    key_ids_ptr,
    row_tops_ptr,
    row_sums_ptr,
    key_tops_ptr,
    key_sums_ptr,
    start,
    stop,
    M,
    span,
    D: tl.constexpr,
    KIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALONE: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = start + block * BN
    rows = tl.minimum(stop - row, BN).to(tl.int32)
    lane = tl.arange(0, BN)
    scale = tl.load(scale_ptr)
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    left = part * span
    right = tl.minimum(left + span, M)
    if ALONE:
        left = tl.maximum(left, row)
    for key in range(left, right, BN):
        keys = tl.minimum(M - key, BN).to(tl.int32)
        s = similarities(x_ptr + row * D, y_ptr + key * D, rows, keys, D, BN, BD, PRECISION)  # [BN, BN]
        counts = counted(row_ids_ptr + row, key_ids_ptr + key, rows, keys, KIN, BN)
        s = tl.where(counts, s * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.maximum(new, -3e38)  # exp2(-inf - base) is 0
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
        top = new
        if COLUMNS:
            key_top = tl.max(s, 0)
            key_base = tl.maximum(key_top, -3e38)
            key_sum = tl.sum(tl.exp2((s - key_base[None, :]) * LOG2E), 0)
            tl.store(key_tops_ptr + block * M + key + lane, key_top, mask=lane < keys)
            tl.store(key_sums_ptr + block * M + key + lane, key_sum, mask=lane < keys)
    place = part * (stop - start) + (row - start) + lane
    tl.store(row_tops_ptr + place, top, mask=lane < rows)
    tl.store(row_sums_ptr + place, total, mask=lane < rows)


@triton.jit(do_not_specialize=["S", "L", "bound", "step"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    tops_ptr, sums_ptr, r_ptr, t_ptr, S, L, bound, step, CONTINUED: tl.constexpr, BS: tl.constexpr, BL: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)  # [BL]
    top = tl.full([BL], float("-inf"), tl.float32)
    total = tl.zeros([BL], tl.float32)
    if CONTINUED:  # with a maximum of -inf, it does not matter what the sum is
        top = tl.load(t_ptr + places, mask=places < L, other=float("-inf"))
        total = tl.exp(tl.load(r_ptr + places, mask=places < L, other=0.0))
    for first in range(0, S, BS):
        slots = first + tl.arange(0, BS).to(tl.int64)[:, None]  # [BS, 1]
        said = (slots < S) & (places < L) & (places >= bound + slots * step)
        tops = tl.load(tops_ptr + slots * L + places, mask=said, other=float("-inf"))
        sums = tl.load(sums_ptr + slots * L + places, mask=said, other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        base = tl.maximum(new, -3e38)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(sums * tl.exp2((tops - base[None, :]) * LOG2E), 0)
        top = new
    total = tl.where(total < 1, 1.0, total)  # of no key at all; and NaN remains what it is
    tl.store(r_ptr + places, tl.log(total), mask=places < L)
    tl.store(t_ptr + places, top, mask=places < L)
