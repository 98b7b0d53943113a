"""When a Triton kernel can run, how many programs it takes, and what depends on who made the GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._triton import tl, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDE = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 as if its bits were integers


def can_launch(*tensors: Tensor) -> bool:
    """On a GPU, or anywhere under Triton's interpreter; otherwise an op takes its CPU path."""
    return INTERPRETED or all(t.is_cuda for t in tensors)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the GPU of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def programs(items: int, block: int) -> tuple[int]:
    """The grid in which every program takes `block` of the items."""
    return (-(-items // block),)


def power(number: int, least: int, most: int) -> int:
    """The size of a block that holds `number` items: a power of two from `least` to `most`."""
    return max(least, min(most, 1 << (number - 1).bit_length()))


def precision(kind: torch.dtype) -> str:
    """Of products of float32 numbers: torch's own setting; AMD's have no other than exact ones here."""
    # Not torch.get_float32_matmul_precision(), which refuses to answer where backends were set apart.
    loose = kind == torch.float32 and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if loose else "ieee"


def stages(number: int) -> int:
    """How many turns of a loop load ahead: `number`, but two on AMD, whose shared memory holds no more."""
    return min(2, number) if torch.version.hip else number


def crowded(x: Tensor) -> bool:
    """Whether accumulators on the GPU of x need twice the warps, or registers spill: on NVIDIA's since Blackwell."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (10, 0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b, in float32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x in this type, rounded to the nearest; for bfloat16 the interpreter would cut bits off."""
    if WIDE and KIND == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(KIND)
