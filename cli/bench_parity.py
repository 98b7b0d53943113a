"""Nothing is timed that is wrong: results and gradients against the reference in float64.

The error of a number of results is the norm of the difference over the norm of the truth. Ours may err twice as much
as eager torch does in the same type, or by the rounding of that type, whichever is more; others likewise, and by
TF32, which several take for float32 unasked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bench_case import Arrays, Call

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-18, torch.float64: 2**-40}
TF32 = 2e-3


def step(f: Call, arrays: Arrays) -> Callable[[], list[Tensor | None]]:
    """A function that calls f forward and backward: its outputs, then the gradients of what is learned.

    Where an output is no single number, the gradients that arrive at it differ from element to element, and are made
    in the first call.
    """
    learned = [x for x in arrays if isinstance(x, Tensor) and x.requires_grad]
    arriving: list[Tensor] = []

    def run() -> list[Tensor | None]:
        out = f(*arrays)
        out = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)]
        ends = [x for x in out if x.requires_grad]
        if not ends:
            return list(out)
        if not arriving:
            arriving.extend(_weights(x) for x in ends)
        return [*out, *torch.autograd.grad(ends, learned, arriving, allow_unused=True)]

    return run


def _weights(like: Tensor) -> Tensor:
    """The gradient that arrives at an output; in bfloat16, so that it is the same in every type."""
    weights = torch.linspace(1, 3, like.numel(), device=like.device).bfloat16()
    return weights.to(like.dtype).view_as(like) if like.dim() else torch.ones_like(like)


def exact(arrays: Arrays) -> list[Any]:
    """The same arrays, floats in float64."""
    return [x.detach().double().requires_grad_(x.requires_grad) if _floats(x) else x for x in arrays]


def anew(arrays: Arrays) -> list[Any]:
    """Copies of the arrays."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arrays]


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def error(found: list[Tensor | None], true: list[Tensor | None], spare: float = 0.0) -> tuple[float, int]:
    """(the largest error of all results, how many gradients are missing); infinite where one is not finite.

    Integers are right or wrong: if more than the share `spare` of them differ, the error is at least 1.
    """
    if len(found) != len(true):
        return math.inf, 0
    worst, missing = 0.0, 0
    for got, want in zip(found, true, strict=True):
        if want is None:
            continue
        if got is None:
            missing += 1
            continue
        if got.numel() != want.numel():
            return math.inf, missing
        worst = max(worst, _distance(got.reshape(want.shape), want, spare))
    return worst, missing


def _distance(got: Tensor, want: Tensor, spare: float) -> float:
    if not want.is_floating_point():
        unequal = float((got != want).double().mean()) if want.numel() else 0.0
        return 1 + unequal if unequal > spare else 0.0
    got, want = got.detach(), want.detach()
    size = float(want.double().norm())
    gap = float((got.double() - want.double()).norm())
    return math.inf if not math.isfinite(gap) else gap / size if size else gap


def coarsest(arrays: Arrays) -> torch.dtype:
    """The type among these floats that rounds most; float32 where there are none."""
    kinds = {x.dtype for x in arrays if _floats(x)} & ROUNDING.keys()
    return max(kinds, key=ROUNDING.__getitem__, default=torch.float32)


def limit(kind: torch.dtype, eager: float | None, ours: bool) -> float:
    """The largest error that is not wrong, given that of eager torch where it is known."""
    least = ROUNDING[kind] if ours or kind != torch.float32 else TF32
    return max(least, 2 * eager) if eager is not None and math.isfinite(eager) else least
