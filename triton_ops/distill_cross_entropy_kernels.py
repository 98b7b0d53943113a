"""The kernels of distill_cross_entropy.py: each logit is read once for the loss and once for the gradient.

A program has one row of all views, or a part of it where rows are too few to fill a GPU, and keeps a running maximum
and sum of each view and product of each pair; a second kernel merges the parts, in order. A third writes the gradient,
a block of prototypes at a time. exp is taken to base 2, which is what the hardware has. What is past the end is -inf;
running maxima start finite, so that no difference is of two infinities. The result is the same each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import narrow, power
from ._triton import tl, triton

PARTS = 16  # of a row, at most
PROGRAMS = 1024  # about four for each multiprocessor of a large GPU
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite by any temperature


def sums(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    weights: Tensor | None,
    warm: Tensor,
    cold: Tensor,
    skip_same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss of all pairs, summed over rows, and the maxima and sums of all views [R + S, N])."""
    (R, N, K), S = teacher.shape, student.shape[0]
    options = _options(S, R)
    parts = max(1, min(PARTS, PROGRAMS // N, triton.cdiv(K, options["BK"])))
    tops, sums, pulls = (warm.new_empty(parts, rows, N) for rows in (R + S, R + S, R * S))
    found = warm.new_empty(R + S, N), warm.new_empty(R + S, N), warm.new_empty(N)
    arrays = (student.contiguous(), teacher.contiguous(), centre.contiguous())
    ends = (warm if weights is None else weights.contiguous(), warm, cold)
    flags = {"S": S, "R": R, "WEIGHTED": weights is not None}
    _sums_kernel[(N, parts)](*arrays, *ends, tops, sums, pulls, N, K, **flags, **options)
    blocks = {"SP": options["SP"], "RP": options["RP"], "PARTS": PARTS}
    _merge_kernel[(N,)](tops, sums, pulls, *ends, *found, N, parts, SKIP=skip_same, **flags, **blocks)
    return found[2].sum(), found[0], found[1]


def gradient(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    weights: Tensor | None,
    warm: Tensor,
    cold: Tensor,
    skip_same: bool,
    tops: Tensor,
    sums: Tensor,
    grad: Tensor,
) -> Tensor:
    """The gradient for the student's logits, given that of the loss."""
    (R, N, K), S = teacher.shape, student.shape[0]
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    arrays = (student.contiguous(), teacher.contiguous(), centre.contiguous())
    ends = (warm if weights is None else weights.contiguous(), warm, cold)
    options = _options(S, R)
    del options["RP"]
    flags = {"S": S, "R": R, "WEIGHTED": weights is not None, "SKIP": skip_same}
    grid = (N, triton.cdiv(K, options["BK"]))
    _gradient_kernel[grid](*arrays, *ends, tops, sums, grad, out, N, K, **flags, **options)
    return out


def _options(students: int, teachers: int) -> dict[str, int]:
    """BK prototypes of all views at once, so many that what is made of all pairs stays in registers."""
    most = 1 << 30
    sizes = {"SP": power(students, 1, most), "RP": power(teachers, 1, most)}
    return {**sizes, "BK": power(8192 // (sizes["SP"] * sizes["RP"]), 64, 2048), "num_warps": 8}


@triton.jit(do_not_specialize=["N"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    student_ptr,
    teacher_ptr,
    centre_ptr,
    weights_ptr,
    warm_ptr,
    cold_ptr,
    tops_ptr,
    sums_ptr,
    pulls_ptr,
    N,
    K,
    S: tl.constexpr,
    R: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SP: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
):
    """Of one row and a part of its prototypes: the running maxima, sums and products of all views."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, r = tl.arange(0, SP).to(tl.int64), tl.arange(0, RP).to(tl.int64)
    warm, cold = tl.load(warm_ptr) * LOG2E, tl.load(cold_ptr) * LOG2E
    span = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(1)) * BK
    first = part * span
    stop = tl.minimum(first + span, K)
    if WEIGHTED:
        stop = tl.where(tl.load(weights_ptr + row) != 0, stop, first)
    s_top, r_top = tl.full([SP], LOWEST, tl.float32), tl.full([RP], LOWEST, tl.float32)
    s_sum, r_sum = tl.zeros([SP], tl.float32), tl.zeros([RP], tl.float32)
    pull = tl.zeros([RP, SP], tl.float32)  # sum_k exp(..t_rk..) (s_sk - s_top)
    for at in range(first, stop, BK):
        k = at + tl.arange(0, BK)
        inside = (k < K)[None, :]
        t_at = teacher_ptr + (r[:, None] * N + row) * K + k[None, :]
        t = tl.load(t_at, mask=(r < R)[:, None] & inside, other=float("-inf")).to(tl.float32)  # [RP, BK]
        t -= tl.load(centre_ptr + k, mask=k < K, other=0.0)[None, :]
        new = tl.maximum(r_top, tl.max(t, 1))
        old = tl.exp2((r_top - new) * cold)
        e = tl.exp2((t - new[:, None]) * cold)
        s_at = student_ptr + (s[:, None] * N + row) * K + k[None, :]
        x = tl.load(s_at, mask=(s < S)[:, None] & inside, other=float("-inf")).to(tl.float32)  # [SP, BK]
        s_new = tl.maximum(s_top, tl.max(x, 1))
        x -= s_new[:, None]
        # All terms are of one sign: neither the maximum's change nor the sum cancels.
        pull = (pull + r_sum[:, None] * (s_top - s_new)[None, :]) * old[:, None]
        there = tl.where((s < S)[:, None] & inside, x, 0.0)
        pull += tl.sum(e[:, None, :] * there[None, :, :], 2)
        r_sum = r_sum * old + tl.sum(e, 1)
        s_sum = s_sum * tl.exp2((s_top - s_new) * warm) + tl.sum(tl.exp2(x * warm), 1)
        r_top, s_top = new, s_new
    base = part.to(tl.int64) * (R + S)
    tl.store(tops_ptr + (base + r) * N + row, r_top, mask=r < R)
    tl.store(sums_ptr + (base + r) * N + row, r_sum, mask=r < R)
    tl.store(tops_ptr + (base + R + s) * N + row, s_top, mask=s < S)
    tl.store(sums_ptr + (base + R + s) * N + row, s_sum, mask=s < S)
    pair = part.to(tl.int64) * R * S + r[:, None] * S + s[None, :]
    tl.store(pulls_ptr + pair * N + row, pull, mask=(r < R)[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=["N", "parts"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    part_tops_ptr,
    part_sums_ptr,
    pulls_ptr,
    weights_ptr,
    warm_ptr,
    cold_ptr,
    tops_ptr,
    sums_ptr,
    losses_ptr,
    N,
    parts,
    S: tl.constexpr,
    R: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SKIP: tl.constexpr,
    PARTS: tl.constexpr,
    SP: tl.constexpr,
    RP: tl.constexpr,
):
    """Of one row: the parts of its maxima, sums and products as one, and its loss; of an unread row 0, 1 and 0."""
    row = tl.program_id(0).to(tl.int64)
    s, r, part = tl.arange(0, SP).to(tl.int64), tl.arange(0, RP).to(tl.int64), tl.arange(0, PARTS).to(tl.int64)
    warm, cold = tl.load(warm_ptr), tl.load(cold_ptr)
    there = (part < parts)[:, None]
    r_at = (part[:, None] * (R + S) + r[None, :]) * N + row  # [PARTS, RP]
    s_at = (part[:, None] * (R + S) + R + s[None, :]) * N + row  # [PARTS, SP]
    r_there, s_there = there & (r < R)[None, :], there & (s < S)[None, :]
    r_tops = tl.load(part_tops_ptr + r_at, mask=r_there, other=LOWEST)
    s_tops = tl.load(part_tops_ptr + s_at, mask=s_there, other=LOWEST)
    r_sums = tl.load(part_sums_ptr + r_at, mask=r_there, other=0.0)
    s_sums = tl.load(part_sums_ptr + s_at, mask=s_there, other=0.0)
    r_real, s_real = R, S
    if WEIGHTED:
        weight = tl.load(weights_ptr + row)
        r_real, s_real = tl.where(weight != 0, R, 0), tl.where(weight != 0, S, 0)
    r_top = tl.where(r < r_real, tl.max(r_tops, 0), 0.0)
    s_top = tl.where(s < s_real, tl.max(s_tops, 0), 0.0)
    share = tl.exp2((r_tops - r_top[None, :]) * (cold * LOG2E))
    r_sum = tl.where(r < r_real, tl.sum(r_sums * share, 0), 1.0)
    s_sum = tl.sum(s_sums * tl.exp2((s_tops - s_top[None, :]) * (warm * LOG2E)), 0)
    s_sum = tl.where(s < s_real, s_sum, 1.0)
    pair = part[:, None, None] * R * S + r[None, :, None] * S + s[None, None, :]
    pulls = tl.load(pulls_ptr + pair * N + row, mask=r_there[:, :, None] & s_there[:, None, :], other=0.0)
    pulls = (pulls + (s_tops - s_top[None, :])[:, None, :] * r_sums[:, :, None]) * share[:, :, None]
    losses = tl.log(s_sum)[None, :] - tl.sum(pulls, 0) / r_sum[:, None] * warm  # [RP, SP]
    counts = (r < R)[:, None] & (s < S)[None, :]
    if SKIP:
        counts = counts & (r[:, None] != s[None, :])
    loss = tl.sum(tl.sum(tl.where(counts, losses, 0.0), 1), 0)
    if WEIGHTED:
        loss = tl.where(weight != 0, loss * weight, 0.0)
    tl.store(losses_ptr + row, loss)
    tl.store(tops_ptr + r * N + row, r_top, mask=r < R)
    tl.store(sums_ptr + r * N + row, r_sum, mask=r < R)
    tl.store(tops_ptr + (R + s) * N + row, s_top, mask=s < S)
    tl.store(sums_ptr + (R + s) * N + row, s_sum, mask=s < S)


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    student_ptr,
    teacher_ptr,
    centre_ptr,
    weights_ptr,
    warm_ptr,
    cold_ptr,
    tops_ptr,
    sums_ptr,
    grad_ptr,
    out_ptr,
    N,
    K,
    S: tl.constexpr,
    R: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SKIP: tl.constexpr,
    SP: tl.constexpr,
    BK: tl.constexpr,
):
    """Of one row and BK of its prototypes: the gradient for all views of the student."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    s = tl.arange(0, SP).to(tl.int64)
    stop = K
    warm, cold = tl.load(warm_ptr), tl.load(cold_ptr) * LOG2E
    factor = tl.load(grad_ptr) * warm
    if WEIGHTED:
        weight = tl.load(weights_ptr + row)
        factor *= weight
        stop = tl.where(weight != 0, K, 0)
    inside = k < stop
    centre = tl.load(centre_ptr + k, mask=inside, other=0.0)
    lanes = (s < S)[:, None] & inside[None, :]
    at = (s[:, None] * N + row) * K + k[None, :]
    x = tl.load(student_ptr + at, mask=lanes, other=float("-inf")).to(tl.float32)  # [SP, BK]
    s_top = tl.load(tops_ptr + (R + s) * N + row, mask=s < S, other=0.0)
    s_sum = tl.load(sums_ptr + (R + s) * N + row, mask=s < S, other=1.0)
    teachers = tl.where(s < R, R - 1, R) if SKIP else tl.full([SP], R, tl.int32)
    g = tl.exp2((x - s_top[:, None]) * (warm * LOG2E)) * (teachers.to(tl.float32) / s_sum)[:, None]
    place = row
    for r in tl.static_range(R):
        t = tl.load(teacher_ptr + place * K + k, mask=inside, other=float("-inf")).to(tl.float32) - centre
        r_top, r_sum = tl.load(tops_ptr + place), tl.load(sums_ptr + place)
        p = (tl.exp2((t - r_top) * cold) / r_sum)[None, :]
        g -= tl.where(s[:, None] != r, p, 0.0) if SKIP else p
        place += N
    g = tl.where(inside[None, :], g * factor, 0.0)
    tl.store(out_ptr + at, narrow(g, out_ptr.dtype.element_ty), mask=(s < S)[:, None] & (k < K)[None, :])
