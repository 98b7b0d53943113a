"""restore_patches: torch's own scatter, by every road; and the inverse of take_patches."""

from __future__ import annotations

import mmap
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.restore_patches import restore_patches, restore_patches_reference
from selfsup.triton_ops.take_patches import take_patches

module = import_module("selfsup.triton_ops.restore_patches")  # the package has the function under this name

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def drawn(seed, *shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def case(shape=(2, 7, 5, 3), seed=0, dtype=torch.float64, device="cpu", padded=True):
    """(seen, index, token, positions) of B samples, T tokens, D values, K seen; some of these belong nowhere."""
    b, t, d, k = shape
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(b, t, generator=g).argsort(1)[:, :k]
    if padded:
        index = torch.where(torch.rand(b, k, generator=g) < 0.2, -1, index)
    kinds = {"dtype": dtype, "device": device}
    return drawn(seed, b, k, d, **kinds), index.to(device), drawn(seed + 1, d, **kinds), drawn(seed + 2, t, d, **kinds)


def of(f, tokens):
    return lambda *arrays: f(*arrays, tokens=tokens)


def pair(tokens):
    return of(restore_patches, tokens), of(restore_patches_reference, tokens)


def same(ours, theirs, tolerance=1e-12):
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (3, 16, 64, 16), (2, 17, 33, 4), (2, 3, 4, 0)])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_tokens_and_gradients_are_the_references(gradients_of, shape, placed, padded):
    arrays = case(shape, padded=padded)
    ours, theirs = (gradients_of(f, arrays[: 4 if placed else 3]) for f in pair(shape[1]))
    same(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_shape(samples, tokens, width, data):
    seen, index, token, positions = case((samples, tokens, width, data.draw(st.integers(0, tokens))))
    got = restore_patches(seen, index, token, tokens=tokens)
    kept = index >= 0
    back = take_patches(got, index.clamp(min=0))
    assert torch.equal(back[kept], seen[kept]), "what was seen is where it was"
    hidden = torch.ones(samples, tokens + 1).scatter(1, index % (tokens + 1), 0)[:, :tokens].bool()
    assert (got[hidden] == token).all(), "and the token everywhere else"
    placed = restore_patches(seen, index, token, positions, tokens=tokens)
    torch.testing.assert_close(placed, got + positions)


def test_a_class_token_is_one_that_was_seen():
    seen, index, token, positions = case(padded=False)
    first = drawn(9, 2, 1, 5)
    index = torch.cat([torch.zeros(2, 1, dtype=torch.int64), index + 1], 1)
    table = torch.cat([torch.zeros(1, 5), positions])
    got = restore_patches(torch.cat([first, seen], 1), index, token, table, tokens=8)
    assert torch.equal(got[:, :1], first)
    assert torch.equal(got[:, 1:], restore_patches(seen, index[:, 1:] - 1, token, positions, tokens=7))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(2, 9, 33, 4), (5, 3, 4, 2)])
def test_low_precision_is_no_worse_than_torchs(device, as_exact_as_torch, dtype, shape):
    as_exact_as_torch(*pair(shape[1]), lambda seed: case(shape, seed, dtype, device), seeds=2)


def test_the_type_is_that_of_what_was_seen(device):
    seen, index, token, positions = case(dtype=torch.float32, device=device)
    low = seen.detach().bfloat16().requires_grad_()
    got = restore_patches(low, index, token, positions, tokens=7)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, restore_patches_reference(low, index, token, positions, tokens=7), rtol=0, atol=0)
    grads = torch.autograd.grad(got.float().sum(), (low, token, positions))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_many_samples_for_each_program(device, monkeypatch, gradients_of):
    monkeypatch.setattr(module, "PROGRAMS", 2)
    arrays = case((7, 5, 6, 2), dtype=torch.float32, device=device)
    ours, theirs = (gradients_of(f, arrays) for f in pair(5))
    same(ours, theirs, 1e-5)


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient(device, gradients_of, frozen):
    arrays = list(case(dtype=torch.float32, device=device))
    learned = [i for i in (0, 2, 3) if i != (0, 2, 3)[frozen]]
    arrays = [x.detach().requires_grad_(i in learned) if x.is_floating_point() else x for i, x in enumerate(arrays)]
    same(*(gradients_of(f, arrays) for f in pair(7)), 1e-5)


def test_strides_may_be_any(device):
    seen, index, token, positions = case(dtype=torch.float32, device=device)
    want = restore_patches_reference(seen, index, token, positions, tokens=7)
    turned = seen.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    wide = token.repeat_interleave(2)[::2], positions.T.contiguous().T
    got = restore_patches(turned, index.T.contiguous().T, *wide, tokens=7)
    assert torch.equal(got, want)
    grad = torch.ones(1, 1, 5, device=device).expand(2, 7, 5)  # of no memory of its own
    same(torch.autograd.grad(got, (turned, token), grad), torch.autograd.grad(want, (seen, token), grad), 1e-5)


