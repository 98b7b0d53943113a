"""How tokens know where they are.

    Learned    x + table[p]                                        Gehring et al. 2017; BERT, GPT-2
    SinCos     x + [sin(p w_i), cos(p w_i)], w_i = 10000^(-i/(d/2))  Vaswani et al. 2017; MAE's 2-D form
    Conv       x + GELU(conv(x))                                   wav2vec 2.0, Baevski et al. 2020
    Rotary     q and k turned by angles p w_i                      Su et al. 2021; LLaMA
    Relative   a learned bias on the logits, by bucket of p_k - p_q  T5, Raffel et al. 2020

The first three add to the tokens once; `Rotary` and `Relative` act within attention. All but `Conv`
read the positions that tokens carry, so they serve dropped (MAE) and packed tokens as they are. A token
at negative positions (a class token) is nowhere: `Learned` and `SinCos` add nothing to it, `Rotary` does not
turn it, and to `Relative` it comes before the others.

Shapes: B batch, T tokens, D width, A axes of a position, d width of a head, H heads, G groups. A leading
dimension of 1 stands for positions that all samples share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError


def places(tokens: Signal) -> Tensor:
    """The position of each token on each axis: [B, T, A], or [1, T, 1] where tokens are just counted."""
    if tokens.positions is None:
        return tokens.places()[:1, :, None]  # [1, T, 1]
    return tokens.positions if tokens.positions.dim() == 3 else tokens.positions[..., None]


def places_on_line(tokens: Signal, kind: str) -> Tensor:
    """The positions of tokens on their one axis: [B, T] or [1, T].

    Raises ContractError where they have several axes.
    """
    where = places(tokens)
    if where.shape[-1] != 1:
        raise ContractError(
            f"{kind} positions count along one axis, and these tokens have {where.shape[-1]}; "
            "use backbone.positions = sincos or rotary"
        )
    return where[..., 0]


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-i / count) for i in range(count): [count] float32."""
    return base ** (-torch.arange(count, device=device, dtype=torch.float32) / max(1, count))


