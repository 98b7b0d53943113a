"""How far guesses of hidden patches are from the pixels, or from pixels of mean 0 and variance 1 in each patch.

He et al. 2021, "Masked autoencoders are scalable vision learners", https://arxiv.org/abs/2111.06377, section 3; with
`power = 1` and `normalize = False`, Xie et al. 2021, "SimMIM", https://arxiv.org/abs/2111.09886, section 3.4. With
x = patches[b, index[b, m]] and over the patches that are valid,

    target = (x - mean(x)) / sqrt(var(x) + eps)          with `normalize`, var unbiased; else x
    loss = mean over valid b, m and over p of |guess - target|^power
    spread = mean over the same of (target - mean of all targets)^2         what a guess of the mean would cost
    d guess = power sign(guess - target) |guess - target|^(power - 1) / (P valid patches)

Shapes: B samples, T patches, M hidden ones, P values of each. No target is ever whole. On a GPU one launch reads
guesses and hidden pixels, once, and writes guess - target where a gradient is wanted; a second, small one adds up. The
backward scales by the gradient of the loss, which is not known before: 5 numbers moved for each guess (1.16 GB for MAE
with ViT-L, 1,024 samples, bfloat16), 2 without a gradient. What is kept is not yet scaled: float16 could not hold it.
Sums are in float32, in float64 for float64, and in a fixed order. On a CPU a few rows are done at a time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from .take_patches import check_images, check_index, check_values, counts, pick, take_patches_reference

ROWS = 2**17  # values of the patches that a CPU has before it at once: half a megabyte
WIDEST = 8192  # values of a patch that a program of a GPU holds; wider ones are done as on a CPU
MOST = 2**30  # rows that a GPU counts in 32 bits; more are done as on a CPU


def patch_mse(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    *,
    patch: int | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    power: Literal[1, 2] = 2,
) -> Tensor:
    """The mean error of guesses at valid patches: [] float32, 0 where none is valid.

    It has a first derivative with respect to the guesses, and no other. An index that names no patch is a ContractError
    on a CPU; on a GPU, which nobody waits for, it makes the loss NaN. Where a patch is not valid its index may be
    anything.

    Args:
        guess: [B, M, P] of floating point, of any strides.
        patches: [B, T, P]; or, given `patch`, images [B, C, H, W] whose patches have P = patch * patch * C values, by
            (row, column, channel). Both of any strides.
        index: int64 [B, M], each from 0 to T - 1.
        valid: bool [B, M]; which guesses count. With None, all do.
        patch: pixels on a side of a patch of images.
        normalize: targets have mean 0 and variance 1 in each patch, which must have two values at least.
        eps: added to the variance, above 0.
        power: 2 for squared errors, 1 for absolute ones.
    """
    return patch_mse_with_spread(guess, patches, index, valid, patch=patch, normalize=normalize, eps=eps, power=power)[
        0
    ]


def patch_mse_with_spread(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    *,
    patch: int | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    power: Literal[1, 2] = 2,
) -> tuple[Tensor, Tensor]:
    """(`patch_mse`, the spread of its targets, which has no derivative); 1 - loss / spread is what guesses explain."""
    _check(guess, patches, index, valid, patch, normalize)
    if power not in (1, 2) or not eps > 0:
        raise ContractError(f"power is 1 or 2 and eps above 0; they are {power!r} and {eps!r}")
    wanted = guess.requires_grad and torch.is_grad_enabled()
    options = (patch or 0, normalize, eps, power, wanted)
    loss, spread, _, _ = torch.ops.selfsup.patch_mse(guess, patches.detach(), index, valid, *options)
    return loss, spread.detach()


def patch_mse_reference(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    *,
    patch: int | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    power: Literal[1, 2] = 2,
) -> tuple[Tensor, Tensor]:
    """What `patch_mse_with_spread` must equal; makes all targets, [B, M, P]."""
    if patch is not None:
        b, c, h, w = patches.shape
        cells = patches.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
        patches = cells.reshape(b, -1, patch * patch * c)
    exact = _exact(guess, patches)
    target = take_patches_reference(patches.detach(), index).to(exact)  # [B, M, P]
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps).sqrt()
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    count = valid.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x.mean(-1), 0.0).sum() / count

    return mean((guess.to(exact) - target).abs() ** power), mean((target - mean(target)) ** 2)


def _exact(*arrays: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in arrays] else torch.float32


def _check(
    guess: Tensor, patches: Tensor, index: Tensor, valid: Tensor | None, patch: int | None, normalize: bool
) -> None:
    if patch is not None:
        check_images(patches, patch)
    elif patches.dim() != 3:
        raise ContractError(f"patches must be [B, T, P], or images with `patch`, and are {list(patches.shape)}")
    check_index(patches, index)
    tokens, width = counts(patches.shape, patch or 0)
    if list(guess.shape) != [*index.shape, width] or guess.device != patches.device:
        raise ContractError(
            f"guess must be [B, M, P] = {[*index.shape, width]} on {patches.device}, "
            f"and is {list(guess.shape)} on {guess.device}"
        )
    if not guess.is_floating_point() or not patches.is_floating_point() or not tokens or not width:
        raise ContractError(f"guess and patches must be floats, one at least: {guess.dtype}, {patches.dtype}")
    if valid is not None and (valid.shape != index.shape or valid.dtype != torch.bool or valid.device != index.device):
        raise ContractError(f"valid must be bool {list(index.shape)}, and is {valid.dtype} {list(valid.shape)}")
    if normalize and width < 2:
        raise ContractError("a patch of one value has no variance: normalize=False, or larger patches")


Losses = tuple[Tensor, Tensor, Tensor, Tensor]


def losses_in_chunks(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None,
    patch: int,
    normalize: bool,
    eps: float,
    power: int,
    wanted: bool,
) -> Losses:
    """What `_losses` gives, on any device, a few rows at a time."""
    exact, (tokens, width) = _exact(guess, patches), counts(patches.shape, patch)
    counted = torch.ones_like(index, dtype=torch.bool).flatten() if valid is None else valid.flatten()
    if index.device.type == "cpu":
        check_values(index if valid is None else index[valid], 0, tokens)
    rows, place = guess.reshape(-1, width), index.flatten()
    known = (place >= 0) & (place < tokens)
    sample, place = torch.arange(len(place), device=place.device) // max(1, index.shape[1]), place.clamp(0, tokens - 1)
    kept = guess.new_empty(rows.shape if wanted else 0)
    found = guess.new_empty(3, len(rows), dtype=exact)  # of each row the sum of errors; the target's mean and squares
    for first in range(0, len(rows), max(1, ROWS // width)):
        part = slice(first, first + max(1, ROWS // width))
        target = pick(patches, sample[part], place[part], patch).to(exact)
        means, squares = _centre(target, normalize, eps)
        error = torch.sub(rows[part], target, out=target)
        found[0, part] = error.abs().sum(1) if power == 1 else _dot(error)
        found[1, part], found[2, part] = means, squares
        if wanted:
            kept[part] = torch.where(counted[part, None], error.sign() if power == 1 else error, 0.0)
    found[0].masked_fill_(~known, torch.nan)
    count = counted.sum().to(exact)
    total, mean, squares = torch.where(counted, found, 0.0)
    size = count.clamp(min=1)
    apart = torch.where(counted, mean - mean.sum() / size, 0.0)
    return total.sum() / (size * width), (squares.sum() / width + apart.square().sum()) / size, count, kept


def _dot(x: Tensor) -> Tensor:
    """The sum of squares of each row of x [N, P]: [N]."""
    return torch.bmm(x[:, None, :], x[:, :, None])[:, 0, 0]


def _centre(x: Tensor, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Make targets of rows x [N, P], in place: (their means [N], their sums of squares about these [N])."""
    mean = x.mean(1)
    if not normalize:
        return mean, _dot(x - mean[:, None])
    squares = _dot(x.sub_(mean[:, None]))
    variance = squares / (x.shape[1] - 1) + eps
    x.mul_(variance.rsqrt()[:, None])
    return torch.zeros_like(mean), squares / variance


