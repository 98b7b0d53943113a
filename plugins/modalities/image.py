"""Images: photos become small uint8 canvases in the data workers, and random views on the device.

A worker only decodes: it squashes every photo to a square canvas of one size, so that a batch is one
uint8 tensor, and keeps the photo's own height and width. Views are cut from the canvas on the device, all
samples at once; crops follow the law of the original photo (areas and aspect ratios of its pixels), only
the resolution is that of the canvas: a crop of 8 % of a 12-megapixel photo holds less detail than one of
the original would.

The distortions and their strengths are those of SimCLR (Chen et al. 2020, "A simple framework for
contrastive learning of visual representations", https://arxiv.org/abs/2002.05709, appendix A): crop, flip, colour
jitter, grey, blur, in this order, then solarisation (Grill et al. 2020, https://arxiv.org/abs/2006.07733, off by
default). The stem cuts a view into patches and embeds each linearly (Dosovitskiy et al. 2021,
https://arxiv.org/abs/2010.11929, equation 1). Deviations from SimCLR: resizing is bilinear, not bicubic, and
the blur leaves out what lies beyond four times its largest sigma (6e-5 of a Gaussian).

Shapes: B batch, C channels, S side of the canvas, V side of a view, p side of a patch, T = (V / p)**2
patches, P = C p**2 values behind one, L width of the stem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Draw, Modality, Sample, Shown, Signal
from selfsup.kernel.errors import ConfigError, ContractError, DataError
from selfsup.kernel.random import Stream
from selfsup.plugins.common.patch_stem import PatchStem
from selfsup.plugins.common.photo import SUFFIXES, Photo, decode
from selfsup.plugins.common.random_crop import crop_boxes
from selfsup.triton_ops.augment import HUE, AugmentPlan, augment

TRIES = 10  # candidates for a crop, as in every random resized crop
PLAIN = 7 / 8  # of the shorter side: evaluation resizes to 256 and crops 224
TINY = 64  # views smaller than this have canvases of their own size
LARGEST = 178_956_970  # pixels at which Pillow itself refuses to go on


class Image(Modality):
    """Photos and drawings, RGB or grey."""

    field: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(
        self,
        *,
        size: Annotated[int, about("side of a view in pixels", ge=1)] = 224,
        canvas: Annotated[
            int | None,
            about("side of the square that workers hand over; None: 8/7 of size, or size below 64", ge=1),
        ] = None,
        patch: Annotated[int, about("side of a patch of the stem in pixels; divides size", ge=1)] = 16,
        channels: Annotated[int, about("3 for RGB, 1 for grey", ge=1, le=3)] = 3,
        mean: Annotated[tuple[float, ...] | None, about("of each channel, subtracted from values in [0, 1]")] = None,
        std: Annotated[tuple[float, ...] | None, about("of each channel, divided by after the mean")] = None,
        jitter: Annotated[
            tuple[float, float, float, float], about("strength of brightness, contrast, saturation and hue; >= 0")
        ] = (0.8, 0.8, 0.8, 0.2),
        jitter_chance: Annotated[float, about("of a colour jitter", ge=0, le=1)] = 0.8,
        grey_chance: Annotated[float, about("of losing all colour", ge=0, le=1)] = 0.2,
        flip_chance: Annotated[float, about("of a horizontal flip", ge=0, le=1)] = 0.5,
        blur_chance: Annotated[float, about("of a Gaussian blur with a kernel of a tenth of size", ge=0, le=1)] = 0.5,
        blur_sigma: Annotated[tuple[float, float], about("least and largest of the blur, in pixels; > 0")] = (
            0.1,
            2.0,
        ),
        solarize_chance: Annotated[float, about("of inverting the bright half of all values", ge=0, le=1)] = 0.0,
        max_pixels: Annotated[int, about("of a stored image; larger ones are refused", ge=1, le=LARGEST)] = 89_000_000,
    ) -> None:
        self.size, self.patch, self.channels, self.mean, self.std = size, patch, channels, mean, std
        self.canvas = canvas or (size if size < TINY else round(size / PLAIN))
        self.jitter, self.jitter_chance, self.grey_chance = jitter, jitter_chance, grey_chance
        self.flip_chance, self.solarize_chance, self.max_pixels = flip_chance, solarize_chance, max_pixels
        self.blur_chance, self.blur_sigma = blur_chance, blur_sigma
        # A tenth of the size, of which nothing beyond four sigma has any weight to speak of.
        self._kernel = 2 * min(size // 20, math.ceil(4 * max(blur_sigma))) + 1
        self._check()

    def _check(self) -> None:
        """What ranges of single options cannot say."""
        count = f"does not have channels = {self.channels} values; change it as well, or --set modality.{{}}=none"
        wrong = {
            f"channels = {self.channels}: it is 3 (RGB) or 1 (grey)": self.channels == 2,
            f"patch = {self.patch} does not divide size = {self.size}": self.size % self.patch > 0,
            f"canvas = {self.canvas} is smaller than size = {self.size}": self.canvas < self.size,
            f"mean = {self.mean} {count.format('mean')}": _misfit(self.mean, self.channels),
            f"std = {self.std} {count.format('std')}": _misfit(self.std, self.channels),
            f"std = {self.std}: each is greater than 0": min(self.std or (1.0,)) <= 0,
            f"jitter = {self.jitter}: each strength is at least 0": min(self.jitter) < 0,
            f"blur_sigma = {self.blur_sigma}: least, then largest, and both greater than 0": not (
                0 < self.blur_sigma[0] <= self.blur_sigma[1]
            ),
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"modality.{message}")

    def read(self, stored: Any) -> Photo:
        """Decode a path, bytes, {"bytes", "path"}, a uint8 array or a Pillow image; see `photo.decode`."""
        return decode(stored, self.canvas, self.channels, self.max_pixels)

    def collate(self, raws: Sequence[Photo], draw: Draw | None = None) -> Signal:
        """Stack photos: x [B, C, S, S] uint8, positions [B, 2] the heights and widths before squashing."""
        # Photos lie in memory column by column. Stacking them in that order copies each at once.
        x = torch.stack([raw.pixels.permute(2, 0, 1) for raw in raws]).permute(0, 2, 3, 1)  # [B, C, S, S]
        return Signal(x, positions=torch.tensor([raw.size for raw in raws]))

    def stem(self, width: int) -> Patches:
        """A linear embedding of patches."""
        return Patches(width, self.patch, self.channels)

    @torch.no_grad()
    def view(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float = 1.0) -> Signal:
        """A random view of every sample: [B, C, V, V] float32.

        `extent` is the least and largest share of the original photo's area that a crop shows. `strength`
        multiplies the colour jitter; at 0 grey, blur and solarisation are left out with it.
        """
        plan = self._plan(raw, extent, draw, strength)
        return Signal(augment(raw.x, plan, self.size, self.mean, self.std, blur=self._kernel))

    @torch.no_grad()
    def plain(self, raw: Signal) -> Signal:
        """The middle of the photo, undistorted: [B, C, V, V] float32.

        A square of 7/8 of the shorter side; the whole canvas where it is no larger than a view.
        """
        sides, canvas = _size(raw), raw.x.shape[-1]
        if canvas == self.size:
            box = torch.cat([torch.zeros_like(sides), torch.full_like(sides, canvas)], 1)
        else:
            side = (PLAIN * sides.min(1, keepdim=True).values).expand(-1, 2)
            box = self._box(raw, (sides - side) / 2, side)
        return Signal(augment(raw.x, AugmentPlan(box), self.size, self.mean, self.std))

    def _box(self, raw: Signal, start: Tensor, length: Tensor) -> Tensor:
        """Boxes on the canvas for those in the photos' own pixels, [B, 2] each: [B, 4]."""
        share = raw.x.shape[-1] / _size(raw)  # canvas pixels behind one of the photo, down and across
        return torch.cat([start * share, length * share], 1)

    def _plan(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float) -> AugmentPlan:
        """Draw everything at once: one long draw costs as much as a short one."""
        u = draw.uniform(4 * TRIES + 14)  # [B, 54]; always as many, so that an option changes its own effect alone
        height, width = _size(raw).unbind(1)
        box = crop_boxes(height, width, extent, u[:, : 4 * TRIES].reshape(-1, 4, TRIES))
        u = u[:, 4 * TRIES :]
        order = torch.where(u[:, 1, None] < self.jitter_chance, u[:, 6:10].argsort(dim=1, stable=True), -1)
        factors = torch.stack([self._factor(kind, u[:, 2 + kind], strength) for kind in range(4)], 1)
        sigma = self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * u[:, 10]
        # Chances of 0 are known beforehand on any device.
        jitter, grey, blur, solarize = (
            strength > 0 and chance > 0
            for chance in (self.jitter_chance, self.grey_chance, self.blur_chance, self.solarize_chance)
        )
        return AugmentPlan(
            self._box(raw, box[:, :2], box[:, 2:]),
            flip=u[:, 0] < self.flip_chance,
            order=order if jitter else None,
            factors=factors if jitter else None,
            greyed=u[:, 11] < self.grey_chance if grey else None,
            sigma=torch.where(u[:, 12] < self.blur_chance, sigma, 0.0) if blur and self._kernel > 1 else None,
            solarized=u[:, 13] < self.solarize_chance if solarize else None,
        )

    def _factor(self, kind: int, uniform: Tensor, strength: float) -> Tensor:
        """Of brightness, contrast and saturation from [1 - s, 1 + s], not below 0; of hue from [-s, s], s <= 1/2."""
        s = strength * self.jitter[kind]
        low, high = (max(0.0, 1 - s), 1 + s) if kind != HUE else (-min(s, 0.5), min(s, 0.5))
        return low + (high - low) * uniform

    @torch.no_grad()
    def show(self, signal: Signal) -> list[Shown]:
        """Pictures: canvases in the shape of their photos, views with mean and deviation undone."""
        x = signal.x.detach().float().cpu()  # [B, C, H, W]
        if signal.x.is_floating_point():
            mean, std = (torch.tensor(v or (d,)).view(-1, 1, 1) for v, d in ((self.mean, 0.0), (self.std, 1.0)))
            x = (x * std + mean) * 255
        sizes = _size(signal).tolist() if signal.positions is not None else [x.shape[2:]] * len(x)
        shown = []
        for picture, (height, width) in zip(x, sizes, strict=True):
            scale = x.shape[-1] / max(height, width)
            sides = max(1, round(height * scale)), max(1, round(width * scale))
            picture = torch.nn.functional.interpolate(picture[None], sides, mode="bilinear", antialias=True)[0]
            levels = picture.round().clamp(0, 255).byte().expand(3, -1, -1)  # grey shows in three channels
            shown.append(levels.permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]
        return shown

    def sample(self) -> Sequence[Sample]:
        """The 1,797 handwritten digits of 8 x 8 pixels in 10 classes that come with scikit-learn."""
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        except ModuleNotFoundError as cause:
            raise DataError(
                "the built-in sample of images comes with scikit-learn, which is not installed: "
                "pip install 'selfsup[eval]', or name your data with --data"
            ) from cause
        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
        return [{"image": image, "label": int(label)} for image, label in zip(pixels, digits.target, strict=True)]


