"""The kernels of cross_entropy.py, which linear_cross_entropy_device.py uses too: one program for a row of logits.

A program measures its row, a block of classes at a time, with a running maximum, and makes the gradient on a second
turn through it. Where it does both, the second reads what the first left in the cache: of 264 programs that run at
once, rows of 30,522 logits in 16 bits are 16 MB. The logits may then be overwritten by the gradient, as every program
has read its whole row, by the reductions of the last block, before it writes.

A label that is no class reads nothing, and makes loss and gradient NaN. exp is taken to base 2, as the hardware has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import narrow, power
from ._triton import tl, triton
from .cross_entropy_options import Options, joined, losses_of, of_label, share

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)  # exp2(-inf - LOWEST) is 0, where -inf - -inf would be NaN
BLOCK = 1024  # labels that one program packs


def losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, numbers: list[float], group: str
) -> tuple[Tensor, Tensor]:
    """(the loss of every row [T], its top and rest [2, T])."""
    rows, labels = len(labels), labels.contiguous()
    out, measured = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (4, rows)))
    if rows:
        arrays: dict[str, Any] = {
            "logits": _readable(logits),
            "labels": labels,
            "weights": weights,
            "measured": measured,
        }
        launch_rows(rows, ignore_index, numbers, group, **arrays, losses=out)
    if group:
        measured = joined(measured, share(group, 1).group)
        classes, options = logits.shape[1] * share(group, 1).ranks, Options(*numbers)
        own = of_label(labels, weights, options, classes, torch.float32)
        found = losses_of(measured, own, weights, options, classes)
        out = torch.where(labels == ignore_index, 0.0, found)
    return out, measured[:2].contiguous()


def gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    kept: Tensor,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    group: str,
) -> Tensor:
    """The gradient for the logits where each row's loss counts `factor` [T] times."""
    out = logits.new_empty(logits.shape)
    if len(labels):
        arrays: dict[str, Any] = {
            "logits": _readable(logits),
            "labels": labels.contiguous(),
            "weights": weights,
            "measured": kept,
        }
        launch_rows(
            len(labels), ignore_index, numbers, group, **arrays, factor=factor.contiguous(), gradient=out, measure=False
        )
    return out


