"""linear_cross_entropy.py on a GPU: three products a training step, of rows with a label only, and no waiting.

Rows with a label are listed on the GPU (cross_entropy_kernels.py), a chunk of them at a time goes through

    logits = h[rows] W^T + b          [C, V], in the type of the products
    losses and the gradient           in the place of the logits, by one program for each row
    d h[rows] = gradient W            d W += gradient^T h[rows]            d b += sum of gradient

Without a capacity the host must launch as if every row had a label, so the products are kernels whose programs end at
once, and whose loops stop, where the listed rows do; four or five launches a chunk, of which one past the last row
costs some microseconds. With a capacity the rows are that many from the host's view, and the products are the
library's, which is faster: rows listed past the last label have gradients of 0. With a capacity of all rows nothing is
listed and nothing gathered.

Bytes, for n rows and 2 a logit: written by the product, read twice by its row's program, the second time from the
cache, overwritten, and read by two products: 10 n V. Rounding logits to 16 bits costs what it costs torch, whose linear
layer rounds them at the same place: after the bias and before everything else, which is in float32 here. d W is
summed over chunks in float32, by the kernel that makes it, with one rounding at the end. float16, which holds no
gradient of a mean over thousands of rows, has gradients of no mean, divided at the end.

Shapes: T rows, H width, V classes, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import all_reduce
from torch.nn import functional as F

from ._launch import power, precision
from ._triton import triton
from .cross_entropy_kernels import launch_rows, packed
from .cross_entropy_options import Options, joined, kept_type, losses_of, of_label, share, unless_crowded
from .linear_cross_entropy_kernels import head_kernel, hidden_kernel, logits_kernel, product_options, scatter_kernel

CHUNK = 2**28  # bytes of logits; where so few hold not even LEAST rows, more, as each chunk reads and writes all of d W
LEAST, MOST = 2048, 4096
LIMIT = 1_060_000_000
PROGRAMS = 528  # that d h is divided among when every row has a label, as most of them may end at once
SLICE = 2**25  # elements of d W that the library adds at once


class Problem(NamedTuple):
    """One call, in the type of its products."""

    h: Tensor  # [T, H], for kernels filled up to a width that loads of 16 bytes divide
    w: Tensor  # [V, H], likewise
    bias: Tensor | None
    listed: tuple[Tensor, Tensor] | None  # (rows, those with a label first; how many these are)
    last: Tensor | None  # what gradients are multiplied with at last, []
    logits: Tensor  # [C, V], whose rows begin at whole cache lines


def losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
) -> Tensor:
    """The loss of every row: [T]."""
    arrays = (hidden, weight, bias, labels, weights, None)
    return _in_chunks(*arrays, ignore_index, numbers, kind, capacity, group, [False] * 3)[0]


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses times `factor` [T] or [], summed, and its gradients for hidden, weight and bias, where `wanted`."""
    arrays = (hidden, weight, bias, labels, weights, factor)
    found, *gradients = _in_chunks(*arrays, ignore_index, numbers, kind, capacity, group, wanted)
    total = (found * factor).sum() if factor.dim() else found.sum() * factor
    return (total, *gradients)  # type: ignore[return-value]


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    kind: torch.dtype,
    capacity: int | None,
    group: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """(losses [T], gradients where `wanted`)."""
    labels, T = labels.contiguous(), hidden.shape[0]
    rows = T if capacity is None else min(capacity, T)
    crowded = unless_crowded(labels, ignore_index, capacity)
    lead, last = _divided(None if factor is None else factor * crowded, kind)
    problem = _prepared(hidden, weight, bias, labels, ignore_index, kind, capacity, rows, last)
    sums = Sums(problem, hidden, weight, bias, wanted, rows, capacity is not None, bool(group))
    found = hidden.new_zeros(T, dtype=torch.float32)
    for first in range(0, rows, max(1, len(problem.logits))):
        size = min(len(problem.logits), rows - first)
        x, listed = problem.logits[:size], problem.listed
        h = _make_logits(problem, x, first, capacity is not None)
        options: dict[str, Any] = {"rows": size, "ignore_index": ignore_index, "numbers": numbers, "group": group}
        options |= {"logits": x, "labels": labels, "weights": weights, "packed": listed, "first": first}
        place: dict[str, Any] = {"factor": lead, "gradient": x if any(wanted) else None, "fill": capacity is not None}
        if group:
            _across_ranks(options, place, found)
        else:
            launch_rows(**options, **place, losses=found)
        sums.add(x, h, first)
    gradients = sums.results(share(group, 1).group)
    return (found * crowded, *gradients)


