"""Some tokens of each sample, with their positions; and some patches of an image, cut as they are taken.

He et al. 2021, "Masked autoencoders are scalable vision learners", https://arxiv.org/abs/2111.06377, section 3: the
encoder sees visible patches alone. With n = index[b, k],

    out[b, k] = x[b, n] + positions[n]              d x[b, t] = sum over k with index[b, k] = t of d out[b, k]
    d positions[t] = sum_b d x[b, t]

`take_image_patches` takes raw pixels, so that hidden ones are neither moved nor embedded: value (i, j, c) of patch n is
images[b, c, i + patch (n // columns), j + patch (n % columns)], in the order (row, column, channel) of `PatchStem.cut`.

Shapes: B samples, T tokens, K taken ones, D values of each. On a GPU one launch reads what is taken and writes it, both
once; x may have any strides. The gradient is one launch too: each token looks for itself in its sample's index, so that
each element of d x, of zeros too, is written once, and repeats are added in order, at the price of one more look each.
Sums are in float32 and in a fixed order. For MAE with ViT-L (1,024 samples, 49 of 196 tokens of 1,024 values, bfloat16)
that is 206 MB for the tokens and 514 MB for the gradient. On a CPU, and in float64, torch's own indexing does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of


def take_patches(x: Tensor, index: Tensor, positions: Tensor | None = None) -> Tensor:
    """The tokens x[b, index[b, k]], plus their positions: [B, K, D] in the type of x.

    It has a first derivative with respect to x and positions, and no second one. An index that names no token is a
    ContractError on a CPU; on a GPU, which nobody waits for, it makes a token of NaN that has no gradient.

    Args:
        x: [B, T, D] of floating point, of any strides.
        index: int64 [B, K], each from 0 to T - 1; a token may be taken more than once.
        positions: what belongs to each place, [T, D] or [B, T, D]; added in float32.
    """
    if x.dim() != 3:
        raise ContractError(f"x must be [B, T, D], and is {list(x.shape)}")
    _check(x, index, positions)
    out: Tensor = torch.ops.selfsup.take_patches(x, index, positions, 0)
    return out


def take_image_patches(images: Tensor, index: Tensor, patch: int) -> Tensor:
    """The patches that index names, row by row, without cutting the others: [B, K, patch * patch * C].

    Derivatives and indices are those of `take_patches`.

    Args:
        images: [B, C, H, W] of floating point, of any strides; `patch` divides H and W.
        index: int64 [B, K], each from 0 to (H / patch) (W / patch) - 1.
        patch: pixels on a side of a patch, at least 1.
    """
    check_images(images, patch)
    _check(images, index, None)
    out: Tensor = torch.ops.selfsup.take_patches(images, index, None, patch)
    return out


def take_patches_reference(x: Tensor, index: Tensor, positions: Tensor | None = None) -> Tensor:
    """What `take_patches` must equal."""
    rows = torch.arange(len(x), device=x.device)[:, None]  # [B, 1]
    out = x[rows, index]
    if positions is None:
        return out
    where = positions[index] if positions.dim() == 2 else positions[rows, index]  # [B, K, D]
    exact = sum_type(x.dtype)
    return (out.to(exact) + where.to(exact)).to(x.dtype)


def take_image_patches_reference(images: Tensor, index: Tensor, patch: int) -> Tensor:
    """What `take_image_patches` must equal; cuts all patches."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return take_patches_reference(x.reshape(b, -1, patch * patch * c), index)


def check_images(images: Tensor, patch: int) -> None:
    """Raise unless these are images of whole patches."""
    if images.dim() != 4 or patch < 1 or images.shape[2] % patch or images.shape[3] % patch:
        raise ContractError(f"images must be [B, C, H, W], H and W multiples of {patch}, and are {list(images.shape)}")


def check_index(x: Tensor, index: Tensor) -> None:
    """Raise unless this names, by its type, shape and device, tokens of each sample of x."""
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.dtype != torch.int64:
        raise ContractError(
            f"index must be int64 [B, K] with B = {x.shape[0]}, and is {index.dtype} {list(index.shape)}"
        )
    if index.device != x.device:
        raise ContractError(f"index is on {index.device}, and what it names on {x.device}")


def _check(x: Tensor, index: Tensor, positions: Tensor | None) -> None:
    check_index(x, index)
    if not x.is_floating_point() or 0 in x.shape[1:]:
        raise ContractError(f"what is taken must be floats, at least one, and is {x.dtype} {list(x.shape)}")
    if positions is None:
        return
    shapes = [list(x.shape[1:]), list(x.shape)]
    if list(positions.shape) not in shapes or not positions.is_floating_point() or positions.device != x.device:
        raise ContractError(
            f"positions must be floats of shape {shapes[0]} or {shapes[1]} on {x.device}, "
            f"and are {positions.dtype} {list(positions.shape)} on {positions.device}"
        )


def sum_type(kind: torch.dtype) -> torch.dtype:
    """The type of sums over numbers of this type."""
    return torch.float64 if kind == torch.float64 else torch.float32


def check_values(index: Tensor, least: int, tokens: int) -> None:
    """Raise, on a CPU, unless each index is from `least` to `tokens` - 1."""
    if index.device.type != "cpu" or not index.numel():
        return
    low, high = (int(value) for value in index.aminmax())
    if low < least or high >= tokens:
        raise ContractError(f"index must be from {least} to {tokens - 1}, and goes from {low} to {high}")


