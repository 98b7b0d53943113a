"""A row's partner against the keys that are no kin of it, without the matrix of all similarities.

What contrastive losses share. For rows x_i, the partner p_i of each, and keys y_j, over the keys j whose id is not
that of row i, and with s_ij = scale x_i . y_j,

    t_i = max_j s_ij      r_i = log sum_j exp(s_ij - t_i)      and u_j and c_j, over i, likewise
    loss_i = log(exp(scale x_i . p_i) + exp(t_i + r_i)) - scale x_i . p_i = -log sigmoid(scale x_i . p_i - t_i - r_i)

The partner is never one of the keys that count, so that a small loss is no difference of large numbers. Similarities
are redone for the gradients: with a_i and b_j, the gradients of t_i + r_i and u_j + c_j,

    G_ij = a_i exp(s_ij - t_i - r_i) + b_j exp(s_ij - u_j - c_j)      d scale = sum_ij G_ij x_i . y_j
    d x_i = scale sum_j G_ij y_j                                      d y_j = scale sum_i G_ij x_i

and where the keys are the rows, x_i has both at once: scale sum_j (G_ij + G_ji) x_j.

Shapes: N rows, M keys, D width. Products are in the type of the vectors, or of autocast; sums are in float32, in
float64 for float64 vectors. On a CPU, and in float64, one tile of similarities is there at a time; see
contrast_kernels.py for a GPU.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from .contrast_tiles import gradients_in_tiles, sums_in_tiles


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
    r, t, _, _ = negatives(rows, None if same else keys, scale, row_ids, None if same else key_ids)
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
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r [N], t [N], c [M], u [M]) of the equations above; c and u only if `columns`.

    x and y are of one type, scale [] is exact. Without y, the rows are the keys. t is a constant, with the
    gradient of t + r given to r; where a row has no negatives, t is -inf and r is 0.
    """
    r, t, c, u = torch.ops.selfsup.contrast(x, y, scale, row_ids, key_ids, columns)
    return r, t.detach(), c, u.detach()


@torch.library.custom_op("selfsup::contrast", mutates_args=())
def _sums(
    x: Tensor, y: Tensor | None, scale: Tensor, row_ids: Tensor | None, key_ids: Tensor | None, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if can_launch(x) and x.dtype != torch.float64:
        from .contrast_sums_kernels import sums

        with on_device_of(x):
            return sums(x, y, scale, row_ids, key_ids, columns)
    with torch.autocast(x.device.type, enabled=False):
        return sums_in_tiles(x, y, scale, row_ids, key_ids, columns)


@torch.library.custom_op("selfsup::contrast_gradients", mutates_args=())
def _gradients(
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
    if can_launch(x) and x.dtype != torch.float64:
        from .contrast_gradient_kernels import gradients

        with on_device_of(x), torch.autocast(x.device.type, enabled=False):
            return gradients(x, y, scale, row_ids, key_ids, r, t, a, c, u, b, wanted)
    with torch.autocast(x.device.type, enabled=False):
        return gradients_in_tiles(x, y, scale, row_ids, key_ids, r, t, a, c, u, b, wanted)


@_sums.register_fake
def _(
    x: Tensor, y: Tensor | None, scale: Tensor, row_ids: Any, key_ids: Any, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, keys = x.shape[0], (x if y is None else y).shape[0] if columns else 0  # len would fix them
    return scale.new_empty(rows), scale.new_empty(rows), scale.new_empty(keys), scale.new_empty(keys)


@_gradients.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Any,
    key_ids: Any,
    r: Any,
    t: Any,
    a: Any,
    c: Any,
    u: Any,
    b: Any,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        x.new_empty(y.shape if wanted[1] and y is not None else 0),
        scale.new_empty(() if wanted[2] else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)


def _backward(ctx: Any, a: Tensor, of_t: Tensor, b: Tensor, of_u: Tensor) -> tuple[Tensor | None, ...]:
    *arrays, r, t, c, u = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.selfsup.contrast_gradients(*arrays, r, t, a, c, u, b, wanted)
    return (*(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None)


_sums.register_autograd(_backward, setup_context=_keep)
