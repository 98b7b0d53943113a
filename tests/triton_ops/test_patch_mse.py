"""patch_mse: torch's own arithmetic over whole targets, by every road."""

from __future__ import annotations

import mmap
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import patch_mse_kernels as kernels
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.patch_mse import patch_mse, patch_mse_reference, patch_mse_with_spread

module = import_module("selfsup.triton_ops.patch_mse")  # the package has the function under this name

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WAYS = [(True, 2), (False, 2), (False, 1)]  # MAE, MAE without norm_pixels, SimMIM


def case(shape=(2, 9, 12, 5), seed=0, dtype=torch.float64, device="cpu", of_pixels=None, padded=True):
    """(guess, patches, index, valid)."""
    b, t, p, m = shape
    g = torch.Generator().manual_seed(seed)
    guess = torch.randn(b, m, p, generator=g).to(device, dtype).requires_grad_()
    patches = (torch.randn(b, t, p, generator=g) * 2 + 3).to(device, of_pixels or dtype)
    index = torch.rand(b, t, generator=g).argsort(1)[:, :m].to(device)
    valid = (torch.rand(b, m, generator=g) < 0.7).to(device) if padded else None
    return guess, patches, index, valid


def image_case(seed=0, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 10, 15, generator=g).to(device, dtype)
    return *case((2, 6, 75, 4), seed, dtype, device)[::2], images


def both(f, normalize=True, power=2, patch=None):
    """f of arrays alone, and its outputs."""
    return lambda *arrays: f(*arrays, normalize=normalize, power=power, patch=patch)


def same(ours, theirs, tolerance=1e-12):
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[2**17, 20])
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "ROWS", request.param)


@pytest.mark.parametrize(("normalize", "power"), WAYS)
@pytest.mark.parametrize("shape", [(2, 9, 12, 5), (1, 1, 2, 1), (3, 7, 17, 7)])
@pytest.mark.parametrize("padded", [True, False])
def test_loss_spread_and_gradient_are_the_references(chunks, gradients_of, normalize, power, shape, padded):
    arrays = case(shape, padded=padded)
    ours, theirs = (both(f, normalize, power) for f in (patch_mse_with_spread, patch_mse_reference))
    same(gradients_of(lambda *a: ours(*a)[0], arrays), gradients_of(lambda *a: theirs(*a)[0], arrays))
    assert patch_mse(*arrays, normalize=normalize, power=power) == ours(*arrays)[0]
    same([ours(*arrays)[1]], [theirs(*arrays)[1]])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 20), st.data())
def test_any_shape(samples, tokens, width, data):
    arrays = case((samples, tokens, width, data.draw(st.integers(1, tokens))), data.draw(st.integers(0, 99)))
    same(patch_mse_with_spread(*arrays), patch_mse_reference(*arrays))


def test_the_loss_is_the_papers():
    """Patch by patch, as in the equation, and in no way like the code."""
    guess, patches, index, valid = case()
    errors = [
        ((g - (x - x.mean()) / (x.var() + 1e-6).sqrt()) ** 2).mean()
        for b in range(2)
        for g, x, counts in zip(guess[b], patches[b][index[b]], valid[b], strict=True)
        if counts
    ]
    torch.testing.assert_close(patch_mse(guess, patches, index, valid), torch.stack(errors).mean())


def relaxed(f, **options):
    return lambda *arrays: both(f, **options)(*arrays)[0]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("normalize", "power"), WAYS)
def test_low_precision_is_no_worse_than_torchs(device, as_exact_as_torch, dtype, normalize, power):
    ways = [relaxed(f, normalize=normalize, power=power) for f in (patch_mse_with_spread, patch_mse_reference)]
    as_exact_as_torch(*ways, lambda seed: case((2, 9, 33, 5), seed, dtype, device), seeds=3)


