"""contrast.py on a CPU, and in float64 on any device: one tile of similarities is there at a time.

Where the keys are the rows, s_ij = s_ji, and tiles below the diagonal are left out: what a tile says of its rows, the
part of it that is right of the diagonal also says of its columns. That saves half of the products and exponentials.

Shapes: N rows, M keys, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = (512, 1024)  # rows and keys whose similarities are there at once: 2 MB, that a cache may hold
LOG2 = math.log(2)  # exp2 is four times as fast as exp on a CPU, and a hundred times where the result is denormal


def tiles(
    x: Tensor, y: Tensor, row_ids: Tensor | None, key_ids: Tensor | None, alone: bool = False
) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """(rows, keys, keys for which the tile counts too, x_i . y_j, room) of each tile; kin is at -inf.

    The last two are in the memory of those before. Where the rows are `alone`, the tiles from the diagonal on, which
    count for the keys that are right of it too; otherwise all of them, which count for all their keys.
    """
    size = min(TILE[0], len(x)) * min(TILE[1], len(y))
    products, spare = x.new_empty(size), x.new_empty(size)
    for rows in _parts(0, len(x), TILE[0]):
        for keys in _parts(rows.start if alone else 0, len(y), TILE[1]):
            shape = (rows.stop - rows.start, keys.stop - keys.start)
            tile, room = (part[: shape[0] * shape[1]].view(shape) for part in (products, spare))
            torch.mm(x[rows], y[keys].T, out=tile)
            if row_ids is not None and key_ids is not None:
                tile[_kin(row_ids[rows], key_ids[keys])] = -torch.inf
            beyond = slice(min(max(keys.start, rows.stop), keys.stop) if alone else keys.start, keys.stop)
            yield rows, keys, beyond, tile, room


def _parts(first: int, last: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _kin(row_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where ids are equal: (places of rows, places of keys)."""
    values, order = key_ids.sort()
    first = torch.searchsorted(values, row_ids)
    count = torch.searchsorted(values, row_ids, right=True) - first
    i = torch.repeat_interleave(count)
    return i, order[torch.arange(len(i), device=i.device) - (count.cumsum(0) - count - first)[i]]


def _lowest(x: Tensor) -> Tensor:
    """x where it is finite, else a finite number far below: exp(-inf - x) must be 0."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def _merge(top: Tensor, total: Tensor, logits: Tensor, axis: int, room: Tensor) -> None:
    """Take logits into the running maxima, and into the sums of powers of two relative to these."""
    new = torch.maximum(top, logits.amax(axis))
    base = _lowest(new)
    powers = torch.sub(logits, base.unsqueeze(axis), out=room).exp2_()
    total.mul_((top - base).exp2_()).add_(powers.sum(axis))
    top.copy_(new)


def _scaled(x: Tensor, y: Tensor, scale: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """Vectors whose products are scale x_i . y_j / log 2, and alike for i, j and j, i where the rows are `alone`."""
    if not alone:
        return x * (scale / LOG2), y
    root = (scale.abs() / LOG2).sqrt()
    return x * (root * scale.sign()), x * root


def _in_nats(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(r, t): the sum of powers of two, relative to 2**top, as that of exponentials relative to exp(t)."""
    t = top * LOG2
    # t is rounded, and what is summed relative to it must be so relative to what it became.
    return total.clamp(min=1).mul_((top - t / LOG2).nan_to_num_(0.0).exp2_()).log_(), t


