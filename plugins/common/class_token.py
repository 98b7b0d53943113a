"""A learned token before the others that stands for no part of the data: BERT's [CLS], and ViT's.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", https://arxiv.org/abs/2010.11929, section 3.1. It is part of
the tower, so that evaluation sees what training saw, and it is nowhere: at negative positions (see `positions.py`).

Shapes: B batch, T tokens, A axes of a position, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfsup.kernel.contracts import Signal, Stem

from .patch_stem import PatchStem


class ClassToken(Stem):
    """A stem for patches whose tokens come behind a class token."""

    def __init__(self, stem: PatchStem, width: int) -> None:
        super().__init__()
        self.patches, self.size, self.width = stem, stem.size, stem.width
        # Two dimensions, so that it is decayed as MAE's three-dimensional one is.
        self.token = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.token, std=0.02)

    def cut(self, raw: Signal) -> Signal:
        """The patches [B, T, P]; see `PatchStem.cut`."""
        return self.patches.cut(raw)

    def uncut(self, patches: Tensor, like: Signal) -> Signal:
        """See `PatchStem.uncut`."""
        return self.patches.uncut(patches, like)

    def latents(self, raw: Signal) -> Signal:
        """Of the patches alone: [B, T, L]."""
        return self.patches.latents(raw)

    def targets(self, raw: Signal) -> Tensor:
        """Of the patches: [B, T, P]."""
        return self.patches.targets(raw)

    def forward(self, raw: Signal) -> Signal:
        """Embed: raw -> [B, 1 + T, D]."""
        return self.lead(self.patches(raw))

    def tokens(self, patches: Signal) -> Signal:
        """Some patches [B, K, P] -> [B, 1 + K, D]."""
        return self.lead(self.patches.tokens(patches))

    def lead(self, tokens: Signal) -> Signal:
        """Put the class token before the others, in the segment of the first: [B, 1 + T, D]."""
        first = self.token.to(tokens.x.dtype).expand(len(tokens.x), 1, -1)  # [B, 1, D]
        places, segments = tokens.places(), tokens.segments
        nowhere = torch.full_like(places[:, :1], -1)  # [B, 1] or [B, 1, A]
        return Signal(
            torch.cat([first, tokens.x], 1),
            None if segments is None else torch.cat([segments[:, :1], segments], 1),
            torch.cat([nowhere, places], 1),
        )