class Learned(nn.Module):
    """A table of `length` vectors, one for each position along one axis."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, tokens: Signal) -> Tensor:
        """Tokens at positions 0 <= p < length -> what to add to them, [B or 1, T, D].

        Raises ContractError for longer rows. Explicit positions are checked on a CPU only: on a GPU
        the check would wait for it, and its own out-of-range assertion stops the run.
        """
        where = places_on_line(tokens, "learned")
        if tokens.positions is None:
            farthest = where.shape[1] - 1
        else:
            farthest = int(where.max()) if where.device.type == "cpu" and where.numel() else 0
        if farthest >= self.table.num_embeddings:
            raise ContractError(
                f"position {farthest} is beyond the {self.table.num_embeddings} learned ones; "
                "raise backbone.length or shorten the samples"
            )
        out: Tensor = self.table(where.clamp(min=0))
        return out if tokens.positions is None else out.masked_fill((where < 0)[..., None], 0)


class SinCos(nn.Module):
    """Fixed sines and cosines; the width is split evenly over the axes of a position.

    Each axis gets its sines, then its cosines; channels that do not divide stay zero.
    """

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.width, self.base = width, base

    def forward(self, tokens: Signal) -> Tensor:
        """What to add to the tokens: [B or 1, T, D] float32."""
        where = places(tokens)
        share = self.width // (2 * where.shape[-1])
        angle = where[..., None] * frequencies(share, self.base, where.device)  # [B, T, A, share]
        table = torch.cat([angle.sin(), angle.cos()], -1)  # [B, T, A, 2 * share]
        table = table.masked_fill((where < 0)[..., None], 0).flatten(2)  # [B, T, A * 2 * share]
        return F.pad(table, (0, self.width - table.shape[-1]))  # [B, T, D]


class Conv(nn.Module):
    """wav2vec 2.0's grouped convolution over time, weight-normalised for each tap of the kernel.

    weight = weight_g * weight_v / ||weight_v||, with the norm over both channel dimensions. An even
    kernel looks one token further back than ahead. It reads the order of tokens in the row: dropped
    or packed tokens would see strangers, so a signal with explicit positions is refused, and the
    backbone refuses rows of several sequences.
    """

    def __init__(self, width: int, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the kernel from normal(0, 4 / (kernel * D)), as the paper's code does."""
        nn.init.normal_(self.weight_v, std=2 / math.sqrt(self.kernel * len(self.bias)))
        self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))
        nn.init.zeros_(self.bias)

    def forward(self, tokens: Signal) -> Tensor:
        """What to add to the tokens, whose padding is zero: [B, T, D]."""
        if tokens.positions is not None:
            raise ContractError(
                "conv positions read the order of tokens in a row, and these carry positions of their own "
                "(packed or dropped tokens); use backbone.positions = sincos, rotary or relative"
            )
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        x = tokens.x.transpose(1, 2)  # [B, D, T]
        if fft_pays(x, self.kernel):
            x = correlate(x, weight, self.groups) + self.bias[:, None]  # [B, D, T]
        else:
            x = F.conv1d(x, weight, self.bias, padding=self.kernel // 2, groups=self.groups)
            x = x[..., : tokens.x.shape[1]]  # [B, D, T]: an even kernel makes one token too many
        return F.gelu(x).transpose(1, 2)  # [B, T, D]


def fft_pays(x: Tensor, kernel: int) -> bool:
    """Whether the Fourier transform beats the sum for x [B, D, T]: a long kernel, a large batch, a CPU, no bfloat16."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.dtype not in (torch.float32, torch.float64):
        return False
    return kernel >= 32 and x.shape[0] * x.shape[2] >= 2 * (x.shape[2] + kernel)


def correlate(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """What `conv1d` of x [B, D, T] with weight [D, D / groups, K] and padding K // 2 gives at the first T places.

    By the convolution theorem: a sum over K taps becomes one product of channels for each frequency.
    """
    length, kernel = x.shape[-1], weight.shape[-1]
    n = -(-(length + kernel - 1) // 16) * 16  # no wrapping around; sizes that transforms like
    tokens = torch.fft.rfft(x, n).unflatten(1, (groups, -1)).permute(1, 3, 0, 2)  # [G, n / 2 + 1, B, D / G]
    taps = torch.fft.rfft(weight.flip(-1), n).unflatten(0, (groups, -1)).permute(0, 3, 2, 1)  # [G, n / 2 + 1, in, out]
    y: Tensor = torch.fft.irfft((tokens @ taps).permute(2, 0, 3, 1).flatten(1, 2), n)  # [B, D, n]
    first = kernel - 1 - kernel // 2
    return y[..., first : first + length]  # [B, D, T]


class Rotary(nn.Module):
    """Angles that turn channel i of a head against channel i + d/2; axes share the d/2 angles evenly."""

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.width, self.base = width, base

    def forward(self, tokens: Signal) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the heads of every token: 2 x [B or 1, 1, T, d] float32."""
        where = places(tokens)
        pairs, axes = self.width // 2, where.shape[-1]
        if pairs % axes:
            raise ContractError(f"heads {self.width} wide do not split into pairs over {axes} axes of positions")
        where = where.clamp(min=0)
        angle = where[..., None] * frequencies(pairs // axes, self.base, where.device)  # [B, T, A, pairs / A]
        angle = angle.flatten(2).repeat(1, 1, 2)[:, None]  # [B, 1, T, d]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs of queries or keys [B, H, T, d] by the angles of `Rotary`; keeps the dtype."""
    cos, sin = turn
    ahead, behind = x.chunk(2, -1)
    return (x * cos + torch.cat([-behind, ahead], -1) * sin).to(x.dtype)


class Relative(nn.Module):
    """T5's bias on attention logits by distance, one table for all layers.

    Half of the buckets hold one distance each, the other half grow with its logarithm up to
    `distance`, beyond which all is one bucket. Looking both ways, half of all buckets are for keys
    ahead of the query.
    """

    def __init__(self, heads: int, buckets: int = 32, distance: int = 128) -> None:
        super().__init__()
        self.buckets, self.distance = buckets, distance
        self.table = nn.Embedding(buckets, heads)

    def forward(self, tokens: Signal, causal: bool) -> Tensor:
        """The bias of every query (row) for every key: [B or 1, H, T, T]."""
        where = places_on_line(tokens, "relative")
        ahead = where[:, None, :] - where[:, :, None]  # [B, T, T] key minus query
        bias: Tensor = self.table(self.bucket(ahead, causal))  # [B, T, T, H]
        return bias.permute(0, 3, 1, 2)  # [B, H, T, T]

    def bucket(self, ahead: Tensor, causal: bool) -> Tensor:
        """The bucket of each offset key - query, int of any shape; looking back only when causal."""
        buckets = self.buckets if causal else self.buckets // 2
        far = (-ahead).clamp(min=0) if causal else ahead.abs()
        exact = buckets // 2
        growth = torch.log(far.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        coarse = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = torch.where(far < exact, far, coarse)
        return bucket if causal else bucket + buckets * (ahead > 0)
