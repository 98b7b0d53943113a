"""The cross-entropy of given logits, of labelled rows only, without a copy of the logits in float32.

For logits x_t and the label y_t of each row, scaled, and held within -c and c if there is a softcap c (Bello et al.
2016, "Neural combinatorial optimization", https://arxiv.org/abs/1611.09940, section 4.2; the Gemma 2 report,
https://arxiv.org/abs/2408.00118, section 2),

    z = scale x     or     c tanh(scale x / c)                  L_t = log sum_v exp(z_tv)
    loss_t = (1 - e) w_y (L_t - z_ty) + e/V sum_v w_v (L_t - z_tv) + k L_t^2

with class weights w (1 if not given), label smoothing e (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section
7) and the z-loss k (PaLM, https://arxiv.org/abs/2204.02311, section 5, k = 1e-4). The mean divides the sum by the class
weights of the labels, sum_t w_y, as torch does; the z-loss, which no class weight multiplies, is divided by the same.
With s_t for what a row's loss counts in the end, 0 for rows without a label,

    d x_tv = s_t scale (1 - (z_tv / c)^2) (softmax(z_t)_v ((1 - e) w_y + e/V sum_u w_u + 2 k L_t)
                                           - (1 - e) w_y [v = y] - e/V w_v)

Bytes, for logits of 2: the losses read each labelled row once and keep L_t; the gradient reads it again and writes
every row, 6 in all for each logit. A gradient made with the losses would be 4, but another 4 in the backward,
to be multiplied with what is only known there, and it would be made where no gradient is wanted.

Across ranks each has equal shares of the classes, rank r those from r V / W on, with labels and class weights of all:
the loss is the same on every rank, and that of one; the gradient is that of this rank's logits.

Shapes: T rows, V classes. Softmax, losses and sums are in float32, in float64 for float64 logits; on a CPU a few rows
at a time. See cross_entropy_kernels.py for a GPU.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from .cross_entropy_options import (
    Options,
    check_arrays,
    check_labels,
    checked_options,
    exact,
    joined,
    labelled,
    losses_of,
    of_label,
    picked,
    pull_of,
    shaped,
    share,
    share_of_a_row,
    spread_of,
    to_gradient,
    weights_of,
)

AT_ONCE = 2**19  # logits for each thread of a CPU: 2 MB, that a cache may hold
LOG2 = math.log(2)  # exp2 is three times as fast as exp on a CPU


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of logits against labels: [] or, where nothing is reduced, [T]; float32, or float64.

    It has a first derivative with respect to the logits, and no second one. A label that is no class is an error on a
    CPU; on a GPU, where asking would make it wait, it makes the loss NaN.

    Args:
        logits: [T, V], of any floating type.
        labels: int64 [T], each below V, or `ignore_index` for rows that count for nothing.
        class_weights: [V], constant; the loss of a label is multiplied by that of its class.
        ignore_index: the label of rows without one.
        label_smoothing: 0 to 1, how much of a label is spread over all classes.
        z_loss: at least 0, the weight of log^2 of the sum of exponentials.
        softcap: above 0; logits come near it, and not past it.
        scale: of the logits, before the cap.
        reduction: the mean (0 where no row has a label), the sum, or each row's loss.
        group: the ranks that have a share of the classes each; V is then that of all, and logits are [T, V / W].
    """
    if logits.dim() != 2 or not logits.shape[1] or labels.shape != logits.shape[:1]:
        raise ContractError(
            f"logits and labels must be [T, V] and [T], and are {list(logits.shape)} and {list(labels.shape)}"
        )
    numbers = checked_options(label_smoothing, z_loss, softcap, scale)
    classes = logits.shape[1] * (1 if group is None else group.size())
    check_arrays(logits, labels, class_weights, classes, reduction)
    weights = weights_of(class_weights, logits.dtype)
    name = "" if group is None else group.group_name
    losses: Tensor = torch.ops.selfsup.cross_entropy(logits, labels, weights, ignore_index, numbers, name)[0]
    if reduction == "none":
        return losses
    return losses.sum() * (share_of_a_row(labels, weights, ignore_index, logits.dtype) if reduction == "mean" else 1)


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What `cross_entropy` must equal."""
    z = logits.to(exact(logits.dtype)) * scale  # [T, V]
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    counts = labels != ignore_index
    weights = None if class_weights is None else class_weights.to(z.dtype)
    options: Any = {"weight": weights, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(z, labels, reduction="none", **options) + z_loss * (z.logsumexp(-1) ** 2 * counts)
    if reduction == "none":
        return losses
    each = counts.to(z.dtype) if weights is None else weights[labels.where(counts, 0)] * counts
    return losses.sum() / (each.sum() if reduction == "mean" and counts.any() else 1)


def _parts(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[list[slice | Tensor], Tensor]:
    """(which rows with a label, a few at a time; room for as many, exact)."""
    kept = labelled(labels, ignore_index)
    total = len(labels) if kept is None else len(kept)
    size = max(1, AT_ONCE * torch.get_num_threads() // logits.shape[1])
    parts = [slice(first, min(first + size, total)) for first in range(0, total, size)]
    room = logits.new_empty(min(size, total), logits.shape[1], dtype=exact(logits.dtype))
    return [part if kept is None else kept[part] for part in parts], room


def _read(logits: Tensor, rows: slice | Tensor, room: Tensor) -> Tensor:
    """Rows of logits, exact; where that takes a copy it may be in `room`."""
    x = logits[rows]
    return x if x.dtype == room.dtype else room[: len(x)].copy_(x)


def _powers(z: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """exp(z - top) in the memory of `out`, for z [C, V] and top [C]; out may be z."""
    return torch.sub(z, top[:, None], out=out).mul_(1 / LOG2).exp2_()


def losses_in_chunks(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, numbers: list[float], group: str
) -> tuple[Tensor, Tensor]:
    """(the loss of every row [T], its top and rest [2, T]) on any device, a few rows at a time."""
    mine, options, kind = share(group, logits.shape[1]), Options(*numbers), exact(logits.dtype)
    classes = logits.shape[1] * mine.ranks
    here = None if weights is None else weights[mine.first : mine.first + logits.shape[1]]
    measured = logits.new_zeros(4, len(labels), dtype=kind)
    parts, room = _parts(logits, labels, ignore_index)
    for rows in parts:
        z = _read(logits, rows, room)
        z, _ = shaped(z, options, room[: len(z)])
        top = z.amax(-1)
        measured[0, rows] = top
        if options.smoothing:
            measured[3, rows] = spread_of(z, here, options)
        measured[1, rows] = _powers(z, top, room[: len(z)]).sum(-1).log_()
    true = picked(logits, labels - mine.first).to(kind)
    measured[2] = shaped(true, options, true)[0]
    measured = joined(measured, mine.group)
    found = losses_of(measured, of_label(labels, weights, options, classes, kind), weights, options, classes)
    return torch.where(labels == ignore_index, 0.0, found), measured[:2].clone()


def gradient_in_chunks(
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
    mine, options, kind = share(group, logits.shape[1]), Options(*numbers), exact(logits.dtype)
    classes = logits.shape[1] * mine.ranks
    here = None if weights is None else weights[mine.first : mine.first + logits.shape[1]]
    parts, room = _parts(logits, labels, ignore_index)
    whole = bool(parts) and isinstance(parts[0], slice)
    out = logits.new_empty(logits.shape) if whole else logits.new_zeros(logits.shape)
    own = of_label(labels, weights, options, classes, kind).masked_fill_(labels == ignore_index, 0)
    counts = torch.where(labels == ignore_index, 0.0, factor)
    pull = pull_of(kept, own, weights, options, classes, counts, (-kept[1]).exp())
    for rows in parts:
        y = labels[rows] - mine.first
        p = out[rows] if whole and out.dtype == kind else room[: len(y)]
        z, slope = shaped(_read(logits, rows, p), options, p)
        _powers(z, kept[0, rows], p)
        to_gradient(p, pull.at(rows), y, here, slope)
        if not whole:
            out[rows] = p.to(out.dtype)
        elif out.dtype != kind:
            out[rows] = p
    return out


@torch.library.custom_op("selfsup::cross_entropy", mutates_args=())
def _losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, numbers: list[float], group: str
) -> tuple[Tensor, Tensor]:
    check_labels(labels, ignore_index, logits.shape[1] * share(group, 1).ranks)
    with torch.autocast(logits.device.type, enabled=False):
        if can_launch(logits) and logits.dtype != torch.float64:
            from .cross_entropy_kernels import losses

            with on_device_of(logits):
                return losses(logits, labels, weights, ignore_index, numbers, group)
        return losses_in_chunks(logits, labels, weights, ignore_index, numbers, group)


@torch.library.custom_op("selfsup::cross_entropy_gradient", mutates_args=())
def _gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    kept: Tensor,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    group: str,
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        if can_launch(logits) and logits.dtype != torch.float64:
            from .cross_entropy_kernels import gradient

            with on_device_of(logits):
                return gradient(logits, labels, weights, kept, factor, ignore_index, numbers, group)
        return gradient_in_chunks(logits, labels, weights, kept, factor, ignore_index, numbers, group)


@_losses.register_fake
def _(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, numbers: list[float], group: str
) -> tuple[Tensor, Tensor]:
    rows, kind = logits.shape[0], exact(logits.dtype)
    return logits.new_empty(rows, dtype=kind), logits.new_empty(2, rows, dtype=kind)


@_gradient.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    kept: Tensor,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    group: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *arrays, ctx.ignore_index, ctx.numbers, ctx.group = inputs
    ctx.save_for_backward(*arrays, output[1])


def _backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.selfsup.cross_entropy_gradient(*ctx.saved_tensors, grad, ctx.ignore_index, ctx.numbers, ctx.group)
    return (found, None, None, None, None, None)


_losses.register_autograd(_backward, setup_context=_keep)
