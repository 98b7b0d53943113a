"""Hide spans of tokens: of speech, and of whatever else comes in a row.

Baevski et al. 2020, "wav2vec 2.0", section 3.1 and appendix A, https://arxiv.org/abs/2006.11477, and Hsu et al. 2021,
"HuBERT", https://arxiv.org/abs/2106.07447, section IV-C; the number of spans is drawn as in the authors' code:

    spans of a row of t tokens = int(share * t / length + U),  U uniform in [0, 1)

Their starts are drawn without replacement and the spans may overlap, so that less than `share` ends
up hidden: 49 % of 780 tokens for a share of 0.65 and a length of 10.

Everything here is a function of the row alone, with static shapes and no wait for the host. The
authors' code hides as many tokens in every row as in the row that hides the fewest, which
makes the mask of a row depend on its neighbours; here it does not.

On a GPU a program takes a row. The n starts are the n places of least random word; a token is hidden if the last start
before it is less than a span away. One launch reads B T bytes and writes as many.

Shapes: B rows of T tokens, M capacity (the most tokens that a row can hide).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel import Stream
from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of
from ._masks import EXACTLY, LONGEST, NOWHERE, bits_of, block_of, bound_of, check_rows, check_share, exact, keys_of
from ._triton import tl, triton
from .philox import four_words, random_bits, signed

BEFORE = tl.constexpr(-(1 << 30))  # a start so far away that its span ends before the row


class Spans(NamedTuple):
    """How much to hide."""

    share: float  # of the tokens, were there no overlaps; 0 < share < 1
    length: int  # tokens in a span
    least: int  # spans in a row, at least 1


def span_mask(draw: Stream, real: Tensor, spans: Spans) -> Tensor:
    """Hide spans of every row: [B, T] bool.

    A row too short for the least number of spans of full length gets shorter ones, so that one token stays visible
    wherever there are two, and one is hidden wherever there is one. Takes one word of the stream, and then T. Has no
    gradient, and makes nothing wait for a GPU.

    Args:
        draw: a stream for each of B rows.
        real: bool [B, T]; which tokens are not padding. They come first in their row, or too little is hidden: on a CPU
            that is an error.
        spans: how many spans, of which length.
    """
    check_rows(draw, real)
    check_share(spans.share)
    if min(spans.length, spans.least) < 1:
        raise ContractError(f"a row has at least one span of at least one token, and {spans} has less")
    start = draw.take(1)
    draw.take(real.shape[1])
    hidden: Tensor = torch.ops.selfsup.span_mask(draw.ids, real, *spans, *draw.key, start)
    return hidden


def span_mask_reference(draw: Stream, real: Tensor, spans: Spans) -> Tensor:
    """What `span_mask` must equal; sorts every row."""
    return _spans(draw.uniform(1), draw.bits(real.shape[1]), real, spans)


def capacity(tokens: int, spans: Spans) -> int:
    """M: the most tokens that `span_mask` hides in a row of at most this many."""
    return min(tokens, max(spans.least, int(spans.share * tokens / spans.length) + 1) * spans.length)


def _spans(rounding: Tensor, words: Tensor, real: Tensor, spans: Spans) -> Tensor:
    """The mask that `rounding` [B, 1] in [0, 1) and words [B, T] of 32 bits make."""
    frames = real.sum(1, keepdim=True)  # [B, 1]
    size = ((frames - 1) // spans.least).clamp(1, spans.length)  # [B, 1]
    most = ((frames - 1) // size).clamp(min=1)  # [B, 1]
    # In float32, rounding could give one span more than `capacity` provides for.
    count = (spans.share * frames.double() / size + rounding).long()  # [B, 1]
    count = count.clamp(min=spans.least).minimum(most)
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    # A row draws the same keys however long its neighbours are: what is beyond its last start sorts last.
    keys = words.masked_fill(place > frames - size, 2**32)  # [B, T]
    starts = torch.zeros_like(real).scatter(1, keys.argsort(dim=1, stable=True), place < count)  # [B, T]
    begun = F.pad(starts.cumsum(1), (1, 0))  # [B, 1 + T], spans begun before each token
    ended = begun.gather(1, (place - size + 1).clamp(min=0))  # [B, T]
    return (begun[:, 1:] > ended) & real


@torch.library.custom_op("selfsup::span_mask", mutates_args=())
def _span_mask(
    ids: Tensor, real: Tensor, share: float, length: int, least: int, low: int, high: int, start: int
) -> Tensor:
    tokens = real.shape[1]
    if real.is_cpu and (real[:, 1:] & ~real[:, :-1]).any():  # a GPU would have to be waited for
        raise ContractError("padding stands before a token; what is real must come first in its row")
    if not can_launch(ids, real) or tokens > LONGEST:
        rounding = (random_bits(ids, 1, (low, high), start) >> 8).float() * 2.0**-24
        words = random_bits(ids, tokens, (low, high), start + 1)
        return _spans(rounding, words, real, Spans(share, length, least))
    hidden = torch.empty_like(real, memory_format=torch.contiguous_format)
    if real.numel():
        lanes, warps = block_of(tokens)
        numbers = (bits_of(share), length, least, signed((low, high)), start, tokens)
        with on_device_of(real):
            _span_mask_kernel[(len(real),)](
                ids.contiguous(), real.contiguous(), hidden, *numbers, BLOCK=lanes, num_warps=warps, **EXACTLY
            )
    return hidden


@_span_mask.register_fake
def _(ids: Tensor, real: Tensor, share: float, length: int, least: int, low: int, high: int, start: int) -> Tensor:
    return torch.empty_like(real, memory_format=torch.contiguous_format)


@triton.jit
def _later(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["share", "length", "least", "key", "start", "T"])
def _span_mask_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, real_ptr, hidden_ptr, share, length, least, key, start, T, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    real = tl.load(real_ptr + row * T + token, mask=token < T, other=0) != 0
    ident = tl.load(ids_ptr + row)
    frames = tl.sum(real.to(tl.int32), 0)
    # Where there are no frames this divides -1, which rounds another way than in torch: the least is 1 either way.
    size = tl.minimum(tl.maximum((frames - 1) // least, 1), length)
    most = tl.maximum((frames - 1) // size, 1)
    word, _, _, _ = four_words(ident, start, key)
    rounding = (word >> 8).to(tl.float64) * 2.0**-24  # exact, and what follows is rounded as in torch
    count = (exact(share) * frames.to(tl.float64) / size.to(tl.float64) + rounding).to(tl.int32)
    count = tl.minimum(tl.maximum(count, least), most)
    keys = tl.where(token <= frames - size, keys_of(ident, start + 1, key, BLOCK), NOWHERE)
    begun = tl.where(keys < bound_of(keys, count, BLOCK), token, BEFORE)
    last = tl.associative_scan(begun, 0, _later)
    tl.store(hidden_ptr + row * T + token, (token - last < size) & real, mask=token < T)
