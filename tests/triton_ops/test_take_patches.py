"""take_patches and take_image_patches: torch's own indexing, by every road."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError
from selfsup.plugins.modalities.image import Image
from selfsup.triton_ops import take_patches_kernels as kernels
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.take_patches import (
    take_image_patches,
    take_image_patches_reference,
    take_patches,
    take_patches_reference,
)

SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 16, 64, 16), (2, 17, 33, 40), (2, 3, 1025, 5)]  # B, T, D, K
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def drawn(seed, *shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def named(seed, samples, tokens, count, device="cpu"):
    """Indices that repeat where they are many."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(tokens, (samples, count), generator=g).to(device)


def case(shape, seed=0, dtype=torch.float64, device="cpu"):
    b, t, d, k = shape
    return (
        drawn(seed, b, t, d, dtype=dtype, device=device),
        named(seed, b, t, k, device),
        drawn(seed + 1, t, d, dtype=dtype, device=device),
    )


def image_case(seed=0, dtype=torch.float64, device="cpu"):
    return drawn(seed, 2, 3, 10, 15, dtype=dtype, device=device), named(seed, 2, 6, 4, device), 5


def same(ours, theirs, rtol=1e-12):
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", [None, "shared", "each"])
def test_tokens_and_gradients_are_those_of_indexing(gradients_of, shape, positions):
    x, index, shared = case(shape)
    each = drawn(5, *x.shape)
    arrays = (x, index, {None: None, "shared": shared, "each": each}[positions])
    same(gradients_of(take_patches, arrays), gradients_of(take_patches_reference, arrays))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
def test_any_shape(samples, tokens, width, count, seed):
    x, index, positions = case((samples, tokens, width, count), seed)
    got = take_patches(x, index, positions)
    assert got.shape == (samples, count, width)
    assert torch.equal(got, take_patches_reference(x, index, positions))
    (d_x,) = torch.autograd.grad(got.sum(), x)
    times = torch.zeros(samples, tokens).scatter_add_(1, index, torch.ones(index.shape))
    assert torch.equal(d_x, times.double()[..., None].expand_as(x))


def test_image_patches_are_those_of_the_stem(gradients_of):
    arrays = image_case()
    same(gradients_of(take_image_patches, arrays), gradients_of(take_image_patches_reference, arrays))
    images, index, _ = arrays
    cut = Image(size=10, patch=5).stem(4).cut(Signal(images))
    assert torch.equal(take_image_patches(*arrays), cut.take(index).x)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 9, 33, 20)])
def test_low_precision_is_no_worse_than_torchs(device, as_exact_as_torch, dtype, shape):
    as_exact_as_torch(take_patches, take_patches_reference, lambda seed: case(shape, seed, dtype, device), seeds=2)


@pytest.mark.parametrize("dtype", KINDS)
def test_low_precision_of_images(device, as_exact_as_torch, dtype):
    as_exact_as_torch(
        take_image_patches, take_image_patches_reference, lambda seed: image_case(seed, dtype, device), seeds=2
    )


def test_numbers_are_moved_and_zeros_are_where_nothing_is_taken(device):
    x, index, _ = case((3, 11, 20, 4), dtype=torch.bfloat16, device=device)
    index = torch.tensor([[4, 0, 10, 3]] * 3, device=device)
    got = take_patches(x, index)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, x[:, index[0]])
    (d_x,) = torch.autograd.grad(got, x, got.detach())
    assert torch.equal(d_x, torch.zeros_like(x).index_copy(1, index[0], got).detach())


def test_positions_of_every_sample_and_of_another_type(device):
    x, index, positions = case((3, 5, 7, 6), dtype=torch.float32, device=device)
    each = drawn(9, 3, 5, 7, dtype=torch.float16, device=device)
    got = take_patches(x, index, each)
    torch.testing.assert_close(got, take_patches_reference(x, index, each), rtol=0, atol=0)
    d_x, d_each = torch.autograd.grad(got.sum(), (x, each))
    assert d_each.dtype == torch.float16
    assert torch.equal(d_x, d_each.float())
    got = take_patches(x.detach().bfloat16(), index, positions)
    (d_positions,) = torch.autograd.grad(got.sum(), positions)  # what is taken is frozen
    assert torch.equal(d_positions, d_x.sum(0))


