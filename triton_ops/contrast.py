"""A row's partner against the keys that are no kin of it, without the matrix of all similarities.

What contrastive losses share. For rows x_i, the partner p_i of each, and keys y_j, over the keys j whose id is not
that of row i, and with s_ij = scale x_i . y_j,

    t_i = max_j s_ij      r_i = log sum_j exp(s_ij - t_i)      and u_j and c_j, over i, likewise
    loss_i = log(exp(scale x_i . p_i) + exp(t_i + r_i)) - scale x_i . p_i = -log sigmoid(scale x_i . p_i - t_i - r_i)

The partner is never one of the keys that count, so that a small loss is no difference of large numbers. Similarities
are redone for the gradients: with a_i and b_j, the gradients of t_i + r_i and u_j + c_j,

    G_ij = a_i exp(s_ij - t_i - r_i) + b_j exp(s_ij - u_j - c_j)      d scale = sum_ij G_ij x_i . y_j
    d x_i = scale sum_j G_ij y_j                                      d y_j = scale sum_i G_ij x_i

and where the keys are the rows, x_i has both at once, from one product: scale sum_j (G_ij + G_ji) x_j. Given a bias,
r_i = sum_j log(1 + exp(s_ij + bias)), G_ij = a_i sigmoid(s_ij + bias) and d bias = sum_ij G_ij.

Shapes: N rows, M keys, D width. Products are in the type of the vectors, or of autocast; sums are in float32, in
float64 for float64 vectors. On a CPU, and in float64, one tile of similarities is there at a time; see
contrast_kernels.py for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of

TILE = (512, 1024)  # rows and keys whose similarities are there at once on a CPU: 2 MB, that its cache may hold
LOG2 = math.log(2)  # exp2 is four times as fast as exp there, and a hundred times where the result is denormal


def contrast(
    rows: Tensor,
    partners: Tensor,
    keys: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(the loss of each row [N], whether its partner is at least as near as all its negatives: bool [N]).

    Vectors are not normalised. The losses have a first derivative with respect to all three, and no second one.

    Args:
        rows: [N, D].
        partners: [N, D]; what row i should be near to.
        keys: [M, D]; what rows should be far from. Where they are `rows` itself, it costs half as much.
        row_ids: int64 [N]; with None, every key is a negative of every row.
        key_ids: int64 [M]; a key of the same id as a row is no negative of it.
        temperature: of the softmax; a tensor has a gradient.
    """
    check_vectors(rows=rows, partners=partners)
    check_vectors(rows=rows, keys=keys, alike=False)
    check_ids(rows=(rows, row_ids), keys=(keys, key_ids))
    same = keys is rows and key_ids is row_ids
    rows, partners, keys = in_one_type(rows, partners, keys)
    scale = as_scalar(1 / temperature, rows)
    r, t, _, _ = negatives(rows, None if same else keys, scale, None, row_ids, None if same else key_ids)
    near = similarity(rows, partners) * scale
    return losses(near, r, t), near.detach() >= t


