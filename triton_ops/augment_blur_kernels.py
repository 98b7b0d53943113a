"""The blur of augment.py on a GPU, and what comes after it.

Planes are blurred along their columns, then along their rows, in two launches; the second solarises and normalises.
Programs of a sample that is not blurred do nothing, and leave what is there. A program makes LINE pixels as they
follow in memory, so that lanes read neighbours whichever the axis; a pixel is read 2 r + 1 times, from the cache of its
processor but for the first. Weights are made anew in each program, which costs less than to read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton

LINE = 1024  # pixels of a plane
OPTIONS = {"num_warps": 4, "num_stages": 1}


def blur_planes(
    sharp: Tensor, out: Tensor, sigma: Tensor, solarized: Tensor | None, blur: int, colours: list[float]
) -> None:
    """Blur `sharp` [B, C, S, S] float32 into `out`, which may be the same, where sigma [B] is not 0.

    `solarized` [B] is uint8; `colours` are the means of three channels, and what is multiplied by after these.
    """
    batch, channels, size, _ = sharp.shape
    between, grid = torch.empty_like(sharp), (batch * channels * triton.cdiv(size * size, LINE),)
    shape = {"C": channels, "S": size, "WIDE": triton.next_power_of_2(blur), "LINE": LINE, **OPTIONS}
    shape["SOLARIZE"] = solarized is not None
    parts = (sigma, sigma if solarized is None else solarized, blur // 2, *colours)
    _blur_kernel[grid](sharp, between, *parts, ALONG_ROWS=False, **shape)
    _blur_kernel[grid](between, out, *parts, ALONG_ROWS=True, **shape)


@triton.jit
def finished(x, solar, mean, share):  # type: ignore[no-untyped-def]
    """Solarised if `solar`, and normalised."""
    x = tl.where(solar & (x >= 0.5), 1.0 - x, x)
    return (x - mean) * share


@triton.jit(do_not_specialize=["radius"])
def _blur_kernel(  # type: ignore[no-untyped-def]
    in_ptr,
    out_ptr,
    sigma_ptr,
    solarized_ptr,
    radius,
    mean_r,
    mean_g,
    mean_b,
    share_r,
    share_g,
    share_b,
    C: tl.constexpr,
    S: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    SOLARIZE: tl.constexpr,
    WIDE: tl.constexpr,
    LINE: tl.constexpr,
):
    """Blur each plane of the samples that are to be blurred along one axis; rows come last, and are finished."""
    lines: tl.constexpr = (S * S + LINE - 1) // LINE
    plane = (tl.program_id(0) // lines).to(tl.int64)
    sample = plane // C
    sigma = tl.load(sigma_ptr + sample)
    if sigma != 0.0:
        away = tl.arange(0, WIDE) - radius
        share = tl.where(away <= radius, tl.exp(-0.5 * (away / sigma) * (away / sigma)), 0.0)
        share = 1.0 / tl.sum(share, 0)
        pixel = (tl.program_id(0) % lines) * LINE + tl.arange(0, LINE)
        inside = pixel < S * S
        x = pixel % S
        y = pixel // S
        acc = tl.zeros([LINE], tl.float32)
        for k in range(-radius, radius + 1):
            weight = tl.exp(-0.5 * (k / sigma) * (k / sigma)) * share
            if ALONG_ROWS:
                near = tl.abs(x + k)
                at = y * S + tl.minimum(near, 2 * (S - 1) - near)
            else:
                near = tl.abs(y + k)
                at = tl.minimum(near, 2 * (S - 1) - near) * S + x
            acc += weight * tl.load(in_ptr + plane * (S * S) + at, mask=inside, other=0.0)
        if ALONG_ROWS:
            solar = sample < 0
            if SOLARIZE:
                solar = tl.load(solarized_ptr + sample) != 0
            channel = plane % C
            mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
            scale = tl.where(channel == 0, share_r, tl.where(channel == 1, share_g, share_b))
            acc = finished(acc, solar, mean, scale)
        tl.store(out_ptr + plane * (S * S) + pixel, acc, mask=inside)