@torch.library.custom_op("selfsup::patch_mse", mutates_args=())
def _losses(
    guess: Tensor,
    patches: Tensor,
    index: Tensor,
    valid: Tensor | None,
    patch: int,
    normalize: bool,
    eps: float,
    power: int,
    wanted: bool,
) -> Losses:
    """(loss [], spread [], valid patches [], guess - target or its sign [B, M, P]): the last only if `wanted`."""
    arguments = (guess, patches, index, valid, patch, normalize, eps, power, wanted)
    exact, width = _exact(guess, patches), counts(patches.shape, patch)[1]
    if can_launch(guess) and exact != torch.float64 and width <= WIDEST and index.numel() <= MOST:
        from .patch_mse_kernels import losses

        with on_device_of(guess):
            return losses(*arguments)
    with torch.autocast(guess.device.type, enabled=False):
        loss, spread, count, kept = losses_in_chunks(*arguments)
    return loss, spread, count, kept.view(guess.shape if wanted else (0,))


@torch.library.custom_op("selfsup::patch_mse_gradient", mutates_args=())
def _scaled(kept: Tensor, grad: Tensor, count: Tensor, factor: float) -> Tensor:
    """The gradient of the guesses, from what `_losses` kept."""
    if can_launch(kept) and grad.dtype != torch.float64:
        from .patch_mse_kernels import scaled

        with on_device_of(kept):
            return scaled(kept, grad, count, factor)
    return (kept.to(grad.dtype) * (grad * factor / count.clamp(min=1))).to(kept.dtype)


@_losses.register_fake
def _(
    guess: Tensor,
    patches: Tensor,
    index: Any,
    valid: Any,
    patch: int,
    normalize: bool,
    eps: float,
    power: int,
    wanted: bool,
) -> Losses:
    one = guess.new_empty((), dtype=_exact(guess, patches))
    kept = guess.new_empty(guess.shape if wanted else 0)
    return one, torch.empty_like(one), torch.empty_like(one), kept


@_scaled.register_fake
def _(kept: Tensor, grad: Any, count: Any, factor: float) -> Tensor:
    return kept.new_empty(kept.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    ctx.power = inputs[7]
    ctx.save_for_backward(output[2], output[3])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    count, kept = ctx.saved_tensors
    d_guess = torch.ops.selfsup.patch_mse_gradient(kept, grad, count, ctx.power / kept.shape[-1])
    return (d_guess, *[None] * 8)


_losses.register_autograd(_backward, setup_context=_keep)
