"""The stem that cuts a signal into patches and embeds each linearly: z_t = W x_t + b.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", https://arxiv.org/abs/2010.11929, equation 1. What is to be
hidden can be left out between the two halves, so that it is never multiplied: `tokens(cut(raw).take(visible))`.

Shapes: B batch, T patches, P raw values of one, L width of the stem, D width of the backbone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from selfsup.kernel.contracts import Signal, Stem


class PatchStem(Stem):
    """A modality brings `cut`. Weights start Xavier-uniform, as MAE's do; the bias starts at 0."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.embed = nn.Linear(size, width)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)

    @abstractmethod
    def cut(self, raw: Signal) -> Signal:
        """The values of every patch, and where it is: x [B, T, P] float. It moves numbers and does not change them."""

    def latents(self, raw: Signal) -> Signal:
        """Embed every patch: raw -> [B, T, L]."""
        patches = self.cut(raw)
        return replace(patches, x=self.embed(patches.x))

    def targets(self, raw: Signal) -> Tensor:
        """The values of every patch: [B, T, P]."""
        return self.cut(raw).x

    def tokens(self, patches: Signal) -> Signal:
        """What `forward` makes of a signal, for some of its patches [B, K, P]: [B, K, D]."""
        return replace(patches, x=self.project(self.norm(self.embed(patches.x))))

    def uncut(self, patches: Tensor, like: Signal) -> Signal:
        """The signal of the shape of `like` that `cut` would cut into these patches [B, T, P].

        What no patch covers stays as in `like`.
        """
        number = torch.arange(like.x.numel(), dtype=torch.float64, device=like.x.device).view_as(like.x)
        source = self.cut(replace(like, x=number)).x.long()  # [B, T, P]: the number of each value in the signal
        x = like.x.flatten().index_copy(0, source.flatten(), patches.flatten().to(like.x.dtype))
        return replace(like, x=x.view_as(like.x))
