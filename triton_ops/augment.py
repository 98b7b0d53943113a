"""Random views of a batch of photos, each sample cropped, flipped, distorted and blurred in its own way.

The distortions are those of SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual
representations", https://arxiv.org/abs/2002.05709, appendix A) and BYOL (Grill et al. 2020,
https://arxiv.org/abs/2006.07733, appendix B). Nothing is drawn here: a plan says what happens to whom, in this order.

    crop, resize  y_o = sum_i w_oi x_i / (255 sum_i w_oi),  w_oi = max(0, 1 - |i + 1/2 - c_o| / max(s, 1)),
                  c_o = start + (o + 1/2) s,  s = length / S,  along rows and along columns, i inside the image:
                  a triangle that widens with the reduction (Pillow's BILINEAR, antialias=True elsewhere)
    flip          left and right change places
    jitter        the next four, in an order of each sample's own; each cuts to [0, 1] after it
      brightness  x <- f x
      contrast    x <- f x + (1 - f) mean grey(x)         grey(x) = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)
      saturation  x <- f x + (1 - f) grey(x)
      hue         x <- hsv^-1(H + f, S, V)                the circle of HSV (Smith 1978), all of it is 1
    grey          x <- grey(x) in each channel
    blur          x <- sum_k g_k x_(o + k),  g_k ~ exp(-k**2 / (2 sigma**2)),  |k| <= r,  the g_k of sum 1,  along
                  columns and along rows; borders mirror without repeating the outermost pixel
    solarise      x <- 1 - x where x >= 1/2
    normalise     x <- (x - mean) / std, channel by channel

The first three blends of the jitter are those of Pillow's ImageEnhance. On a GPU a view takes at most four launches,
see augment_kernels.py; on a CPU samples go in small groups that fit its cache, see augment_cpu.py; the reference
serves other devices, and float64 on a GPU. Neither waits for a device. There is no derivative.

Shapes: B batch, C channels (1 or 3), H x W input pixels, S side of a view, r = blur // 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of

LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SLACK = 0.01  # pixels by which rounding may put a box beyond the image
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AugmentPlan(NamedTuple):
    """What happens to each sample; a part that is None happens to none."""

    box: Tensor  # [B, 4] float: top, left, height and width of the crop in pixels, fractions allowed, inside the image
    flip: Tensor | None = None  # [B] bool
    order: Tensor | None = None  # [B, 4] int64: which of the jitter comes when, each at most once; -1 is none
    factors: Tensor | None = None  # [B, 4] float: f of brightness, contrast, saturation and hue, whatever the order
    greyed: Tensor | None = None  # [B] bool
    sigma: Tensor | None = None  # [B] float: of the blur, in pixels of the view; 0 is none
    solarized: Tensor | None = None  # [B] bool


def augment(
    images: Tensor,
    plan: AugmentPlan,
    size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    blur: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views of the images as planned: [B, C, S, S], in [0, 1] before `mean` and `std`.

    A sample that nothing happens to is what resizing makes of it, to the bit, whatever happens to others. What is
    wrong in the values of a plan (a box beyond the image, an order with a number twice, a sigma below 0) raises
    ContractError in host memory; on a GPU, which nobody waits for, all of that sample is NaN.

    Args:
        images: uint8 [B, C, H, W], C 1 or 3, of any strides; fastest where columns are contiguous.
        plan: on the device of the images.
        size: S, in pixels.
        mean: of each channel, subtracted; None: nothing is.
        std: of each channel, divided by; None: by nothing.
        blur: pixels along a side that the blur weighs, 2 r + 1; odd, r < S.
        dtype: of the views. They are computed in float32, for float64 in float64.
    """
    _check(images, plan, size, mean, std, blur, dtype)
    numbers = list(mean or ()), list(std or ())
    views: Tensor = torch.ops.selfsup.augment(images, *plan, size, *numbers, blur, dtype)
    return views


