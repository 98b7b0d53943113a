"""The cross-entropy of a linear head, of labelled rows only, without the matrix of all its logits.

For rows h_t of `hidden`, a head with rows w_v and biases b_v, and the label y_t of each row,

    x_tv = h_t . w_v + b_v        loss_t = cross-entropy of x_t and y_t, as cross_entropy.py has it with all its options

and with G_tv = d loss_t / d x_tv, and s_t what the loss of a row counts in the end (for the mean, 1 / the class weights
of all labels; 0 for rows without a label)

    d h_t = s_t sum_v G_tv w_v      d w_v = sum_t s_t G_tv h_t      d b_v = sum_t s_t G_tv

G is a few rows tall at any time, and has only rows with a label. Where a gradient is wanted it is computed with the
loss, from the same logits, so a training step costs three products, 6 n H V operations for n rows with a label;
with `reduction = "none"`, whose s is known in the backward only, the logits are computed twice.

Across ranks each has equal shares of the classes, rank r those from r V / W on: its rows of the head and its biases,
with hidden, labels and class weights the same on all. The loss is the same on every rank, and that of one. The
gradients of the head are those of the rank's own classes; that of hidden is summed over ranks, and the same on all.

Shapes: T rows, H width of a row, V classes. Products are in the type of the inputs, or of autocast; softmax, losses
and sums over rows are in float32, in float64 for float64 inputs. See linear_cross_entropy_device.py for a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from .cross_entropy import cross_entropy_reference
from .cross_entropy_options import (
    Options,
    check_arrays,
    check_labels,
    checked_options,
    chunks,
    exact,
    in_one_dtype,
    joined,
    kept_type,
    labelled,
    losses_of,
    of_label,
    pull_of,
    share,
    share_of_a_row,
    softmax_rows,
    to_gradient,
    unless_crowded,
    weights_of,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    capacity: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of hidden @ weight.T + bias against the labels: [], or [T] where nothing is reduced.

    It has a first derivative with respect to hidden, weight and bias, and no second one. The loss is float32, or
    float64. A label that is no class is an error on a CPU; on a GPU, where asking would make it wait, it makes the
    loss NaN.

    Args:
        hidden: [T, H].
        weight: [V, H]; the table of an embedding may be shared.
        labels: int64 [T], each below V, or `ignore_index` for rows that count for nothing.
        bias: [V].
        class_weights: [V], constant; the loss of a label is multiplied by that of its class.
        ignore_index: the label of rows without one.
        label_smoothing: 0 to 1, how much of a label is spread over all classes.
        z_loss: at least 0, the weight of log^2 of the sum of exponentials.
        softcap: above 0; logits come near it, and not past it.
        scale: of the logits, before the cap.
        reduction: the mean over labelled rows (0 where there are none), the sum, or each row's loss.
        capacity: the most rows that have a label. Only so many are multiplied, by the library of the GPU, which is
            faster than kernels that find out their number there; T where most rows have one. If more have one,
            the loss is NaN, and so are gradients.
        group: the ranks that have a share of the classes each; V is then that of all, and weight is [V / W, H].
    """
    _check(hidden, weight, labels, bias, capacity)
    numbers = checked_options(label_smoothing, z_loss, softcap, scale)
    check_arrays(hidden, labels, class_weights, weight.shape[0] * (1 if group is None else group.size()), reduction)
    kind = in_one_dtype(hidden, weight)
    weights = weights_of(class_weights, kind)
    arrays = (hidden, weight, bias, labels, weights)
    options = (ignore_index, numbers, kind, capacity, "" if group is None else group.group_name)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in arrays[:3]]
    factor = torch.ones((), dtype=exact(kind), device=hidden.device)
    if reduction == "mean":
        factor = share_of_a_row(labels, weights, ignore_index, kind)
    if any(wanted) and reduction != "none":
        total: Tensor = torch.ops.selfsup.linear_cross_entropy_sum(*arrays, factor, *options, wanted)[0]
        return total
    losses: Tensor = torch.ops.selfsup.linear_cross_entropy(*arrays, *options)
    return losses if reduction == "none" else losses.sum() * factor


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, capacity: int | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, labels))
        raise ContractError(f"hidden, weight and labels must be [T, H], [V, H] and [T], and are {shapes}")
    if 0 in weight.shape:
        raise ContractError(f"a head has at least one class and one feature, and weight is {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ContractError(f"bias must be [V] = {list(weight.shape[:1])}, and is {list(bias.shape)}")
    if hidden.device != weight.device or (bias is not None and bias.device != weight.device):
        given = " and ".join(sorted({str(x.device) for x in (hidden, weight, bias) if x is not None}))
        raise ContractError(f"hidden, weight and bias must be on one device, and are on {given}")
    if not weight.is_floating_point():
        raise ContractError(f"weight must be of floating point, and is {weight.dtype}")
    if capacity is not None and capacity < 1:
        raise ContractError(f"capacity must be at least 1, or None, and is {capacity}")


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """What `linear_cross_entropy` must equal; makes all logits, [T, V]. Options are those of `cross_entropy`."""
    return cross_entropy_reference(F.linear(hidden, weight, bias), labels, **options)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h [C, H] against the head, in the memory of `out` [>= C, V]: [C, V], exact."""
    z = out[: len(h)]
    if h.dtype != z.dtype:
        z.copy_(h @ weight.T)
    else:
        torch.mm(h, weight.T, out=z)
    return z if bias is None else z.add_(bias)


def rows_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
) -> Tensor:
    """The loss of every row, [T], on any device, a few rows at a time."""
    mine, options = share(group, len(weight)), Options(*numbers)
    classes = len(weight) * mine.ranks
    here = None if weights is None else weights[mine.first : mine.first + len(weight)]
    kept = labelled(labels, ignore_index)
    h, y = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    found = hidden.new_empty(len(h), dtype=exact(kind))
    parts, w = chunks(len(h), len(weight)), weight.to(kind)
    buffer = found.new_empty(parts[0].stop if parts else 0, len(w))
    for part in parts:
        z = _logits(h[part].to(kind), w, bias, buffer)
        measured = joined(softmax_rows(z, y[part] - mine.first, here, options, z)[0], mine.group)
        own = of_label(y[part], weights, options, classes, found.dtype)
        found[part] = losses_of(measured, own, weights, options, classes)
    found = found.where(y != ignore_index, 0.0) * unless_crowded(labels, ignore_index, capacity)
    return found if kept is None else found.new_zeros(len(hidden)).index_copy_(0, kept, found)


def sum_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses times `factor` [T] or [], summed, and its gradients for hidden, weight and bias, where `wanted`."""
    mine, options = share(group, len(weight)), Options(*numbers)
    classes = len(weight) * mine.ranks
    here = None if weights is None else weights[mine.first : mine.first + len(weight)]
    total = hidden.new_zeros((), dtype=exact(kind))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    d_hidden, d_weight, d_bias = (
        total.new_zeros(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)
    )
    kept = labelled(labels, ignore_index)
    s = torch.where(labels == ignore_index, 0.0, factor * unless_crowded(labels, ignore_index, capacity))
    h, y, s = (hidden, labels, s) if kept is None else (hidden[kept], labels[kept], s[kept])
    d_rows = d_hidden if kept is None else d_hidden.new_empty(len(h) if wanted[0] else 0, h.shape[1])
    parts, w = chunks(len(h), len(weight)), weight.to(kind)
    buffer = total.new_empty(parts[0].stop if parts else 0, len(w))
    for part in parts:
        rows, y_part, s_part = h[part].to(kind), y[part] - mine.first, s[part]
        p = _logits(rows, w, bias, buffer)  # [C, V]
        measures, slope = softmax_rows(p, y_part, here, options, p)
        measured = joined(measures, mine.group)
        own = of_label(y[part], weights, options, classes, p.dtype).masked_fill_(y[part] == ignore_index, 0)
        total += losses_of(measured, own, weights, options, classes) @ s_part
        shrink = None if mine.group is None else (measures[0] - measured[0] + measures[1] - measured[1]).exp()
        to_gradient(p, pull_of(measured, own, weights, options, classes, None, shrink), y_part, here, slope)
        if wanted[2]:
            d_bias += s_part @ p
        p = p.to(kind)
        if wanted[0]:
            torch.mul(p @ w, s_part[:, None], out=d_rows[part])
        if wanted[1]:
            _accumulate(d_weight, p.T, rows * s_part[:, None].to(kind))
    if wanted[0] and mine.group is not None:
        all_reduce(d_rows, group=mine.group)
    if wanted[0] and kept is not None:
        d_hidden.index_copy_(0, kept, d_rows)
    kinds = (kept_type(x.dtype) for x in (hidden, weight, weight if bias is None else bias))
    return (total, *(d.to(x) for d, x in zip((d_hidden, d_weight, d_bias), kinds, strict=True)))  # type: ignore[return-value]


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@torch.library.custom_op("selfsup::linear_cross_entropy", mutates_args=())
def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
) -> Tensor:
    check_labels(labels, ignore_index, len(weight) * share(group, 1).ranks)
    with torch.autocast(hidden.device.type, enabled=False):
        if can_launch(hidden) and kind != torch.float64:
            from .linear_cross_entropy_device import losses

            with on_device_of(hidden):
                return losses(hidden, weight, bias, labels, weights, ignore_index, numbers, kind, capacity, group)
        return rows_in_chunks(hidden, weight, bias, labels, weights, ignore_index, numbers, kind, capacity, group)


