"""Where to crop: the random resized crop.

Szegedy et al. 2015, "Going deeper with convolutions", https://arxiv.org/abs/1409.4842, section 6: a share of the
area and an aspect ratio, then a place. The crop itself is made by `selfsup.triton_ops.augment`.

Shapes: B batch, N candidates. Nothing here draws anything, reads anything back from the device, or has a shape that
depends on what is drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ASPECTS = (3 / 4, 4 / 3)


def crop_boxes(
    height: Tensor,
    width: Tensor,
    extent: tuple[float, float],
    uniform: Tensor,
    aspects: tuple[float, float] = ASPECTS,
) -> Tensor:
    """Where to crop: (top, left, height, width) in pixels, whole numbers, [B, 4] float.

    `height` and `width` [B] are those of the images, `extent` the least and the largest share of the area,
    `uniform` [B, 4, N] numbers in [0, 1): N candidates, of which the first that fits is taken. The share
    is uniform, the aspect ratio (width / height) uniform in its logarithm. Where none of the candidates
    fits, the largest centred crop within the aspect ratios is taken.
    """
    high, wide = height.float()[:, None], width.float()[:, None]  # [B, 1]
    share, shape, down, across = uniform.unbind(1)  # [B, N]
    area = high * wide * (extent[0] + (extent[1] - extent[0]) * share)
    low, top = math.log(aspects[0]), math.log(aspects[1])
    ratio = torch.exp(low + (top - low) * shape)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [B, N]
    fits = (w >= 1) & (w <= wide) & (h >= 1) & (h <= high)
    boxes = torch.stack([(down * (high - h + 1)).floor(), (across * (wide - w + 1)).floor(), h, w], -1)  # [B, N, 4]
    first = fits.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, 4)
    chosen = boxes.gather(1, first)[:, 0]  # [B, 4]
    return torch.where(fits.any(1, keepdim=True), chosen, _centred(high, wide, aspects))


def _centred(high: Tensor, wide: Tensor, aspects: tuple[float, float]) -> Tensor:
    """The largest box in the middle whose aspect ratio is allowed: [B, 4]."""
    h = torch.minimum(high, (wide / aspects[0]).round().clamp(min=1))
    w = torch.minimum(wide, (high * aspects[1]).round().clamp(min=1))
    return torch.cat([((high - h) / 2).floor(), ((wide - w) / 2).floor(), h, w], 1)
