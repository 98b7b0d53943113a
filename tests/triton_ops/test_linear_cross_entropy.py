"""linear_cross_entropy: equal to the reference, in every type and shape, without the logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import linear_cross_entropy as module
from selfsup.triton_ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SHAPES = [(1, 1, 1), (7, 5, 3), (33, 16, 1001), (70, 8, 257)]
NAMES = ("hidden", "weight", "bias")


def case(rows, width, classes, dtype=torch.float64, ignored=0.4, seed=0):
    """(hidden, weight, bias, labels), the first three with gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    labels = torch.randint(classes, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    return hidden, weight, bias, labels


def gradients(f, hidden, weight, bias, labels, **options):
    """The loss, and its gradients, of a scalar that weighs each row differently where nothing is reduced."""
    loss = f(hidden, weight, labels, bias, **options)
    given = [x for x in (hidden, weight, bias) if x is not None]
    scalar = loss if loss.dim() == 0 else loss @ torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
    return [loss, *torch.autograd.grad(3 * scalar, given)]


@pytest.fixture(params=[256, 3])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(module, "ROWS", request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_loss_and_gradients_equal_the_reference(rows_at_once, shape, reduction, biased, ignored):
    hidden, weight, bias, labels = case(*shape, ignored=ignored)
    bias = bias if biased else None
    got = gradients(linear_cross_entropy, hidden, weight, bias, labels, reduction=reduction)
    want = gradients(linear_cross_entropy_reference, hidden, weight, bias, labels, reduction=reduction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_are_ignored_are_computed_where_leaving_them_out_would_make_a_device_wait(monkeypatch, reduction):
    hidden, weight, bias, labels = case(33, 16, 101)
    want = gradients(linear_cross_entropy, hidden, weight, bias, labels, reduction=reduction)
    monkeypatch.setattr(module, "_kept", lambda *_: None)
    got = gradients(linear_cross_entropy, hidden, weight, bias, labels, reduction=reduction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_labels_cost_nothing_and_teach_nothing():
    hidden, weight, bias, labels = case(9, 4, 11, ignored=1.0)
    for x in gradients(linear_cross_entropy, hidden, weight, bias, labels):
        assert not x.any()


def test_another_label_may_be_the_ignored_one():
    hidden, weight, bias, labels = case(40, 4, 5, ignored=0.0)
    got = linear_cross_entropy(hidden, weight, labels, bias, ignore_index=3)
    want = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient(frozen):
    parts = [*case(12, 4, 30)]
    want = gradients(linear_cross_entropy_reference, *parts)[1:]
    parts[frozen].requires_grad_(False)
    linear_cross_entropy(parts[0], parts[1], parts[3], parts[2]).backward()
    assert parts[frozen].grad is None
    for index, x in enumerate(parts[:3]):
        if index != frozen:
            torch.testing.assert_close(3 * x.grad, want[index], rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_weight_that_is_also_an_embedding_adds():
    _, weight, bias, labels = case(20, 6, 15, ignored=0.2)
    ids = torch.arange(20) % 15

    def loss(f):
        return torch.autograd.grad(f(F.embedding(ids, weight).tanh(), weight, labels, bias), weight)[0]

    torch.testing.assert_close(loss(linear_cross_entropy), loss(linear_cross_entropy_reference), rtol=1e-12, atol=1e-12)


def test_far_logits_neither_overflow_nor_vanish():
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[1e4], [-1e4], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), reduction="none")
    assert loss.tolist() == [2e4, 0.0]


ROUNDING = torch.finfo(torch.float32).eps  # by luck, torch's error of a single number may be none


def error(got, true):
    return float((got.detach().double() - true.detach()).norm() / true.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_no_worse_than_torchs(dtype, reduction):
    parts = case(300, 64, 999, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in parts[:3]]
    true = gradients(linear_cross_entropy_reference, *exact, parts[3], reduction=reduction)
    ours, theirs = (
        gradients(f, *parts, reduction=reduction) for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert error(a, c) <= 2 * error(b, c) + ROUNDING


def test_autocast_rounds_products_only():
    parts = case(300, 64, 999, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in parts[:3]]
    true = gradients(linear_cross_entropy_reference, *exact, parts[3])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (gradients(f, *parts) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert [x.dtype for x in ours] == [torch.float32] * 4
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert error(a, c) <= 2 * error(b, c) + ROUNDING
    assert error(ours[1], true[1]) > 1e-4  # or autocast was not heard


def test_the_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    hidden, weight, bias, labels = (x.detach() for x in case(100, 4, 1000, ignored=0.0))
    arrays = (hidden, weight, bias, labels)
    with Watch():
        module.rows_in_chunks(*arrays, -100, torch.float64)
        module.sum_in_chunks(*arrays, torch.ones(100).double(), -100, torch.float64, [True] * 3)
    assert max(sizes) == 8 * 1000


def test_without_gradients_none_are_computed(monkeypatch):
    monkeypatch.setattr(module, "_accumulate", None)
    hidden, weight, bias, labels = case(9, 4, 11)
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels, bias)
    want = linear_cross_entropy_reference(hidden, weight, labels, bias)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)


def test_it_needs_no_values():
    hidden, weight, bias = (torch.empty(s, device="meta", requires_grad=True) for s in ((9, 4), (11, 4), (11,)))
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert [g.shape for g in grads] == [x.shape for x in (hidden, weight, bias)]


@pytest.mark.parametrize("biased", [True, False])
def test_the_ops_are_well_formed(biased):
    hidden, weight, bias, labels = case(9, 4, 11)
    arrays = (hidden, weight, bias if biased else None, labels)
    torch.library.opcheck(torch.ops.selfsup.linear_cross_entropy, (*arrays, -100, torch.float64))
    scale = torch.linspace(0, 1, 9, dtype=torch.float64)
    wanted = [True, True, biased]
    torch.library.opcheck(torch.ops.selfsup.linear_cross_entropy_sum, (*arrays, scale, -100, torch.float64, wanted))


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, bias, labels = case(9, 4, 11)
    with pytest.raises(ContractError, match=r"\[9, 4\], \[11, 3\], \[9\]"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ContractError, match=r"bias must be \[V\] = \[11\], and is \[4\]"):
        linear_cross_entropy(hidden, weight, labels, bias[:4])
    with pytest.raises(ContractError, match="no reduction 'avg'"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")