@torch.library.custom_op("selfsup::linear_cross_entropy_sum", mutates_args=())
def _sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels(labels, ignore_index, len(weight) * share(group, 1).ranks)
    arrays = (hidden, weight, bias, labels, weights, factor)
    with torch.autocast(hidden.device.type, enabled=False):
        if can_launch(hidden) and kind != torch.float64:
            from .linear_cross_entropy_device import loss_and_gradients

            with on_device_of(hidden):
                return loss_and_gradients(*arrays, ignore_index, numbers, kind, capacity, group, wanted)
        return sum_in_chunks(*arrays, ignore_index, numbers, kind, capacity, group, wanted)


@_rows.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Any, weights: Any, *options: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=exact(options[2]))


@_sum.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Any, weights: Any, factor: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, last = options[-1], weight if bias is None else bias
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    kinds = (kept_type(x.dtype) for x in (hidden, weight, last))
    parts = zip(shapes, kinds, wanted, strict=True)
    gradients = (hidden.new_empty(shape if want else 0, dtype=kind) for shape, kind, want in parts)
    return (factor.new_empty(()), *gradients)  # type: ignore[return-value]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    _, *grads = torch.ops.selfsup.linear_cross_entropy_sum(*ctx.saved_tensors, grad, *ctx.options, wanted)
    arrays = zip(grads, ctx.saved_tensors[:3], wanted, strict=True)
    return (*(g.to(x.dtype) if want else None for g, x, want in arrays), *[None] * 7)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *_, ctx.wanted = inputs
    ctx.kinds = [x.dtype for x in (hidden, weight, weight if bias is None else bias)]
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    # A number alone would be rounded to the type of the gradients: infinite, if it scales a loss for float16.
    grad = grad[None]
    arrays = zip(ctx.saved_tensors, ctx.kinds, ctx.wanted, strict=True)
    return (*((g * grad).to(kind) if want else None for g, kind, want in arrays), *[None] * 9)


_rows.register_autograd(_rows_backward, setup_context=_keep_inputs)
_sum.register_autograd(_sum_backward, setup_context=_keep_gradients)
