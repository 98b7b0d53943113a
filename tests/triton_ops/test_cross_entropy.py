"""cross_entropy: equal to the reference and to torch, in every type and shape and with every option."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.cross_entropy import cross_entropy, cross_entropy_reference

module = import_module("selfsup.triton_ops.cross_entropy")  # the package has the function under this name

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 3), (33, 1001), (70, 257)]
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


def case(rows, classes, dtype=torch.float64, ignored=0.4, seed=0, device=CPU, size=2.0):
    """(logits with a gradient, labels)."""
    g = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(rows, classes, generator=g, dtype=torch.float64)).to(device, dtype).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    return logits, labels.to(device)


def complete(options, classes, device=CPU):
    """The options, with class weights in the place of True."""
    if options.get("class_weights", False) is not True:
        return options
    weights = 0.1 + torch.rand(classes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return options | {"class_weights": weights.to(device)}


def same(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows_at_once", [256, 3])
@pytest.mark.parametrize("shape", SHAPES)
@every_option
@every_reduction
def test_loss_and_gradient_equal_the_reference(gradients_of, monkeypatch, rows_at_once, shape, options, reduction):
    monkeypatch.setattr(module, "AT_ONCE", rows_at_once * shape[1])
    options = complete(options, shape[1]) | {"reduction": reduction}
    for ignored in (0.0, 0.4, 1.0):
        arrays = case(*shape, ignored=ignored)
        same(*(gradients_of(partial(f, **options), arrays) for f in (cross_entropy, cross_entropy_reference)))


@every_option
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_option_is_as_exact_as_torch(device, as_exact_as_torch, options, reduction):
    options = complete(options, 150, device) | {"reduction": reduction}
    ours, theirs = (partial(f, **options) for f in (cross_entropy, cross_entropy_reference))
    as_exact_as_torch(ours, theirs, lambda seed: case(9, 150, torch.float32, seed=seed, device=device), seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 127), (4, 129), (3, 8193)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_ragged_shapes_are_as_exact_as_torch(device, as_exact_as_torch, dtype, shape, softcap):
    ours, theirs = (partial(f, softcap=softcap) for f in (cross_entropy, cross_entropy_reference))
    as_exact_as_torch(ours, theirs, lambda seed: case(*shape, dtype, seed=seed, device=device), seeds=3)


@pytest.mark.parametrize("cap", [0.01, 1.0, 50.0, 1e4])
def test_a_cap_is_exact_near_it_and_far_below_it(device, as_exact_as_torch, cap):
    ours, theirs = (partial(f, softcap=cap, reduction="none") for f in (cross_entropy, cross_entropy_reference))
    as_exact_as_torch(ours, theirs, lambda seed: case(6, 50, torch.float32, seed=seed, device=device), seeds=2)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(list(OPTIONS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(0, 1000),
)
def test_any_case_equals_the_reference(shape, ignored, name, reduction, seed):
    logits, labels = case(*shape, ignored=ignored, seed=seed)
    options = complete(OPTIONS[name], shape[1]) | {"reduction": reduction}
    ours, theirs = (f(logits, labels, **options) for f in (cross_entropy, cross_entropy_reference))
    same([ours], [theirs])
    same(*(torch.autograd.grad(loss.sum(), logits) for loss in (ours, theirs)))


@pytest.mark.parametrize(("weighted", "smoothing"), [(True, 0.2), (False, 0.2), (True, 0.0), (False, 1.0)])
@every_reduction
def test_it_is_what_torch_computes(device, gradients_of, weighted, smoothing, reduction):
    weights = complete({"class_weights": True}, 41)["class_weights"].to(device, torch.float32) if weighted else None
    theirs = partial(F.cross_entropy, weight=weights, label_smoothing=smoothing, reduction=reduction)
    ours = partial(cross_entropy, class_weights=weights, label_smoothing=smoothing, reduction=reduction)
    arrays = case(9, 41, torch.float32, device=device)
    same(gradients_of(ours, arrays), gradients_of(theirs, arrays), 1e-5)


@every_reduction
def test_no_labels_cost_nothing_and_teach_nothing(device, gradients_of, reduction):
    ours = partial(cross_entropy, reduction=reduction, z_loss=0.1, label_smoothing=0.1)
    for x in gradients_of(ours, case(9, 11, torch.float32, ignored=1.0, device=device)):
        assert not x.any()
    logits, labels = case(9, 11, torch.float32, device=device)
    for x in gradients_of(ours, (logits[:0].detach().requires_grad_(), labels[:0])):
        assert not x.any()


def test_another_label_may_be_the_ignored_one(device):
    logits, labels = case(40, 5, torch.float32, ignored=0.0, device=device)
    want = F.cross_entropy(logits, labels, ignore_index=3)
    torch.testing.assert_close(cross_entropy(logits, labels, ignore_index=3), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [11, -1, 2**40])
def test_a_label_of_no_class_makes_no_number_where_it_cannot_be_asked(device, gradients_of, monkeypatch, label):
    monkeypatch.setattr(module, "check_labels", lambda *_: None)
    logits, labels = case(9, 11, torch.float32, device=device)
    labels[4] = label
    for reduction in ("mean", "none"):
        options = complete(OPTIONS["all"], 11, device) | {"reduction": reduction}
        for x in gradients_of(partial(cross_entropy, **options), (logits, labels)):
            assert x.isnan().any()


def test_far_logits_neither_overflow_nor_vanish(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e38, -1e38, 0.0]], device=device)
    loss = cross_entropy(logits, torch.tensor([1, 0, 0], device=device), reduction="none")
    assert loss.tolist() == [2e4, 0.0, 0.0]


def test_classes_may_be_ruled_out(device, gradients_of):
    logits, labels = case(20, 9, torch.float32, device=device)
    labels = torch.where(labels > 5, 2, labels)
    masked = logits.detach().index_fill(1, torch.tensor([6, 8], device=device), -torch.inf).requires_grad_()
    same(*(gradients_of(f, (masked, labels)) for f in (cross_entropy, cross_entropy_reference)), 1e-5)


def test_a_number_that_is_none_makes_the_loss_none(device):
    logits, labels = case(9, 300, torch.float32, ignored=0.0, device=device)
    logits = logits.detach()
    logits[3, 150] = torch.nan
    assert cross_entropy(logits, labels, reduction="none").isnan().tolist() == [i == 3 for i in range(9)]


def test_logits_may_have_gaps_in_memory(device, gradients_of):
    logits, labels = case(10, 31, torch.float32, device=device)
    for view in (
        lambda x: x[::2, :20],
        lambda x: x[:, ::3],
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(9, 31),
    ):
        x = view(logits.detach()).requires_grad_()
        y = labels[: len(x)] % x.shape[1]
        same(*(gradients_of(f, (x, y)) for f in (cross_entropy, cross_entropy_reference)), 1e-5)


def test_rows_may_be_far_apart(device, gradients_of, tmp_path):
    """Their offsets do not fit 32 bits; on a CPU the memory between them is a file's that has nothing in it."""
    apart, classes = 2**31 + 16, 50
    if device.type == "cuda":
        memory = torch.empty(apart + classes, dtype=torch.float16, device=device)
    else:
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + classes, dtype=torch.float16)
    far = memory.as_strided((2, classes), (apart, 1))
    near, labels = case(2, classes, torch.float16, ignored=0.0, device=device)
    far.copy_(near.detach())
    same(*(gradients_of(cross_entropy, (x.requires_grad_(), labels)) for x in (far, near)), 0)