def sums_in_tiles(
    x: Tensor, y: Tensor | None, scale: Tensor, row_ids: Tensor | None, key_ids: Tensor | None, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, t, c, u) of contrast.py."""
    alone, x = y is None, x.to(scale.dtype)
    y, key_ids = (x, row_ids) if y is None else (y.to(scale.dtype), key_ids)
    total, seen = y.new_zeros(len(x)), y.new_zeros(len(y) if columns else 0)
    top, highest = torch.full_like(total, -torch.inf), torch.full_like(seen, -torch.inf)
    tops, totals = (top, total) if alone else (highest, seen)
    for rows, keys, beyond, logits, room in tiles(*_scaled(x, y, scale, alone), row_ids, key_ids, alone):
        both = (columns or alone) and beyond.start < beyond.stop
        _merge(top[rows], total[rows], logits, 1, room if both else logits)
        if both:
            part = logits[:, beyond.start - keys.start :]
            _merge(tops[beyond], totals[beyond], part, 0, part)
    return *_in_nats(top, total), *_in_nats(highest, seen)


def gradients_in_tiles(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    r: Tensor,
    t: Tensor,
    a: Tensor,
    c: Tensor,
    u: Tensor,
    b: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, y and scale: empty where not `wanted`."""
    alone, kind = y is None, x.dtype
    x = x.to(scale.dtype)
    y, key_ids = (x, row_ids) if y is None else (y.to(scale.dtype), key_ids)
    a, b, t, u = a * (-r).exp(), b * (-c).exp(), _lowest(t / LOG2), _lowest(u / LOG2)
    b, u = (a, t) if alone else (b, u)
    # Where only rows have weights, these are taken into what G is multiplied by.
    both = len(u) > 0
    weighed = x if both else x * a[:, None]
    d_x = x.new_zeros(x.shape if wanted[0] or wanted[2] else 0)
    d_y = d_x if alone else y.new_zeros(y.shape if wanted[1] else 0)
    for rows, keys, beyond, logits, g in tiles(*_scaled(x, y, scale, alone), row_ids, key_ids, alone):
        if both:
            torch.sub(logits, t[rows, None], out=g).exp2_().mul_(a[rows, None])
            g.add_(logits.sub_(u[keys]).exp2_().mul_(b[keys]))
        else:
            g = logits.sub_(t[rows, None]).exp2_()
        if len(d_x):
            d_x[rows].addmm_(g, y[keys])
        if len(d_y):
            d_y[beyond].addmm_(g[:, beyond.start - keys.start :].T, weighed[rows])
    d_x = d_x if both or not len(d_x) else d_x.mul_(a[:, None])
    d_scale = (d_x.flatten() @ x.flatten()) / (2 if alone else 1) if wanted[2] else x.new_empty(0)
    d_x = d_x.mul_(scale).to(kind) if wanted[0] else x.new_empty(0, dtype=kind)
    d_y = d_y.mul_(scale).to(kind) if wanted[1] and not alone else x.new_empty(0, dtype=kind)
    return d_x, d_y, d_scale


def pairs_in_tiles(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of contrast_pairs.py and its gradients for x, y, scale and bias: empty where not `wanted`."""
    x, y = x.to(scale.dtype), y.to(scale.dtype)
    loss, d_bias = x.new_zeros(()), x.new_zeros(())
    d_x = x.new_zeros(x.shape if wanted[0] or wanted[2] else 0)
    d_y = y.new_zeros(y.shape if wanted[1] else 0)
    for rows, keys, _, logits, g in tiles(x * scale, y, row_ids, key_ids):
        loss += F.softplus(logits.add_(bias), threshold=40).sum()
        if any(wanted):
            torch.sigmoid(logits, out=g)
        if len(d_x):
            d_x[rows].addmm_(g, y[keys])
        if len(d_y):
            d_y[keys].addmm_(g.T, x[rows])
        if wanted[3]:
            d_bias += g.sum()
    factor, none = scale / len(x), [x.new_empty(0) for _ in range(4)]
    d_scale = (d_x.flatten() @ x.flatten()) / len(x) if wanted[2] else none[2]
    d_x, d_y = d_x.mul_(factor) if wanted[0] else none[0], d_y.mul_(factor) if wanted[1] else none[1]
    return loss / len(x), d_x, d_y, d_scale, d_bias / len(x) if wanted[3] else none[3]