def test_offsets_pass_two_to_the_31(device):
    gap, width = 2**31 + 64, 6
    if device.type == "cuda":
        memory = torch.empty(gap + width, dtype=torch.bfloat16, device=device)
    else:  # pages between the tokens are never touched
        pages = mmap.mmap(-1, 2 * (gap + width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    seen, index, token, _ = case((1, 3, width, 2), dtype=torch.bfloat16, device=device, padded=False)
    far = memory.as_strided(seen.shape, (gap + width, gap, 1)).copy_(seen.detach())
    assert torch.equal(restore_patches(far, index, token, tokens=3), restore_patches(seen, index, token, tokens=3))


@pytest.mark.parametrize(("wrong", "named"), [(7, "from -1 to 6, and goes from"), (-2, "goes from -2"), (0, "place 0")])
def test_places_that_are_not_there_or_taken(device, wrong, named):
    seen, _, token, _ = case(dtype=torch.float32, device=device)
    index = torch.tensor([[0, 3, 5], [0, 3, wrong]], device=device)
    if not can_launch(seen):
        with pytest.raises(ContractError, match=named):
            restore_patches(seen, index, token, tokens=7)
        return
    got = restore_patches(seen, index, token, tokens=7)
    assert got[0].isfinite().all()
    spoiled = got[1].isnan().all(-1)
    assert spoiled.tolist() == ([True] + [False] * 6 if wrong == 0 else [True] * 7)


def test_the_same_twice_and_nobody_waits(device, without_waiting):
    arrays = case((4, 9, 6, 5), dtype=torch.float32, device=device)

    def once():
        got = restore_patches(*arrays, tokens=9)
        return got, *torch.autograd.grad((got**2).sum(), [x for x in arrays if x.requires_grad])

    with without_waiting():
        first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_ops_are_well_formed():
    torch.library.opcheck(torch.ops.selfsup.restore_patches.default, (*case(), 7))
    index, grad = case()[1], torch.randn(2, 7, 5)
    torch.library.opcheck(torch.ops.selfsup.restore_patches_gradient.default, (grad, index, [True, True, True]))
    torch.library.opcheck(torch.ops.selfsup.restore_patches_gradient.default, (grad, index, [False, True, False]))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(gradients_of):
    torch._dynamo.reset()
    compiled = torch.compile(of(restore_patches, 7), fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (2, 3, 5, 8, 13):
        arrays = case((samples, 7, 5, 3))
        same(gradients_of(compiled, arrays), gradients_of(of(restore_patches, 7), arrays))


def test_autocast_changes_nothing():
    arrays = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(restore_patches(*arrays, tokens=7), restore_patches_reference(*arrays, tokens=7))


def test_it_needs_no_values():
    arrays = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in case()]
    out = restore_patches(*arrays, tokens=7)
    assert out.shape == (2, 7, 5)
    learned = [x for x in arrays if x.requires_grad]
    assert [g.shape for g in torch.autograd.grad(out.sum(), learned)] == [x.shape for x in learned]


def test_what_does_not_fit_is_named():
    seen, index, token, positions = case()
    with pytest.raises(ContractError, match=r"seen must be floats \[B, K, D\] and tokens above 0; .* \[2, 5\] and 7"):
        restore_patches(seen[:, 0], index, token, tokens=7)
    with pytest.raises(ContractError, match="and 0"):
        restore_patches(seen, index, token, tokens=0)
    with pytest.raises(ContractError, match=r"index must be \[B, K\] = \[2, 3\], and is \[2, 2\]"):
        restore_patches(seen, index[:, 1:], token, tokens=7)
    with pytest.raises(ContractError, match="int64"):
        restore_patches(seen, index.int(), token, tokens=7)
    with pytest.raises(ContractError, match=r"token must be floats \[5\] on cpu, and is torch.float64 \[4\]"):
        restore_patches(seen, index, token[1:], tokens=7)
    with pytest.raises(ContractError, match=r"positions must be floats \[8, 5\] on cpu, and is torch.float64 \[7, 5\]"):
        restore_patches(seen, index, token, positions, tokens=8)


@pytest.mark.parametrize(("kind", "width"), [("bf16", 512), ("fp32", 1024), ("fp16", 48)])
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, width):
    options = {"D": width, **module._options(196, width, 49)}
    arrays = {"seen_ptr": f"*{kind}", "token_ptr": "*fp32", "positions_ptr": "*fp32", "out_ptr": f"*{kind}"}
    sizes = {"index_ptr": "*i64", "K": "i32", "T": "i32"}
    signature = arrays | sizes | dict.fromkeys(("s_b", "s_k", "p_t"), "i64")
    for placed in (True, False):
        ones = {"s_d": 1, "p_d": 1}  # Triton compiles strides of 1 in
        assert_fits(compile_ahead(module._restore_kernel, signature, POSITIONS=placed, **ones, **options))
    signature = {"grad_ptr": f"*{kind}", "token_ptr": "*fp32", "positions_ptr": "*fp32", "B": "i32", "span": "i32"}
    signature |= sizes | dict.fromkeys(("g_b", "g_t"), "i64")
    for token, placed in ((True, True), (True, False), (False, True)):
        flags = {"TOKEN": token, "POSITIONS": placed, "g_d": 1}
        assert_fits(compile_ahead(module._sums_kernel, signature, **flags, **options))
