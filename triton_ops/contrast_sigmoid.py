"""The loss of SigLIP, without its matrix of similarities.

Zhai, Mustafa, Kolesnikov and Beyer 2023, "Sigmoid loss for language image pre-training",
https://arxiv.org/abs/2303.15343, equation in section 3.2. For images x and texts y, and l_ij = scale x_i . y_j + bias,

    loss = -1/B sum_ij log sigmoid(z_ij l_ij)      z_ij = 1 where i = j, else -1

Over processes, texts and what is added to their gradient go round the ring of contrast_ring.py once, in the forward
pass, in which the gradients are found: the paper's section 3.3 swaps texts likewise, and redoes it backward.

Shapes: B pairs, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from .contrast import as_scalar, check_vectors, in_one_type, similarity
from .contrast_options import unit
from .contrast_pairs import negative_pairs
from .contrast_ring import Block, Ring, numbered


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    normalize: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of telling, for each image and text, whether they are a pair; over B: [].

    It has a first derivative with respect to all that are tensors, and no second one.

    Args:
        image: [B, D].
        text: [B, D]; row i belongs to image i.
        scale: what similarities are multiplied by; the paper starts at 10.
        bias: what is added to them; the paper starts at -10, near what most pairs need.
        normalize: make vectors unit ones first (contrast_options.py); otherwise they are taken as they are.
        group: the processes whose pairs take part, such as torch.distributed.group.WORLD, each with as many; None is
            this one alone. The loss is that of this process's images with all texts, and its gradients are those of
            the sum of all processes' losses, so that means over processes are one process's (contrast_ring.py). All
            processes must give their losses the same weight: with others, gradients are an error, on a GPU NaN.
    """
    check_vectors(image=image, text=text)
    image, text = in_one_type(*((unit(image), unit(text)) if normalize else (image, text)))
    scale, bias = as_scalar(scale, image), as_scalar(bias, image)
    ids = numbered(image, group)
    near = similarity(image, text) * scale + bias  # [B]
    arrays = (image, text, scale, bias, ids)
    others = negative_pairs(*arrays, ids) if group is None else _of_all(group, *arrays)
    return others - F.logsigmoid(near).mean()


def sigmoid_loss_reference(
    image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor, *, normalize: bool = False
) -> Tensor:
    """What `sigmoid_loss` must equal on one process; makes all similarities, [B, B]."""
    if normalize:
        image, text = (F.normalize(x, dim=-1, eps=1e-6) for x in (image, text))
    logits = scale * (image @ text.T) + bias  # [B, B]
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


@torch.compiler.disable
def _of_all(group: ProcessGroup, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """`negative_pairs` of this process's rows with the keys of all."""
    ring, arrays = Ring(group), (x, y, scale, bias)
    if ring.size == 1:
        return negative_pairs(*arrays, ids, ids)
    ring.hold_to_one_form(*arrays)
    wanted = [z.requires_grad and torch.is_grad_enabled() for z in arrays]
    return _PairsOfAll.apply(ring, wanted, *arrays, ids)  # type: ignore[no-untyped-call, no-any-return]


class _PairsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, wanted: list[bool], x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
        scale, bias, ids = others
        block: Block = [y, ids]
        found: list[Tensor] = []
        coming, behind = None, None
        for turn in range(ring.size):
            block = coming() if coming else block
            coming = ring.move(block, 1) if turn < ring.size - 1 else None
            parts = torch.ops.selfsup.contrast_pairs(x, block[0], scale, bias, ids, block[1], wanted)
            loss, d_x, d_y, d_scale, d_bias = (part.to(scale.dtype) for part in parts)
            parts = [loss, d_x, d_scale, d_bias]
            found = [whole.add_(part) for whole, part in zip(found, parts, strict=True)] if turn else parts
            if wanted[1]:
                behind = ring.move([d_y if behind is None else d_y.add_(behind()[0])], 1)
        loss, d_x, *of_numbers = found
        ctx.ring, ctx.wanted, ctx.kind = ring, wanted, x.dtype
        ctx.save_for_backward(d_x, d_x.new_empty(0) if behind is None else behind()[0], *of_numbers)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        weight = _alike(ctx.ring, weight) if ctx.wanted[1] else weight
        kinds = (ctx.kind, ctx.kind, weight.dtype, weight.dtype)
        saved = zip(ctx.saved_tensors, ctx.wanted, kinds, strict=True)
        return (None, None, *((g * weight).to(kind) if want else None for g, want, kind in saved), None)


def _alike(ring: Ring, weight: Tensor) -> Tensor:
    """The weight of this process's loss, which must be that of all: their parts of a gradient are already added."""
    every = ring.gathered(weight)  # [W]
    if weight.device.type == "cpu" and len(set(every.nan_to_num().tolist())) > 1:
        raise ContractError(f"processes must give this loss the same weight, and they give it {every.tolist()}")
    return torch.where((every == weight).all(), weight, torch.nan)
