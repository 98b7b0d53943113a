"""The cross-entropy of a linear head, without the matrix of all its logits.

For rows h_t of `hidden`, a head with rows w_v and biases b_v, and the label y_t of each row,

    z_tv = h_t . w_v + b_v        loss_t = log sum_v exp(z_tv) - z_ty

and with a factor s_t for each row (1 / number of labelled rows for the mean; 0 where the label is ignored)

    P_tv = softmax(z_t)_v - [v = y_t]      d h_t = s_t P_t W      d W = P^T (s h)      d b = P^T s

P is a few rows tall at any time. Where a gradient is wanted it is computed with the loss, from the same logits, so
a training step costs the three products that it costs anyway; with `reduction = "none"`, whose s is known in the
backward only, the logits are computed twice.

Shapes: T rows, H width of a row, V classes. Products are in the type of the inputs, or of autocast; the softmax, the
loss and the sums over rows are in float32, in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

ROWS = 256  # of logits at once; fewer where so many would pass LOGITS
LOGITS = 2**25


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The cross-entropy of hidden @ weight.T + bias against the labels: [], or [T] where nothing is reduced.

    It has a first derivative with respect to hidden, weight and bias, and no second one.

    Args:
        hidden: [T, H].
        weight: [V, H]; the table of an embedding may be shared.
        labels: int64 [T], each below V, or `ignore_index` for rows that count for nothing.
        bias: [V].
        ignore_index: the label of rows without one.
        reduction: the mean over labelled rows (0 where there are none), the sum, or each row's loss.
    """
    _check(hidden, weight, labels, bias)
    kind = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if kind != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    arrays = (hidden, weight, bias, labels)
    if reduction == "none":
        rows: Tensor = torch.ops.selfsup.linear_cross_entropy(*arrays, ignore_index, kind)
        return rows
    scale = (labels != ignore_index).to(_exact(kind))  # [T]
    if reduction == "mean":
        scale = scale / scale.sum().clamp(min=1)
    elif reduction != "sum":
        raise ContractError(f"there is no reduction {reduction!r}; choose mean, sum or none")
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in arrays[:3]]
    total: Tensor
    if any(wanted):
        total = torch.ops.selfsup.linear_cross_entropy_sum(*arrays, scale, ignore_index, kind, wanted)[0]
        return total
    total = torch.ops.selfsup.linear_cross_entropy(*arrays, ignore_index, kind) @ scale
    return total


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, labels))
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ContractError(f"hidden, weight and labels must be [T, H], [V, H] and [T], and are {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ContractError(f"bias must be [V] = {list(weight.shape[:1])}, and is {list(bias.shape)}")


def _exact(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind == torch.float64 else torch.float32


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What `linear_cross_entropy` must equal; makes all logits, [T, V]."""
    logits = F.linear(hidden, weight, bias)  # [T, V]
    losses = F.cross_entropy(logits.to(_exact(logits.dtype)), labels, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / ((labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)


def _chunks(rows: int, classes: int) -> list[slice]:
    """Evenly sized, as products of few rows are slow."""
    number = -(-rows // max(1, min(ROWS, LOGITS // classes)))
    size = -(-rows // max(1, number))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(1, size))]


def _kept(labels: Tensor, ignore_index: int) -> Tensor | None:
    """The rows with a label, where leaving out the others makes no device wait and saves something."""
    if labels.device.type != "cpu":
        return None
    kept = (labels != ignore_index).nonzero()[:, 0]
    return kept if len(kept) < len(labels) else None


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h [C, H] against the head, in the memory of `out` [>= C, V]: [C, V], exact."""
    z = out[: len(h)]
    if h.dtype != z.dtype:
        z.copy_(h @ weight.T)
    else:
        torch.mm(h, weight.T, out=z)
    return z if bias is None else z.add_(bias)


def _losses(z: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of logits z [C, V], which become probabilities: [C].

    log sum exp z = max z - log max softmax(z), as the largest probability, unlike the label's, is never near 0.
    """
    top, true = z.amax(-1), z.gather(1, labels[:, None])[:, 0]  # [C]
    torch.softmax(z, -1, out=z)
    return torch.where(valid, top - z.amax(-1).log() - true, 0.0)


def rows_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, kind: torch.dtype
) -> Tensor:
    """The loss of every row: [T]."""
    losses = hidden.new_zeros(len(hidden), dtype=_exact(kind))
    kept = _kept(labels, ignore_index)
    h, y = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    valid = y != ignore_index
    y = torch.where(valid, y, 0)
    found = losses if kept is None else losses.new_empty(len(h))
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(kind)
        parts = _chunks(len(h), len(w))
        buffer = losses.new_empty(parts[0].stop if parts else 0, len(w))
        for part in parts:
            z = _logits(h[part].to(kind), w, bias, buffer)
            found[part] = _losses(z, y[part], valid[part])
    return losses if kept is None else losses.index_copy_(0, kept, found)


def sum_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses times `scale` [T], summed, and its gradients for hidden, weight and bias: empty where not `wanted`."""
    exact = _exact(kind)
    total = hidden.new_zeros((), dtype=exact)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    d_hidden, d_weight, d_bias = (
        hidden.new_zeros(shape if want else 0, dtype=exact) for shape, want in zip(shapes, wanted, strict=True)
    )
    kept = _kept(labels, ignore_index)
    h, y, s = (hidden, labels, scale) if kept is None else (hidden[kept], labels[kept], scale[kept])
    valid = y != ignore_index
    y, s = torch.where(valid, y, 0), torch.where(valid, s, 0.0)
    d_rows = d_hidden if kept is None else d_hidden.new_empty(len(h) if wanted[0] else 0, h.shape[1])
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(kind)
        parts = _chunks(len(h), len(w))
        buffer = total.new_empty(parts[0].stop if parts else 0, len(w))
        for part in parts:
            rows, factor = h[part].to(kind), s[part]
            p = _logits(rows, w, bias, buffer)  # [C, V]
            total += _losses(p, y[part], valid[part]) @ factor
            p.scatter_add_(1, y[part, None], p.new_full((len(p), 1), -1.0))
            if wanted[2]:
                d_bias += factor @ p
            p = p.to(kind)
            if wanted[0]:
                torch.mul(p @ w, factor[:, None], out=d_rows[part])
            if wanted[1]:
                _accumulate(d_weight, p.T, rows * factor[:, None].to(kind))
    if wanted[0] and kept is not None:
        d_hidden.index_copy_(0, kept, d_rows)
    return (
        total,
        d_hidden.to(hidden.dtype),
        d_weight.to(weight.dtype),
        d_bias.to((weight if bias is None else bias).dtype),
    )


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


_rows = torch.library.custom_op("selfsup::linear_cross_entropy", rows_in_chunks, mutates_args=())
_sum = torch.library.custom_op("selfsup::linear_cross_entropy_sum", sum_in_chunks, mutates_args=())


@_rows.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, kind: torch.dtype
) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=_exact(kind))


@_sum.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=_exact(kind)),
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if wanted[2] else 0),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *arrays, ctx.ignore_index, ctx.kind = inputs
    ctx.save_for_backward(*arrays)


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arrays, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    _, *grads = torch.ops.selfsup.linear_cross_entropy_sum(*arrays, grad, ctx.ignore_index, ctx.kind, wanted)
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = (g * grad.to(g.dtype) if want else None for g, want in zip(ctx.saved_tensors, ctx.wanted, strict=True))
    return (*grads, None, None, None, None, None)


_rows.register_autograd(_rows_backward, setup_context=_keep_inputs)
_sum.register_autograd(_sum_backward, setup_context=_keep_gradients)