def contrast_reference(
    rows: Tensor,
    partners: Tensor,
    keys: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """What `contrast` must equal; makes all similarities, [N, M]."""
    far = rows @ keys.T / temperature  # [N, M]
    if row_ids is not None and key_ids is not None:
        far = far.masked_fill(row_ids[:, None] == key_ids, -torch.inf)
    near = (rows * partners).sum(-1) / temperature  # [N]
    logits = torch.cat([near[:, None], far], 1)  # [N, 1 + M]
    return logits.logsumexp(1) - near, near.detach() >= far.detach().amax(1)


def check_vectors(*, alike: bool = True, **vectors: Tensor) -> None:
    """Raise unless all are matrices of one width and, if `alike`, of one shape, with rows."""
    shapes = [x.shape for x in vectors.values()]
    if any(len(s) != 2 or s[-1] != shapes[0][-1] for s in shapes) or (alike and any(s != shapes[0] for s in shapes)):
        asked = ", ".join("[N, D]" if alike or not i else "[M, D]" for i in range(len(shapes)))
        given = ", ".join(str(list(s)) for s in shapes)
        raise ContractError(f"{' and '.join(vectors)} must be {asked}, and are {given}")
    if 0 in shapes[0] or 0 in shapes[-1]:
        raise ContractError(f"there is nothing to contrast: {' and '.join(vectors)} are {[list(s) for s in shapes]}")
    if not all(x.is_floating_point() for x in vectors.values()):
        raise ContractError(f"{' and '.join(vectors)} must be of floating point")


def check_ids(**pairs: tuple[Tensor, Tensor | None]) -> None:
    """Raise unless there is an id for each vector of each pair, or none at all."""
    given = {name: None if ids is None else list(ids.shape) for name, (_, ids) in pairs.items()}
    right = {name: [vectors.shape[0]] for name, (vectors, _) in pairs.items()}
    if given != right and any(shape is not None for shape in given.values()):
        raise ContractError(f"ids must be one for each: {right}; they are {given}")


def exact(kind: torch.dtype) -> torch.dtype:
    """The type of sums over vectors of this type."""
    return torch.float64 if kind == torch.float64 else torch.float32


def in_one_type(*vectors: Tensor) -> tuple[Tensor, ...]:
    """The vectors in the type in which products are taken."""
    kind = reduce(torch.promote_types, (x.dtype for x in vectors))
    device = vectors[0].device.type
    if kind != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    return tuple(x.to(kind) for x in vectors)


def as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A learned or fixed number, [] in the type of sums."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ContractError(f"a scale, bias or temperature is one number, and this has shape {list(value.shape)}")
        return value.to(exact(like.dtype)).reshape(())
    return torch.full((), value, dtype=exact(like.dtype), device=like.device)


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i, exact: [N]."""
    return (x.to(exact(x.dtype)) * y.to(exact(y.dtype))).sum(-1)


def losses(near: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """log(exp(near) + exp(t + r)) - near; 0, with gradients of 0, where t is -inf."""
    return -F.logsigmoid((near - t) - r)


def negatives(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r [N], t [N], c [M], u [M]) of the equations above; c and u only if `columns`, t only without a bias.

    x and y are of one type, scale and bias [] are exact. Without y, the rows are the keys. t is a constant, with the
    gradient of t + r given to r; where a row has no negatives, t is -inf and r is 0.
    """
    r, t, c, u = torch.ops.selfsup.contrast(x, y, scale, bias, row_ids, key_ids, columns)
    return r, t.detach(), c, u.detach()


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _kin(row_ids: Tensor, values: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Where ids are equal: (places of rows, places of keys), given the ids of keys sorted, and the order that does."""
    first = torch.searchsorted(values, row_ids)
    count = torch.searchsorted(values, row_ids, right=True) - first
    i = torch.repeat_interleave(count)
    return i, order[torch.arange(len(i), device=i.device) - (count.cumsum(0) - count - first)[i]]


def _tiles(
    x: Tensor, y: Tensor, factor: Tensor, row_ids: Tensor | None, key_ids: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, keys, their similarities times the factor, room), each in the memory of the last; kin is at -inf."""
    size = min(TILE[0], len(x)) * min(TILE[1], len(y))
    products, room = x.new_empty(size), x.new_empty(size)
    blocks = _parts(len(y), TILE[1])
    ids = [None if key_ids is None else key_ids[keys].sort() for keys in blocks]
    for rows in _parts(len(x), TILE[0]):
        for keys, block in zip(blocks, ids, strict=True):
            shape = (rows.stop - rows.start, keys.stop - keys.start)
            tile, spare = (part[: shape[0] * shape[1]].view(shape) for part in (products, room))
            # The factor comes after: x_i . x_j must not differ from x_j . x_i by what rounding makes of the factor.
            torch.mm(x[rows], y[keys].T, out=tile).mul_(factor)
            if row_ids is not None and block is not None:
                tile[_kin(row_ids[rows], *block)] = -torch.inf
            yield rows, keys, tile, spare


def _lowest(x: Tensor) -> Tensor:
    """x where it is finite, else a finite number far below: exp(-inf - x) must be 0."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def _exp(x: Tensor, base: Tensor, room: Tensor) -> Tensor:
    """exp(x - base) in the memory of `room`."""
    return torch.sub(x, base, out=room).mul_(1 / LOG2).exp2_()


def _merge(top: Tensor, total: Tensor, logits: Tensor, axis: int, room: Tensor) -> None:
    """Take logits into the running maxima, and into the sums of exponentials relative to these."""
    new = torch.maximum(top, logits.amax(axis))
    base = _lowest(new)
    total.mul_(_exp(top, base, torch.empty_like(top))).add_(_exp(logits, base.unsqueeze(axis), room).sum(axis))
    top.copy_(new)


def sums_in_tiles(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, t, c, u) on any device, a tile at a time."""
    x = x.to(scale.dtype)
    y, key_ids = (x, row_ids) if y is None else (y.to(scale.dtype), key_ids)
    total, seen = x.new_zeros(len(x)), x.new_zeros(len(y) if columns else 0)
    if bias is not None:
        for rows, _, logits, _ in _tiles(x, y, scale, row_ids, key_ids):
            total[rows] += F.softplus(logits.add_(bias), threshold=40).sum(1)
        return total, x.new_empty(0), seen, x.new_empty(0)
    top, highest = torch.full_like(total, -torch.inf), torch.full_like(seen, -torch.inf)
    for rows, keys, logits, room in _tiles(x, y, scale, row_ids, key_ids):
        _merge(top[rows], total[rows], logits, 1, room)
        if columns:
            _merge(highest[keys], seen[keys], logits, 0, room)
    return total.clamp_(min=1).log_(), top, seen.clamp_(min=1).log_(), highest


def gradients_in_tiles(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    r: Tensor,
    t: Tensor,
    a: Tensor,
    c: Tensor,
    u: Tensor,
    b: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for x, y, scale and bias on any device, a tile at a time: empty where not `wanted`."""
    kind, twice = x.dtype, y is None
    x = x.to(scale.dtype)
    if bias is None:
        a, b, t, u = a * (-r).exp(), b * (-c).exp(), _lowest(t), _lowest(u)
    y, key_ids, u, b = (x, row_ids, t, a) if y is None else (y.to(scale.dtype), key_ids, u, b)
    for_x, for_y = wanted[0] or wanted[2], wanted[1] and not twice
    d_x, d_y = x.new_zeros(x.shape if for_x else 0), y.new_zeros(y.shape if for_y else 0)
    d_bias = x.new_zeros(() if wanted[3] else 0)
    for rows, keys, logits, room in _tiles(x, y, scale, row_ids, key_ids):
        if bias is not None:
            g = torch.sigmoid(logits.add_(bias), out=room).mul_(a[rows, None] + b[keys] if len(b) else a[rows, None])
        else:
            g = _exp(logits, t[rows, None], room).mul_(a[rows, None])
            if len(u):
                g.add_(_exp(logits, u[keys], logits).mul_(b[keys]))
        if for_x:
            d_x[rows].addmm_(g, y[keys])
        if for_y:
            d_y[keys].addmm_(g.T, x[rows])
        if wanted[3]:
            d_bias += g.sum()
    d_scale = (d_x.flatten() @ x.flatten()) / (2 if twice else 1) if wanted[2] else x.new_empty(0)
    d_x = d_x if wanted[0] else x.new_empty(0)
    return d_x.mul_(scale).to(kind), d_y.mul_(scale).to(kind), d_scale, d_bias


@torch.library.custom_op("selfsup::contrast", mutates_args=())
def _sums(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if can_launch(x) and x.dtype != torch.float64:
        from .contrast_kernels import sums

        with on_device_of(x):
            return sums(x, y, scale, bias, row_ids, key_ids, columns)
    with torch.autocast(x.device.type, enabled=False):
        return sums_in_tiles(x, y, scale, bias, row_ids, key_ids, columns)


@torch.library.custom_op("selfsup::contrast_gradients", mutates_args=())
def _gradients(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    r: Tensor,
    t: Tensor,
    a: Tensor,
    c: Tensor,
    u: Tensor,
    b: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if can_launch(x) and x.dtype != torch.float64:
        from .contrast_kernels import gradients

        with on_device_of(x):
            return gradients(x, y, scale, bias, row_ids, key_ids, r, t, a, c, u, b, wanted)
    with torch.autocast(x.device.type, enabled=False):
        return gradients_in_tiles(x, y, scale, bias, row_ids, key_ids, r, t, a, c, u, b, wanted)


@_sums.register_fake
def _(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, row_ids: Any, key_ids: Any, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, keys = x.shape[0], (x if y is None else y).shape[0] if columns else 0  # len would fix them
    with_t, with_u = (0, 0) if bias is not None else (rows, keys)
    return scale.new_empty(rows), scale.new_empty(with_t), scale.new_empty(keys), scale.new_empty(with_u)


@_gradients.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Any,
    key_ids: Any,
    r: Any,
    t: Any,
    a: Any,
    c: Any,
    u: Any,
    b: Any,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        x.new_empty(y.shape if wanted[1] and y is not None else 0),
        scale.new_empty(() if wanted[2] else 0),
        scale.new_empty(() if wanted[3] else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)


def _backward(ctx: Any, a: Tensor, of_t: Tensor, b: Tensor, of_u: Tensor) -> tuple[Tensor | None, ...]:
    *arrays, r, t, c, u = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.selfsup.contrast_gradients(*arrays, r, t, a, c, u, b, wanted)
    return (*(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None)


_sums.register_autograd(_backward, setup_context=_keep)
