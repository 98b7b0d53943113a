"""The views of augment.py on a CPU: a few samples at a time, so that what they go through stays in its cache.

Samples that need the same work come together, and what none of a group needs is not computed.

* Every output row of a resized image is a short weighted sum of input rows, which is what an embedding bag computes;
  columns come first, as photos lie in memory column by column, and a flip only counts them from the other end.
* Brightness, contrast and saturation are one formula, gain x + shade grey(x) + level mean grey(x). A sample with hue
  at place p of its order passes through three slots before the hue and three after it, of which the first p and the
  last 3 - p do something: hue, the expensive one, is computed once for the group.
* A blur is one small banded matrix for each sample, applied to blocks of rows and of columns.

Shapes: those of augment.py, and K taps of an output pixel along one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from .augment import CONTRAST, HUE, SATURATION, SLACK, AugmentPlan, grey

BLOCK = 16  # pixels that one product of the blur makes: larger multiplies more zeros, smaller copies more
CHUNK = 2**16  # pixels that one pass over the samples holds

Taps = tuple[Tensor, Tensor]
"""Which input pixels make each output pixel along one axis [B, S, K] int64, and their weights [B, S, K]."""

Work = dict[str, tuple[Tensor, ...]]
"""What is done for each sample, each tensor with B rows: taps of "rows" and "columns"; and for each of CHANGES that
anybody needs, who needs it, and the parameters of the function that does it."""


def augment_in_chunks(
    images: Tensor,
    plan: AugmentPlan,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `augment` promises, for images in host memory."""
    _check_values(images, plan)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    if _as_they_are(images, plan, size):
        x = images.to(kind, memory_format=torch.contiguous_format).mul_(1 / 255)
        return normalise(x, mean, std).to(dtype)
    work = _prepared(images, plan, size, blur, kind)
    order, parts = chunks(_sort_of(work), size**2)
    work = _of(work, order)
    views = torch.empty(*images.shape[:2], size, size, dtype=dtype)
    columns = images.permute(0, 3, 1, 2)  # [B, W, C, H], as photos lie in memory
    for part in parts:
        canvas = columns.index_select(0, order[part]).permute(0, 2, 3, 1)
        x = _made(canvas, _of(work, part))
        views.index_copy_(0, order[part], normalise(x, mean, std).to(dtype))
    return views