def strided(kind, device):
    """Arrays whose memory is in another order than their axes."""
    x = drawn(0, 3, 9, 6, dtype=kind, device=device).detach()
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.repeat_interleave(2, 2)[..., ::2]
    yield x[:1].expand(3, -1, -1)
    yield torch.cat([x, x], 1)[:, 4:13]


def test_x_may_have_any_strides(device):
    index = named(1, 3, 9, 5, device)
    for x in strided(torch.float32, device):
        assert torch.equal(take_patches(x, index), take_patches_reference(x.contiguous(), index))
        learned = x.requires_grad_()
        grad = torch.ones(1, 1, 6, device=device).expand(3, 5, 6)  # of no memory of its own
        (got,) = torch.autograd.grad(take_patches(learned, index), learned, grad)
        (want,) = torch.autograd.grad(take_patches_reference(learned, index), learned, grad)
        assert torch.equal(got, want)


def test_images_may_have_any_strides(device):
    images, index, patch = image_case(dtype=torch.float32, device=device)
    want = take_image_patches_reference(images, index, patch)
    for memory in (
        images.to(memory_format=torch.channels_last),
        images.mT.contiguous().mT,
        images.repeat(2, 1, 1, 1)[:2],
    ):
        assert torch.equal(take_image_patches(memory, index, patch), want)


def far(values, device):
    """[1, 2, D] whose second token is more than 2**31 numbers behind the first; pages between are never touched."""
    gap, width = 2**31 + 64, values.shape[2]
    if device.type == "cuda":
        memory = torch.empty(gap + width, dtype=torch.bfloat16, device=device)
    else:
        pages = mmap.mmap(-1, 2 * (gap + width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    return memory.as_strided((1, 2, width), (gap + width, gap, 1)).copy_(values)


def test_offsets_pass_two_to_the_31(device):
    values = drawn(0, 1, 2, 6, dtype=torch.bfloat16, device=device).detach()
    x, index = far(values, device), torch.tensor([[1, 0, 1]], device=device)
    assert torch.equal(take_patches(x, index), values[:, [1, 0, 1]])


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_index_of_nothing(device, wrong):
    x, index, positions = case((2, 5, 6, 4), dtype=torch.float32, device=device)
    index[1, 2] = wrong
    if not can_launch(x):
        with pytest.raises(ContractError, match=r"index must be from 0 to 4, and goes from"):
            take_patches(x, index, positions)
        return
    got = take_patches(x, index, positions)
    assert got[1, 2].isnan().all()
    right = index.clamp(0, 4)
    want = take_patches_reference(x, right, positions)
    keep = torch.ones_like(index).bool()
    keep[1, 2] = False
    assert torch.equal(got[keep], want[keep])
    ours = torch.autograd.grad(got[keep].sum() + 0 * got[~keep].nan_to_num().sum(), (x, positions))
    same(ours, torch.autograd.grad(want[keep].sum(), (x, positions)), 1e-6)


def test_sums_do_not_depend_on_chance(device):
    x, index, positions = case((3, 3, 20, 9), dtype=torch.float32, device=device)

    def grads():
        return torch.autograd.grad((take_patches(x, index, positions) ** 2).sum(), (x, positions))

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))


def test_nobody_waits(device, without_waiting):
    x, index, positions = case((2, 5, 6, 4), dtype=torch.float32, device=device)
    images, places, patch = image_case(dtype=torch.float32, device=device)
    with without_waiting():
        total = take_patches(x, index, positions).sum() + take_image_patches(images, places, patch).sum()
        torch.autograd.grad(total, (x, positions, images))


