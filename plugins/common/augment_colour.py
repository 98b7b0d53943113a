"""Distort the colours of a batch of images on its device, each sample in its own way and order.

Brightness, contrast and saturation each blend the image x with another one (Howard 2013,
https://arxiv.org/abs/1312.5402; the definitions are those of Pillow's ImageEnhance), hue turns the colour circle
of HSV (Smith 1978), and after every step values are cut to [0, 1]:

    brightness  x <- f x                        grey(x) = 0.299 R + 0.587 G + 0.114 B
    contrast    x <- f x + (1 - f) mean grey(x)
    saturation  x <- f x + (1 - f) grey(x)
    hue         x <- hsv^-1(H + f, S, V)

The four come in an order of each sample's own. The first three are one formula,
gain x + shade grey(x) + level mean grey(x), so a sample with hue at place p of its order passes through three slots
before the hue and three after it, of which the first p and the last 3 - p do something: hue, the
expensive one, is computed once, and no shape depends on the order.

Shapes: B batch, C channels (1 or 3), H x W pixels with values in [0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.plugins.common import augment

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Jitter(NamedTuple):
    """What each sample's colour jitter does; made by `plan_jitter`."""

    active: Tensor  # [B, 6] bool: three slots before the hue and three after it
    blend: Tensor  # [B, 6, 3]: gain, shade and level of each slot
    turn: Tensor  # [B] of the colour circle, 1 is all of it


def grey(x: Tensor) -> Tensor:
    """The luma of x [B, C, H, W]: [B, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def without_colour(x: Tensor) -> Tensor:
    """Put the luma of x [B, C, H, W] in each of its channels, in place."""
    return x.copy_(grey(x))


def plan_jitter(factors: Tensor, order: Tensor) -> Jitter:
    """Lay the four distortions out in slots.

    `factors` [B, 4] are those of brightness, contrast, saturation (1 changes nothing) and hue (a share of
    the circle, 0 changes nothing); `order` [B, 4] int64 says which of the four comes when.
    """
    slot = torch.arange(3, device=order.device)[None]  # [1, 3]
    place = (order == HUE).to(torch.uint8).argmax(1, keepdim=True)  # [B, 1]
    kind = order.gather(1, slot + (slot >= place))  # [B, 3]: the order without the hue
    factor = factors.gather(1, kind)
    active = torch.cat([slot < place, slot >= place], 1)  # [B, 6]
    kind, factor = torch.cat([kind, kind], 1), torch.cat([factor, factor], 1)  # [B, 6]
    gain = torch.where(active, factor, 1.0)
    shade = torch.where(active & (kind == SATURATION), 1 - factor, 0.0)
    level = torch.where(active & (kind == CONTRAST), 1 - factor, 0.0)
    return Jitter(active, torch.stack([gain, shade, level], -1), factors[:, HUE])


def jitter(x: Tensor, active: Tensor, blend: Tensor, turn: Tensor) -> Tensor:
    """Distort x [B, C, H, W] in place as planned; the other arguments are the parts of a `Jitter`."""
    for slot in range(6):
        if slot == 3 and x.shape[1] == 3:
            x = turn_hue(x, turn)
        # An idle slot changes nothing; in host memory, where asking costs nothing, it is not even computed.
        if not augment.hosted(x) or active[:, slot].any():
            x = _blend(x, *blend[:, slot, :, None, None, None].unbind(1))
    return x


def _blend(x: Tensor, gain: Tensor, shade: Tensor, level: Tensor) -> Tensor:
    """gain x + shade grey(x) + level mean grey(x), cut to [0, 1], in place."""
    luma = grey(x)
    mean = luma.mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    # Not luma.mul_: the luma of a single channel is the image itself.
    other = (luma * shade).add_(mean * level)
    return x.mul_(gain).add_(other).clamp_(0, 1)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of x [B, 3, H, W] by `turn` [B] of the circle, in place; HSV's saturation and value stay.

    With h the hue in turns, low and c the least value and the range over the channels, a colour is
    low + c clip(|6 frac(h + o) - 3| - 1, 0, 1) with o = 0, 2/3, 1/3 for red, green, blue, and solved for h

        h = 1/2 - s / 6,    s = 2 + (red - green - blue + low) / c with the sign of green - blue,

    which needs no case for each sector. Where c is 0, h does not matter.
    """
    red, green, blue = x.unbind(1)  # [B, H, W]
    low = x.amin(1)
    c = x.amax(1).sub_(low)
    s = (red - green).sub_(blue).add_(low).div_(c.clamp(min=1e-12)).add_(2)
    s = torch.copysign(s, green - blue).div_(6)
    # One whole turn more keeps the sum positive, where frac is the remainder.
    offset = (3 - torch.arange(3, device=x.device)) / 3 % 1 + 1.5 + turn[:, None]  # [B, 3]
    torch.sub(offset[:, :, None, None], s[:, None], out=x)  # [B, 3, H, W]
    return x.frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(c[:, None]).add_(low[:, None])


def solarize(x: Tensor) -> Tensor:
    """Invert the values of x that are at least one half."""
    return torch.where(x >= 0.5, 1 - x, x)


def normalise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """(x - mean) / std for each channel of x [B, C, H, W], in place; None leaves that part out."""
    for channel in range(x.shape[1]):
        if mean is not None:
            x[:, channel].sub_(mean[channel])
        if std is not None:
            x[:, channel].div_(std[channel])
    return x