def _check_values(images: Tensor, plan: AugmentPlan) -> None:
    """Raise on what a GPU can only answer with NaN. In NumPy, whose calls on few numbers cost a third of torch's."""
    box = plan.box.detach().double().numpy()
    start, sides, pixels = box[:, :2], box[:, 2:], list(images.shape[2:])
    inside = (start >= -SLACK) & (sides > 0) & (start + sides <= np.array(pixels) + SLACK)  # not so for a NaN
    _refuse(~inside.all(1), box, f"a box lies in the image, {pixels} pixels")
    if plan.order is not None:
        order = plan.order.numpy()
        ordered = np.sort(order, 1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
        wrong = twice | (ordered[:, 0] < -1) | (ordered[:, 3] > HUE)
        _refuse(wrong, order, "an order has each of 0 to 3 at most once, and else -1")
    if plan.sigma is not None:
        sigma = plan.sigma.detach().double().numpy()
        _refuse(~(sigma >= 0), sigma, "the sigma of a blur is at least 0")


def _refuse(wrong: np.ndarray[Any, Any], values: np.ndarray[Any, Any], rule: str) -> None:
    if wrong.any():
        sample = int(wrong.argmax())
        raise ContractError(f"{rule}; that of sample {sample} is {values[sample].tolist()}")


def _as_they_are(images: Tensor, plan: AugmentPlan, size: int) -> bool:
    """Whether a view is the whole image in its own resolution, as where small photos are evaluated."""
    whole = plan.box.new_tensor([0, 0, size, size])
    same = images.shape[2:] == (size, size) and bool((plan.box == whole).all())
    return same and all(part is None for part in plan[1:])


def _prepared(images: Tensor, plan: AugmentPlan, size: int, blur: int, kind: torch.dtype) -> Work:
    """What is done, for the whole batch at once."""
    top, left, height, width = plan.box.to(kind).unbind(1)
    index, weight = taps(top, height, images.shape[2], size)
    # Bytes become shares of white on the way.
    work: Work = {"rows": (index, weight / 255), "columns": taps(left, width, images.shape[3], size, plan.flip)}
    if plan.order is not None and plan.factors is not None:
        work["jitter"] = slots(plan.order, plan.factors.to(kind))
    if plan.greyed is not None and images.shape[1] == 3:
        work["grey"] = (plan.greyed,)
    if plan.sigma is not None and blur > 1:
        chosen = plan.sigma != 0
        sigma = torch.where(chosen, plan.sigma.to(kind), 1)
        work["blur"] = (chosen, bands(gaussian(sigma, blur), size))
    if plan.solarized is not None:
        work["solarize"] = (plan.solarized,)
    return work


def _of(work: Work, samples: Tensor | slice) -> Work:
    return {name: tuple(part[samples] for part in parts) for name, parts in work.items()}


def _sort_of(work: Work) -> Tensor:
    """A number [B] that is alike for samples that need the same of the expensive steps."""
    number = torch.zeros(len(work["rows"][0]), dtype=torch.long)
    if "jitter" in work:
        chosen, used = work["jitter"][:2]
        number += 4 * used[:, :3].sum(1) + 2 * chosen
    return number + work["blur"][0] if "blur" in work else number


def _made(canvas: Tensor, work: Work) -> Tensor:
    """Views of some samples: [B, C, H, W] uint8 -> [B, C, S, S], not normalised."""
    x = resample(canvas, *work["rows"], *work["columns"])
    for name, change in CHANGES.items():
        if name in work:
            chosen, *parameters = work[name]
            x = only(chosen, change, x, *parameters)
    return x


def chunks(kind: Tensor, pixels: int) -> tuple[Tensor, list[slice]]:
    """Cut a batch into parts that fit the cache, as an order of its samples [B] and slices of that order.

    `kind` [B] int64 is alike for samples that need the same work, which come together, so that `only` can
    leave out more; `pixels` is what a view has.
    """
    step = max(1, CHUNK // pixels)
    return kind.argsort(stable=True), [slice(first, first + step) for first in range(0, len(kind), step)]


def only(chosen: Tensor, change: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Apply change(x, *parameters), which may work in place, to the samples `chosen` [B] bool.

    The others keep their values exactly; x is not to be used afterwards.
    """
    index = chosen.nonzero()[:, 0]
    if len(index) in (0, len(x)):
        return change(x, *parameters) if len(index) else x
    return x.index_copy_(0, index, change(x[index], *(p[index] for p in parameters)).contiguous())


def taps(start: Tensor, length: Tensor, pixels: int, size: int, flip: Tensor | None = None) -> Taps:
    """The taps of one axis of `pixels`, with triangular weights; start, length [B] are the box along it.

    `flip` [B] bool counts the output from the other end. Pixels beside the box count where the triangle reaches
    them, pixels outside the image do not.
    """
    place = torch.arange(size)[None]  # [1, S]
    if flip is not None:
        place = torch.where(flip[:, None], size - 1 - place, place)  # [B, S]
    scale = (length / size)[:, None]  # [B, 1]
    reach = scale.clamp(min=1)
    centre = start[:, None] + (place + 0.5) * scale  # [B, S]
    # A box is at most the image, so the widest triangle, and with it the number of taps, is known beforehand.
    count = math.ceil(2 * max(1.0, (pixels + SLACK) / size) - 1e-6)
    first = (centre - reach + 0.5).floor().long()
    index = first[..., None] + torch.arange(count)  # [B, S, K]
    weight = (1 - ((index + 0.5 - centre[..., None]) / reach[..., None]).abs()).clamp(min=0)
    weight = weight * ((index >= 0) & (index < pixels))
    return index.clamp(0, pixels - 1), weight / weight.sum(-1, keepdim=True)


def resample(x: Tensor, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor) -> Tensor:
    """Make an image of the weighted rows and columns of another, x [B, C, H, W] -> [B, C, S, S]."""
    b, c, h, w = x.shape
    size, kind = rows.shape[1], row_weights.dtype
    # In memory column by column, so that this is a cast and no transposition.
    table = x.permute(0, 3, 1, 2).to(kind, memory_format=torch.contiguous_format)  # [B, W, C, H]
    narrow = _bag(table.reshape(b, w, c * h), columns, column_weights)  # [B, S, C * H]
    table = narrow.transpose(1, 2).contiguous().reshape(b * c, h, size)  # [B * C, H, S]
    index, weight = (t[:, None].expand(-1, c, -1, -1).reshape(b * c, size, -1) for t in (rows, row_weights))
    return _bag(table, index, weight).reshape(b, c, size, size)


def _bag(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of the rows of each table: [N, R, F], [N, O, K], [N, O, K] -> [N, O, F]."""
    n, rows, features = table.shape
    first = torch.arange(0, n * rows, rows)[:, None, None]
    index, weight = (index + first).flatten(0, 1), weight.flatten(0, 1)  # [N * O, K]
    return F.embedding_bag(index, table.flatten(0, 1), mode="sum", per_sample_weights=weight).reshape(n, -1, features)


def slots(order: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Who is jittered [B], and the parameters of `jitter`, given the order and the factors of a plan.

    Those are which of three slots before the hue and three after it do something [B, 6] bool, the gain, shade and
    level of each [B, 6, 3], whose hue is turned [B] bool, and by how much of the circle [B], in [0, 1).
    """
    slot = torch.arange(3)[None]  # [1, 3]
    turned = (order == HUE).any(1)
    # Three slots hold all but the hue; without one, all but a place where nothing happens.
    gap = torch.where(turned[:, None], order == HUE, order < 0).to(torch.uint8).argmax(1, keepdim=True)  # [B, 1]
    what = order.gather(1, slot + (slot >= gap))  # [B, 3]
    factor = factors.gather(1, what.clamp(min=0))
    used = torch.cat([(slot < gap) & (what >= 0), (slot >= gap) & (what >= 0)], 1)  # [B, 6]
    what, factor = torch.cat([what, what], 1), torch.cat([factor, factor], 1)  # [B, 6]
    gain = torch.where(used, factor, 1.0)
    shade = torch.where(used & (what == SATURATION), 1 - factor, 0.0)
    level = torch.where(used & (what == CONTRAST), 1 - factor, 0.0)
    turn = factors[:, HUE] - factors[:, HUE].floor()
    return (order >= 0).any(1), used, torch.stack([gain, shade, level], -1), turned, turn


def jitter(x: Tensor, used: Tensor, blend: Tensor, turned: Tensor, turn: Tensor) -> Tensor:
    """Distort x [B, C, S, S] in place; the other arguments are those of `slots`."""
    does = used.any(0).tolist()
    shaded, levelled = (blend[..., 1:] != 0).any(0).T.tolist()
    for slot in range(6):
        if slot == 3 and x.shape[1] == 3:
            x = only(turned, turn_hue, x, turn)
        if does[slot]:
            x = _blend(x, blend[:, slot, :, None, None, None], shaded[slot], levelled[slot])
    return x


def _blend(x: Tensor, blend: Tensor, shaded: bool, levelled: bool) -> Tensor:
    """gain x + shade grey(x) + level mean grey(x), cut to [0, 1], in place; what nobody needs is not computed."""
    gain, shade, level = blend.unbind(1)  # [B, 1, 1, 1] each
    if not shaded and not levelled:
        return x.mul_(gain).clamp_(0, 1)
    luma = grey(x)
    # Not luma.mul_: the luma of a single channel is the image itself.
    other = level * luma.mean((1, 2, 3), keepdim=True) if levelled else 0.0
    other = luma * shade + other if shaded else other
    return x.mul_(gain).add_(other).clamp_(0, 1)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of x [B, 3, S, S] by `turn` [B] of the circle, in [0, 1), in place; saturation and value stay.

    With h the hue in turns, low and c the least value and the range over the channels, a colour is
    low + c clip(|6 frac(h + o) - 3| - 1, 0, 1) with o = 0, 2/3, 1/3 for red, green, blue, and solved for h

        h = 1/2 - s / 6,    s = 2 + (red - green - blue + low) / c with the sign of green - blue,

    which needs no case for each sector. Where c is 0, h does not matter.
    """
    red, green, blue = x.unbind(1)  # [B, S, S]
    low = x.amin(1)
    c = x.amax(1).sub_(low)
    s = (red - green).sub_(blue).add_(low).div_(c.clamp(min=1e-12)).add_(2)
    s = torch.copysign(s, green - blue).div_(6)
    # One whole turn more keeps the sum positive, where frac is the remainder.
    offset = (3 - torch.arange(3, dtype=x.dtype)) / 3 % 1 + 1.5 + turn[:, None]  # [B, 3]
    torch.sub(offset[:, :, None, None], s[:, None], out=x)  # [B, 3, S, S]
    return x.frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(c[:, None]).add_(low[:, None])


def without_colour(x: Tensor) -> Tensor:
    """Put the luma of x [B, C, S, S] in each of its channels, in place."""
    return x.copy_(grey(x))


def gaussian(sigma: Tensor, size: int) -> Tensor:
    """The weights of a blur: sigma [B] in pixels -> [B, size], size odd; each row sums to one."""
    away = torch.arange(size) - size // 2
    weight = torch.exp(-0.5 * (away / sigma[:, None]) ** 2)  # [B, size]
    return weight / weight.sum(1, keepdim=True)


def bands(kernel: Tensor, side: int) -> Tensor:
    """The matrix that convolves N neighbouring pixels at once: [B, K] -> [B, N + K - 1, N], N a divisor of `side`."""
    size, block = kernel.shape[1], max(n for n in range(1, BLOCK + 1) if side % n == 0)
    lag = torch.arange(block + size - 1)[:, None] - torch.arange(block)
    inside = (lag >= 0) & (lag < size)
    return kernel[:, lag.clamp(0, size - 1)] * inside


def blurred(x: Tensor, band: Tensor) -> Tensor:
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


def solarized(x: Tensor) -> Tensor:
    """Invert the values of x that are at least one half."""
    return torch.where(x >= 0.5, 1 - x, x)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std for each channel of x [B, C, S, S], in place; an empty one is left out."""
    for channel, value in enumerate(mean):
        x[:, channel].sub_(value)
    for channel, value in enumerate(std):
        x[:, channel].div_(value)
    return x


CHANGES: dict[str, Callable[..., Tensor]] = {
    "jitter": jitter,
    "grey": without_colour,
    "blur": blurred,
    "solarize": solarized,
}