def test_the_ops_are_well_formed():
    x, index, positions = case((2, 5, 6, 4))
    for arguments in ((x, index, positions, 0), (*image_case()[:2], None, 5)):
        torch.library.opcheck(torch.ops.selfsup.take_patches.default, arguments)
    for wanted in ([True, True], [False, True]):
        arguments = (torch.randn(2, 4, 6), index, [2, 5, 6], 0, wanted)
        torch.library.opcheck(torch.ops.selfsup.take_patches_gradient.default, arguments)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once(gradients_of):
    torch._dynamo.reset()

    def both(x, index, positions, images, places):
        return take_patches(x, index, positions), take_image_patches(images, places, 5)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (2, 3, 5, 8, 13):
        arrays = (*case((samples, 7, 6, 4)), drawn(3, samples, 3, 10, 15), named(4, samples, 6, 3))
        same(gradients_of(compiled, arrays), gradients_of(both, arrays))


def test_autocast_changes_nothing():
    x, index, positions = case((2, 5, 6, 4), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(take_patches(x, index, positions), take_patches_reference(x, index, positions))


def test_it_needs_no_values():
    x, index, positions = (a.detach().to("meta") for a in case((2, 5, 6, 4)))
    x, positions = x.requires_grad_(), positions.requires_grad_()
    out = take_patches(x, index, positions)
    assert out.shape == (2, 4, 6)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (x, positions))] == [x.shape, positions.shape]


def test_what_does_not_fit_is_named():
    x, index, positions = case((2, 5, 6, 4))
    with pytest.raises(ContractError, match=r"x must be \[B, T, D\], and is \[2, 6\]"):
        take_patches(x[:, 0], index)
    with pytest.raises(ContractError, match=r"int64 \[B, K\] with B = 2, and is torch.int32 \[2, 4\]"):
        take_patches(x, index.int())
    with pytest.raises(ContractError, match=r"with B = 2, and is torch.int64 \[1, 4\]"):
        take_patches(x, index[:1])
    with pytest.raises(ContractError, match="index is on meta, and what it names on cpu"):
        take_patches(x, index.to("meta"))
    with pytest.raises(ContractError, match=r"positions must be floats of shape \[5, 6\] or \[2, 5, 6\] .* \[4, 6\]"):
        take_patches(x, index, positions[:4])
    with pytest.raises(ContractError, match=r"must be floats, at least one, and is torch.int64"):
        take_patches(x.long(), index)
    with pytest.raises(ContractError, match="at least one"):
        take_patches(x[:, :0], index)
    with pytest.raises(ContractError, match=r"H and W multiples of 4, and are \[2, 3, 10, 15\]"):
        take_image_patches(*image_case()[:2], 4)
    assert take_patches(x, index[:, :0]).shape == (2, 0, 6)
    assert take_patches(x[:0], index[:0]).shape == (0, 4, 6)


SCALARS = {"N": "i64", "K": "i32", "T": "i32", "columns": "i32", "missing": "fp32", "B": "i32", "span": "i32"}


def signature(kernel, kind, **constants):
    pointers = {name: f"*{kind}" for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"index_ptr": "*i64"} | ({"sums_ptr": "*fp32"} if "sums_ptr" in pointers else {})
    strides = {name: "i64" for name in kernel.arg_names if len(name) > 1 and name[1] == "_" and name not in pointers}
    whole = pointers | {name: SCALARS[name] for name in kernel.arg_names if name in SCALARS} | strides
    return {name: kind for name, kind in whole.items() if name not in constants}


@pytest.mark.parametrize(
    ("kind", "width", "patch"), [("bf16", 1024, 0), ("fp32", 1280, 0), ("fp16", 768, 16), ("fp32", 588, 14)]
)
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, width, patch):
    values = {"D": width, "PATCH": patch, "C": 3 if patch else width, **kernels.tile(2**16, width)}
    ones = {"x_j" if patch else "x_c": 1}  # Triton compiles strides of 1 in
    for kernel, flags in (
        (kernels._take_kernel, ones | {"p_d": 1, "POSITIONS": not patch}),
        (kernels._scatter_kernel, ones | {"g_d": 1, "X": True, "SUM": False, "BK": 64}),
        (kernels._scatter_kernel, ones | {"g_d": 1, "X": not patch, "SUM": True, "BK": 64}),
    ):
        assert_fits(compile_ahead(kernel, signature(kernel, kind, **flags), **values, **flags))
