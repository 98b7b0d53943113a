"""Cases of what a masked autoencoder does with patches, at the sizes of MAE's ViT-L: 49 of 196 patches are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bench_case import Arrays, Call, Case, Draw, Peer


def cases(full: bool) -> list[Case]:
    """Of taking patches, putting them back, and the loss over those that were hidden."""
    batch, tokens, kept = (1024, 196, 49) if full else (5, 23, 6)
    wide, narrow, values = (1024, 512, 768) if full else (40, 24, 75)
    side, patch = (224, 16) if full else (35, 5)
    return [
        _take(batch, tokens, kept, wide),
        _take_from_images(batch, side, patch, kept),
        _restore(batch, tokens, kept, narrow),
        _error(batch, tokens, tokens - kept, values),
    ]


def _take(batch: int, tokens: int, kept: int, width: int) -> Case:
    def make(draw: Draw) -> Arrays:
        x = draw.normal(batch, tokens, width)
        return [x, draw.subset(batch, tokens, kept), draw.normal(tokens, width, learned=False)]

    return Case(
        "take_patches",
        f"B={batch} T={tokens} K={kept} D={width}",
        make,
        lambda op, x, index, positions: op(x, index, positions),
        least=2 * batch * width * (2 * kept + kept + tokens),  # read and written, then its gradient and that of x
        peers={"mae's form": Peer(lambda: _mae_take, only_gpu=False)},
    )


def _take_from_images(batch: int, side: int, patch: int, kept: int) -> Case:
    return Case(
        "take_image_patches",
        f"B={batch} {side}x{side} patch={patch} K={kept}",
        lambda draw: [
            draw.normal(batch, 3, side, side, learned=False),
            draw.subset(batch, (side // patch) ** 2, kept),
        ],
        lambda op, images, index: op(images, index, patch),
        least=2 * 2 * batch * kept * 3 * patch**2,
    )


def _restore(batch: int, tokens: int, kept: int, width: int) -> Case:
    def make(draw: Draw) -> Arrays:
        seen = draw.normal(batch, kept, width)
        token, positions = draw.normal(width), draw.normal(tokens, width, learned=False)
        return [seen, draw.subset(batch, tokens, kept), token, positions]

    return Case(
        "restore_patches",
        f"B={batch} T={tokens} K={kept} D={width}",
        make,
        lambda op, seen, index, token, positions: op(seen, index, token, positions, tokens=tokens),
        least=2 * batch * width * 2 * (kept + tokens),
        peers={"mae's form": Peer(_mae_restore, only_gpu=False)},
    )


def _error(batch: int, tokens: int, hidden: int, values: int) -> Case:
    def make(draw: Draw) -> Arrays:
        patches = draw.normal(batch, tokens, values, learned=False)
        return [draw.normal(batch, hidden, values), patches, draw.subset(batch, tokens, hidden)]

    return Case(
        "patch_mse",
        f"B={batch} T={tokens} M={hidden} P={values}",
        make,
        lambda op, guess, patches, index: _first(op(guess, patches, index)),
        least=2 * batch * values * 3 * hidden,
    )


def _first(found: Any) -> Any:
    """The loss, where the spread of the targets comes with it."""
    return found[0] if isinstance(found, tuple) else found


def _mae_take(x: Tensor, index: Tensor, positions: Tensor) -> Tensor:
    """As MAE's code does it: positions for all tokens, and an index as wide as a token."""
    return (x + positions).gather(1, index[:, :, None].repeat(1, 1, x.shape[2]))


def _mae_restore() -> Call:
    """As MAE's code does it; where each token comes from is known there beforehand, from its mask."""
    known: dict[int, Tensor] = {}

    def restore(seen: Tensor, index: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        if id(index) not in known:
            known[id(index)] = _places(index, len(positions))
        hidden = token.to(seen.dtype).expand(len(seen), len(positions) - seen.shape[1], -1)
        x = torch.cat([seen, hidden], 1)
        return x.gather(1, known[id(index)][:, :, None].repeat(1, 1, x.shape[2])) + positions

    found: Callable[..., Tensor] = restore
    return found


def _places(index: Tensor, tokens: int) -> Tensor:
    """Where each token is among those seen, followed by those hidden: [B, T]."""
    hidden = torch.ones(len(index), tokens, device=index.device).scatter(1, index, 0)
    first = hidden.argsort(dim=1, descending=True, stable=True)[:, : tokens - index.shape[1]]
    return torch.cat([index, first], 1).argsort(dim=1)