def test_no_device_waits(device, without_waiting):
    logits, labels = case(9, 41, torch.float32, device=device)
    options = complete(OPTIONS["all"], 41, device)
    torch.autograd.grad(cross_entropy(logits, labels, **options), logits)  # compiles the kernels
    with without_waiting():
        torch.autograd.grad(cross_entropy(logits, labels, **options), logits)


def test_low_precision_logits_are_never_whole_in_float32(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 8 * 1000 // torch.get_num_threads())
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            found = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
            sizes.extend(x.numel() for x in found if x.dtype == torch.float32)
            return out

    logits, labels = case(100, 1000, torch.bfloat16)
    arrays, rest = (logits.detach(), labels, None), (-100, [0.1, 0.0, 2.0, 1.0], "")
    with Watch():
        _, kept = module.losses_in_chunks(*arrays, *rest)
        module.gradient_in_chunks(*arrays, kept, torch.ones(100), *rest)
    assert max(sizes) == 8 * 1000


def test_it_needs_no_values():
    logits, labels = (x.detach().to("meta") for x in case(9, 11))
    logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(logits, labels, reduction=reduction, **complete(OPTIONS["all"], 11, "meta"))
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (9, 11)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_ops_are_well_formed(device, weighted):
    logits, labels = case(4, 5, torch.float32, device=device)
    arrays = (logits, labels, torch.linspace(0, 1, 5, device=device) if weighted else None)
    rest = (-100, [0.1, 0.0, 2.0, 1.0], "")
    torch.library.opcheck(torch.ops.selfsup.cross_entropy, (*arrays, *rest))
    with torch.no_grad():
        _, kept = torch.ops.selfsup.cross_entropy(*arrays, *rest)
    state = (kept, torch.linspace(0, 1, 4, device=device))
    given = (logits.detach(), *arrays[1:], *state, *rest)
    torch.library.opcheck(torch.ops.selfsup.cross_entropy_gradient, given)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(device, gradients_of):
    torch._dynamo.reset()
    f = partial(cross_entropy, **complete(OPTIONS["all"], 13, device))
    compiled = torch.compile(lambda *arrays: f(*arrays), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6, 4, 7, 5):
        arrays = case(rows, 13, torch.float32, device=device)
        same(gradients_of(compiled, arrays), gradients_of(f, arrays), 1e-6)


def test_under_autocast_it_stays_exact(device, gradients_of):
    arrays = case(9, 11, torch.float32, device=device)
    plain = gradients_of(cross_entropy, arrays)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients_of(cross_entropy, arrays), strict=True))