def counts(shape: tuple[int, ...] | torch.Size, patch: int) -> tuple[int, int]:
    """(tokens of a sample, values of a token): of [B, T, D], or of images [B, C, H, W] in patches."""
    if not patch:
        return shape[1], shape[2]
    return (shape[2] // patch) * (shape[3] // patch), patch * patch * shape[1]


def grid(x: Tensor, patch: int) -> Tensor:
    """A view of x that has its patches in rows and columns: [B, rows, columns, patch, patch, C], or [B, 1, T, 1, 1, D].

    Tokens are a grid of one row, and values of one pixel.
    """
    if not patch:
        return x[:, None, :, None, None, :]
    b, c, h, w = x.shape
    return x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)


def pick(x: Tensor, row: Tensor, index: Tensor, patch: int) -> Tensor:
    """Patches index [N] of samples row [N], by torch's own indexing: [N, D]."""
    tokens, width = counts(x.shape, patch)
    if not patch and x.is_contiguous():
        return x.view(-1, width).index_select(0, row * tokens + index)
    cells = grid(x, patch)
    down, across = index // cells.shape[2], index % cells.shape[2]
    return cells[row, down, across].reshape(len(index), width)


def _samples(index: Tensor) -> Tensor:
    """The sample of each entry of index [B, K]: [B * K]."""
    return torch.arange(len(index), device=index.device)[:, None].expand_as(index).flatten()


def _known(index: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
    """(index [B * K], which of it names a token [B * K, 1]); None on a CPU, where all of it does."""
    index = index.flatten()
    if index.device.type == "cpu":
        return index, None
    return index.clamp(0, tokens - 1), ((index >= 0) & (index < tokens))[:, None]


@torch.library.custom_op("selfsup::take_patches", mutates_args=())
def _take(x: Tensor, index: Tensor, positions: Tensor | None, patch: int) -> Tensor:
    tokens, width = counts(x.shape, patch)
    kinds = (x.dtype, x.dtype if positions is None else positions.dtype)
    if can_launch(x) and torch.float64 not in kinds:
        from .take_patches_kernels import take

        with on_device_of(x):
            return take(x, index, positions, patch, torch.nan)
    check_values(index, 0, tokens)
    row, (place, known) = _samples(index), _known(index, tokens)
    out = pick(x, row, place, patch)
    if positions is not None:
        where = positions.index_select(0, place) if positions.dim() == 2 else pick(positions, row, place, 0)
        exact = sum_type(x.dtype)
        out = out.to(exact).add_(where).to(x.dtype)
    if known is not None:
        out = torch.where(known, out, torch.nan)
    return out.view(*index.shape, width)


@torch.library.custom_op("selfsup::take_patches_gradient", mutates_args=())
def _scatter(grad: Tensor, index: Tensor, shape: list[int], patch: int, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """(d x in this shape, its sum over samples [T, D]): empty where not `wanted`."""
    if can_launch(grad) and grad.dtype != torch.float64:
        from .take_patches_kernels import scatter

        with on_device_of(grad):
            return scatter(grad, index, shape, patch, wanted)
    (tokens, width), exact = counts(tuple(shape), patch), sum_type(grad.dtype)
    rows, (place, known) = grad.reshape(-1, width), _known(index, tokens)
    rows = rows if known is None else torch.where(known, rows, 0.0)
    d_x, total = grad.new_empty(0), grad.new_empty(0, dtype=exact)
    if wanted[0]:
        d_x = grad.new_zeros(len(grad) * tokens, width).index_add_(0, _samples(index) * tokens + place, rows)
        d_x = d_x.view(shape) if not patch else _uncut(d_x, shape, patch)
    if wanted[1]:
        total = grad.new_zeros(tokens, width, dtype=exact).index_add_(0, place, rows.to(exact))
    return d_x, total


def _uncut(patches: Tensor, shape: list[int], patch: int) -> Tensor:
    """Patches [B * T, D] as the images of this shape."""
    out = patches.new_empty(shape)
    cells = grid(out, patch)
    cells.copy_(patches.view(cells.shape))
    return out


@_take.register_fake
def _(x: Tensor, index: Tensor, positions: Any, patch: int) -> Tensor:
    return x.new_empty(*index.shape, counts(x.shape, patch)[1])


@_scatter.register_fake
def _(grad: Tensor, index: Any, shape: list[int], patch: int, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    total = grad.new_empty(counts(tuple(shape), patch) if wanted[1] else 0, dtype=sum_type(grad.dtype))
    return grad.new_empty(shape if wanted[0] else 0), total


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, positions, ctx.patch = inputs
    ctx.save_for_backward(index)
    ctx.shape, ctx.kind = x.shape, None if positions is None else positions.dtype
    ctx.shared = positions is not None and positions.dim() == 2


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    for_x, _, for_positions, _ = ctx.needs_input_grad
    alone = for_positions and not ctx.shared
    wanted = [for_x or alone, for_positions and ctx.shared]
    d_x, total = torch.ops.selfsup.take_patches_gradient(grad, index, list(ctx.shape), ctx.patch, wanted)
    d_positions = (d_x.to(ctx.kind, copy=True) if alone else total.to(ctx.kind)) if for_positions else None
    return d_x if for_x else None, None, d_positions, None


_take.register_autograd(_backward, setup_context=_keep)
