"""Contrastive losses by tiles: equal to their references, in every type and shape, without the matrix.

Run as a program under Triton's interpreter, this file holds the kernels to the same: see test_contrast_kernels.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import contrast_tiles as module
from selfsup.triton_ops.contrast import contrast, contrast_reference
from selfsup.triton_ops.contrast_clip import clip_loss, clip_loss_reference
from selfsup.triton_ops.contrast_info_nce import info_nce, info_nce_reference
from selfsup.triton_ops.contrast_nt_xent import nt_xent, nt_xent_reference
from selfsup.triton_ops.contrast_sigmoid import sigmoid_loss, sigmoid_loss_reference

SHAPES = [(1, 1), (2, 5), (17, 3), (31, 20), (64, 7), (65, 16)]


def unit(count, width, seed, dtype=torch.float64):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype).requires_grad_()


def number(value, dtype):
    return torch.tensor([value], dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)


def of_pairs(count, width, seed, dtype, scale):
    return unit(count, width, seed, dtype), unit(count, width, seed + 100, dtype), number(scale, dtype)


def of_views(count, width, seed, dtype, scale):
    a, b, _ = of_pairs(count, width, seed, dtype, scale)
    return a, b, 1 / number(scale, dtype).detach()


def of_a_process(count, width, seed, dtype, scale):
    """Rows among the keys of others, with samples that occur more than once."""
    rows, partners, temperature = of_views(count, width, seed, dtype, scale)
    keys = unit(2 * count + 1, width, seed + 200, dtype)
    return rows, partners, keys, torch.arange(count) % 5, torch.arange(2 * count + 1) % 7, temperature


def of_keys(count, width, seed, dtype, scale):
    queries, _, temperature = of_views(count, width, seed, dtype, scale)
    labels = torch.arange(count) * 2 + 1
    return queries, unit(2 * count + 1, width, seed + 200, dtype), labels, temperature


def of_a_queue(count, width, seed, dtype, scale):
    queries, keys, temperature = of_views(count, width, seed, dtype, scale)
    return queries, keys, unit(3 * count, width, seed + 200, dtype), temperature


def with_queue(f, queries, keys, queue, temperature):
    return f(queries, keys, queue=queue, temperature=temperature)


def with_temperature(f, *arrays, **options):
    return f(*arrays[:-1], temperature=arrays[-1], **options)


def only_losses(f, *arrays):
    return with_temperature(f, *arrays)[0]


CASES = {  # (the arrays of a case, how each is called, the op, its reference)
    "contrast": (of_a_process, only_losses, contrast, contrast_reference),
    "nt_xent": (of_views, with_temperature, nt_xent, nt_xent_reference),
    "clip_loss": (of_pairs, lambda f, *arrays: f(*arrays), clip_loss, clip_loss_reference),
    "sigmoid_loss": (
        lambda count, width, seed, dtype, scale: (*of_pairs(count, width, seed, dtype, scale), number(-5.0, dtype)),
        lambda f, *arrays: f(*arrays),
        sigmoid_loss,
        sigmoid_loss_reference,
    ),
    "info_nce": (of_keys, with_temperature, info_nce, info_nce_reference),
    "info_nce of rows": (of_keys, partial(with_temperature, reduction="none"), info_nce, info_nce_reference),
    "info_nce with a queue": (of_a_queue, with_queue, info_nce, info_nce_reference),
}
every_case = pytest.mark.parametrize("name", CASES)


def prepared(name, count, width, seed=0, dtype=torch.float64, scale=14.0):
    """(arrays, op, reference), the latter two of the arrays alone."""
    arrays, call, op, reference = CASES[name]
    return arrays(count, width, seed, dtype, scale), partial(call, op), partial(call, reference)


def values(f, arrays):
    """The loss and its gradients, for a scalar that weighs each row differently where nothing is reduced."""
    loss = f(*arrays)
    scalar = loss if loss.dim() == 0 else loss @ torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
    given = [x for x in arrays if x.requires_grad]
    return [x.detach() for x in (loss, *torch.autograd.grad(3 * scalar, given))]


def exact(arrays):
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arrays]


def distance(got, true):
    return float((got.double() - true).norm()), float(true.norm())


ROUNDING = torch.finfo(torch.float32).eps  # by luck, torch's error of a single number may be none


def hold_to_torchs_error(name, count, width, dtype, scale, slack=ROUNDING, seeds=6):
    """The relative error of the loss and each gradient, over several draws, is at most twice torch's."""
    sums = {}
    for seed in range(seeds):
        arrays, op, reference = prepared(name, count, width, seed, dtype, scale)
        true = values(reference, exact(arrays))
        for who, f in (("ours", op), ("torch's", reference)):
            for index, (got, want) in enumerate(zip(values(f, arrays), true, strict=True)):
                assert got.isfinite().all(), (name, who, index)
                off, size = distance(got, want)
                sums[who, index] = sums.get((who, index), 0.0) + off**2
                sums["size", index] = sums.get(("size", index), 0.0) + size**2
    for index in range(len(true)):
        ours, theirs, size = (sums[who, index] ** 0.5 for who in ("ours", "torch's", "size"))
        assert ours <= 2 * theirs + slack * size, (name, count, width, dtype, scale, index, ours / size, theirs / size)


