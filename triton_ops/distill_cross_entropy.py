"""The cross-entropy of students with their teachers' sharpened choice among K prototypes, without any probabilities.

Caron et al. 2021, "Emerging properties in self-supervised vision transformers" (DINO),
https://arxiv.org/abs/2104.14294, equations 1 to 3; on hidden patches, Zhou et al. 2022, "iBOT",
https://arxiv.org/abs/2111.07832, equation 2. For views s of a student and r of a teacher, with centre c,

    p_r = softmax((t_r - c) / tau_t)        q_s = softmax(s_s / tau_s)
    L = mean over pairs (r, s) of - sum_k p_rk log q_sk = log Z_s - (1 / tau_s) sum_k p_rk (s_sk - m_s)
    m_s = max_k s_sk, Z_s = sum_k exp((s_sk - m_s) / tau_s)
    d s_s = (number of teachers of s * q_s - sum_r p_r) / (tau_s * number of pairs)

Maxima are subtracted before the division: where a small temperature makes differences large, those that matter stay
exact. A running maximum serves for the sum over k with p as it does for Z, so the loss takes one reading of all logits,
and the gradient, which needs Z, one more and a writing:

    3 S + 2 R times N K elements in all, of which S are written, and nothing else of that size.

The centre's next value needs the mean over views and rows of the teacher, which is a reading of R N K by itself,
`teacher.mean((0, 1), dtype=torch.float32)`: here a program has a row, and a sum over rows would cost about as much.

Shapes: S views of the student, R of the teacher, N rows, K prototypes. Sums are in float32, in float64 for float64
logits. On a CPU, and in float64, a few rows are in hand at a time; see distill_cross_entropy_kernels.py for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, on_device_of

LOGITS = 2**18  # of one view at once on a CPU: 1 MB, that its cache may hold
PAIRS = 64  # views of the student times those of the teacher, for which a kernel is tried


def distill_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor | None = None,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    weights: Tensor | None = None,
    skip_same: bool = True,
) -> Tensor:
    """The mean over pairs of views, and over rows, of the cross-entropy of the student with the teacher: [].

    It has a first derivative with respect to the student's logits alone; all else is taken as constant.

    Args:
        student: logits [S, N, K]; the first R views are the crops that the teacher saw. Or [N, K], one view.
        teacher: logits [R, N, K]. Or [N, K], one view, which pairs with the student's.
        centre: [K], subtracted from the teacher's logits; None is 0.
        student_temperature: above 0; a tensor of one number varies without recompiling a compiled step, and lies where
            the logits do, or the host waits for it.
        teacher_temperature: likewise.
        weights: [N]; the loss is then the sum over rows, each times its weight, instead of their mean. A row of weight
            0 is not read, whatever it holds: for iBOT, 1 / (hidden patches of the image * images), and 0 for the rest.
        skip_same: leave out the pairs of a crop with itself; not asked of two that are [N, K].
    """
    student, teacher, skip_same = _views(student, teacher, skip_same)
    _check(student, teacher, centre, weights)
    pairs = _pairs(student.shape[0], teacher.shape[0], skip_same)
    kind = _exact(student, teacher)
    warm = _inverse("student_temperature", student_temperature, student, kind)
    cold = _inverse("teacher_temperature", teacher_temperature, student, kind)
    centre = student.new_zeros(student.shape[2], dtype=kind) if centre is None else centre.to(kind)
    rows = None if weights is None else weights.to(kind)
    total: Tensor = torch.ops.selfsup.distill_cross_entropy(student, teacher, centre, rows, warm, cold, skip_same)[0]
    return total / (pairs * student.shape[1] if weights is None else pairs)


def distill_cross_entropy_reference(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor | None = None,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    weights: Tensor | None = None,
    skip_same: bool = True,
) -> Tensor:
    """What `distill_cross_entropy` must equal; makes all probabilities, [S, N, K] and [R, N, K]."""
    student, teacher, skip_same = _views(student, teacher, skip_same)
    kind = _exact(student, teacher)
    aim = teacher.detach().to(kind) - (0 if centre is None else centre.to(kind))  # [R, N, K]
    p = (aim / teacher_temperature).softmax(-1)
    log_q = (student.to(kind) / student_temperature).log_softmax(-1)  # [S, N, K]
    total = student.new_zeros((), dtype=kind)
    for r in range(len(p)):
        for s in range(len(log_q)):
            if r != s or not skip_same:
                rows = -(p[r] * log_q[s]).sum(-1)  # [N]
                total = total + (rows.mean() if weights is None else rows @ weights.to(kind))
    return total / _pairs(len(log_q), len(p), skip_same)


def _views(student: Tensor, teacher: Tensor, skip_same: bool) -> tuple[Tensor, Tensor, bool]:
    """With an axis of views, of which there may be one."""
    if student.dim() == teacher.dim() == 2:
        return student[None], teacher[None], False
    return student, teacher, skip_same


def _check(student: Tensor, teacher: Tensor, centre: Tensor | None, weights: Tensor | None) -> None:
    shapes = f"{list(student.shape)} and {list(teacher.shape)}"
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ContractError(f"student and teacher must be [S, N, K] and [R, N, K], or [N, K] both, and are {shapes}")
    if 0 in student.shape or 0 in teacher.shape:
        raise ContractError(f"there is nothing to distil: student and teacher are {shapes}")
    for name, x, size in (("centre", centre, student.shape[2]), ("weights", weights, student.shape[1])):
        if x is not None and (x.dim() != 1 or x.shape[0] != size):
            raise ContractError(f"{name} must be [{size}], and is {list(x.shape)}")
    given = {"student": student, "teacher": teacher, "centre": centre, "weights": weights}
    for name, x in given.items():
        if x is not None and not x.is_floating_point():
            raise ContractError(f"{name} must be of floating point, and is {x.dtype}")
        if x is not None and x.device != student.device:
            raise ContractError(f"{name} is on {x.device}, and the student's logits are on {student.device}")


def _pairs(students: int, teachers: int, skip_same: bool) -> int:
    count = students * teachers - (min(students, teachers) if skip_same else 0)
    if count == 0:
        raise ContractError("one view of the student and the same of the teacher leave no pair; set skip_same=False")
    return count


def _exact(*logits: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _inverse(name: str, temperature: float | Tensor, like: Tensor, kind: torch.dtype) -> Tensor:
    """1 / temperature, [] on the device of the logits."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ContractError(f"{name} is one number, and this has shape {list(temperature.shape)}")
        return temperature.detach().to(like.device, kind).reshape(()).reciprocal()
    if not temperature > 0:
        raise ContractError(f"{name} must be above 0, and is {temperature}")
    return torch.full((), 1 / temperature, dtype=kind, device=like.device)


