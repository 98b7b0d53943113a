"""linear_cross_entropy: equal to the reference, in every type and shape and with every option, without the logits."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import cross_entropy_options as shared
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

module = import_module("selfsup.triton_ops.linear_cross_entropy")  # the package has the function under this name

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (7, 5, 3), (33, 16, 1001), (70, 8, 257)]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"class_weights": True},
    "weighted and smoothed": {"class_weights": True, "label_smoothing": 0.3},
    "with a z-loss": {"z_loss": 0.01},
    "capped": {"softcap": 3.0},
    "scaled": {"scale": -0.7},
    "all": {"class_weights": True, "label_smoothing": 0.2, "z_loss": 0.02, "softcap": 2.0, "scale": 1.5},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def case(rows, width, classes, dtype=torch.float64, ignored=0.4, seed=0, device=CPU, size=1.0):
    """(hidden, weight, bias, labels), the first three with gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        (size * torch.randn(shape, generator=g, dtype=torch.float64)).to(device, dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    labels = torch.randint(classes, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    return hidden, weight, bias, labels.to(device)


def complete(options, classes, device=CPU):
    """The options, with class weights in the place of True."""
    if options.get("class_weights", False) is not True:
        return options
    weights = 0.1 + torch.rand(classes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return options | {"class_weights": weights.to(device)}


def called(f, options):
    """f of (hidden, weight, bias, labels)."""
    return lambda hidden, weight, bias, labels: f(hidden, weight, labels, bias, **options)


def same(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[256, 3])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(shared, "ROWS", request.param)


@pytest.mark.parametrize("shape", SHAPES)
@every_reduction
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_loss_and_gradients_equal_the_reference(gradients_of, rows_at_once, shape, reduction, biased, ignored):
    hidden, weight, bias, labels = case(*shape, ignored=ignored)
    arrays = (hidden, weight, bias if biased else None, labels)
    ours, theirs = (
        gradients_of(called(f, {"reduction": reduction}), arrays)
        for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    same(ours, theirs)


@every_option
@every_reduction
def test_every_option_equals_the_reference(gradients_of, rows_at_once, options, reduction):
    arrays, options = case(33, 5, 41), complete(options, 41) | {"reduction": reduction}
    ours, theirs = (
        gradients_of(called(f, options), arrays) for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    same(ours, theirs)


# No capacity, one of fewer rows and one of all: the three ways to a GPU's gradients.
every_way = pytest.mark.parametrize(("capacity", "reduction"), [(None, "mean"), (9, "none"), (12, "sum")])


@every_option
@every_way
def test_every_option_is_as_exact_as_torch(device, as_exact_as_torch, options, capacity, reduction):
    options = complete(options, 40, device) | {"reduction": reduction}
    ours = called(linear_cross_entropy, options | {"capacity": capacity})
    theirs = called(linear_cross_entropy_reference, options)
    as_exact_as_torch(ours, theirs, lambda seed: case(12, 20, 40, torch.float32, seed=seed, device=device), seeds=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("capacity", "reduction"), [(None, "none"), (100, "none"), (130, "none")])
def test_low_precision_is_as_exact_as_torch(device, as_exact_as_torch, dtype, capacity, reduction):
    options = {"reduction": reduction}
    ours = called(linear_cross_entropy, options | {"capacity": capacity})
    theirs = called(linear_cross_entropy_reference, options)
    draw = partial(case, 130, 33, 150, dtype, 0.7, device=device)
    as_exact_as_torch(ours, theirs, draw, seeds=1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (65, 17, 63), (63, 16, 65), (31, 65, 64)])
@pytest.mark.parametrize(("capacity", "biased"), [(None, True), (None, False), (65, False)])
def test_ragged_shapes_are_as_exact_as_torch(device, as_exact_as_torch, shape, capacity, biased):
    def draw(seed):
        hidden, weight, bias, labels = case(*shape, torch.float32, seed=seed, device=device)
        return hidden, weight, bias if biased else None, labels

    ours = called(linear_cross_entropy, {"capacity": capacity})
    as_exact_as_torch(ours, called(linear_cross_entropy_reference, {}), draw, seeds=2)


@pytest.mark.parametrize(("capacity", "dtype"), [(None, torch.float32), (150, torch.bfloat16)])
def test_chunks_add_up(device, gradients_of, monkeypatch, capacity, dtype):
    """Two chunks of rows with a label, and where all rows are looked at another of none."""
    arrays = case(280, 9, 11, dtype, ignored=0.5, device=device)
    assert 128 < int((arrays[3] != -100).sum()) <= 150
    ours = called(linear_cross_entropy, {"capacity": capacity})
    whole = gradients_of(ours, arrays)
    if can_launch(arrays[0]):
        from selfsup.triton_ops import linear_cross_entropy_device

        monkeypatch.setattr(linear_cross_entropy_device, "_chunk", lambda row: 128)
    same(gradients_of(ours, arrays), whole, 1e-5 if dtype == torch.float32 else 0.01)


def test_chunks_are_as_large_as_is_worth_their_memory():
    from selfsup.triton_ops.linear_cross_entropy_device import _chunk

    assert _chunk(2 * 30_528) * 2 * 30_528 <= 2**28
    assert _chunk(2 * 50_304) * 2 * 50_304 <= 2**28
    assert (_chunk(2 * 128_256), 4096 * 2 * 128_256 < 1.1e9) == (4096, True)
    assert _chunk(2**24) == 128


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(list(OPTIONS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(0, 1000),
)
def test_any_case_equals_the_reference(shape, ignored, name, reduction, seed):
    arrays = case(*shape, ignored=ignored, seed=seed)
    options = complete(OPTIONS[name], shape[2]) | {"reduction": reduction}
    ours, theirs = (called(f, options)(*arrays) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    same([ours], [theirs])
    given = arrays[:3]
    same(*(torch.autograd.grad(loss.sum(), given) for loss in (ours, theirs)))


@every_reduction
def test_it_is_what_torch_computes(gradients_of, reduction):
    hidden, weight, bias, labels = case(33, 5, 41)
    options = complete(OPTIONS["weighted and smoothed"], 41)
    class_weights, smoothing = options["class_weights"], options["label_smoothing"]

    def theirs(hidden, weight, bias, labels):
        logits = hidden @ weight.T + bias
        return F.cross_entropy(logits, labels, class_weights, label_smoothing=smoothing, reduction=reduction)

    ours = called(linear_cross_entropy, options | {"reduction": reduction})
    same(*(gradients_of(f, (hidden, weight, bias, labels)) for f in (ours, theirs)))


@every_reduction
def test_it_is_torchs_own_linear_cross_entropy(gradients_of, reduction):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")

    def theirs(hidden, weight, bias, labels):
        return F.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction=reduction, ignore_index=-100, label_smoothing=0.1
        )

    ours = called(linear_cross_entropy, {"reduction": reduction, "label_smoothing": 0.1})
    same(*(gradients_of(f, case(33, 5, 41)) for f in (ours, theirs)))


def test_the_z_loss_is_palms():
    hidden, weight, bias, labels = case(33, 5, 41)
    log_z = torch.logsumexp(hidden @ weight.T + bias, 1)[labels != -100]
    plain, more = (linear_cross_entropy(hidden, weight, labels, bias, z_loss=k) for k in (0.0, 0.5))
    same([more - plain], [0.5 * log_z.square().mean()])


@every_reduction
def test_rows_that_are_ignored_are_computed_where_leaving_them_out_would_make_a_device_wait(
    gradients_of, monkeypatch, reduction
):
    ours = called(linear_cross_entropy, complete(OPTIONS["all"], 101) | {"reduction": reduction})
    want = gradients_of(ours, case(33, 16, 101))
    monkeypatch.setattr(module, "labelled", lambda *_: None)
    same(gradients_of(ours, case(33, 16, 101)), want)


@every_way
def test_no_labels_cost_nothing_and_teach_nothing(device, gradients_of, capacity, reduction):
    options = {"capacity": capacity, "reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1}
    arrays = case(12, 4, 11, torch.float32, ignored=1.0, device=device)
    for x in gradients_of(called(linear_cross_entropy, options), arrays):
        assert not x.any()


@pytest.mark.parametrize("capacity", [None, 4])
def test_no_rows_cost_nothing_and_teach_nothing(device, gradients_of, capacity):
    hidden, weight, bias, labels = case(9, 4, 11, torch.float32, device=device)
    hidden = hidden[:0].detach().requires_grad_()
    arrays = (hidden, weight, bias, labels[:0])
    for reduction in ("mean", "sum", "none"):
        options = {"capacity": capacity, "reduction": reduction}
        for x in gradients_of(called(linear_cross_entropy, options), arrays):
            assert not x.any()


def test_labels_of_no_weight_teach_nothing(device, gradients_of):
    weights = torch.zeros(11, device=device)
    ours = called(linear_cross_entropy, {"class_weights": weights})
    for x in gradients_of(ours, case(9, 4, 11, torch.float32, device=device)):
        assert not x.any()


@pytest.mark.parametrize("capacity", [None, 40])
def test_another_label_may_be_the_ignored_one(device, capacity):
    hidden, weight, bias, labels = case(40, 4, 5, torch.float32, ignored=0.0, device=device)
    got = linear_cross_entropy(hidden, weight, labels, bias, ignore_index=3, capacity=capacity)
    want = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@every_reduction
def test_more_labels_than_were_said_make_no_number(device, gradients_of, reduction):
    arrays = case(40, 4, 5, torch.float32, device=device)
    count = int((arrays[3] != -100).sum())
    fits, crowded = (
        gradients_of(called(linear_cross_entropy, {"capacity": n, "reduction": reduction}), arrays)
        for n in (count, count - 1)
    )
    assert all(x.isfinite().all() for x in fits)
    assert all(x.isnan().any() for x in crowded)
    assert crowded[0].sum().isnan()


@pytest.mark.parametrize(("capacity", "label"), [(None, 11), (8, -1), (20, 2**40)])
def test_a_label_of_no_class_makes_no_number_where_it_cannot_be_asked(
    device, gradients_of, monkeypatch, capacity, label
):
    monkeypatch.setattr(module, "check_labels", lambda *_: None)
    hidden, weight, bias, labels = case(9, 4, 11, torch.float32, device=device)
    labels[4] = label
    for reduction in ("mean", "none"):
        options = complete(OPTIONS["all"], 11, device) | {"capacity": capacity, "reduction": reduction}
        for x in gradients_of(called(linear_cross_entropy, options), (hidden, weight, bias, labels)):
            assert x.isnan().any()


@pytest.mark.parametrize("frozen", range(3))
@pytest.mark.parametrize(("capacity", "reduction"), [(None, "mean"), (8, "none"), (12, "mean")])
def test_what_is_frozen_gets_no_gradient(device, gradients_of, frozen, reduction, capacity):
    parts = [*case(12, 4, 30, torch.float32, device=device)]
    parts[frozen].requires_grad_(False)
    options = {"reduction": reduction}
    ours = gradients_of(called(linear_cross_entropy, options | {"capacity": capacity}), parts)
    theirs = gradients_of(called(linear_cross_entropy_reference, options), parts)
    assert len(ours) == 3
    same(ours, theirs, 1e-5)


@pytest.mark.parametrize("capacity", [None, 30])
def test_arrays_may_have_gaps_in_memory(device, gradients_of, capacity):
    hidden, weight, bias, labels = case(60, 8, 22, torch.float32, ignored=0.6, device=device)
    pieces = (hidden.T[:4].T[::2], weight.T[4:].T[::2], bias[::2], (labels // 2)[::2])
    arrays = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in pieces)
    assert not any(x.is_contiguous() for x in arrays)
    arrays[3][arrays[3] < 0] = -100
    ours, theirs = (
        gradients_of(called(f, o), arrays)
        for f, o in ((linear_cross_entropy, {"capacity": capacity}), (linear_cross_entropy_reference, {}))
    )
    same(ours, theirs, 1e-5)


def test_the_gradient_of_a_weight_that_is_also_an_embedding_adds():
    _, weight, bias, labels = case(20, 6, 15, ignored=0.2)
    ids = torch.arange(20) % 15

    def loss(f):
        return torch.autograd.grad(f(F.embedding(ids, weight).tanh(), weight, labels, bias), weight)[0]

    same([loss(linear_cross_entropy)], [loss(linear_cross_entropy_reference)])


def test_far_logits_neither_overflow_nor_vanish(device):
    hidden, weight = (torch.tensor(x, device=device) for x in ([[1.0], [1.0]], [[1e4], [-1e4], [0.0]]))
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0], device=device), reduction="none")
    assert loss.tolist() == [2e4, 0.0]


@pytest.mark.parametrize("capacity", [None, 30, 33])
def test_a_loss_may_be_scaled_for_float16(device, gradients_of, capacity):
    """As torch's GradScaler does it, by more than float16 can hold."""
    arrays = case(33, 16, 11, torch.float16, device=device)
    ours = called(linear_cross_entropy, {"capacity": capacity})
    once, *plain = gradients_of(ours, arrays)
    _, *scaled = gradients_of(lambda *arrays: 65_536 * ours(*arrays), arrays)
    assert once.isfinite()
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a.float(), 65_536 * b.float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("capacity", [None, 300, 200])
def test_sums_past_the_range_of_float16_have_a_mean(device, gradients_of, capacity):
    hidden = torch.full((300, 3), 2_000.0, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.zeros(2, 3, dtype=torch.float16, device=device, requires_grad=True)
    labels = torch.zeros(300, dtype=torch.int64, device=device)
    labels[200:] = -100
    found = gradients_of(lambda h, w: linear_cross_entropy(h, w, labels, capacity=capacity), (hidden, weight))
    torch.testing.assert_close(found[2].cpu(), torch.tensor([[-1_000.0], [1_000.0]]).half().expand(2, 3))


@pytest.mark.parametrize("capacity", [None, 70])
def test_autocast_rounds_products_only(device, as_exact_as_torch, gradients_of, capacity):
    options = {"capacity": capacity}

    def under_autocast(f, options):
        def call(*arrays):
            if arrays[0].dtype == torch.float64:
                return called(f, options)(*arrays)
            with torch.autocast(device.type, torch.bfloat16):
                return called(f, options)(*arrays)

        return call

    draw = partial(case, 70, 32, 50, torch.float32, 0.4, device=device)
    ours = under_autocast(linear_cross_entropy, options)
    as_exact_as_torch(ours, under_autocast(linear_cross_entropy_reference, {}), draw, seeds=2)
    arrays = draw(0)
    rounded, plain = gradients_of(ours, arrays), gradients_of(called(linear_cross_entropy, options), arrays)
    assert [x.dtype for x in rounded] == [torch.float32] * 4
    assert (rounded[1] - plain[1]).norm() > 1e-4 * plain[1].norm()  # or autocast was not heard


@every_way
def test_no_device_waits(device, without_waiting, capacity, reduction):
    hidden, weight, bias, labels = case(12, 8, 41, torch.float32, device=device)
    options = complete(OPTIONS["all"], 41, device) | {"capacity": capacity, "reduction": reduction}
    f = called(linear_cross_entropy, options)
    torch.autograd.grad(f(hidden, weight, bias, labels).sum(), (hidden, weight, bias))  # compiles the kernels
    with without_waiting():
        torch.autograd.grad(f(hidden, weight, bias, labels).sum(), (hidden, weight, bias))


@every_option
def test_the_logits_are_never_whole(monkeypatch, options):
    monkeypatch.setattr(shared, "ROWS", 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    hidden, weight, bias, labels = (x.detach() for x in case(100, 4, 1000, ignored=0.0))
    weights = complete(options, 1000).get("class_weights")
    numbers = [options.get("label_smoothing", 0.0), options.get("z_loss", 0.0), options.get("softcap", 0.0), 1.0]
    arrays, rest = (hidden, weight, bias, labels, weights), (-100, numbers, torch.float64, None, "")
    with Watch():
        module.rows_in_chunks(*arrays, *rest)
        module.sum_in_chunks(*arrays, torch.ones(100).double(), *rest, [True] * 3)
    assert max(sizes) == 8 * 1000


def test_without_gradients_none_are_computed(monkeypatch):
    monkeypatch.setattr(module, "_accumulate", None)
    hidden, weight, bias, labels = case(9, 4, 11)
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels, bias)
    same([got], [linear_cross_entropy_reference(hidden, weight, labels, bias).detach()])


@every_option
def test_it_needs_no_values(options):
    hidden, weight, bias = (torch.empty(s, device="meta", requires_grad=True) for s in ((9, 4), (11, 4), (11,)))
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    for reduction in ("mean", "sum", "none"):
        more = complete(options, 11, "meta")
        loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, **more)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert [g.shape for g in grads] == [x.shape for x in (hidden, weight, bias)]


@pytest.mark.parametrize(("biased", "weighted", "capacity"), [(True, False, None), (False, True, 3), (True, True, 4)])
def test_the_ops_are_well_formed(device, biased, weighted, capacity):
    hidden, weight, bias, labels = case(4, 3, 5, torch.float32, device=device)
    class_weights = torch.linspace(0, 1, 5, device=device) if weighted else None
    arrays = (hidden, weight, bias if biased else None, labels, class_weights)
    rest = (-100, [0.1, 0.0, 2.0, 1.0], torch.float32, capacity, "")
    torch.library.opcheck(torch.ops.selfsup.linear_cross_entropy, (*arrays, *rest))
    for factor in (torch.linspace(0, 1, 4), torch.tensor(0.5)):
        given = (*arrays, factor.to(device), *rest, [True, True, biased])
        torch.library.opcheck(torch.ops.selfsup.linear_cross_entropy_sum, given)


@pytest.mark.parametrize(("capacity", "reduction"), [(None, "mean"), (7, "none")])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(device, gradients_of, capacity, reduction):
    torch._dynamo.reset()
    options = complete(OPTIONS["all"], 13, device) | {"capacity": capacity, "reduction": reduction}
    f = called(linear_cross_entropy, options)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6, 4, 7, 5):
        arrays = case(rows, 4, 13, torch.float32, device=device, ignored=0.5)
        same(gradients_of(compiled, arrays), gradients_of(f, arrays), 1e-6)


def test_what_does_not_fit_is_named():
    hidden, weight, bias, labels = case(9, 4, 11)
    bad = partial(pytest.raises, ContractError)
    with bad(match=r"\[9, 4\], \[11, 3\], \[9\]"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with bad(match=r"at least one class and one feature, and weight is \[0, 4\]"):
        linear_cross_entropy(hidden, weight[:0], labels)
    with bad(match=r"bias must be \[V\] = \[11\], and is \[4\]"):
        linear_cross_entropy(hidden, weight, labels, bias[:4])
    with bad(match="no reduction 'avg'"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")
    with bad(match="labels must be int64, and are torch.int32"):
        linear_cross_entropy(hidden, weight, labels.int())
    with bad(match="of floating point, and are torch.int64"):
        linear_cross_entropy(hidden.long(), weight, labels)
    with bad(match=r"class_weights must be \[V\] = \[11\] on cpu, and are \[9\] on cpu"):
        linear_cross_entropy(hidden, weight, labels, class_weights=torch.ones(9))
    with bad(match="capacity must be at least 1, or None, and is 0"):
        linear_cross_entropy(hidden, weight, labels, capacity=0)
    with bad(match="on one device, and are on cpu and meta"):
        linear_cross_entropy(hidden, weight.to("meta"), labels)
    with bad(match="labels are on meta, and the rest is on cpu"):
        linear_cross_entropy(hidden, weight, labels.to("meta"))
    for name, value in (("label_smoothing", 1.5), ("z_loss", -1.0), ("softcap", 0.0), ("scale", float("nan"))):
        with bad(match=f"{name} must be"):
            linear_cross_entropy(hidden, weight, labels, **{name: value})


def test_labels_of_no_class_are_named():
    hidden, weight, bias, labels = case(9, 4, 11)
    for label in (11, -1):
        with pytest.raises(ContractError, match=r"from 0 to 10, the last class, or -100; they are from"):
            linear_cross_entropy(hidden, weight, torch.where(labels == -100, label, labels), bias)


KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [768, 16])
def test_the_products_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, width):
    from selfsup.triton_ops import linear_cross_entropy_kernels as kernels

    sizes = {"H": width, "V": 30_522, "STRIDE": 30_528}
    flags = {"BIASED": True, "BIAS": True, "WEIGHT": True, "FIRST": False, "LAST": True, "SCALED": True}
    for kernel in (kernels.logits_kernel, kernels.hidden_kernel, kernels.head_kernel):
        pointers = {name: f"*{kind}" for name in kernel.arg_names if name.endswith("_ptr")}
        pointers |= {"count_ptr": "*i64", "last_ptr": "*fp32", "acc_ptr": "*fp32", "acc_bias_ptr": "*fp32"}
        pointers |= {"first": "i32", "size": "i32"} | ({"out_ptr": "*fp32"} if kernel is kernels.hidden_kernel else {})
        signature = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        given = {name: value for name, value in (sizes | flags).items() if name in kernel.arg_names}
        options = kernels.product_options(KINDS[kind], head=kernel is kernels.head_kernel)
        for precision in ("ieee", "tf32") if kind == "fp32" and compile_ahead.backend == "cuda" else ("ieee",):
            assert_fits(compile_ahead(kernel, signature, **given, **options, PRECISION=precision))


def test_the_sum_of_parts_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits):
    from selfsup.triton_ops import linear_cross_entropy_kernels as kernels

    pointers = {"partial_ptr": "*fp32", "place_ptr": "*i64", "count_ptr": "*i64", "last_ptr": "*fp32"}
    sizes = {"first": "i32", "size": "i32", "parts": "i32"}
    for kind in ("*bf16", "*fp32"):
        signature = {**pointers, "out_ptr": kind, **sizes}
        assert_fits(compile_ahead(kernels.scatter_kernel, signature, H=768, WIDTH=765, SCALED=True, BH=1024))


def test_what_is_too_small_for_float16_waits_for_the_factor_of_the_loss(device, as_exact_as_torch):
    """The mean over many rows makes gradients that float16 cannot hold, until a scaler multiplies them."""

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        hidden, weight = (torch.randn(n, 16, generator=g).half().to(device) for n in (512, 40))
        labels = torch.randint(40, (512,), generator=g).to(device)
        return [hidden.requires_grad_(), weight.requires_grad_(), labels]

    def scaled(f):
        return lambda hidden, weight, labels: 2.0**14 * f(hidden, weight, labels)

    as_exact_as_torch(scaled(linear_cross_entropy), scaled(linear_cross_entropy_reference), draw, seeds=2)


def test_class_weights_may_have_gaps_in_memory(device):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g).to(device) for n in (9, 5))
    labels, weights = torch.arange(9, device=device) % 5, torch.rand(10, generator=g).to(device)[::2]
    got = linear_cross_entropy(hidden, weight, labels, class_weights=weights)
    torch.testing.assert_close(got, linear_cross_entropy(hidden, weight, labels, class_weights=weights.clone()))
