"""Cases of masks and of the random words behind them; nothing of it has a gradient, so a call is all there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.random import Stream

from .bench_case import KEY, Call, Case, Draw, Peer, borrowed

OTHERS = "draws other numbers, and is not compared"


def cases(full: bool) -> list[Case]:
    """Of `random_bits` and of the masks that are drawn with it."""
    batch, grid, frames = (1024, 14, 8) if full else (5, 6, 3)
    utterances = ((64, 1500), (1024, 1500)) if full else ((4, 61),)
    return [
        _bits(*((4096, 4096) if full else (5, 37))),
        _random(batch, grid**2),
        _tube(batch, frames, grid**2),
        _block(batch, grid),
        *(_span(*shape) for shape in utterances),
    ]


def _ids(draw: Draw, batch: int) -> Tensor:
    return torch.arange(batch, device=draw.device)


def _all(draw: Draw, batch: int, tokens: int) -> Tensor:
    return torch.ones(batch, tokens, dtype=torch.bool, device=draw.device)


def _bits(batch: int, count: int) -> Case:
    return Case(
        "random_bits",
        f"B={batch} N={count}",
        lambda draw: [_ids(draw, batch)],
        lambda op, ids: op(ids, count, KEY, 0),
        least=8 * batch * count,
    )


def _random(batch: int, tokens: int) -> Case:
    return Case(
        "random_mask",
        f"B={batch} T={tokens} share=0.75",
        lambda draw: [_ids(draw, batch), _all(draw, batch, tokens)],
        lambda op, ids, real: op(Stream(KEY, ids), real, 0.75),
        least=batch * tokens * (1 + 1 + 8 + 8),  # padding and mask; which are kept or hidden; where each is
        peers={"mae's form": Peer(lambda: _mae_mask, differs=OTHERS, only_gpu=False)},
    )


def _tube(batch: int, frames: int, spots: int) -> Case:
    tokens = frames * spots
    return Case(
        "tube_mask",
        f"B={batch} F={frames} S={spots} share=0.9",
        lambda draw: [_ids(draw, batch), _all(draw, batch, tokens)],
        lambda op, ids, real: op(Stream(KEY, ids), real, frames, 0.9),
        least=batch * tokens * (1 + 1 + 8 + 8),
    )


def _block(batch: int, side: int) -> Case:
    return Case(
        "block_mask",
        f"B={batch} {side}x{side} share=0.4",
        lambda draw: [_ids(draw, batch)],
        lambda op, ids: op(Stream(KEY, ids), rows=side, columns=side, share=0.4),
        least=batch * side**2 * (1 + 8 + 8),
    )


def _span(batch: int, tokens: int) -> Case:
    def call(op: Call, ids: Tensor, real: Tensor) -> Any:
        from selfsup.triton_ops.masks_span import Spans

        return op(Stream(KEY, ids), real, Spans(share=0.65, length=10, least=2))

    return Case(
        "span_mask",
        f"B={batch} T={tokens} share=0.65 length=10",
        lambda draw: [_ids(draw, batch), _all(draw, batch, tokens)],
        call,
        least=batch * tokens * 2,
        peers={"transformers": Peer(_transformers, differs=OTHERS, only_gpu=False)},
    )


def _mae_mask(ids: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """As MAE's code does it."""
    batch, tokens = real.shape
    kept = tokens - int(0.75 * tokens)
    order = torch.rand(batch, tokens, device=real.device).argsort(1)
    restore = order.argsort(1)
    mask = torch.ones(batch, tokens, device=real.device)
    mask[:, :kept] = 0
    return order[:, :kept], mask.gather(1, restore), restore


def _transformers() -> Call:
    """Its masks are made by NumPy on the host, row by row, and copied."""
    indices = borrowed("transformers.models.wav2vec2.modeling_wav2vec2", "_compute_mask_indices")
    return lambda ids, real: torch.from_numpy(indices(tuple(real.shape), 0.65, 10, min_masks=2)).to(real.device)