@pytest.fixture(params=[(512, 1024), (5, 7)])
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", request.param)


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_reference(tiles, name, shape):
    arrays, op, reference = prepared(name, *shape)
    for got, want in zip(values(op, arrays), values(reference, arrays), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_low_precision_is_no_worse_than_torchs(name, dtype, scale):
    hold_to_torchs_error(name, 70, 40, dtype, scale)


@every_case
def test_far_similarities_neither_overflow_nor_vanish(tiles, name):
    arrays, op, reference = prepared(name, 23, 2, dtype=torch.float32, scale=1e4)
    true = values(reference, exact(arrays))
    for got, want in zip(values(op, arrays), true, strict=True):
        assert got.isfinite().all()
        # A similarity of 1e4 is rounded by 1e4 * 2**-24, and so, relative to itself, is every exponential.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e4 * 2**-23 * float(want.norm() + 1))


@every_case
def test_autocast_is_heard(name):
    arrays, op, reference = prepared(name, 70, 40, dtype=torch.float32)
    true = values(reference, exact(arrays))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = values(op, arrays), values(reference, arrays)
    assert [x.dtype for x in ours] == [torch.float32] * len(ours)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert distance(a, c)[0] <= 2 * distance(b, c)[0] + 2**-8 * distance(a, c)[1]
    assert distance(ours[1], true[1])[0] > 1e-4 * float(true[1].norm())


@every_case
def test_it_needs_no_values(name):
    arrays, op, _ = prepared(name, 9, 4, dtype=torch.float32)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in arrays]
    loss = op(*meta)
    given = [x for x in meta if x.requires_grad]
    assert [g.shape for g in torch.autograd.grad(loss.sum(), given)] == [x.shape for x in given]


@every_case
@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(name):
    torch._dynamo.reset()
    compiled = torch.compile(prepared(name, 9, 4)[1], fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (9, 20, 33):
        arrays, op, _ = prepared(name, count, 4)
        for got, want in zip(values(compiled, arrays), values(op, arrays), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_case
def test_the_similarities_are_never_whole(monkeypatch, name):
    monkeypatch.setattr(module, "TILE", (8, 16))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    monkeypatch.setattr(torch.ops.selfsup, "contrast", module.sums_in_tiles)
    arrays, op, _ = prepared(name, 100, 3)
    with Watch(), torch.no_grad():
        op(*arrays)
        x = unit(100, 3, 0).detach()
        rows = torch.zeros(100, dtype=torch.float64)
        none, scale = rows[:0], torch.tensor(2.0, dtype=torch.float64)
        for y in (None, x):
            ids = torch.arange(100)
            state = (rows, rows, rows, none, none, none)
            module.gradients_in_tiles(x, y, scale, ids, ids, *state, [True, True, True])
    assert max(sizes) <= 300 * 3  # the vectors of a queue


@every_case
@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient(name, frozen):
    arrays, op, reference = prepared(name, 12, 4)
    learned = [x for x in arrays if x.requires_grad]
    if frozen >= len(learned):
        learned[0].requires_grad_(False)
    else:
        learned[frozen].requires_grad_(False)
    for got, want in zip(values(op, arrays), values(reference, arrays), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("alone", "columns"), [(True, False), (False, False), (False, True)])
def test_the_ops_are_well_formed(alone, columns, known):
    x, y = unit(9, 4, 0), None if alone else unit(11, 4, 1)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -2.0))
    ids = (torch.arange(9), None if alone else torch.arange(11)) if known else (None, None)
    torch.library.opcheck(torch.ops.selfsup.contrast.default, (x, y, scale, *ids, columns))
    with torch.no_grad():
        r, t, c, u = torch.ops.selfsup.contrast(x, y, scale, *ids, columns)
    state = (r, t, torch.ones_like(r), c, u, torch.ones_like(c))
    given = [z.detach() if isinstance(z, torch.Tensor) else z for z in (x, y, scale, *ids)]
    torch.library.opcheck(torch.ops.selfsup.contrast_gradients.default, (*given, *state, [True, not alone, True]))
    if not alone:
        torch.library.opcheck(torch.ops.selfsup.contrast_pairs.default, (x, y, scale, bias, *ids, [True] * 4))


