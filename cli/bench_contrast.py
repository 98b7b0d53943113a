"""Cases of the contrastive losses: vectors of length 1 whose pairs are near each other, as in the middle of a training.

The fewest products: one of all similarities, and one for each side's gradient; CLIP takes the similarities twice, as
no gradient is known before both sides' sums are; NT-Xent's are symmetric, so half of them is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .bench_case import Arrays, Call, Case, Draw, Peer, borrowed

TEMPERATURE, SCALE = 0.07, 1 / 0.07
PART = 4096  # rows of similarities in float64 at once


def cases(full: bool) -> list[Case]:
    """Of all contrastive ops."""
    pairs = ((32768, 512), (32768, 1024)) if full else ((257, 48), (64, 65))
    views = ((16384, 512),) if full else ((129, 48),)
    clips = ((65536, 512), (65536, 768)) if full else ((130, 72),)
    queue = ((256, 65536, 128),) if full else ((31, 515, 32),)
    sigmoid = ((32768, 768),) if full else ((131, 40),)
    return [
        *(_info_nce(*shape) for shape in pairs),
        *(_moco(*shape) for shape in queue),
        *(_nt_xent(*shape) for shape in views),
        *(_clip(*shape) for shape in clips),
        *(_sigmoid(*shape) for shape in sigmoid),
    ]


def _pair(draw: Draw, rows: int, width: int) -> list[Any]:
    x = draw.units(rows, width)
    return [x, draw.units(rows, width, near=x)]


def _info_nce(rows: int, width: int) -> Case:
    return Case(
        "info_nce",
        f"N={rows} M={rows} D={width}",
        lambda draw: _pair(draw, rows, width),
        lambda op, q, k: op(q, k, temperature=TEMPERATURE),
        products=((rows, width, rows), (rows, rows, width), (rows, rows, width)),
        least=2 * 2 * 2 * rows * width,
        peers={"memeff": Peer(_memeff_rows), "inf-cl": Peer(_inf_cl)},
    )


def _moco(rows: int, keys: int, width: int) -> Case:
    def make(draw: Draw) -> Arrays:
        q = draw.units(rows, width)
        return [q, draw.units(rows, width, near=q, learned=False), draw.units(keys, width, learned=False)]

    return Case(
        "info_nce",
        f"N={rows} queue={keys} D={width}",
        make,
        lambda op, q, k, queue: op(q, k, temperature=0.2, queue=queue),
        products=((rows, width, keys), (rows, keys, width)),
        least=2 * keys * width,
    )


def _nt_xent(samples: int, width: int) -> Case:
    rows = 2 * samples
    return Case(
        "nt_xent",
        f"2B={rows} D={width}",
        lambda draw: _pair(draw, samples, width),
        lambda op, a, b: op(a, b, temperature=TEMPERATURE),
        products=((samples, width, rows), (samples, width, rows), (rows, rows, width)),
        least=2 * 2 * rows * width,
    )


def _clip(rows: int, width: int) -> Case:
    return Case(
        "clip_loss",
        f"B={rows} D={width}",
        lambda draw: [*_pair(draw, rows, width), draw.number(SCALE)],
        lambda op, x, y, scale: op(x, y, scale),
        products=((rows, width, rows), (rows, width, rows), (rows, rows, width), (rows, rows, width)),
        least=2 * 2 * 2 * rows * width,
        peers={
            "open_clip's form": Peer(lambda: _open_clip, only_gpu=False),
            "memeff": Peer(_memeff_clip),
            "inf-cl": Peer(_inf_cl_both),
        },
        truth=_clip_in_parts if rows > 2 * PART else None,
    )


def _sigmoid(rows: int, width: int) -> Case:
    return Case(
        "sigmoid_loss",
        f"B={rows} D={width}",
        lambda draw: [*_pair(draw, rows, width), draw.number(10.0), draw.number(-10.0)],
        lambda op, x, y, scale, bias: op(x, y, scale, bias),
        products=((rows, width, rows), (rows, rows, width), (rows, rows, width)),
        least=2 * 2 * 2 * rows * width,
    )


def _clip_in_parts(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """`clip_loss_reference`, some rows at a time, of which nothing is kept for the gradient."""

    def rows(a: Tensor, b: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(a), device=a.device)
        return F.cross_entropy(scale * (a @ b.T), labels, reduction="sum")

    total = x.new_zeros(())
    for a, b in ((x, y), (y, x)):
        for first in range(0, len(a), PART):
            total = total + checkpoint(rows, a[first : first + PART], b, first, use_reentrant=False)
    return total / (2 * len(x))


def _open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As open_clip 3.2 computes it: a product for either side."""
    labels = torch.arange(len(x), device=x.device)
    scale = scale.to(x.dtype)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def _memeff_clip() -> Call:
    make = borrowed("memeff", "MemoryEfficientCLIPLoss")
    loss = make(temperature=TEMPERATURE, normalized_inputs=True, stable=False)
    return lambda x, y, scale: loss(x, y)


def _memeff_rows() -> Call:
    make = borrowed("memeff", "MemoryEfficientQwen3Loss")
    # A margin of 2 masks no negative.
    loss: Call = make(temperature=TEMPERATURE, margin=2.0, normalized_inputs=True, stable=False)
    return loss


def _inf_cl() -> Call:
    loss = borrowed("inf_cl", "cal_inf_loss")
    return lambda q, k: loss(q, k, scale=SCALE, head_dim=_head(q.shape[1]))


def _inf_cl_both() -> Call:
    loss = borrowed("inf_cl", "cal_inf_loss")

    def both(x: Tensor, y: Tensor, scale: Tensor) -> Any:
        head = _head(x.shape[1])
        return (loss(x, y, scale=scale, head_dim=head) + loss(y, x, scale=scale, head_dim=head)) / 2

    return both


def _head(width: int) -> int:
    """The largest of inf-cl's head dimensions that divides a width."""
    return next((size for size in (256, 128, 64, 32, 16) if width % size == 0), width)