def _readable(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()


def launch_rows(
    rows: int,
    ignore_index: int,
    numbers: list[float],
    group: str,
    *,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    losses: Tensor | None = None,
    measured: Tensor | None = None,
    factor: Tensor | None = None,
    gradient: Tensor | None = None,
    packed: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    measure: bool = True,
    fill: bool = True,
) -> None:
    """Measure rows, or take what was measured, write losses if rows were measured, and a gradient if there is a place.

    Args:
        rows: how many, from `first` on.
        ignore_index: the label of rows without one.
        numbers: the options of the loss.
        group: of ranks that share the classes.
        logits: [rows, V]; classes lie side by side.
        labels: int64 [T].
        weights: float32, of all classes of all ranks.
        losses: float32 [T]; written where a row is reached, which is not so past the count of packed rows.
        measured: float32 [4, rows], or [2, rows] if it is given; not kept if None.
        factor: float32 [T] or [].
        gradient: [rows, V]; may be the logits.
        packed: (place of each row in labels, losses and factor, [T]; the count of those with a label).
        first: of the packed rows.
        measure: whether `measured` is an output.
        fill: whether to write zeros to the gradient past the count of packed rows.
    """
    mine, options, V = share(group, logits.shape[1]), Options(*numbers), logits.shape[1]
    classes = V * mine.ranks
    mass = logits.new_full((), classes, dtype=torch.float32) if weights is None else weights.sum()
    other = mass  # what the kernel is told not to read
    arrays = [
        other if x is None else x for x in (losses, measured, factor, gradient, weights, *(packed or (None,) * 2))
    ]
    gap = 0 if measured is None else measured.stride(0)
    strides = (logits.stride(0), 0 if gradient is None else gradient.stride(0), gap)
    ints = (first, ignore_index, mine.first, classes)
    floats = (options.smoothing, options.smoothing / classes, options.z_loss, options.softcap or 1.0, options.scale)
    flags = {
        "PACKED": packed is not None,
        "FILL": fill,
        "WEIGHTED": weights is not None,
        "SMOOTHED": options.smoothing > 0,
        "CAPPED": options.softcap > 0,
        "EACH": factor is not None and factor.dim() == 1,
        "MEASURE": measure,
        "KEEP": measure and measured is not None,
        "GRADIENT": gradient is not None,
    }
    _rows_kernel[(rows,)](logits, labels, *arrays, mass, *strides, *ints, *floats, V=V, **flags, **_row_options(V))


def _row_options(classes: int) -> dict[str, Any]:
    block = power(classes, 128, 1024)  # larger ones leave the registers with some options, on some GPUs
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def packed(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(rows with a label, in order, then those without, int64 [T]; the count of the former, int64 [1]).

    Two launches: each program counts a block of labels, then each adds up the blocks before its own.
    """
    labels, blocks = labels.contiguous(), -(-len(labels) // BLOCK)
    counts, place, total = labels.new_empty(blocks), labels.new_empty(len(labels)), labels.new_empty(1)
    if not blocks:
        return place, total.zero_()
    _count_kernel[(blocks,)](labels, counts, len(labels), ignore_index, BLOCK=BLOCK)
    _pack_kernel[(blocks,)](labels, counts, place, total, len(labels), blocks, ignore_index, BLOCK=BLOCK)
    return place, total


@triton.jit(do_not_specialize=["T", "ignore_index"])
def _count_kernel(labels_ptr, counts_ptr, T, ignore_index, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64)
    item = block * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + item, mask=item < T, other=0)
    tl.store(counts_ptr + block, tl.sum(((item < T) & (label != ignore_index)).to(tl.int64)))


@triton.jit(do_not_specialize=["T", "blocks", "ignore_index"])
def _pack_kernel(  # type: ignore[no-untyped-def]
    labels_ptr, counts_ptr, place_ptr, total_ptr, T, blocks, ignore_index, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], tl.int64)
    every = tl.zeros([BLOCK], tl.int64)
    for first in range(0, blocks, BLOCK):
        other = first + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + other, mask=other < blocks, other=0)
        every += count
        before += tl.where(other < block, count, 0)
    total, start = tl.sum(every), tl.sum(before)
    item = block * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + item, mask=item < T, other=0)
    real = (item < T) & (label != ignore_index)
    rank = start + tl.cumsum(real.to(tl.int64)) - 1  # of a labelled row; of others, how many are before, less one
    tl.store(place_ptr + tl.where(real, rank, total + item - rank - 1), item, mask=item < T)
    tl.store(total_ptr, total, mask=block == 0)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """A series where 1 - 2 / (exp(2 x) + 1) would lose digits."""
    u = tl.abs(x)
    u = tl.where(u > 20, 20.0, u)  # tl.minimum would lose a NaN
    far = 1 - 2 / (tl.exp2(2 * u * LOG2E) + 1)
    small = tl.where(u < 0.5, x, 0.0)
    s = small * small
    series = 62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075 - s * (929569 / 638512875)))
    near = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * series)))
    return tl.where(u < 0.5, small * near, tl.where(x < 0, -far, far))


@triton.jit(do_not_specialize=["measured_stride", "first", "ignore_index", "start", "classes"])
def _rows_kernel(  # type: ignore[no-untyped-def]  # noqa: C901
    x_ptr,
    labels_ptr,
    losses_ptr,
    measured_ptr,
    factor_ptr,
    out_ptr,
    weights_ptr,
    place_ptr,
    count_ptr,
    mass_ptr,
    x_stride,
    out_stride,
    measured_stride,
    first,
    ignore_index,
    start,
    classes,
    smoothing,
    even,
    z_loss,
    softcap,
    scale,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    FILL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    EACH: tl.constexpr,
    MEASURE: tl.constexpr,
    KEEP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    row = first + line
    counts = row >= 0
    if PACKED:
        counts = row < tl.load(count_ptr)
        row = tl.load(place_ptr + row, mask=counts, other=0)
    label = tl.load(labels_ptr + row, mask=counts, other=0)
    x_ptr += line * x_stride
    out_ptr += line * out_stride
    if (not counts) | (label == ignore_index):
        if GRADIENT and FILL:
            for begin in range(0, V, BLOCK):
                columns = begin + tl.arange(0, BLOCK)
                tl.store(out_ptr + columns, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=columns < V)
        if MEASURE:
            tl.store(losses_ptr + row, 0.0, mask=counts)
        if KEEP:
            for index in range(4):
                tl.store(measured_ptr + index * measured_stride + line, 0.0)
        return
    real = (label >= 0) & (label < classes)
    here = (label >= start) & (label < start + V)
    own = tl.where(real, 1 - smoothing, float("nan"))
    if WEIGHTED:
        own *= tl.load(weights_ptr + label, mask=real, other=0.0)
    mass = tl.load(mass_ptr)
    if MEASURE:
        # The label's logit is read before any of the row may be overwritten.
        true = tl.load(x_ptr + (label - start), mask=here, other=0.0).to(tl.float32) * scale
        if CAPPED:
            true = softcap * _tanh(true / softcap)
        top = float("-inf")
        total = 0.0
        spread = 0.0
        for begin in range(0, V, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = tl.load(x_ptr + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
            if CAPPED:
                z = softcap * _tanh(z / softcap)
            z = tl.where(columns < V, z, float("-inf"))
            new = tl.maximum(top, tl.max(z, 0))
            base = tl.maximum(new, LOWEST)
            total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((z - base) * LOG2E), 0)
            top = new
            if SMOOTHED:
                z = tl.where(columns < V, z, 0.0)
                if WEIGHTED:
                    z *= tl.load(weights_ptr + start + columns, mask=columns < V, other=0.0)
                spread += tl.sum(z, 0)
        rest = tl.log(total)
        loss = own * ((top - true) + rest) + z_loss * (top + rest) * (top + rest)
        if SMOOTHED:
            loss += even * ((mass * top - spread) + mass * rest)
        tl.store(losses_ptr + row, loss)
        if KEEP:
            tl.store(measured_ptr + line, top)
            tl.store(measured_ptr + measured_stride + line, rest)
            tl.store(measured_ptr + 2 * measured_stride + line, true)
            tl.store(measured_ptr + 3 * measured_stride + line, spread)
    else:
        top = tl.load(measured_ptr + line)
        rest = tl.load(measured_ptr + measured_stride + line)
    if GRADIENT:
        factor = tl.load(factor_ptr + row) if EACH else tl.load(factor_ptr)
        factor *= scale
        whole = factor * (own + even * mass + 2 * z_loss * (top + rest))
        own *= factor
        even *= factor
        for begin in range(0, V, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = tl.load(x_ptr + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
            if CAPPED:
                t = _tanh(z / softcap)
                z = softcap * t
            z = tl.where(columns < V, z, top)  # a power past the last would overflow
            g = whole * tl.exp2(((z - top) - rest) * LOG2E)
            g = tl.where(columns == label - start, g - own, g)
            if SMOOTHED:
                share = even
                if WEIGHTED:
                    share *= tl.load(weights_ptr + start + columns, mask=columns < V, other=0.0)
                g -= share
            if CAPPED:
                g *= 1 - t * t
            tl.store(out_ptr + columns, narrow(g, out_ptr.dtype.element_ty), mask=columns < V)
