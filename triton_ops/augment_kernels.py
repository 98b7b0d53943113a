"""The kernels of augment.py: the same views on a GPU, the same each time.

A program makes a square tile of one sample's view, so that what happens to a sample is a branch that all of it takes.
Resizing weighs few pixels (2 x 2 where a crop is enlarged, K x K with K = ceil(2 s) where it is reduced s times), and
reads bytes, so it is done again rather than kept. Launches, and what they move for a sample, in bytes:

    levels  only with a jitter   resize, then the jitter up to the contrast; reads C H W, writes a sum for each tile
    views   always               resize, jitter with the mean of the sums, grey; reads C H W, writes 4 C S**2
    blur    only with a blur     two launches, see augment_blur_kernels.py: each reads and writes 4 C S**2

`views` solarises and normalises what is not blurred, and leaves the rest as it is for the last blur, which does the
same; programs of a sample that is not blurred, or whose order has no contrast, do nothing. Of 3 x 256 x 256 bytes come
3 x 224 x 224 numbers by 1.0 MB without and 3.4 MB with a blur; to read the one and write the other takes 0.8.

Lanes run along a column of the canvas while they read, as photos lie in memory column by column, and along a row of
the view while they write; Triton turns the tile in shared memory. Indices are cut to the image, where the weight of
what lies beyond is 0, so no plan makes a kernel read elsewhere. Sums of tiles are added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton
from .augment import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, SLACK, AugmentPlan
from .augment_blur_kernels import blur_planes, finished

TILE = 32  # pixels along a side
RED, GREEN, BLUE = (tl.constexpr(share) for share in LUMA)
IS_BRIGHTNESS, IS_CONTRAST, IS_SATURATION, IS_HUE = (
    tl.constexpr(number) for number in (BRIGHTNESS, CONTRAST, SATURATION, HUE)
)
BEYOND = tl.constexpr(SLACK)
OPTIONS = {"num_warps": 8, "num_stages": 1}  # with 4, registers overflow


def augment_by_kernels(
    images: Tensor,
    plan: AugmentPlan,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `augment` promises, in float32."""
    (batch, channels), tiles = images.shape[:2], triton.cdiv(size, TILE) ** 2
    out = images.new_empty(batch, channels, size, size, dtype=dtype)
    if batch == 0:
        return out
    jittered, blurred = plan.order is not None, plan.sigma is not None
    sums = out.new_empty(batch, tiles if jittered else 0, dtype=torch.float32)
    # What is to be blurred waits where the view will be, if that is as exact.
    sharp = out if dtype == torch.float32 or not blurred else torch.empty_like(out, dtype=torch.float32)
    box, order, flip, factors, greyed, sigma, solarized = _parts(plan)
    source = (images, *images.stride(), *images.shape[2:], box, flip, order, factors)
    shape = {"C": channels, "S": size, "FLIP": plan.flip is not None}
    if jittered:
        _levels_kernel[(batch * tiles,)](*source, sums, **shape, TILE=TILE, **OPTIONS)
    flags = {"JITTER": jittered, "GREY": plan.greyed is not None and channels == 3, "BLUR": blurred}
    flags["SOLARIZE"] = plan.solarized is not None
    colours = [*_of_each(mean, 0.0), *(1 / value for value in _of_each(std, 1.0))]
    arrays = (sums, greyed, sigma, solarized, sharp, out)
    _views_kernel[(batch * tiles,)](*source, *arrays, *colours, **shape, **flags, TILE=TILE, **OPTIONS)
    if blurred:
        blur_planes(sharp, out, sigma, solarized if flags["SOLARIZE"] else None, blur, colours)
    return out


