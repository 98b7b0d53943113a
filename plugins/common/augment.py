"""Crop, resize, flip and blur a batch of images on its device, each sample in its own way.

Random resized crop (Szegedy et al. 2015, "Going deeper with convolutions", https://arxiv.org/abs/1409.4842,
section 6) draws a share of the area and an aspect ratio. Resizing weighs input pixels i for output pixel o,
whose centre lies at c_o = start + (o + 1/2) * scale in the input, by a triangle that widens with the
reduction, so that nothing aliases (what Pillow calls BILINEAR, and others antialias=True):

    y_o = sum_i w_oi x_i / sum_i w_oi,    w_oi = max(0, 1 - |i + 1/2 - c_o| / max(scale, 1))

Every output row is a short weighted sum of input rows, which is what an embedding bag computes; columns
follow after a transposition, and a flip only counts the output pixels from the other end. A Gaussian blur is
one small banded matrix for each sample, applied to blocks of rows and of columns.

Shapes: B batch, C channels, H x W input and Y x X output pixels, K taps. No function here draws anything,
reads anything back from the device, or has a shape that depends on what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # pixels that one product of the blur makes: larger multiplies more zeros, smaller copies more
CHUNK = 2**16  # pixels that one pass over the samples holds on a CPU, so that they stay in its cache
ASPECTS = (3 / 4, 4 / 3)

Taps = tuple[Tensor, Tensor]
"""Which input pixels make each output pixel along one axis [B, out, K] int64, and their weights [B, out, K]."""


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


def taps(start: Tensor, length: Tensor, size: int, out: int, flip: Tensor | None = None) -> Taps:
    """The taps of one axis, with triangular weights.

    `start` and `length` [B] are the box in input pixels, fractions allowed; `size` the pixels of the input,
    `out` of the output; `flip` [B] bool counts the output from the other end. Pixels beside the
    box count where the triangle reaches them, pixels outside the image do not.
    """
    place = torch.arange(out, device=start.device)[None]  # [1, out]
    if flip is not None:
        place = torch.where(flip[:, None], out - 1 - place, place)  # [B, out]
    scale = (length / out)[:, None]  # [B, 1]
    reach = scale.clamp(min=1)
    centre = start[:, None] + (place + 0.5) * scale  # [B, out]
    # A box is at most the image, so the widest triangle, and with it the number of taps, is known beforehand.
    count = math.ceil(2 * max(1.0, size / out) - 1e-6)
    first = (centre - reach + 0.5).floor().long()
    index = first[..., None] + torch.arange(count, device=start.device)  # [B, out, K]
    weight = (1 - ((index + 0.5 - centre[..., None]) / reach[..., None]).abs()).clamp(min=0)
    weight = weight * ((index >= 0) & (index < size))
    return index.clamp(0, size - 1), weight / weight.sum(-1, keepdim=True)


def resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Make an image of the weighted rows and columns of another, x [B, C, H, W] -> float32 [B, C, Y, X]."""
    b, c, h, w = x.shape
    y, out = rows[0].shape[1], columns[0].shape[1]
    # Photos lie in memory column by column, see photo.py, so that this is a cast and no transposition.
    table = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, W, C, H]
    narrow = _bag(table.reshape(b, w, c * h), *columns)  # [B, X, C * H]
    table = narrow.transpose(1, 2).contiguous().reshape(b * c, h, out)  # [B * C, H, X]
    index, weight = (t[:, None].expand(-1, c, -1, -1).reshape(b * c, y, -1) for t in rows)
    return _bag(table, index, weight).reshape(b, c, y, out)


def _bag(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of the rows of each table: [N, R, F], [N, O, K], [N, O, K] -> [N, O, F]."""
    n, rows, features = table.shape
    first = torch.arange(0, n * rows, rows, device=table.device)[:, None, None]
    index, weight = (index + first).flatten(0, 1), weight.flatten(0, 1)  # [N * O, K]
    return F.embedding_bag(index, table.flatten(0, 1), mode="sum", per_sample_weights=weight).reshape(n, -1, features)


def gaussian(sigma: Tensor, size: int) -> Tensor:
    """The weights of a blur: sigma [B] in pixels -> [B, size], size odd; each row sums to one."""
    away = torch.arange(size, device=sigma.device) - size // 2
    weight = torch.exp(-0.5 * (away / sigma[:, None]) ** 2)  # [B, size]
    return weight / weight.sum(1, keepdim=True)


def bands(kernel: Tensor, side: int) -> Tensor:
    """The matrix that convolves N neighbouring pixels at once: [B, K] -> [B, N + K - 1, N], N a divisor of `side`."""
    size, block = kernel.shape[1], max(n for n in range(1, BLOCK + 1) if side % n == 0)
    lag = torch.arange(block + size - 1, device=kernel.device)[:, None] - torch.arange(block, device=kernel.device)
    inside = (lag >= 0) & (lag < size)
    return kernel[:, lag.clamp(0, size - 1)] * inside


def blur(x: Tensor, band: Tensor) -> Tensor:
    """Convolve rows and columns of x [B, C, S, S] with the kernels behind `bands`; borders mirror."""
    b, c, side, _ = x.shape
    near, block = band.shape[1:]
    radius = (near - block) // 2
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")  # [B, C, S + 2r, S + 2r]
    x = torch.bmm(x.unfold(3, near, block).reshape(b, -1, near), band)  # [B, C * (S + 2r) * S / N, N]
    x = x.reshape(b, c, side + 2 * radius, side)
    x = x.unfold(2, near, block).transpose(3, 4).reshape(-1, near, side)  # [B * C * S / N, N + 2r, S]
    each = band.transpose(1, 2)[:, None].expand(-1, len(x) // b, -1, -1).reshape(len(x), block, near)
    return torch.bmm(each, x).reshape(b, c, side, side)


def hosted(x: Tensor) -> bool:
    """Whether x lies in host memory, where reading a value makes nobody wait."""
    return x.device.type == "cpu"


def only(chosen: Tensor, change: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Apply change(x, *parameters), which may work in place, to the samples `chosen` [B] bool.

    The others keep their values exactly; x is not to be used afterwards.
    On an accelerator all samples are changed and the result is selected, because asking which are
    chosen would make the host wait. In host memory nobody waits, and only the chosen ones are computed.
    """
    if not hosted(x):
        return torch.where(chosen[:, None, None, None], change(x.clone(), *parameters), x)
    index = chosen.nonzero()[:, 0]
    if len(index) in (0, len(x)):
        return change(x, *parameters) if len(index) else x
    return x.index_copy_(0, index, change(x[index], *(p[index] for p in parameters)).contiguous())


def chunks(kind: Tensor, pixels: int) -> tuple[Tensor, list[slice]]:
    """Cut a batch into parts that fit a CPU's cache, as an order of its samples [B] and slices of that order.

    `kind` [B] int64 is alike for samples that need the same work, which come together, so that `only` can
    leave out more; `pixels` is what a view has. An accelerator takes the batch as it is, and whole.
    """
    count = len(kind)
    if not hosted(kind):
        return torch.arange(count, device=kind.device), [slice(0, count)]
    step = max(1, CHUNK // pixels)
    return kind.argsort(stable=True), [slice(first, first + step) for first in range(0, count, step)]