def _weighed(exponents: Tensor, factor: Tensor) -> Tensor:
    """exp(factor * exponents), in their memory."""
    return exponents.mul_(factor * 1.4426950408889634).exp2_()


def _row_chunks(rows: int, width: int) -> list[slice]:
    size = max(1, LOGITS // width)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def sums_in_chunks(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    weights: Tensor | None,
    warm: Tensor,
    cold: Tensor,
    skip_same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss of all pairs, summed over rows, and the maxima and sums of all views [R + S, N]) on any device."""
    R, N, K = teacher.shape
    S = student.shape[0]
    tops, sums = (warm.new_empty(R + S, N) for _ in range(2))
    losses = warm.new_zeros(N)
    for rows in _row_chunks(N, K):
        aims = []  # R of [C, K], not normalised
        for r in range(R):
            x = teacher[r, rows].to(warm.dtype) - centre
            tops[r, rows] = x.amax(-1)
            aims.append(_weighed(x.sub_(tops[r, rows, None]), cold))
            sums[r, rows] = aims[r].sum(-1)
        for s in range(S):
            x = student[s, rows].to(warm.dtype, copy=True)
            tops[R + s, rows] = x.amax(-1)
            x.sub_(tops[R + s, rows, None])
            pulls = [torch.linalg.vecdot(aims[r], x) / sums[r, rows] for r in range(R) if r != s or not skip_same]
            sums[R + s, rows] = _weighed(x, warm).sum(-1)
            for pull in pulls:
                losses[rows] += sums[R + s, rows].log() - warm * pull
    return (losses if weights is None else torch.where(weights != 0, weights * losses, 0.0)).sum(), tops, sums


def gradient_in_chunks(
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
    """The gradient for the student's logits, on any device."""
    (R, N, K), S = teacher.shape, student.shape[0]
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    factor = (grad * warm).expand(N) if weights is None else grad * warm * weights  # [N]
    for rows in _row_chunks(N, K):
        aims = [
            _weighed(teacher[r, rows].to(warm.dtype).sub(centre).sub_(tops[r, rows, None]), cold).mul_(
                (factor[rows] / sums[r, rows])[:, None]
            )
            for r in range(R)
        ]
        for s in range(S):
            paired = [aim for r, aim in enumerate(aims) if r != s or not skip_same]
            x = _weighed(student[s, rows].to(warm.dtype) - tops[R + s, rows, None], warm)
            x.mul_((len(paired) * factor[rows] / sums[R + s, rows])[:, None])
            for aim in paired:
                x.sub_(aim)
            out[s, rows] = x if weights is None else torch.where(weights[rows, None] != 0, x, 0.0)
    return out


@torch.library.custom_op("selfsup::distill_cross_entropy", mutates_args=())
def _sums(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    weights: Tensor | None,
    warm: Tensor,
    cold: Tensor,
    skip_same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _launches(student, teacher, warm):
        with torch.autocast(student.device.type, enabled=False):
            return sums_in_chunks(student, teacher, centre, weights, warm, cold, skip_same)
    from .distill_cross_entropy_kernels import sums

    with on_device_of(student):
        return sums(student, teacher, centre, weights, warm, cold, skip_same)


@torch.library.custom_op("selfsup::distill_cross_entropy_gradient", mutates_args=())
def _gradient(
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
    if not _launches(student, teacher, warm):
        return gradient_in_chunks(student, teacher, centre, weights, warm, cold, skip_same, tops, sums, grad)
    from .distill_cross_entropy_kernels import gradient

    with on_device_of(student):
        return gradient(student, teacher, centre, weights, warm, cold, skip_same, tops, sums, grad)


def _launches(student: Tensor, teacher: Tensor, warm: Tensor) -> bool:
    """Whether a kernel can run, and holds so many views."""
    return can_launch(student) and warm.dtype != torch.float64 and student.shape[0] * teacher.shape[0] <= PAIRS


@_sums.register_fake
def _(
    student: Tensor, teacher: Tensor, centre: Any, weights: Any, warm: Tensor, cold: Any, skip_same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = (student.shape[0] + teacher.shape[0], student.shape[1])
    return warm.new_empty(()), warm.new_empty(size), warm.new_empty(size)


@_gradient.register_fake
def _(student: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arrays, ctx.skip_same = inputs
    ctx.save_for_backward(*arrays, *output[1:])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *arrays, tops, sums = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    found = (
        torch.ops.selfsup.distill_cross_entropy_gradient(*arrays, ctx.skip_same, tops, sums, grad) if wanted else None
    )
    return found, None, None, None, None, None, None


_sums.register_autograd(_backward, setup_context=_keep)