def test_what_does_not_fit_is_named():
    logits, labels = case(9, 11)
    bad = partial(pytest.raises, ContractError)
    with bad(match=r"\[T, V\] and \[T\], and are \[9, 11\] and \[8\]"):
        cross_entropy(logits, labels[:8])
    with bad(match=r"\[T, V\] and \[T\], and are \[9, 0\] and \[9\]"):
        cross_entropy(logits[:, :0], labels)
    with bad(match="no reduction 'avg'"):
        cross_entropy(logits, labels, reduction="avg")
    with bad(match="labels must be int64, and are torch.int32"):
        cross_entropy(logits, labels.int())
    with bad(match="of floating point, and are torch.int64"):
        cross_entropy(logits.long(), labels)
    with bad(match=r"class_weights must be \[V\] = \[11\] on cpu, and are \[9\] on cpu"):
        cross_entropy(logits, labels, class_weights=torch.ones(9))
    with bad(match=r"from 0 to 10, the last class, or -100; they are from 3 to 11"):
        cross_entropy(logits, torch.arange(9) + 3)


def test_labelled_rows_are_listed_first_and_in_order(device):
    if not can_launch(torch.empty(0, device=device)):
        pytest.skip("Triton runs on a GPU, or in its interpreter")
    from selfsup.triton_ops.cross_entropy_kernels import packed

    for rows in (1, 1023, 1024, 1025, 5000):
        _, labels = case(rows, 7, ignored=0.7, seed=rows)
        place, count = packed(labels.to(device), -100)
        want = torch.cat([(labels != -100).nonzero()[:, 0], (labels == -100).nonzero()[:, 0]])
        assert torch.equal(place.cpu(), want)
        assert count.tolist() == [int((labels != -100).sum())]


NUMBERS = ["smoothing", "even", "z_loss", "softcap", "scale"]


@pytest.mark.parametrize(
    ("way", "plain", "classes", "kind"),
    [(way, False, 50_257, kind) for way in ("losses", "gradient", "both") for kind in ("fp32", "bf16")]
    + [("both", True, 30_522, "fp16"), ("gradient", True, 8, "fp32"), ("both", False, 300, "bf16")],
)
def test_the_kernel_of_rows_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, way, plain, classes):
    from selfsup.triton_ops import cross_entropy_kernels as kernels

    names = kernels._rows_kernel.arg_names
    signature = {name: "*fp32" for name in names if name.endswith("_ptr")}
    signature |= dict.fromkeys(("labels_ptr", "place_ptr", "count_ptr"), "*i64")
    signature |= {"x_ptr": f"*{kind}", "out_ptr": f"*{kind}"} | dict.fromkeys(NUMBERS, "fp32")
    signature |= {name: "i32" for name in names if name not in signature and name.islower()}
    flags = {
        "MEASURE": way != "gradient",
        "KEEP": way == "losses",
        "GRADIENT": way != "losses",
        "EACH": way == "gradient",
    }
    flags |= {"PACKED": way == "both", "FILL": True} | dict.fromkeys(("WEIGHTED", "SMOOTHED", "CAPPED"), not plain)
    assert_fits(compile_ahead(kernels._rows_kernel, signature, V=classes, **flags, **kernels._row_options(classes)))


def test_the_kernels_that_list_rows_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits):
    from selfsup.triton_ops import cross_entropy_kernels as kernels

    for kernel in (kernels._count_kernel, kernels._pack_kernel):
        signature = {name: "*i64" if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name != "BLOCK"}
        assert_fits(compile_ahead(kernel, signature, BLOCK=kernels.BLOCK))
