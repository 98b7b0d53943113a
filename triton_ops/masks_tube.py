"""Hide the same places of every frame of a video.

Tong, Song, Wang and Wang 2022, "VideoMAE: Masked autoencoders are data-efficient learners for self-supervised video
pre-training", https://arxiv.org/abs/2203.12602, section 3.3: what is hidden in one frame is seen in none, as next to it
in time there would be the same picture. One frame is masked as by `random_mask`, and

    hidden[b, f S + s] = hidden[b, s]        keep[b] = f S + k for all frames f, and for all k that the frame keeps

so that counts are exact in every frame. One launch, of a program for each frame of each row; what it does to draw the
frame's mask again is less than to wait for another to have drawn it.

Shapes: B rows of F frames with S tokens each, T = F S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsup.kernel import Stream
from selfsup.kernel.errors import ContractError

from ._masks import Masked, check_rows, check_share, repeated
from .masks_random import random_mask_reference


def tube_mask(draw: Stream, real: Tensor, frames: int, share: float) -> Masked:
    """Hide `hidden_count(S, share)` tokens of every frame, the same ones in all frames of a row.

    Takes S words of the stream. Has no gradient, and makes nothing wait for a GPU.

    Args:
        draw: a stream for each of B rows.
        real: bool [B, T], frame by frame; which tokens are not padding. Every frame is as the first, or
            all padding: on a CPU anything else is an error, on a GPU it hides too many tokens or too few.
        frames: F, which divides T.
        share: of a frame's tokens, how many to hide at least; above 0, below 1.
    """
    check_rows(draw, real)
    check_share(share)
    if frames < 1 or real.shape[1] % frames:
        raise ContractError(f"{frames} frames do not divide {real.shape[1]} tokens")
    start = draw.take(real.shape[1] // frames)
    return Masked(*torch.ops.selfsup.random_mask(draw.ids, real, share, frames, *draw.key, start))


def tube_mask_reference(draw: Stream, real: Tensor, frames: int, share: float) -> Masked:
    """What `tube_mask` must equal: the first frame's mask, over and over."""
    return repeated(random_mask_reference(draw, real[:, : real.shape[1] // frames], share), real, frames)
