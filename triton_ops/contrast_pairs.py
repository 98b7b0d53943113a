"""The loss of all pairs that are none, by a sigmoid, without the matrix of all similarities.

The part of SigLIP's loss (contrast_sigmoid.py) that has all pairs in it. For rows x_i and keys y_j, over the pairs
whose ids differ, and with l_ij = scale x_i . y_j + bias,

    loss = 1/N sum_ij log(1 + exp(l_ij))        G_ij = 1/N sigmoid(l_ij)       d bias = sum_ij G_ij
    d x_i = scale sum_j G_ij y_j                d y_j = scale sum_i G_ij x_i   d scale = sum_ij G_ij x_i . y_j

G needs nothing but l_ij, so the gradients that are wanted come with the loss, from the same similarities: 6 N M D
operations, where a second pass for the gradients would make them 8.

Shapes: N rows, M keys, D width. Products are in the type of the vectors; sums are in float32, in float64 for float64
vectors, as gradients are until the backward has a factor for them. On a CPU, and in float64, one tile of similarities
is there at a time; on a GPU, a panel of G, see contrast_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import can_launch, on_device_of
from ._triton import tl, triton
from .contrast_kernels import (
    BLOCKS,
    aligned,
    contiguous,
    counted,
    finish,
    multiply_panels,
    options_for,
    similarities,
)
from .contrast_tiles import pairs_in_tiles

LOG2E = tl.constexpr(1.4426950408889634)
RAISED = 4096.0  # what G is multiplied by in float16, in which most of it would be too small to be exact


def negative_pairs(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """The loss of the equation above, [], with a first derivative for x, y, scale and bias.

    x [N, D] and y [M, D] are of one type, scale and bias [] are exact; ids are int64 [N] and [M].
    """
    arrays = (x, y, scale, bias)
    wanted = [z.requires_grad and torch.is_grad_enabled() for z in arrays]
    loss: Tensor = torch.ops.selfsup.contrast_pairs(*arrays, row_ids, key_ids, wanted)[0]
    return loss


@torch.library.custom_op("selfsup::contrast_pairs", mutates_args=())
def _pairs(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launched = can_launch(x) and x.dtype != torch.float64
    compute = pairs_in_panels if launched else pairs_in_tiles
    with on_device_of(x), torch.autocast(x.device.type, enabled=False):
        return compute(x, y, scale, bias, row_ids, key_ids, wanted)


@_pairs.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_ids: Any, key_ids: Any, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        scale.new_empty(()),
        scale.new_empty(x.shape if wanted[0] else 0),
        scale.new_empty(y.shape if wanted[1] else 0),
        scale.new_empty(() if wanted[2] else 0),
        scale.new_empty(() if wanted[3] else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.kind = inputs[-1], inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    kinds = (ctx.kind, ctx.kind, grad.dtype, grad.dtype)
    found = (
        (g * grad).to(kind) if want else None
        for g, want, kind in zip(ctx.saved_tensors, ctx.wanted, kinds, strict=True)
    )
    return (*found, None, None, None)


_pairs.register_autograd(_backward, setup_context=_keep)


def pairs_in_panels(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients for x, y, scale and bias: empty where not `wanted`."""
    kind, width, x, y = x.dtype, x.shape[1], aligned(x), aligned(y)
    raised = RAISED if kind == torch.float16 else 1.0
    arrays = (x, y, scale, bias, *contiguous(row_ids, key_ids, other=scale))
    options = {"KIN": row_ids is not None, **options_for(x)}
    found = []

    def write(g: Tensor, rows: slice, keys: slice, *, wanted: bool = True) -> None:
        grid = tuple(triton.cdiv(part.stop - part.start, options["BN"]) for part in (rows, keys))
        sums = scale.new_empty(3, *grid)
        sizes = (rows.start, rows.stop, keys.start, keys.stop, g.stride(0))
        _pairs_kernel[grid](*arrays, g, *sums, *sizes, GRADIENTS=wanted, RAISED=raised, **options)
        found.append(sums.flatten(1))

    d_x, d_y = (scale.new_zeros(z.shape) if want else None for z, want in zip((x, y), wanted[:2], strict=True))
    if wanted[0] or wanted[1]:
        multiply_panels(x, y, False, d_x, d_y, write)
    else:
        step = BLOCKS * options["BN"]
        for first in range(0, len(y), step):
            write(x, slice(0, len(x)), slice(first, min(first + step, len(y))), wanted=False)
    factor = scale / (raised * len(x))
    of_x, of_y = (scale.new_empty(0) if d is None else finish(d, factor, width, scale.dtype) for d in (d_x, d_y))
    loss, d_scale, d_bias = (part.sum() / len(x) for part in torch.cat(found, 1))
    d_scale, d_bias = (d if want else scale.new_empty(0) for d, want in zip((d_scale, d_bias), wanted[2:], strict=True))
    return loss, of_x, of_y, d_scale, d_bias


@triton.jit(do_not_specialize=["start", "stop", "first", "last"])
def _pairs_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row_ids_ptr,
    key_ids_ptr,
    out_ptr,
    loss_ptr,
    pull_ptr,
    mass_ptr,
    start,
    stop,
    first,
    last,
    pitch,
    D: tl.constexpr,
    KIN: tl.constexpr,
    GRADIENTS: tl.constexpr,
    RAISED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row = start + tl.program_id(0).to(tl.int64) * BN
    key = first + tl.program_id(1).to(tl.int64) * BN
    rows, keys = tl.minimum(stop - row, BN).to(tl.int32), tl.minimum(last - key, BN).to(tl.int32)
    s = similarities(x_ptr + row * D, y_ptr + key * D, rows, keys, D, BN, BD, PRECISION)  # [BN, BN]
    counts = counted(row_ids_ptr + row, key_ids_ptr + key, rows, keys, KIN, BN)
    z = tl.where(counts, s * tl.load(scale_ptr) + tl.load(bias_ptr), float("-inf"))
    e = tl.exp2(-tl.abs(z) * LOG2E)
    g = tl.where(z < 0, e, 1.0) / (1 + e)
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(pull_ptr + tile, tl.sum(g * s))
    tl.store(mass_ptr + tile, tl.sum(g))
    if GRADIENTS:
        lane = tl.arange(0, BN)
        place = out_ptr + (row - start) * pitch + (key - first) + lane[:, None] * pitch + lane
        inside = (lane < rows)[:, None] & (lane < keys)[None, :]
        tl.store(place, (g * RAISED).to(out_ptr.dtype.element_ty), mask=inside)
    # log(1 + e) = 2 atanh(h), h = e / (2 + e) <= 1/3: a series that keeps small results exact
    h = e / (2 + e)
    q = h * h
    series = 1 / 11 + q * (1 / 13 + q * (1 / 15))
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * series)))
    tl.store(loss_ptr + tile, tl.sum(tl.maximum(z, 0.0) + 2 * h * (1 + q * series)))