def _parts(plan: AugmentPlan) -> list[Tensor]:
    """As kernels take them: (box, order, flip, factors, greyed, sigma, solarized); a box for what is not there."""
    box = plan.box.float().contiguous()
    found = [box]
    for name in ("order", "flip", "factors", "greyed", "sigma", "solarized"):
        part = getattr(plan, name)
        if part is None:
            found.append(box)  # which the kernels are told not to read
        elif part.dtype == torch.bool:
            found.append(part.contiguous().view(torch.uint8))
        else:
            found.append(part.contiguous() if name == "order" else part.float().contiguous())
    return found


def _of_each(values: Sequence[float], default: float) -> list[float]:
    """Three numbers, for each channel that there could be."""
    return [*map(float, values), default, default, default][:3]


@triton.jit
def _cut(x):  # type: ignore[no-untyped-def]
    """x in [0, 1]; what is no number stays none."""
    x = tl.where(x < 0.0, 0.0, x)
    return tl.where(x > 1.0, 1.0, x)


@triton.jit
def _grey(r, g, b, C: tl.constexpr):  # type: ignore[no-untyped-def]
    luma = r
    if C == 3:
        luma = r * RED + g * GREEN + b * BLUE
    return luma


@triton.jit
def _weight(index, centre, slope, pixels):  # type: ignore[no-untyped-def]
    """The triangle around `centre` at the pixels `index`, 0 beyond the image."""
    weight = 1.0 - tl.abs(index + 0.5 - centre) * slope
    return tl.where((index >= 0) & (index < pixels) & (weight > 0.0), weight, 0.0)