def _across_ranks(options: dict[str, Any], place: dict[str, Any], found: Tensor) -> None:
    """Measure rows over the classes of every rank; then their losses and gradients."""
    x, weights, first, size = (options[name] for name in ("logits", "weights", "first", "rows"))
    mine, shape, classes = share(options["group"], x.shape[1]), Options(*options["numbers"]), x.shape[1]
    classes *= mine.ranks
    measured = found.new_zeros(4, size)
    launch_rows(**options, losses=torch.zeros_like(found), measured=measured)
    measured = joined(measured, mine.group)
    rows = torch.arange(first, first + size, device=x.device)
    if options["packed"] is not None:
        rows = options["packed"][0][first : first + size]
    y = options["labels"][rows]
    own = of_label(y, weights, shape, classes, torch.float32)
    found[rows] = torch.where(y == options["ignore_index"], 0.0, losses_of(measured, own, weights, shape, classes))
    if place["gradient"] is not None:
        launch_rows(**options, **place, measured=measured, measure=False)


def _divided(factor: Tensor | None, kind: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(what multiplies the gradient of each row's logits, what multiplies sums of these)."""
    if factor is None or kind != torch.float16 or not factor.numel():
        return factor, None
    largest = factor.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return factor / largest, largest


def _prepared(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    kind: torch.dtype,
    capacity: int | None,
    rows: int,
    last: Tensor | None,
) -> Problem:
    h, w = (_aligned(x.to(kind)) if capacity is None else x.to(kind) for x in (hidden, weight))
    listed = None if capacity is not None and rows == len(labels) else packed(labels, ignore_index)
    V = len(weight)
    stride = V + -V % 64
    logits = h.new_empty(min(rows, _chunk(stride * kind.itemsize)), stride)[:, :V]
    return Problem(h, w, None if bias is None else bias.to(kind).contiguous(), listed, last, logits)


def _chunk(row: int) -> int:
    """Rows of a chunk, given the bytes of one; a multiple of what any kernel takes at once."""
    rows = CHUNK // row
    if rows < LEAST:
        rows = min(MOST, LIMIT // row)
    return max(128, rows // 128 * 128)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and of a width that loads of 16 bytes divide."""
    gap = -x.shape[1] % 16
    return F.pad(x, (0, gap)) if gap else x.contiguous()


def _make_logits(problem: Problem, out: Tensor, first: int, library: bool) -> Tensor:
    """Write the logits of listed rows from `first` on; gives these rows of hidden, [C, H]."""
    rows = slice(first, first + len(out))
    h = problem.h[rows] if problem.listed is None else problem.h.index_select(0, problem.listed[0][rows])
    if library and problem.bias is not None:
        torch.addmm(problem.bias, h, problem.w.T, out=out)
    elif library:
        torch.mm(h, problem.w.T, out=out)
    elif problem.listed is not None:
        options = product_options(out.dtype)
        grid = (triton.cdiv(len(out), options["BR"]), triton.cdiv(out.shape[1], options["BC"]))
        arrays = (h, problem.w, problem.w if problem.bias is None else problem.bias, problem.listed[1], out, first)
        sizes = {"H": h.shape[1], "V": out.shape[1], "STRIDE": out.stride(0)}
        flags = {"BIASED": problem.bias is not None, "PRECISION": precision(out.dtype)}
        logits_kernel[grid](*arrays, len(out), **sizes, **flags, **options)
    return h


class Sums:
    """The gradients of a call, to which each chunk adds."""

    def __init__(
        self,
        problem: Problem,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: list[bool],
        rows: int,
        library: bool,
        shared: bool,
    ) -> None:
        self.problem, self.rows, self.library, self.shared, self.wanted = problem, rows, library, shared, wanted
        self.hidden, self.weight, self.bias = hidden, weight, weight if bias is None else bias
        # Of rows that no chunk reaches the gradient is 0; what ranks add up is not rounded before.
        kind = torch.float32 if shared else kept_type(hidden.dtype)
        self.d_hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=kind)
        self.single = rows <= max(1, len(problem.logits))
        sums = problem.w.shape if wanted[1] else (0,), weight.shape[:1] if wanted[2] else (0,)
        kinds = (kept_type(x.dtype) for x in (weight, self.bias))
        self.d_weight, self.d_bias = (weight.new_empty(s, dtype=k) for s, k in zip(sums, kinds, strict=True))
        spare = [(0,), (0,)] if self.single else sums
        self.acc_weight, self.acc_bias = (weight.new_empty(s, dtype=torch.float32) for s in spare)
        if not rows:
            self.d_weight.zero_()
            self.d_bias.zero_()

    def add(self, g: Tensor, h: Tensor, first: int) -> None:
        """The gradients of a chunk: g [C, V] of its logits, given h [C, H]."""
        if self.wanted[0]:
            (self._hidden_by_library if self.library else self._hidden_by_kernel)(g, first)
        if self.wanted[1] or self.wanted[2]:
            (self._head_by_library if self.library else self._head_by_kernel)(g, h, first)

    def results(self, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients for hidden, weight and bias, each in its type."""
        if self.wanted[0] and self.shared:
            all_reduce(self.d_hidden, group=group)
        d_weight = self.d_weight[:, : self.weight.shape[1]].contiguous() if self.wanted[1] else self.d_weight
        return self.d_hidden.to(kept_type(self.hidden.dtype)), d_weight, self.d_bias

    def _finished(self, x: Tensor) -> Tensor:
        return x if self.problem.last is None else x * self.problem.last

    def _hidden_by_library(self, g: Tensor, first: int) -> None:
        rows = slice(first, first + len(g))
        d = self._finished(torch.mm(g, self.problem.w)).to(self.d_hidden.dtype)
        if self.problem.listed is None:
            self.d_hidden[rows] = d
        else:
            self.d_hidden.index_copy_(0, self.problem.listed[0][rows], d)

    def _head_by_library(self, g: Tensor, h: Tensor, first: int) -> None:
        last = first + len(g) >= self.rows
        if self.wanted[2]:
            mass = g.sum(0, dtype=torch.float32)
            mass = mass if first == 0 else self.acc_bias.add_(mass)
            self._keep(self.d_bias, self.acc_bias, mass, last)
        if self.wanted[1] and self.single and self.problem.last is None:  # else the sum is too large for float16
            self.d_weight.copy_(self._finished(torch.mm(g.T, h)))
        elif self.wanted[1]:
            step = max(128, SLICE // h.shape[1] // 128 * 128)
            for part in (slice(start, start + step) for start in range(0, g.shape[1], step)):
                found, acc = _in_float32(g[:, part].T, h), self.acc_weight[part]
                self._keep(self.d_weight[part], acc, found if first == 0 else acc.add_(found), last)

    def _keep(self, out: Tensor, acc: Tensor, found: Tensor, last: bool) -> None:
        if last:
            out.copy_(self._finished(found))
        elif found is not acc:
            acc.copy_(found)

    def _hidden_by_kernel(self, g: Tensor, first: int) -> None:
        problem, H, options = self.problem, self.problem.h.shape[1], product_options(g.dtype)
        assert problem.listed is not None
        blocks = triton.cdiv(len(g), options["BR"]), triton.cdiv(H, options["BC"])
        parts = max(1, min(PROGRAMS // (blocks[0] * blocks[1]), -(-g.shape[1] // (4 * options["BK"])), 8))
        partial = g.new_empty(parts, len(g), H, dtype=torch.float32)
        sizes = {"H": H, "V": g.shape[1], "STRIDE": g.stride(0), "PRECISION": precision(g.dtype)}
        place, count = problem.listed
        hidden_kernel[blocks[0], blocks[1], parts](g, problem.w, count, partial, first, len(g), **sizes, **options)
        last = count if problem.last is None else problem.last
        sizes = {"H": H, "WIDTH": self.hidden.shape[1], "SCALED": problem.last is not None, "BH": power(H, 16, 1024)}
        arrays = (partial, place, count, last, self.d_hidden)
        scatter_kernel[(len(g), triton.cdiv(H, sizes["BH"]))](*arrays, first, len(g), parts, **sizes)

    def _head_by_kernel(self, g: Tensor, h: Tensor, first: int) -> None:
        problem, H, options = self.problem, h.shape[1], product_options(g.dtype, head=True)
        assert problem.listed is not None
        columns = triton.cdiv(H, options["BC"]) if self.wanted[1] else 1
        count = problem.listed[1]
        arrays = (g, h, count, count if problem.last is None else problem.last)
        sums = (self.acc_weight, self.d_weight, self.acc_bias, self.d_bias)
        sizes = {"H": H, "V": g.shape[1], "STRIDE": g.stride(0)}
        turn = {"FIRST": first == 0, "LAST": first + len(g) >= self.rows, "SCALED": problem.last is not None}
        flags = {"WEIGHT": self.wanted[1], "BIAS": self.wanted[2], "PRECISION": precision(g.dtype)}
        grid = (triton.cdiv(g.shape[1], options["BR"]), columns)
        head_kernel[grid](*arrays, *sums, first, len(g), **sizes, **turn, **flags, **options)


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded to 16 bits."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