@pytest.mark.parametrize("dtype", KINDS)
def test_guesses_of_another_type_than_the_pixels(device, as_exact_as_torch, dtype):
    ways = [relaxed(f) for f in (patch_mse_with_spread, patch_mse_reference)]
    as_exact_as_torch(*ways, lambda seed: case((2, 5, 20, 3), seed, dtype, device, torch.float32), seeds=2)
    assert patch_mse(*case((2, 5, 20, 3), 0, dtype, device, torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_spread_of_low_precision(device, dtype, normalize):
    guess, patches, index, valid = case((3, 8, 19, 6), dtype=dtype, device=device)
    patches = patches + 100  # far from 0, so that a difference of squares would lose it
    got = patch_mse_with_spread(guess, patches, index, valid, normalize=normalize)[1]
    want = patch_mse_reference(guess.double(), patches.double(), index, valid, normalize=normalize)[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert not got.requires_grad


@pytest.mark.parametrize("normalize", [True, False])
def test_many_rows_for_each_program(device, monkeypatch, normalize):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(kernels, "TILE", 32)
    arrays = case((4, 12, 9, 11), dtype=torch.float32, device=device)
    true = patch_mse_reference(*(x.double() if x.is_floating_point() else x for x in arrays), normalize=normalize)
    for got, want in zip(patch_mse_with_spread(*arrays, normalize=normalize), true, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_images_are_cut_on_the_way(device, gradients_of):
    guess, index, images = image_case(dtype=torch.float32, device=device)
    last = images.to(memory_format=torch.channels_last)
    want = gradients_of(relaxed(patch_mse_reference, patch=5), (guess, images, index))
    for like in (images, last, torch.cat([images, images], 3)[..., 15:]):
        same(gradients_of(relaxed(patch_mse_with_spread, patch=5), (guess, like, index)), want, 1e-6)


def test_strides_may_be_any(device, gradients_of):
    guess, patches, index, valid = case(dtype=torch.float32, device=device)
    want = gradients_of(relaxed(patch_mse_reference), (guess, patches, index, valid))
    other = torch.cat([guess, guess], 1).detach()[:, 5:].requires_grad_()
    wide = patches.repeat_interleave(3, 2)[..., ::3]
    turned = valid.T.contiguous().T, index.T.contiguous().T
    assert not any(x.is_contiguous() for x in (wide, *turned, other))
    same(gradients_of(relaxed(patch_mse_with_spread), (other, wide, turned[1], turned[0])), want, 1e-6)


def test_offsets_pass_two_to_the_31(device):
    gap, width = 2**31 + 64, 6
    if device.type == "cuda":
        memory = torch.empty(gap + width, dtype=torch.bfloat16, device=device)
    else:  # pages between the patches are never touched
        pages = mmap.mmap(-1, 2 * (gap + width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    guess, patches, _, _ = case((1, 2, width, 2), dtype=torch.bfloat16, device=device)
    far = memory.as_strided(patches.shape, (gap + width, gap, 1)).copy_(patches)
    index = torch.tensor([[1, 0]], device=device)
    same([patch_mse(guess, far, index)], [patch_mse(guess, patches, index)])


def test_patches_wider_than_a_program(device, monkeypatch, gradients_of):
    monkeypatch.setattr(module, "WIDEST", 8)
    arrays = case(dtype=torch.float32, device=device)
    want = gradients_of(relaxed(patch_mse_reference), arrays)
    same(gradients_of(relaxed(patch_mse_with_spread), arrays), want, 1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_not_valid_counts_for_nothing(device, normalize):
    guess, patches, index, valid = case(dtype=torch.float32, device=device)
    want = patch_mse_with_spread(guess, patches, index, valid, normalize=normalize)
    (grad,) = torch.autograd.grad(want[0], guess)
    assert (grad[~valid] == 0).all()
    assert grad[valid].any()
    spoiled = torch.where(valid[..., None], guess, torch.nan).detach().requires_grad_()
    places = torch.where(valid, index, 2**40)  # what is not valid may be named anything
    got = patch_mse_with_spread(spoiled, patches, places, valid, normalize=normalize)
    same(got, want, 0)
    assert torch.equal(torch.autograd.grad(got[0], spoiled)[0], grad)


def test_where_nothing_is_valid_the_loss_is_zero(device):
    guess, patches, index, valid = case(dtype=torch.float32, device=device)
    loss, spread = patch_mse_with_spread(guess, patches, index, valid & False)
    assert (float(loss.detach()), float(spread)) == (0, 0)
    assert not torch.autograd.grad(loss, guess)[0].any()
    assert float(patch_mse(guess[:, :0].detach(), patches, index[:, :0])) == 0


def test_a_flat_patch_has_a_target_of_zeros(device):
    guess, patches, index, _ = case(dtype=torch.float32, device=device)
    loss = patch_mse(guess, patches * 0 + 0.5, index)
    torch.testing.assert_close(loss, guess.square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_index_of_nothing(device, wrong):
    guess, patches, index, valid = case(dtype=torch.float32, device=device)
    index[1, 2], valid[1, 2] = wrong, True
    if can_launch(guess):
        assert patch_mse(guess, patches, index, valid).isnan()
        return
    with pytest.raises(ContractError, match="index must be from 0 to 8, and goes from"):
        patch_mse(guess, patches, index, valid)


def test_small_gradients_survive_float16(device):
    """The loss is scaled before its gradient is: 1 / (P x patches) alone would be 0 in float16."""
    guess, patches, index, _ = case((4, 40, 256, 30), dtype=torch.float16, device=device)
    grads = []
    for f in (patch_mse, lambda *arrays: patch_mse_reference(*arrays)[0]):
        grads.append(torch.autograd.grad(f(guess, patches, index) * 2.0**16, guess)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-3, atol=1e-4)
    assert grads[0].any(-1).all()


def test_the_same_twice_and_nobody_waits(device, without_waiting):
    arrays = case(dtype=torch.float32, device=device)

    def once():
        loss, spread = patch_mse_with_spread(*arrays)
        return loss, spread, torch.autograd.grad(3 * loss, arrays[0])[0]

    with without_waiting():
        first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_targets_are_never_whole(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    guess, patches, index, valid = case((4, 40, 16, 30))
    guess, sizes = guess.detach(), []
    given = [x.untyped_storage().data_ptr() for x in (guess, patches)]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            found = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
            sizes.extend(x.numel() for x in found if x.untyped_storage().data_ptr() not in given)
            return out

    with Watch(), torch.no_grad():
        module.losses_in_chunks(guess, patches, index, valid, 0, True, 1e-6, 2, False)
    assert max(sizes) <= 4 * 30 * 3


def test_the_ops_are_well_formed():
    guess, patches, index, valid = case()
    torch.library.opcheck(torch.ops.selfsup.patch_mse.default, (guess, patches, index, valid, 0, True, 1e-6, 2, True))
    guess, index, images = image_case()
    more = (images, index, None, 5, False, 1e-6, 1, False)
    torch.library.opcheck(torch.ops.selfsup.patch_mse.default, (guess.detach(), *more))
    one = torch.ones((), dtype=torch.float64)
    torch.library.opcheck(torch.ops.selfsup.patch_mse_gradient.default, (guess.detach(), one, one * 7, 0.5))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(gradients_of):
    torch._dynamo.reset()
    compiled = torch.compile(patch_mse_with_spread, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (2, 3, 5, 8, 13):
        arrays = case((samples, 9, 12, 5))
        ours, theirs = (gradients_of(lambda *a, f=f: f(*a)[0], arrays) for f in (compiled, patch_mse_with_spread))
        same(ours, theirs)
        same(compiled(*arrays)[1:], patch_mse_with_spread(*arrays)[1:])


def test_autocast_changes_nothing():
    arrays = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = patch_mse(*arrays)
    assert torch.equal(got, patch_mse(*arrays))
    assert got.dtype == torch.float32


def test_frozen_guesses_and_no_grad_keep_nothing():
    guess, patches, index, valid = case()
    with torch.no_grad():
        assert not patch_mse(guess, patches, index, valid).requires_grad
    assert not patch_mse(guess.detach(), patches.requires_grad_(), index, valid).requires_grad
    kept = torch.ops.selfsup.patch_mse(guess.detach(), patches.detach(), index, valid, 0, True, 1e-6, 2, False)[3]
    assert kept.numel() == 0


def test_it_needs_no_values():
    guess, patches, index, valid = (x.detach().to("meta") for x in case())
    loss = patch_mse(guess.requires_grad_(), patches, index, valid)
    assert loss.shape == ()
    assert torch.autograd.grad(loss, guess)[0].shape == guess.shape


def test_what_does_not_fit_is_named():
    guess, patches, index, valid = case()
    with pytest.raises(ContractError, match=r"guess must be \[B, M, P\] = \[2, 5, 12\] on cpu, and is \[2, 4, 12\]"):
        patch_mse(guess[:, 1:], patches, index)
    with pytest.raises(ContractError, match=r"patches must be \[B, T, P\], or images .* are \[2, 12\]"):
        patch_mse(guess, patches[:, 0], index)
    with pytest.raises(ContractError, match=r"valid must be bool \[2, 5\], and is torch.int64 \[2, 5\]"):
        patch_mse(guess, patches, index, valid.long())
    with pytest.raises(ContractError, match=r"index must be int64 \[B, K\] with B = 2"):
        patch_mse(guess, patches, index.int())
    with pytest.raises(ContractError, match="has no variance: normalize=False, or larger patches"):
        patch_mse(guess[..., :1], patches[..., :1], index)
    with pytest.raises(ContractError, match="must be floats"):
        patch_mse(guess, patches.long(), index)
    with pytest.raises(ContractError, match=r"power is 1 or 2 and eps above 0; they are 3 and 1e-06"):
        patch_mse(guess, patches, index, power=3)
    with pytest.raises(ContractError, match=r"H and W multiples of 4"):
        patch_mse(guess, torch.zeros(2, 3, 8, 9), index, patch=4)


SCALARS = {"N": "i32", "M": "i32", "T": "i32", "columns": "i32", "eps": "fp32"}


@pytest.mark.parametrize(
    ("kind", "pixels", "width", "patch"),
    [("bf16", "fp32", 768, 16), ("fp32", "fp32", 1024, 0), ("fp16", "fp16", 48, 0), ("bf16", "fp32", 8192, 0)],
)
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, pixels, width, patch):
    pointers = {"guess_ptr": f"*{kind}", "x_ptr": f"*{pixels}", "index_ptr": "*i64", "valid_ptr": "*i1"}
    pointers |= {"kept_ptr": f"*{kind}", "sums_ptr": "*fp32"}
    for normalize, power, wanted in ((True, 2, True), (False, 1, False)):
        flags = {"VALID": True, "NORMALIZE": normalize, "POWER": power, "WANTED": wanted}
        values = flags | {"D": width, "PATCH": patch, "C": 3 if patch else width, **kernels.tile(2**16, width)}
        ones = {"g_d": 1, "x_j" if patch else "x_c": 1}  # Triton compiles strides of 1 in
        strides = ("g_b", "g_m", "x_b", "x_down", "x_across", "x_i", "x_j", "x_c")
        signature = pointers | SCALARS | {name: "i64" for name in strides if name not in ones}
        assert_fits(compile_ahead(kernels._errors_kernel, signature, **values, **ones))


def test_the_small_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits):
    pointers = dict.fromkeys(("sums_ptr", "loss_ptr", "spread_ptr", "count_ptr"), "*fp32")
    assert_fits(compile_ahead(kernels._sum_kernel, pointers | {"N": "i32"}, D=768, BLOCK=2048))
    for kind in KINDS.values():
        pointers = {"kept_ptr": f"*{kind}", "grad_ptr": "*fp32", "count_ptr": "*fp32", "out_ptr": f"*{kind}"}
        signature = pointers | {"factor": "fp32", "N": "i64"}
        assert_fits(compile_ahead(kernels._scale_kernel, signature, BLOCK=kernels.BLOCK))