def test_rows_that_are_the_keys_give_what_other_rows_would():
    rows, partners, ids = unit(20, 4, 0), unit(20, 4, 1), torch.arange(20) // 2
    copy = rows.detach().clone().requires_grad_()
    same, _ = contrast(rows, partners, rows, ids, ids, temperature=0.2)
    other, _ = contrast(rows, partners, copy, ids, ids, temperature=0.2)
    weights = torch.linspace(-1, 2, 20, dtype=torch.float64)
    torch.testing.assert_close(same, other, rtol=1e-12, atol=0)
    (whole,) = torch.autograd.grad(same @ weights, rows)
    torch.testing.assert_close(whole, sum(torch.autograd.grad(other @ weights, (rows, copy))), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kin", [True, False])
def test_a_partner_is_nearest_if_no_negative_is_nearer(tiles, kin):
    rows = torch.eye(4, dtype=torch.float64)
    partners = rows.clone()
    partners[0], partners[1] = torch.tensor([0.6, 0.8, 0, 0]), torch.tensor([0.0, 0.5, 0.5, 0])
    keys = torch.cat([0.6 * rows[:1], 0.55 * rows[1:2], rows[2:3]])  # as near, nearer, and the row itself
    ids = (torch.arange(4), torch.arange(3) + 10 * (not kin)) if kin else (None, None)
    _, nearest = contrast(rows, partners, keys, *ids, temperature=0.1)
    assert nearest.tolist() == ([True] * 4 if kin else [True, False, True, True])


def test_rows_without_negatives_have_no_loss_and_no_gradient():
    arrays = (unit(3, 4, 0), unit(3, 4, 1), unit(5, 4, 2))
    losses, nearest = contrast(*arrays, torch.zeros(3).long(), torch.zeros(5).long(), temperature=0.01)
    assert losses.tolist() == [0.0] * 3
    assert nearest.all()
    assert not any(g.any() for g in torch.autograd.grad(losses.sum(), arrays))


def test_a_number_that_is_none_makes_the_loss_none():
    rows = unit(5, 4, 0).detach()
    rows[3, 2] = torch.nan
    assert nt_xent(rows, unit(5, 4, 1), temperature=0.1).isnan()


def test_what_does_not_fit_is_named():
    x, y, ids = unit(5, 4, 0), unit(6, 4, 1), torch.arange(6)
    with pytest.raises(ContractError, match=r"rows and partners must be \[N, D\], \[N, D\], .* \[5, 4\], \[6, 4\]"):
        contrast(x, y, y, None, None, temperature=1.0)
    with pytest.raises(ContractError, match=r"rows and keys must be \[N, D\], \[M, D\], and are \[5, 4\], \[6, 3\]"):
        contrast(x, x, y[:, :3], None, None, temperature=1.0)
    with pytest.raises(ContractError, match=r"ids must be one for each: .*5.*6.* they are .*4.*6"):
        contrast(x, x, y, ids[:4], ids, temperature=1.0)
    with pytest.raises(ContractError, match="ids must be one for each"):
        contrast(x, x, y, None, ids, temperature=1.0)
    with pytest.raises(ContractError, match="nothing to contrast"):
        contrast(x, x, y[:0], None, None, temperature=1.0)
    with pytest.raises(ContractError, match="of floating point"):
        contrast(x, x, ids[:, None].expand(6, 4), None, None, temperature=1.0)
    with pytest.raises(ContractError, match=r"one number, and this has shape \[6\]"):
        contrast(x, x, y, None, None, temperature=ids + 1.0)


def interpreted():
    """What test_contrast_kernels.py runs: every case, with blocks so small that each loop has several turns."""
    from selfsup.triton_ops import _launch, contrast_kernels

    assert _launch.INTERPRETED
    torch.use_deterministic_algorithms(True)  # fills new memory with a poison, so that a lane left unwritten shows
    small = {"BN": 16, "BM": 16, "BD": 16, "num_warps": 4, "num_stages": 1}
    for name in CASES:
        arrays, op, _ = prepared(name, 20, 70, dtype=torch.float32)
        whole = values(op, arrays)
        before = contrast_kernels._sums_options, contrast_kernels._gradient_options
        contrast_kernels._sums_options = lambda kind, width: small
        contrast_kernels._gradient_options = lambda kind, width: {**small, "BO": 32}
        for count, width, dtype in INTERPRETED_SHAPES:
            scale = 100.0 if count > 16 else 14.0
            # NumPy adds in another order for x_i . x_j than for x_j . x_i, so that they differ by a rounding.
            hold_to_torchs_error(name, count, width, dtype, scale, slack=scale * ROUNDING / 2, seeds=2)
        contrast_kernels._sums_options, contrast_kernels._gradient_options = before
        assert all(torch.equal(a, b) for a, b in zip(whole, values(op, arrays), strict=True)), f"{name}: another result"


INTERPRETED_SHAPES = [
    (1, 1, torch.float32),
    (31, 20, torch.float32),
    (65, 3, torch.bfloat16),
    (17, 35, torch.bfloat16),
    (15, 17, torch.float16),
]

if __name__ == "__main__":
    interpreted()
