"""Which tokens to predict, and what to show in their place.

Devlin, Chang, Lee, Toutanova 2018, "BERT: Pre-training of deep bidirectional transformers for language
understanding", https://arxiv.org/abs/1810.04805, section 3.1 and appendix A.1. Of a sequence of n tokens, special
ones included, as in the authors' code

    chosen = min(most, max(1, round(share * n)))       round half to even; never more than its candidates

are drawn without replacement from its candidates, which special tokens are not. The c chosen tokens of a row, which may
hold several sequences, are put in a random order, and v is drawn uniformly from 0 .. 9:

    the first (8 c + v) // 10               become the mask
    those up to (9 c + v) // 10             become a token drawn from the whole vocabulary
    the others                              stay

So both counts are exact where 10 divides c, within one of 8 c / 10 and c / 10 elsewhere, and a token's chances are
80, 10 and 10 % in every row, where rounding by itself would never replace the one chosen token of a short row.

Everything here is a function of the row alone, with static shapes and no wait for the host.

Shapes: B batch, T tokens, M capacity (the most tokens that can be chosen in a row).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.kernel import Stream

from .masking import pack


class Choice(NamedTuple):
    """How many tokens of a sequence to choose."""

    share: float  # of its tokens; 0 < share < 1
    most: int | None = None  # None: as many as the share says


class Corrupted(NamedTuple):
    """Rows of which some tokens are to be predicted."""

    ids: Tensor  # [B, T] what is shown
    places: Tensor  # [B, M] where the chosen tokens are, in order
    valid: Tensor  # [B, M] which of them are any
    truth: Tensor  # [B, M] the ids that stood there


def choose(draw: Stream, segments: Tensor, candidates: Tensor, choice: Choice) -> Tensor:
    """The chosen tokens of every sequence: [B, T] bool.

    `segments` [B, T] int numbers the sequences of a row, 0 is padding; `candidates` [B, T] bool may be chosen.
    """
    rows, length = segments.shape
    keys = draw.bits(length) + (~candidates).long() * 2**32  # [B, T], candidates first
    order = (segments.long() * 2**33 + keys).argsort(dim=1, stable=True)  # [B, T], by sequence and then at random
    sorted_segments = segments.gather(1, order)  # [B, T]
    fresh = torch.zeros_like(order)
    fresh[:, 1:] = (sorted_segments[:, 1:] != sorted_segments[:, :-1]).long()
    run = fresh.cumsum(1)  # [B, T] number of each token's sequence in its sorted row
    zeros = torch.zeros(rows, length, dtype=torch.long, device=segments.device)
    size = zeros.scatter_add(1, run, torch.ones_like(run))  # [B, T], of run r at r
    able = zeros.scatter_add(1, run, candidates.gather(1, order).long())  # [B, T]
    count = (choice.share * size.double()).round().long().clamp(1, choice.most).minimum(able)  # [B, T]
    rank = torch.arange(length, device=segments.device) - (size.cumsum(1) - size).gather(1, run)  # [B, T]
    chosen = (rank < count.gather(1, run)) & (sorted_segments > 0)  # [B, T]
    return torch.zeros_like(candidates).scatter(1, order, chosen)


def capacity(tokens: int, sequences: int, choice: Choice) -> int:
    """M: the most tokens that `choose` chooses in a row of this many tokens and at most so many sequences.

    Rounding adds at most a half to a sequence, and the least of one token less than one.
    """
    one, several = max(1, round(choice.share * tokens)), int(choice.share * tokens) + sequences
    return min(tokens, one if sequences == 1 else several, sequences * (choice.most or tokens))


def corrupt(ids: Tensor, chosen: Tensor, size: int, mask: int, vocabulary: int, fate: Stream) -> Corrupted:
    """Hide the `chosen` [B, T] of ids [B, T], at most `size` in a row, by `mask` or any id below `vocabulary`."""
    index, valid = pack(chosen, size)  # [B, M]
    truth = ids.gather(1, index)  # [B, M]
    tenths = fate.integers(10, 1)  # [B, 1]
    keys, words = fate.bits(size, 2).unbind(2)  # [B, M] each; side by side, so that they do not depend on the capacity
    other = words * vocabulary >> 32  # [B, M]
    rank = keys.masked_fill(~valid, 2**32).argsort(dim=1, stable=True).argsort(dim=1)  # [B, M], the invalid ones last
    count = valid.sum(1, keepdim=True)  # [B, 1]
    kept = torch.where(rank < (9 * count + tenths) // 10, other, truth)
    shown = torch.where(rank < (8 * count + tenths) // 10, mask, kept)  # [B, M]
    shown = torch.where(valid, shown, truth)
    return Corrupted(ids.scatter(1, index, shown), index, valid, truth)
