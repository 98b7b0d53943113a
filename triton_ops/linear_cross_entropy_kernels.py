"""The products of linear_cross_entropy_device.py, of rows with a label only: programs end where these do.

Rows with a label come first in a list whose `count` of them is on the GPU. A chunk has `size` lines of hidden, h, and
of logits or their gradient g, line 0 for row `first` of the list; what is past the count is not read. H is the width
of a line of h, a multiple of 16, and WIDTH that of hidden; V classes, in lines STRIDE apart.
"""

from __future__ import annotations

from typing import Any

import torch

from ._launch import dot, narrow, stages
from ._triton import tl, triton


def product_options(kind: torch.dtype, head: bool = False) -> dict[str, Any]:
    """BR x BC results of a product, BK at a time of what it sums over; `head` is that which adds up biases as well."""
    if kind.itemsize == 2:
        depth, ahead = (32, 4) if head else (64, 3)
        return {"BR": 128, "BC": 128, "BK": depth, "num_warps": 8, "num_stages": stages(ahead)}
    return {"BR": 64, "BC": 64, "BK": 32, "num_warps": 8, "num_stages": 2}


@triton.jit(do_not_specialize=["first", "size"])
def logits_kernel(  # type: ignore[no-untyped-def]
    h_ptr,
    w_ptr,
    bias_ptr,
    count_ptr,
    out_ptr,
    first,
    size,
    H: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Blocks of rows come first, so that programs that run together share their part of the head."""
    begin = tl.program_id(0).to(tl.int64) * BR
    count = tl.minimum(tl.load(count_ptr) - first, size)
    if begin >= count:
        return
    line = begin + tl.arange(0, BR)
    column = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(0, H, BK):
        depth = start + tl.arange(0, BK)
        inside = (line[:, None] < count) & (depth < H)
        h = tl.load(h_ptr + line[:, None] * H + depth, mask=inside, other=0.0)
        inside = (column < V)[None, :] & (depth < H)[:, None]
        w = tl.load(w_ptr + column[None, :] * H + depth[:, None], mask=inside, other=0.0)
        acc = dot(h, w, acc, PRECISION)
    if BIASED:
        acc += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    inside = (line[:, None] < count) & (column < V)
    tl.store(out_ptr + line[:, None] * STRIDE + column, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "size"])
def hidden_kernel(  # type: ignore[no-untyped-def]
    g_ptr,
    w_ptr,
    count_ptr,
    out_ptr,
    first,
    size,
    H: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """g W over a part of the classes, [parts, size, H]."""
    begin = tl.program_id(0).to(tl.int64) * BR
    count = tl.minimum(tl.load(count_ptr) - first, size)
    if begin >= count:
        return
    line = begin + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(V, BK), tl.num_programs(2)) * BK
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, V), BK):
        depth = start + tl.arange(0, BK).to(tl.int64)
        inside = (line[:, None] < count) & (depth < V)
        g = tl.load(g_ptr + line[:, None] * STRIDE + depth, mask=inside, other=0.0)
        inside = (depth < V)[:, None] & (column < H)
        w = tl.load(w_ptr + depth[:, None] * H + column, mask=inside, other=0.0)
        acc = dot(g, w, acc, PRECISION)
    place = (part.to(tl.int64) * size + line)[:, None] * H + column
    tl.store(out_ptr + place, acc, mask=(line[:, None] < count) & (column < H))


@triton.jit(do_not_specialize=["first", "size", "parts"])
def scatter_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    place_ptr,
    count_ptr,
    last_ptr,
    out_ptr,
    first,
    size,
    parts,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BH: tl.constexpr,
):
    """The sum of the parts of a row, to where the row came from."""
    line = tl.program_id(0).to(tl.int64)
    if first + line >= tl.load(count_ptr):
        return
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros([BH], tl.float32)
    for part in range(0, parts):
        total += tl.load(partial_ptr + (part * size.to(tl.int64) + line) * H + column, mask=column < WIDTH, other=0.0)
    if SCALED:
        total *= tl.load(last_ptr)
    row = tl.load(place_ptr + first + line)
    tl.store(out_ptr + row * WIDTH + column, narrow(total, out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["first", "size"])
def head_kernel(  # type: ignore[no-untyped-def]  # noqa: C901
    g_ptr,
    h_ptr,
    count_ptr,
    last_ptr,
    acc_ptr,
    out_ptr,
    acc_bias_ptr,
    bias_ptr,
    first,
    size,
    H: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """g^T h and the sum of g over rows with a label, on top of what was, in float32 until the last chunk."""
    count = tl.minimum(tl.load(count_ptr) - first, size)
    if (not FIRST) and (not LAST) and count <= 0:
        return
    head = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    mass = tl.zeros([BR], tl.float32)
    for start in range(0, count, BK):
        line = start + tl.arange(0, BK).to(tl.int64)
        inside = (head < V)[:, None] & (line < count)
        g = tl.load(g_ptr + line * STRIDE + head[:, None], mask=inside, other=0.0)
        if BIAS:
            mass += tl.sum(g.to(tl.float32), 1)
        if WEIGHT:
            inside = (line < count)[:, None] & (column < H)
            h = tl.load(h_ptr + line[:, None] * H + column, mask=inside, other=0.0)
            acc = dot(g, h, acc, PRECISION)
    scale = 1.0
    if SCALED:
        scale = tl.load(last_ptr)
    place = head[:, None] * H + column
    inside = (head < V)[:, None] & (column < H)
    if WEIGHT:
        if not FIRST:
            acc += tl.load(acc_ptr + place, mask=inside, other=0.0)
        if LAST:
            tl.store(out_ptr + place, narrow(acc * scale, out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(acc_ptr + place, acc, mask=inside)
    if BIAS:
        inside = (head < V) & (tl.program_id(1) == 0)
        if not FIRST:
            mass += tl.load(acc_bias_ptr + head, mask=inside, other=0.0)
        if LAST:
            tl.store(bias_ptr + head, narrow(mass * scale, bias_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(acc_bias_ptr + head, mass, mask=inside)
