"""What the kernels of contrastive losses share: tiles of similarities, and products with their gradient G.

The gradients are made panel by panel. A panel is some rows against some keys, so that its part of G finds room in
WORKSPACE bytes; one kernel writes it there, in the type of the vectors, and matrix products of the vendor's library
take it to d x and d y, which are added up in float32. The kernel also sums G_ij x_i . y_j of its tile, for d scale,
before G is rounded. What needs no sums beforehand writes G from the only similarities there are.

Where the keys are the rows, G + G^T is symmetric. Panels then begin at the diagonal, and what is right of the square
at their beginning serves twice, once as it is and once transposed. In that square, a tile above the diagonal is
written to both of its places. So similarities cost N N D operations, and the products 2 N N D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._launch import crowded, dot, precision, stages
from ._triton import tl, triton

WORKSPACE = 2**28  # bytes of G that are there at once
BLOCKS = 65_535  # of keys in a panel, as many as a launch has along its second axis
TILES = {2: (128, 64, 8), 4: (64, 32, 4)}  # by bytes of a number: rows or keys, width at a time, warps


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and of a width that loads of 16 bytes divide: without them registers overflow."""
    gap = -x.shape[1] % 16
    return F.pad(x, (0, gap)) if gap else x.contiguous()


def contiguous(*arrays: Tensor | None, other: Tensor) -> list[Tensor]:
    """Contiguous; where there is none, another, that the kernel is told not to read."""
    return [other if array is None else array.contiguous() for array in arrays]


def tile_options(kind: torch.dtype, width: int, *, crowded: bool = False) -> dict[str, Any]:
    """Sizes of a tile: BN rows, as many keys, BD of an aligned width at a time.

    Where a GPU hands a thread a whole row of a product, as Blackwell does, registers are `crowded` by what there is
    for each key, and twice as many threads share them.
    """
    size, depth, warps = TILES[kind.itemsize]
    sizes = {"BN": size, "BD": min(depth, width & -width)}
    return {**sizes, "num_warps": 2 * warps if crowded else warps, "num_stages": stages(3)}


def options_for(x: Tensor) -> dict[str, Any]:
    """The options of a kernel on the device of x, which is aligned, with the width and the precision."""
    sizes = tile_options(x.dtype, x.shape[1], crowded=crowded(x))
    return {"D": x.shape[1], "PRECISION": precision(x.dtype), **sizes}


def panels(rows: int, keys: int, alone: bool, itemsize: int, block: int) -> Iterator[tuple[slice, slice]]:
    """(rows, keys) of each panel; from the diagonal on where the rows are `alone`."""
    room = WORKSPACE // itemsize
    start = 0
    while start < rows:
        left = start if alone else 0
        stop = min(rows, start + max(1, room // (keys - left) // block) * block)
        width = min(BLOCKS, max(1, room // (stop - start) // block)) * block
        for first in range(left, keys, width):
            yield slice(start, stop), slice(first, min(keys, first + width))
        start = stop


def _height(part: slice) -> int:
    return int(part.stop - part.start)


def _pitch(keys: slice) -> int:
    """From one row of a panel to the next: products are fastest where each begins at 32 bytes."""
    return -(-_height(keys) // 16) * 16


def multiply_panels(
    x: Tensor, y: Tensor, alone: bool, d_x: Tensor | None, d_y: Tensor | None, write: Callable[..., None]
) -> None:
    """Add sum_j G_ij y_j to d_x and sum_i G_ij x_i to d_y; sum_j (G_ij + G_ji) x_j to d_x where rows are `alone`.

    `write(g, rows, keys)` fills a panel of G, or of G + G^T.
    """
    block = TILES[x.dtype.itemsize][0]
    every = list(panels(len(x), len(y), alone, x.element_size(), block))
    room = x.new_empty(max(_height(rows) * _pitch(keys) for rows, keys in every))
    for rows, keys in every:
        g = room.as_strided((_height(rows), _height(keys)), (_pitch(keys), 1))
        write(g, rows, keys)
        if d_x is not None:
            accumulate(d_x[rows], g, y[keys])
        if d_x is not None and alone and rows.stop < keys.stop:
            beyond = slice(max(rows.stop, keys.start), keys.stop)
            accumulate(d_x[beyond], g[:, beyond.start - keys.start :].T, x[rows])
        if d_y is not None:
            accumulate(d_y[keys], g.T, x[rows])


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the float32 of `total` whatever the type of a and b."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def finish(total: Tensor, factor: Tensor, width: int, kind: torch.dtype) -> Tensor:
    """The total times the factor, in this width and type: a new tensor, in one launch."""
    return torch.mul(total[:, :width], factor, out=total.new_empty(len(total), width, dtype=kind))


# A tile is addressed by where it begins, in 64 bits, and by lanes from there in 32: addresses take registers.


@triton.jit
def similarities(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, rows, keys, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr
):
    """x_i . y_j of the tile whose first row and key are pointed to, 0 past its `rows` and `keys`: [BN, BN]."""
    lane = tl.arange(0, BN)
    s = tl.zeros([BN, BN], tl.float32)
    for first in range(0, D, BD):
        depth = first + tl.arange(0, BD)
        x = tl.load(x_ptr + lane[:, None] * D + depth, mask=lane[:, None] < rows, other=0.0)
        y = tl.load(y_ptr + lane * D + depth[:, None], mask=lane < keys, other=0.0)
        s = dot(x, y, s, PRECISION)
    return s


@triton.jit
def counted(row_ids_ptr, key_ids_ptr, rows, keys, KIN: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which pairs of the tile are there and, where there are ids, no kin: [BN, BN]."""
    lane = tl.arange(0, BN)
    counts = (lane < rows)[:, None] & (lane < keys)[None, :]
    if KIN:
        row_ids = tl.load(row_ids_ptr + lane, mask=lane < rows, other=0)
        key_ids = tl.load(key_ids_ptr + lane, mask=lane < keys, other=0)
        counts = counts & (row_ids[:, None] != key_ids[None, :])
    return counts