@triton.jit
def _axis(start, length, place, pixels, good, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """(centres, first taps, slope, number of taps, 1 / sum of weights) of output pixels `place` [N] along an axis."""
    scale = length / S
    reach = tl.maximum(scale, 1.0)
    centre = start + (place + 0.5) * scale
    first = tl.floor(centre - reach + 0.5).to(tl.int32)
    taps = tl.where(good, tl.ceil(2.0 * reach), 0.0).to(tl.int32)
    total = tl.zeros_like(centre)
    for k in range(taps):
        total += _weight(first + k, centre, 1.0 / reach, pixels)
    return centre, first, 1.0 / reach, taps, 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _resized(  # type: ignore[no-untyped-def]
    images_ptr,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    H,
    W,
    box_ptr,
    flip_ptr,
    sample,
    x,
    y,
    C: tl.constexpr,
    S: tl.constexpr,
    FLIP: tl.constexpr,
):
    """The channels [X, Y] of a sample's view at columns x and rows y, and whether its box lies in the image."""
    top, left = tl.load(box_ptr + sample * 4), tl.load(box_ptr + sample * 4 + 1)
    height, width = tl.load(box_ptr + sample * 4 + 2), tl.load(box_ptr + sample * 4 + 3)
    good = (height > 0.0) & (width > 0.0) & (top >= -BEYOND) & (left >= -BEYOND)
    good = good & (top + height <= H + BEYOND) & (left + width <= W + BEYOND)
    # What a tile has beyond the view is its outermost pixel again.
    place = tl.minimum(x, S - 1)
    top, left = tl.where(good, top, 0.0), tl.where(good, left, 0.0)
    height, width = tl.where(good, height, 1.0), tl.where(good, width, 1.0)
    if FLIP:
        place = tl.where(tl.load(flip_ptr + sample) != 0, S - 1 - place, place)
    centre_y, first_y, slope_y, taps_y, share_y = _axis(top, height, tl.minimum(y, S - 1), H, good, S)
    centre_x, first_x, slope_x, taps_x, share_x = _axis(left, width, place, W, good, S)
    base = images_ptr + sample * stride_b
    r = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    g = r
    b = r
    for i in range(taps_x):
        column = first_x + i
        weight_x = _weight(column, centre_x, slope_x, W)  # [X]
        column = tl.minimum(tl.maximum(column, 0), W - 1).to(tl.int64) * stride_w
        for j in range(taps_y):
            row = first_y + j
            weight_y = _weight(row, centre_y, slope_y, H)  # [Y]
            row = tl.minimum(tl.maximum(row, 0), H - 1).to(tl.int64) * stride_h
            pixel = base + column[:, None] + row[None, :]
            weight = weight_x[:, None] * weight_y[None, :]
            r += weight * tl.load(pixel)
            if C == 3:
                g += weight * tl.load(pixel + stride_c)
                b += weight * tl.load(pixel + stride_c + stride_c)
    # Only here, as what a loop has summed has to be handed from thread to thread.
    share = share_x[:, None] * share_y[None, :] / 255.0
    return r * share, g * share, b * share, good


@triton.jit
def _turned(r, g, b, turn):  # type: ignore[no-untyped-def]
    """The hue turned by a share of the circle: low + c cut(|6 frac(h + o) - 3| - 1), o = 0, 2/3, 1/3 for each channel.

    h = 1/2 - s / 6 with s = 2 + (red - green - blue + low) / c with the sign of green - blue, c the range over the
    channels and low the least of them.
    """
    low = tl.minimum(tl.minimum(r, g), b)
    c = tl.maximum(tl.maximum(r, g), b) - low
    s = 2.0 + (r - g - b + low) / tl.maximum(c, 1e-12)
    hue = 0.5 - tl.where(g >= b, s, -s) / 6.0 + (turn - tl.floor(turn))
    r = _channel(hue, low, c)
    g = _channel(hue + 2.0 / 3.0, low, c)
    b = _channel(hue + 1.0 / 3.0, low, c)
    return r, g, b


@triton.jit
def _channel(hue, low, c):  # type: ignore[no-untyped-def]
    part = hue - tl.floor(hue)
    return low + c * _cut(tl.abs(6.0 * part - 3.0) - 1.0)


@triton.jit
def _distorted(r, g, b, kind, factors_ptr, level, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """One distortion of the jitter, and the cut after it; what is none of the four does nothing."""
    if (kind >= 0) & (kind <= IS_HUE):
        f = tl.load(factors_ptr + kind)
        if kind == IS_HUE:
            if C == 3:
                r, g, b = _turned(r, g, b, f)
        else:
            other = tl.zeros_like(r)
            if kind == IS_CONTRAST:
                other = other + level
            if kind == IS_SATURATION:
                other = _grey(r, g, b, C)
            if kind != IS_BRIGHTNESS:
                other = other * (1.0 - f)
            r = r * f + other
            if C == 3:
                g = g * f + other
                b = b * f + other
        r = _cut(r)
        if C == 3:
            g = _cut(g)
            b = _cut(b)
    return r, g, b


@triton.jit
def _tile(S: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sample, columns, rows) of a program; it is the tile's number among those of all samples."""
    across: tl.constexpr = (S + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % (across * across)
    x = (tile % across) * TILE + tl.arange(0, TILE)
    y = (tile // across) * TILE + tl.arange(0, TILE)
    return (program // (across * across)).to(tl.int64), x, y


@triton.jit
def _place_of_contrast(order_ptr):  # type: ignore[no-untyped-def]
    """Where in its order the contrast comes; 4 if it does not."""
    place = 4
    for slot in tl.static_range(4):
        place = tl.where(tl.load(order_ptr + 3 - slot) == IS_CONTRAST, 3 - slot, place)
    return place


@triton.jit
def _is_order(order_ptr):  # type: ignore[no-untyped-def]
    """Whether each of 0 to 3 comes at most once, and besides them only -1."""
    good = tl.load(order_ptr) >= -1
    for slot in tl.static_range(4):
        kind = tl.load(order_ptr + slot)
        good = good & (kind >= -1) & (kind < 4)
        for other in tl.static_range(slot):
            good = good & ((kind < 0) | (kind != tl.load(order_ptr + other)))
    return good


@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_h", "stride_w", "H", "W"])
def _levels_kernel(  # type: ignore[no-untyped-def]
    images_ptr,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    H,
    W,
    box_ptr,
    flip_ptr,
    order_ptr,
    factors_ptr,
    sums_ptr,
    C: tl.constexpr,
    S: tl.constexpr,
    FLIP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sum of the luma of each tile at the point where the contrast comes."""
    sample, x, y = _tile(S, TILE)
    place = _place_of_contrast(order_ptr + sample * 4)
    if place < 4:
        r, g, b, _ = _resized(
            images_ptr, stride_b, stride_c, stride_h, stride_w, H, W, box_ptr, flip_ptr, sample, x, y, C, S, FLIP
        )
        for slot in range(place):
            kind = tl.load(order_ptr + sample * 4 + slot)
            r, g, b = _distorted(r, g, b, kind, factors_ptr + sample * 4, 0.0, C)
        luma = tl.where((x < S)[:, None] & (y < S)[None, :], _grey(r, g, b, C), 0.0)
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64), tl.sum(tl.sum(luma, 0), 0))


@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_h", "stride_w", "H", "W"])
def _views_kernel(  # type: ignore[no-untyped-def]  # noqa: C901
    images_ptr,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    H,
    W,
    box_ptr,
    flip_ptr,
    order_ptr,
    factors_ptr,
    sums_ptr,
    greyed_ptr,
    sigma_ptr,
    solarized_ptr,
    sharp_ptr,
    out_ptr,
    mean_r,
    mean_g,
    mean_b,
    share_r,
    share_g,
    share_b,
    C: tl.constexpr,
    S: tl.constexpr,
    FLIP: tl.constexpr,
    JITTER: tl.constexpr,
    GREY: tl.constexpr,
    BLUR: tl.constexpr,
    SOLARIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Views but for the blur, finished where a sample has none."""
    sample, x, y = _tile(S, TILE)
    r, g, b, good = _resized(
        images_ptr, stride_b, stride_c, stride_h, stride_w, H, W, box_ptr, flip_ptr, sample, x, y, C, S, FLIP
    )
    if JITTER:
        good = good & _is_order(order_ptr + sample * 4)
        level = 0.0
        if _place_of_contrast(order_ptr + sample * 4) < 4:
            tiles: tl.constexpr = ((S + TILE - 1) // TILE) * ((S + TILE - 1) // TILE)
            total = tl.zeros([128], tl.float32)
            for first in range(0, tiles, 128):
                lane = first + tl.arange(0, 128)
                total += tl.load(sums_ptr + sample * tiles + lane, mask=lane < tiles, other=0.0)
            level = tl.sum(total, 0) / (S * S)
        for slot in range(4):
            kind = tl.load(order_ptr + sample * 4 + slot)
            r, g, b = _distorted(r, g, b, kind, factors_ptr + sample * 4, level, C)
    if GREY:  # noqa: SIM102
        if tl.load(greyed_ptr + sample) != 0:
            r = _grey(r, g, b, C)
            g = r
            b = r
    solar = sample < 0
    if SOLARIZE:
        solar = tl.load(solarized_ptr + sample) != 0
    blurred = sample < 0
    if BLUR:
        sigma = tl.load(sigma_ptr + sample)
        blurred = sigma != 0.0
        good = good & (sigma >= 0.0)
    r = tl.where(good, r, float("nan"))
    inside = (x < S)[:, None] & (y < S)[None, :]
    at = sample * (C * S * S) + (y * S)[None, :] + x[:, None]
    if blurred:
        tl.store(sharp_ptr + at, r, mask=inside)
    else:
        tl.store(out_ptr + at, finished(r, solar, mean_r, share_r), mask=inside)
    if C == 3:
        g = tl.where(good, g, float("nan"))
        b = tl.where(good, b, float("nan"))
        if blurred:
            tl.store(sharp_ptr + at + S * S, g, mask=inside)
            tl.store(sharp_ptr + at + 2 * S * S, b, mask=inside)
        else:
            tl.store(out_ptr + at + S * S, finished(g, solar, mean_g, share_g), mask=inside)
            tl.store(out_ptr + at + 2 * S * S, finished(b, solar, mean_b, share_b), mask=inside)