def augment_reference(
    images: Tensor,
    plan: AugmentPlan,
    size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    blur: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `augment` must equal; makes every step for every sample, and a matrix [S, H] for each."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    top, left, height, width = plan.box.to(kind).unbind(1)
    rows, columns = triangles(top, height, images.shape[2], size), triangles(left, width, images.shape[3], size)
    x = rows[:, None] @ images.to(kind) @ columns[:, None].mT / 255  # [B, C, S, S]
    if plan.flip is not None:
        x = torch.where(_each(plan.flip), x.flip(-1), x)
    if plan.order is not None and plan.factors is not None:
        x = _jittered(x, plan.order, plan.factors.to(kind))
    if plan.greyed is not None:
        x = torch.where(_each(plan.greyed), grey(x).expand_as(x), x)
    if plan.sigma is not None:
        x = torch.where(_each(plan.sigma != 0), _blurred(x, plan.sigma.to(kind), blur), x)
    if plan.solarized is not None:
        x = torch.where(_each(plan.solarized) & (x >= 0.5), 1 - x, x)
    if mean is not None:
        x = torch.stack([x[:, c] - mean[c] for c in range(len(mean))], 1)
    if std is not None:
        x = torch.stack([x[:, c] / std[c] for c in range(len(std))], 1)
    return x.to(dtype)


def triangles(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """The weight of each input pixel in each output pixel of one axis: start, length [B] -> [B, size, pixels]."""
    scale = (length / size)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # [B, S, 1]
    away = (torch.arange(pixels, device=start.device) + 0.5 - centre) / scale.clamp(min=1)  # [B, S, H]
    weight = (1 - away.abs()).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True)


def grey(x: Tensor) -> Tensor:
    """The luma of x [B, C, S, S]: [B, 1, S, S]."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def _each(values: Tensor) -> Tensor:
    """One value for each sample [B], to stand beside images."""
    return values[:, None, None, None]


def _jittered(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """The four distortions of each sample, one place of its order after the other."""
    f = factors.T[..., None, None, None]  # [4, B, 1, 1, 1]
    for place in range(4):
        luma = grey(x)
        level = luma.mean((1, 2, 3), keepdim=True)
        results = (
            f[BRIGHTNESS] * x,
            f[CONTRAST] * x + (1 - f[CONTRAST]) * level,
            f[SATURATION] * x + (1 - f[SATURATION]) * luma,
            _turned(x, f[HUE, :, :, 0]) if x.shape[1] == 3 else x,
        )
        for number, result in enumerate(results):
            x = torch.where(_each(order[:, place] == number), result.clamp(0, 1), x)
    return x


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, 3, S, S] with its hue turned by `turn` [B, 1, 1] of the circle."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    c = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / c,
        torch.where(value == green, 2 + (blue - red) / c, 4 + (red - green) / c),
    )
    hue = hue + 6 * turn  # in sixths of the circle
    k = torch.stack([(hue + n) % 6 for n in (5, 3, 1)], 1)  # [B, 3, S, S]
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _blurred(x: Tensor, sigma: Tensor, size: int) -> Tensor:
    radius = size // 2
    away = torch.arange(-radius, radius + 1, device=x.device)
    g = torch.exp(-0.5 * (away / torch.where(sigma == 0, 1.0, sigma)[:, None]) ** 2)  # [B, 2 r + 1]
    g = (g / g.sum(1, keepdim=True))[:, None, None, None]  # [B, 1, 1, 1, 2 r + 1]
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    x = (x.unfold(3, size, 1) * g).sum(-1)
    return (x.unfold(2, size, 1) * g).sum(-1)


def _check(
    images: Tensor,
    plan: AugmentPlan,
    size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    blur: int,
    dtype: torch.dtype,
) -> None:
    """Raise on what can be known without reading a value."""
    if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ContractError(
            f"images must be uint8 [B, C, H, W] with pixels in 1 or 3 channels; "
            f"these are {images.dtype} {list(images.shape)}"
        )
    for name, part in plan._asdict().items():
        _check_part(name, part, images)
    if (plan.order is None) != (plan.factors is None):
        raise ContractError("a plan has both order and factors, or neither")
    if size < 1 or blur < 1 or blur % 2 == 0 or (plan.sigma is not None and blur // 2 >= size):
        raise ContractError(
            f"size must be at least 1 pixel, and blur an odd number of pixels below 2 size; they are {size} and {blur}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != images.shape[1]:
            raise ContractError(f"{name} has a value for each of {images.shape[1]} channels; {list(values)} was given")
    if std is not None and not min(std) > 0:
        raise ContractError(f"each std is greater than 0; {list(std)} was given")
    if dtype not in KINDS:
        raise ContractError(f"views can be {', '.join(map(str, KINDS))}; {dtype} was asked for")


def _check_part(name: str, part: Tensor | None, images: Tensor) -> None:
    if part is None:
        if name == "box":
            raise ContractError("a plan has a box for each sample, [B, 4]; where nothing is cropped, the whole image")
        return
    shape = [images.shape[0], 4] if name in ("box", "order", "factors") else [images.shape[0]]
    kind = {"order": "int64", "box": "float", "factors": "float", "sigma": "float"}.get(name, "bool")
    right = part.is_floating_point() if kind == "float" else part.dtype == getattr(torch, kind)
    if not right or list(part.shape) != shape or part.device != images.device:
        raise ContractError(
            f"{name} of a plan must be {kind} {shape} on {images.device}; "
            f"it is {part.dtype} {list(part.shape)} on {part.device}"
        )


@torch.library.custom_op("selfsup::augment", mutates_args=())
def _augment(
    images: Tensor,
    box: Tensor,
    flip: Tensor | None,
    order: Tensor | None,
    factors: Tensor | None,
    greyed: Tensor | None,
    sigma: Tensor | None,
    solarized: Tensor | None,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: int,
    dtype: torch.dtype,
) -> Tensor:
    plan = AugmentPlan(box, flip, order, factors, greyed, sigma, solarized)
    if can_launch(images) and dtype != torch.float64:
        from .augment_kernels import augment_by_kernels

        with on_device_of(images):
            return augment_by_kernels(images, plan, size, mean, std, blur, dtype)
    # Pixels keep float32 where the model around computes in bfloat16, which has fewer levels than a byte.
    with torch.autocast(images.device.type, enabled=False):
        if images.device.type != "cpu":
            return augment_reference(images, plan, size, mean or None, std or None, blur=blur, dtype=dtype)
        from .augment_cpu import augment_in_chunks

        return augment_in_chunks(images, plan, size, mean, std, blur, dtype)


@_augment.register_fake
def _(
    images: Tensor,
    box: Tensor,
    flip: Tensor | None,
    order: Tensor | None,
    factors: Tensor | None,
    greyed: Tensor | None,
    sigma: Tensor | None,
    solarized: Tensor | None,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: int,
    dtype: torch.dtype,
) -> Tensor:
    return images.new_empty(*images.shape[:2], size, size, dtype=dtype)
