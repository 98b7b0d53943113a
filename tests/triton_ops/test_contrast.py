"""Contrastive losses by tiles: equal to their references, in every type and shape, without the matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import contrast_kernels, contrast_sums_kernels, contrast_tiles
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.contrast import contrast, contrast_reference
from selfsup.triton_ops.contrast_clip import clip_loss, clip_loss_reference
from selfsup.triton_ops.contrast_gradient_kernels import gradients
from selfsup.triton_ops.contrast_info_nce import info_nce, info_nce_reference
from selfsup.triton_ops.contrast_nt_xent import nt_xent, nt_xent_reference
from selfsup.triton_ops.contrast_pairs import pairs_in_panels
from selfsup.triton_ops.contrast_sigmoid import sigmoid_loss, sigmoid_loss_reference
from selfsup.triton_ops.contrast_sums_kernels import sums

ROUNDING = torch.finfo(torch.float32).eps

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
    return a, b, (1 / number(scale, dtype)).detach().requires_grad_()


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


def prepared(name, count, width, seed=0, dtype=torch.float64, scale=14.0, device="cpu"):
    """(arrays, op, reference), the latter two of the arrays alone."""
    arrays, call, op, reference = CASES[name]
    made = arrays(count, width, seed, dtype, scale)
    there = [x.detach().to(device).requires_grad_(x.requires_grad) for x in made]
    return there, partial(call, op), partial(call, reference)


@pytest.fixture(params=["as they are", "small"])
def tiles(request, monkeypatch):
    if request.param == "small":
        make_small(monkeypatch)


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


def make_small(monkeypatch):
    """So small that every loop has several turns, over 33 rows of width 20."""
    monkeypatch.setattr(contrast_tiles, "TILE", (5, 7))
    monkeypatch.setattr(contrast_kernels, "TILES", {2: (16, 16, 4), 4: (16, 16, 4)})
    monkeypatch.setattr(contrast_kernels, "WORKSPACE", 3 * 16 * 16 * 4)
    monkeypatch.setattr(contrast_sums_kernels, "PARTIALS", 100)
    monkeypatch.setattr(contrast_sums_kernels, "SPAN", 2)
    monkeypatch.setattr(contrast_sums_kernels, "PROGRAMS", 4)
    monkeypatch.setattr(contrast_sums_kernels, "MERGED", {"BS": 2, "BL": 16, "num_warps": 4})


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_reference(tiles, gradients_of, name, shape):
    arrays, op, reference = prepared(name, *shape)
    for got, want in zip(gradients_of(op, arrays), gradients_of(reference, arrays), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**16))
def test_any_ids_leave_out_the_kin(rows, keys, width, kinds, seed):
    g = torch.Generator().manual_seed(seed)
    x, partners, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (rows, rows, keys))
    ids = [torch.randint(kinds, (n,), generator=g) - 2**40 for n in (rows, keys)]
    got, want = (f(x, partners, y, *ids, temperature=0.3) for f in (contrast, contrast_reference))
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11)
    assert torch.equal(got[1], want[1])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_low_precision_is_no_worse_than_torchs(as_exact_as_torch, name, dtype, scale):
    _, op, reference = prepared(name, 1, 1)
    as_exact_as_torch(op, reference, lambda seed: prepared(name, 70, 40, seed, dtype, scale)[0], seeds=6)


@every_case
@pytest.mark.parametrize(
    ("count", "width", "dtype"),
    [(1, 1, torch.float32), (33, 20, torch.float32), (17, 35, torch.bfloat16), (15, 17, torch.float16)],
)
def test_every_path_is_no_worse_than_torch(device, small, as_exact_as_torch, name, count, width, dtype):
    scale = 100.0 if count > 15 else 14.0
    _, op, reference = prepared(name, 1, 1)
    # NumPy adds in another order for x_i . x_j than for x_j . x_i, so that they differ by a rounding.
    slack = scale * ROUNDING / 2
    draw = partial(prepared, name, count, width, dtype=dtype, scale=scale, device=device)
    as_exact_as_torch(op, reference, lambda seed: draw(seed=seed)[0], slack=slack, seeds=4)


@every_case
def test_it_gives_the_same_again_and_never_waits(device, small, gradients_of, without_waiting, name):
    arrays, op, _ = prepared(name, 20, 5, dtype=torch.float32, device=device)
    first = gradients_of(op, arrays)
    with without_waiting():
        again = gradients_of(op, arrays)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_case
def test_far_similarities_neither_overflow_nor_vanish(device, small, gradients_of, name):
    arrays, op, reference = prepared(name, 19, 2, dtype=torch.float32, scale=1e4, device=device)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arrays]
    for got, want in zip(gradients_of(op, arrays), gradients_of(reference, exact), strict=True):
        assert got.isfinite().all()
        # A similarity of 1e4 is rounded by 1e4 * 2**-24, and so, relative to itself, is every exponential.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e4 * 2**-23 * float(want.norm() + 1))


@every_case
def test_vectors_may_lie_anywhere_in_memory(device, small, gradients_of, name):
    arrays, op, _ = prepared(name, 9, 6, dtype=torch.float32, device=device)
    strewn = [x.T.contiguous().T if x.dim() == 2 else x for x in (z.detach() for z in arrays)]
    strewn = [x.requires_grad_(z.requires_grad) for x, z in zip(strewn, arrays, strict=True)]
    for got, want in zip(gradients_of(op, strewn), gradients_of(op, arrays), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@every_case
def test_autocast_is_heard(device, gradients_of, name):
    arrays, op, reference = prepared(name, 40, 20, dtype=torch.float32, device=device)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arrays]
    true = gradients_of(reference, exact)
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = gradients_of(op, arrays), gradients_of(reference, arrays)
    assert [x.dtype for x in ours] == [torch.float32] * len(ours)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 2**-8 * c.norm()
    assert (ours[1] - true[1]).norm() > 1e-4 * true[1].norm()


@every_case
def test_it_needs_no_values(name):
    arrays, op, _ = prepared(name, 9, 4, dtype=torch.float32)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in arrays]
    loss = op(*meta)
    learned = [x for x in meta if x.requires_grad]
    assert [g.shape for g in torch.autograd.grad(loss.sum(), learned)] == [x.shape for x in learned]


@every_case
@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(gradients_of, name):
    torch._dynamo.reset()
    compiled = torch.compile(prepared(name, 9, 4)[1], fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (9, 20, 33, 7, 64):
        arrays, op, _ = prepared(name, count, 4)
        for got, want in zip(gradients_of(compiled, arrays), gradients_of(op, arrays), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient(device, small, gradients_of, name, frozen):
    arrays, op, reference = prepared(name, 7, 4, dtype=torch.float32, device=device)
    learned = [x for x in arrays if x.requires_grad]
    for x in learned[frozen : frozen + 1] if frozen < 3 else learned[1:]:
        x.requires_grad_(False)
    for got, want in zip(gradients_of(op, arrays), gradients_of(reference, arrays), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.most = max(self.most, x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("alone", [True, False])
def test_the_similarities_are_never_whole(device, small, alone):
    """Of 72 rows, 21 kB of float32; the vectors are 5 kB, what is there of G 3 kB."""
    x = unit(72, 16, 0, torch.float32).detach().to(device)
    y, scale = None if alone else unit(72, 16, 1, torch.float32).detach().to(device), torch.tensor(5.0, device=device)
    ids, none = torch.arange(72, device=device), x.new_empty(0)
    launched = can_launch(x)
    of_sums, of_gradients, of_pairs = (
        (sums, gradients, pairs_in_panels)
        if launched
        else (contrast_tiles.sums_in_tiles, contrast_tiles.gradients_in_tiles, contrast_tiles.pairs_in_tiles)
    )
    with Watch() as watch:
        r, t, c, u = of_sums(x, y, scale, ids, ids, not alone)
        b = none if alone else torch.ones_like(c)
        of_gradients(x, y, scale, ids, ids, r, t, torch.ones_like(r), c, u, b, [True] * 3)
        if y is not None:
            of_pairs(x, y, scale, scale, ids, ids, [True] * 4)
    assert watch.most <= 72 * 16 * 4


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
def test_a_partner_is_nearest_if_no_negative_is_nearer(small, kin):
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
