"""The convolutional encoder of wav2vec 2.0: a waveform becomes one vector every 20 ms.

Baevski, Zhou, Mohamed, Auli 2020, "wav2vec 2.0", section 2 (feature encoder) and 4.2;
https://arxiv.org/abs/2006.11477. Seven strided convolutions with GELU: strides 5·2⁶ = 320 samples,
receptive field 400 samples, so 1 s at 16 kHz gives 49 frames. `group` normalises each channel of the first
layer over the utterance's time (the base model), `layer` every frame of every layer over its channels (large).

Padding never changes an utterance: a frame is real when all the samples it sees are, and the statistics over
time are those of the real frames. fairseq and transformers normalise over the padding too, so that there the
features of an utterance depend on its batch.

Shapes: B batch, N samples, T frames, K taps of a kernel, C channels in, O channels out, L = O of the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.kernel.contracts import Signal, Stem
from selfsup.kernel.errors import ConfigError, ContractError

Layer = tuple[int, int, int]  # channels, kernel, stride
LAYERS: tuple[Layer, ...] = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)
EPSILON = 1e-5  # of the normalisations, as in the paper's code


def frames(samples: Any, layers: Sequence[Layer]) -> Any:
    """How many frames see only these first `samples`: an int, or an integer tensor elementwise."""
    for _, kernel, stride in layers:
        samples = (samples - kernel) // stride + 1
    return samples.clamp(min=0) if isinstance(samples, Tensor) else max(0, samples)


def receptive_field(layers: Sequence[Layer]) -> int:
    """How many samples one frame sees."""
    seen = 1
    for _, kernel, stride in reversed(layers):
        seen = (seen - 1) * stride + kernel
    return seen


class ConvEncoder(Stem):
    """Waveform [B, N] -> latents [B, T, L] -> tokens [B, T, width].

    `layers` lists (channels, kernel, stride); `norm` is "group" or "layer"; `bias` gives the convolutions one.
    The input's `segments` [B, N] must be ones followed by zeros.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[Layer] = LAYERS,
        norm: Literal["group", "layer"] = "group",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not layers or any(len(layer) != 3 or min(layer) < 1 for layer in layers):
            raise ConfigError(f"layers lists [channels, kernel, stride] of positive numbers; it got {layers!r}")
        self.layers = tuple((c, k, s) for c, k, s in layers)
        self.width = self.layers[-1][0]
        self.size = math.prod(stride for _, _, stride in self.layers)
        inputs = (1, *(channels for channels, _, _ in self.layers))
        self.convs = nn.ModuleList(
            FirstConv(*layer)
            if norm == "group" and i == 0
            else Conv(inputs[i], *layer, bias=bias, norm=norm == "layer")
            for i, layer in enumerate(self.layers)
        )
        self.norm = nn.LayerNorm(self.width)
        self.project = nn.Linear(self.width, width)

    def latents(self, raw: Signal) -> Signal:
        """Frames of L features; a frame is real when it sees no padding. raw.x is [B, N] float."""
        total = frames(raw.x.shape[1], self.layers)
        if total < 1:
            raise ContractError(
                f"{raw.x.shape[1]} samples make no frame: one frame sees {receptive_field(self.layers)} samples"
            )
        lengths = None if raw.segments is None else (raw.segments > 0).sum(1)  # [B]
        x = raw.x[:, None]  # [B, 1, N]
        for conv in self.convs:
            x = F.gelu(conv(x, lengths))  # [B, O, T']
        x = x.transpose(1, 2)  # [B, T, L]
        if lengths is None:
            return Signal(x)
        return Signal(x, before(frames(lengths, self.layers), total).int())


class FirstConv(nn.Module):
    """A convolution of one channel and the normalisation of each of its outputs over the utterance.

    Both are one linear map. With centred windows u_t = x_t - mean(x) of K samples, their covariance Σ over the
    real frames, and a filter w, the outputs w·u_t have mean 0 and variance wᵀΣw, so

        normalised output = u_t · (scale w / √(wᵀΣw + ε)) + shift

    is a product with a filter for each utterance: the largest activation of the model is neither kept nor read
    for its statistics. A bias would go out with the mean, so there is none.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.layer = (channels, kernel, stride)
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(channels, 1, kernel)))
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, 1, N] -> [B, O, T]; `lengths` [B] counts the real samples."""
        _, kernel, stride = self.layer
        windows = x[:, 0].unfold(1, kernel, stride)  # [B, T, K]
        if lengths is None:
            count = torch.tensor(float(windows.shape[1]), device=x.device)
            real = torch.ones((), device=x.device)
        else:
            count = frames(lengths, [self.layer]).clamp(min=1)[:, None, None]  # [B, 1, 1]
            real = before(count[:, 0, 0], windows.shape[1])[..., None]  # [B, T, 1]
        centred = windows - (windows * real).sum(1, keepdim=True) / count
        # Neighbouring samples of speech are nearly equal, so Σ is nearly singular: float64, 100 numbers an utterance.
        seen = (centred * real).double()
        covariance = seen.transpose(1, 2) @ seen / count  # [B, K, K]
        filters = self.weight[:, 0].double()  # [O, K]
        variance = ((filters @ covariance) * filters).sum(2)  # [B, O]
        filters = (self.scale * (variance + EPSILON).rsqrt())[..., None] * filters  # [B, O, K]
        return torch.baddbmm(self.shift[:, None], filters.to(x.dtype), centred.transpose(1, 2))


class Conv(nn.Module):
    """A strided convolution over time, and LayerNorm over the channels of each frame if asked."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int, *, bias: bool, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm = nn.LayerNorm(channels, eps=EPSILON) if norm else None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, C, T] -> [B, O, T']. Padding lies behind all that a real frame sees: `lengths` is not needed."""
        y: Tensor = self.conv(x)
        return y if self.norm is None else self.norm(y.transpose(1, 2)).transpose(1, 2)


def before(lengths: Tensor, total: int) -> Tensor:
    """Which of `total` places lie before each length: [B] -> [B, total] bool."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]
