"""distill_cross_entropy: DINO's loss and gradient by every road, without the probabilities."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.distill_cross_entropy import distill_cross_entropy, distill_cross_entropy_reference

module = import_module("selfsup.triton_ops.distill_cross_entropy")  # the package has the function under this name

# students, teachers, rows, prototypes
SHAPES = [(1, 2, 1, 1), (2, 1, 3, 5), (2, 2, 2, 127), (3, 2, 3, 129), (10, 2, 2, 301), (1, 3, 3, 64), (5, 4, 1, 257)]
FRACTIONS = (torch.float32, torch.bfloat16, torch.float16)


def case(shape, dtype=torch.float64, device="cpu", seed=0, weighted=False, size=3.0):
    """(student, teacher, centre, weights or None), the first with a gradient."""
    students, teachers, rows, width = shape
    g = torch.Generator().manual_seed(seed)
    student, teacher, centre = (
        (size * torch.randn(s, generator=g, dtype=torch.float64)).to(device, dtype)
        for s in ((students, rows, width), (teachers, rows, width), (width,))
    )
    weights = None
    if weighted:
        weights = torch.rand(rows, generator=g, dtype=torch.float64)
        weights[::3] = 0
        weights = weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return student.requires_grad_(), teacher, centre, weights


def papers(student, teacher, centre, tps=0.1, tpt=0.04):
    """Algorithm 1 of DINO, H(t, s) for each pair and row by itself, in Python's floats; [S, N, K] and [R, N, K]."""

    def softmax(x):
        top = max(x)
        exponentials = [math.exp(v - top) for v in x]
        return [e / math.fsum(exponentials) for e in exponentials]

    pairs = []
    for r, t in enumerate(teacher.tolist()):
        for s, q in enumerate(student.tolist()):
            if r == s:
                continue
            rows = []
            for a, b in zip(t, q, strict=True):
                p = softmax([(x - c) / tpt for x, c in zip(a, centre.tolist(), strict=True)])
                rows.append(-math.fsum(x * math.log(y) for x, y in zip(p, softmax([v / tps for v in b]), strict=True)))
            pairs.append(math.fsum(rows) / len(rows))
    return math.fsum(pairs) / len(pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_papers_algorithm(shape):
    student, teacher, centre, _ = case(shape, size=0.5)
    want = pytest.approx(papers(student, teacher, centre), rel=1e-12, abs=1e-14)
    assert distill_cross_entropy(student, teacher, centre).item() == want
    assert distill_cross_entropy_reference(student, teacher, centre).item() == want


def test_the_gradient_is_that_of_the_papers_algorithm():
    student, teacher, centre, _ = case((3, 2, 2, 5), size=0.5)
    (grad,) = torch.autograd.grad(distill_cross_entropy(student, teacher, centre), student)
    for index in [(0, 0, 0), (1, 1, 4), (2, 0, 3)]:
        step = torch.zeros_like(student)
        step[index] = 1e-5
        change = papers(student + step, teacher, centre) - papers(student - step, teacher, centre)
        assert grad[index].item() == pytest.approx(change / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("logits", [2**18, 300])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_reference(monkeypatch, gradients_of, logits, weighted, skip, shape):
    monkeypatch.setattr(module, "LOGITS", logits)
    student, teacher, centre, weights = case(shape, weighted=weighted)

    def run(f):
        return gradients_of(
            lambda s: f(s, teacher, centre, weights=weights, skip_same=skip, teacher_temperature=0.07), [student]
        )

    for a, b in zip(run(distill_cross_entropy), run(distill_cross_entropy_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", FRACTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_is_no_worse_than_torchs(device, as_exact_as_torch, dtype, weighted, shape):
    as_exact_as_torch(
        lambda s, t, c, w: distill_cross_entropy(s, t, c, weights=w),
        lambda s, t, c, w: distill_cross_entropy_reference(s, t, c, weights=w),
        lambda seed: case(shape, dtype, device, seed, weighted),
        seeds=2,
    )


@pytest.mark.parametrize("dtype", FRACTIONS)
def test_far_logits_at_low_temperatures_stay_exact(device, as_exact_as_torch, dtype):
    """bfloat16 logits of some hundreds: exponents of thousands, and differences of 0.5 that decide."""
    as_exact_as_torch(
        lambda s, t, c, _: distill_cross_entropy(s, t, c),
        lambda s, t, c, _: distill_cross_entropy_reference(s, t, c),
        lambda seed: case((4, 2, 3, 500), dtype, device, seed, size=100.0),
        seeds=2,
    )


def test_an_agreed_choice_costs_nothing_and_its_opposite_the_whole_way(device):
    logits = torch.tensor([[100.0, -100.0, 0.0]], device=device, dtype=torch.bfloat16)
    assert distill_cross_entropy(logits, logits).item() == 0
    opposite = distill_cross_entropy(-logits, logits)
    assert opposite.item() == pytest.approx(2000)


def test_rows_divided_among_programs_and_rows_of_their_own_give_the_same(device, as_exact_as_torch, monkeypatch):
    """Few rows are divided, up to 16 ways; many are not, and a program goes through blocks of one."""
    kernels = pytest.importorskip("selfsup.triton_ops.distill_cross_entropy_kernels")
    few, many = (1, 2, 1, 12_000), (3, 2, 3, 5000)
    for shape, programs in ((few, 1024), (many, 3)):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        as_exact_as_torch(
            lambda s, t, c, _: distill_cross_entropy(s, t, c),
            lambda s, t, c, _: distill_cross_entropy_reference(s, t, c),
            lambda seed, shape=shape: case(shape, torch.float32, device, seed),
            seeds=1,
        )


def test_one_view_each_is_a_pair(device):
    student, teacher, centre, weights = case((1, 1, 7, 33), torch.float32, device, weighted=True)
    got = distill_cross_entropy(student[0], teacher[0], centre, weights=weights)
    want = distill_cross_entropy_reference(student, teacher, centre, weights=weights, skip_same=False)
    torch.testing.assert_close(got, want)


def test_rows_without_weight_are_not_read(device):
    """Padding may hold anything: NaN neither reaches the loss nor the gradient."""
    student, teacher, centre, weights = case((2, 2, 7, 33), torch.float32, device, weighted=True)
    clean = torch.autograd.grad(distill_cross_entropy(student, teacher, centre, weights=weights), student)[0]
    with torch.no_grad():
        student[:, ::3] = torch.nan
        teacher[:, ::3] = torch.inf
    loss = distill_cross_entropy(student, teacher, centre, weights=weights)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert torch.equal(grad, clean)
    assert not grad[:, ::3].any()


def test_no_weight_at_all_is_a_loss_of_nothing(device):
    student, teacher, centre, _ = case((2, 2, 4, 33), torch.float32, device)
    loss = distill_cross_entropy(student, teacher, centre, weights=torch.zeros(4, device=device))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_what_is_not_finite_is_seen(device):
    for index in range(2):
        arrays = list(case((2, 2, 4, 33), torch.float32, device))
        with torch.no_grad():
            arrays[index][0, 0, 5] = torch.nan
        assert distill_cross_entropy(*arrays[:3]).isnan()


def test_types_may_differ_and_memory_may_have_gaps(device):
    student, teacher, centre, weights = case((3, 2, 8, 70), torch.float32, device, weighted=True)
    arrays = (student.bfloat16()[..., ::2], teacher.half()[:, ::2].repeat(1, 2, 1)[..., ::2], centre[::2])
    spread = weights[:, None].expand(-1, 3)[:, 1]
    got = distill_cross_entropy(*arrays, weights=spread)
    want = distill_cross_entropy_reference(*(x.float() for x in arrays), weights=weights)
    torch.testing.assert_close(got, want)


def test_the_teacher_is_constant(device):
    student, teacher, centre, weights = case((2, 2, 4, 33), torch.float32, device, weighted=True)
    for x in (teacher, centre, weights):
        x.requires_grad_()
    distill_cross_entropy(student, teacher, centre, weights=weights).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert centre.grad is None
    assert weights.grad is None
    assert not distill_cross_entropy(student.detach(), teacher, centre).backward()


def test_temperatures_may_be_tensors(device):
    student, teacher, centre, _ = case((2, 2, 4, 33), torch.float32, device)
    warm, cold = torch.tensor(0.2, device=device), torch.tensor([0.05], device=device)
    got = distill_cross_entropy(student, teacher, centre, student_temperature=warm, teacher_temperature=cold)
    want = distill_cross_entropy(student, teacher, centre, student_temperature=0.2, teacher_temperature=0.05)
    torch.testing.assert_close(got, want)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40)),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_only_differences_of_logits_count_and_gradients_sum_to_nothing(shape, shift, seed):
    student, teacher, centre, _ = case(shape, seed=seed)
    loss = distill_cross_entropy(student, teacher, centre, skip_same=False)
    moved = distill_cross_entropy(student + shift, teacher - shift, centre, skip_same=False)
    torch.testing.assert_close(loss, moved, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad.sum(-1), torch.zeros_like(grad[..., 0]), rtol=0, atol=1e-12)


def test_more_views_than_a_kernel_holds(device, as_exact_as_torch):
    as_exact_as_torch(
        lambda s, t, c, _: distill_cross_entropy(s, t, c),
        lambda s, t, c, _: distill_cross_entropy_reference(s, t, c),
        lambda seed: case((33, 2, 2, 10), torch.float32, device, seed),
        seeds=1,
    )


def test_the_same_numbers_twice(device):
    student, teacher, centre, _ = case((10, 2, 3, 1031), torch.float32, device)
    first, again = (
        (loss, *torch.autograd.grad(loss, student))
        for loss in (distill_cross_entropy(student, teacher, centre) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_host_does_not_wait(device, without_waiting):
    student, teacher, centre, weights = case((3, 2, 4, 33), torch.bfloat16, device, weighted=True)
    with without_waiting():
        distill_cross_entropy(student, teacher, centre, weights=weights).backward()
        distill_cross_entropy(student, teacher).backward()


def test_autocast_changes_nothing():
    student, teacher, centre, _ = case((3, 2, 4, 33), torch.float32)
    plain = distill_cross_entropy(student, teacher, centre)
    with torch.autocast("cpu", torch.bfloat16):
        under = distill_cross_entropy(student, teacher, centre)
        (grad,) = torch.autograd.grad(under, student)
    assert torch.equal(plain, under)
    assert torch.equal(grad, torch.autograd.grad(plain, student)[0])


def test_it_needs_no_values():
    student = torch.empty(3, 4, 9, device="meta", requires_grad=True)
    loss = distill_cross_entropy(student, torch.empty(2, 4, 9, device="meta"))
    assert loss.shape == ()
    assert torch.autograd.grad(loss, student)[0].shape == student.shape


def test_the_ops_are_well_formed():
    student, teacher, centre, weights = case((3, 2, 4, 33), weighted=True)
    warm, cold = torch.tensor(10.0).double(), torch.tensor(25.0).double()
    ops = torch.ops.selfsup
    for rows in (weights, None):
        arrays = (student, teacher, centre, rows, warm, cold, True)
        torch.library.opcheck(ops.distill_cross_entropy, arrays)
        _, tops, sums = (x.detach() for x in ops.distill_cross_entropy(*arrays))
        arrays = (student.detach(), *arrays[1:], tops, sums, torch.tensor(1.0).double())
        torch.library.opcheck(ops.distill_cross_entropy_gradient, arrays)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_once_for_batches_of_all_sizes_and_any_temperature():
    torch._dynamo.reset()
    compiled = torch.compile(distill_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, temperature in zip((6, 7, 9, 11, 13), (0.04, 0.05, 0.055, 0.06, 0.07), strict=True):
        student, teacher, centre, _ = case((4, 2, rows, 17))
        options = {"teacher_temperature": torch.tensor(temperature).double()}
        losses = [f(student, teacher, centre, **options) for f in (compiled, distill_cross_entropy)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_no_array_of_probabilities_is_made(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 64)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
            sizes.extend(x.numel() for x in made if x.untyped_storage().data_ptr() not in given)
            return out

    student, teacher, centre, _ = (x if x is None else x.detach() for x in case((2, 2, 20, 64)))
    given = [x.untyped_storage().data_ptr() for x in (student, teacher)]
    factor = torch.ones((), dtype=torch.float64)
    with Watch():
        module.sums_in_chunks(student, teacher, centre, None, factor, factor, True)
    assert max(sizes) <= 4 * 20  # the sums of all rows; a row of logits has 64


BAD = [
    ((torch.ones(2, 3, 4), torch.ones(2, 3, 5)), r"\[2, 3, 4\] and \[2, 3, 5\]"),
    ((torch.ones(2, 3, 4), torch.ones(3, 4)), r"\[2, 3, 4\] and \[3, 4\]"),
    ((torch.ones(2, 0, 4), torch.ones(2, 0, 4)), "nothing to distil"),
    ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(3)), r"centre must be \[4\], and is \[3\]"),
    ((torch.ones(2, 3, 4), torch.ones(2, 3, 4).long()), "teacher must be of floating point, and is torch.int64"),
    ((torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta")), "teacher is on meta"),
    ((torch.ones(1, 3, 4), torch.ones(1, 3, 4)), "leave no pair; set skip_same=False"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD)
def test_what_does_not_fit_is_named(arrays, message):
    with pytest.raises(ContractError, match=message):
        distill_cross_entropy(*arrays)


def test_options_that_do_not_fit_are_named():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ContractError, match=r"weights must be \[3\], and is \[4\]"):
        distill_cross_entropy(x, x, weights=torch.ones(4))
    with pytest.raises(ContractError, match="teacher_temperature must be above 0, and is -1"):
        distill_cross_entropy(x, x, teacher_temperature=-1.0)
    with pytest.raises(ContractError, match=r"student_temperature is one number, and this has shape \[2\]"):
        distill_cross_entropy(x, x, student_temperature=torch.ones(2))


COMPILED = [("bf16", (1, 1), True), ("fp32", (2, 2), False), ("bf16", (10, 2), False), ("fp16", (32, 2), True)]


@pytest.mark.parametrize(("kind", "views", "weighted"), COMPILED)
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, views, weighted):
    from selfsup.triton_ops import distill_cross_entropy_kernels as kernels

    students, teachers = views
    options = kernels._options(students, teachers)
    flags = {"S": students, "R": teachers, "WEIGHTED": weighted}
    merging = {"PARTS": kernels.PARTS, "SP": options["SP"], "RP": options["RP"], "SKIP": True}
    gradient = {"SKIP": True, "SP": options["SP"], "BK": options["BK"], "num_warps": options["num_warps"]}
    for kernel, more in (
        (kernels._sums_kernel, options),
        (kernels._merge_kernel, merging),
        (kernels._gradient_kernel, gradient),
    ):
        pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        logits = {name: f"*{kind}" for name in ("student_ptr", "teacher_ptr", "out_ptr") if name in pointers}
        integers = {name: "i32" for name in ("N", "K", "parts") if name in kernel.arg_names}
        assert_fits(compile_ahead(kernel, pointers | logits | integers, **flags, **more))
