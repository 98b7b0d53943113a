"""Which tokens to hide: spans of them, or single ones by exact count; and the hidden ones of each row side by side.

Spans are those of Baevski et al. 2020, "wav2vec 2.0", section 3.1 and appendix A, https://arxiv.org/abs/2006.11477; the
number of spans is drawn as in the authors' code:

    spans of an utterance of t frames = int(share * t / length + U),  U uniform in [0, 1)

Their starts are drawn without replacement and the spans may overlap, so that less than `share` ends
up hidden: 49 % of 780 frames for a share of 0.65 and a length of 10.

Everything here is a function of the row alone, with static shapes and no wait for the host. The
authors' code hides as many frames in every row as in the row that hides the fewest, which
makes the mask of an utterance depend on its neighbours; here it does not.

Shapes: B batch, T tokens, M capacity (the most tokens that a row can hide), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel import Stream

SLACK = 1e-6  # tokens: a tenth of ten is one, though in floating point (1 - 0.9) * 10 < 1


class Spans(NamedTuple):
    """How much to hide."""

    share: float  # of the tokens, were there no overlaps; 0 < share < 1
    length: int  # tokens in a span
    least: int  # spans in a row, at least 1


def span_mask(draw: Stream, real: Tensor, spans: Spans) -> Tensor:
    """Hide spans of every row: [B, T] bool.

    `real` [B, T] bool says which tokens are not padding; they come first in their row. A row too short
    for the least number of spans of full length gets shorter ones, so that one token stays visible
    wherever there are two, and one is hidden wherever there is one.
    """
    frames = real.sum(1, keepdim=True)  # [B, 1]
    size = ((frames - 1) // spans.least).clamp(1, spans.length)  # [B, 1]
    most = ((frames - 1) // size).clamp(min=1)  # [B, 1]
    # In float32, rounding could give one span more than `capacity` provides for.
    count = (spans.share * frames.double() / size + draw.uniform(1)).long()  # [B, 1]
    count = count.clamp(min=spans.least).minimum(most)
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    # A row draws the same keys however long its neighbours are: what is beyond its last start sorts last.
    keys = draw.bits(len(place)).masked_fill(place > frames - size, 2**32)  # [B, T]
    starts = torch.zeros_like(real).scatter(1, keys.argsort(dim=1, stable=True), place < count)  # [B, T]
    begun = F.pad(starts.cumsum(1), (1, 0))  # [B, 1 + T], spans begun before each token
    ended = begun.gather(1, (place - size + 1).clamp(min=0))  # [B, T]
    return (begun[:, 1:] > ended) & real


def capacity(tokens: int, spans: Spans) -> int:
    """M: the most tokens that `span_mask` hides in a row of at most this many."""
    return min(tokens, max(spans.least, int(spans.share * tokens / spans.length) + 1) * spans.length)


def random_mask(draw: Stream, real: Tensor, share: float) -> Tensor:
    """Hide `hidden_count` tokens of every row, all sets of them alike likely: [B, T] bool.

    `real` [B, T] bool says which tokens are not padding; they come first in their row.
    """
    tokens = real.sum(1, keepdim=True)  # [B, 1]
    visible = ((1 - share) * tokens.double() + SLACK).long().clamp(min=1)  # [B, 1], as `hidden_count` has it
    # A row draws the same keys however long its neighbours are: padding sorts last, and so is never hidden.
    keys = draw.bits(real.shape[1]).masked_fill(~real, 2**32)  # [B, T]
    order = keys.argsort(dim=1, stable=True)  # [B, T]
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    return torch.zeros_like(real).scatter(1, order, (place >= visible) & (place < tokens))


def hidden_count(tokens: int, share: float) -> int:
    """How many of a row's tokens `random_mask` hides: at least this share, and not the last one. Grows with the row."""
    return tokens - max(1, int((1 - share) * tokens + SLACK))


def pack(hidden: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the hidden tokens of each row are: index [B, M] in order, and valid [B, M] for those that are any."""
    index = (~hidden).byte().argsort(dim=1, stable=True)[:, :size]  # [B, M]
    valid = torch.arange(size, device=hidden.device) < hidden.sum(1, keepdim=True)  # [B, M]
    return index, valid


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each row of x [B, T, D] that index [B, M] names: [B, M, D]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]  # [B, 1]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, -1)