class Patches(PatchStem):
    """Square patches of a view, row by row."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__(channels * patch**2, width)
        self.patch = patch

    def cut(self, raw: Signal) -> Signal:
        """[B, C, H, W] float -> its patches [B, T, P] with positions [B, T, 2] (row, column).

        Sides are any multiples of the patch. The values of a patch stand by (row, column, channel), as in MAE.
        """
        b, c, h, w = raw.x.shape
        p = self.patch
        if c * p * p != self.size or h % p or w % p or not raw.x.is_floating_point():
            raise ContractError(
                f"the stem takes float views of {self.size // p**2} channels whose sides are multiples of {p}; "
                f"it got {raw.x.dtype} {[c, h, w]} (a decoded photo becomes a view through `view` or `plain`)"
            )
        x = raw.x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, p, p, C]
        row, column = torch.arange(h // p, device=x.device), torch.arange(w // p, device=x.device)
        places = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).reshape(1, -1, 2)  # [1, T, 2]
        return Signal(x.reshape(b, -1, self.size), positions=places.expand(b, -1, -1))


def _size(raw: Signal) -> Tensor:
    """Heights and widths of the photos [B, 2] float; where nobody says, they are as square as the canvas."""
    if raw.positions is not None:
        return raw.positions.float()
    return torch.full((len(raw.x), 2), float(raw.x.shape[-1]), device=raw.x.device)


def _misfit(values: tuple[float, ...] | None, channels: int) -> bool:
    return values is not None and len(values) != channels
