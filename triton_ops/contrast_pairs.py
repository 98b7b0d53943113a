"""The loss of all pairs that are none, by a sigmoid, without the matrix of all similarities.

The part of SigLIP's loss (contrast_sigmoid.py) that has all pairs in it. For rows x_i and keys y_j, over the pairs
whose ids differ, and with l_ij = scale x_i . y_j + bias,

    loss = 1/N sum_ij log(1 + exp(l_ij))        G_ij = 1/N sigmoid(l_ij)       d bias = sum_ij G_ij
    d x_i = scale sum_j G_ij y_j                d y_j = scale sum_i G_ij x_i   d scale = sum_ij G_ij x_i . y_j

G needs nothing but l_ij, so the gradients that are wanted come with the loss, from the same similarities: 6 N M D
operations, where a second pass for the gradients would make them 8.

Shapes: N rows, M keys, D width. Products are in the type of the vectors; sums are in float32, in float64 for float64
vectors. On a CPU, and in float64, one tile of similarities is there at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contrast_tiles import kept, pairs_in_tiles


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
    with torch.autocast(x.device.type, enabled=False):
        return pairs_in_tiles(x, y, scale, bias, row_ids, key_ids, wanted)


@_pairs.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_ids: Any, key_ids: Any, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind = kept(x.dtype)
    return (
        scale.new_empty(()),
        x.new_empty(x.shape if wanted[0] else 0, dtype=kind),
        y.new_empty(y.shape if wanted[1] else 0, dtype=kind),
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
