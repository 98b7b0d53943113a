"""random_bits: equal bits to the kernel's streams, by every road."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl

from selfsup.kernel.random import key_of, stream, tag
from selfsup.kernel.random import philox as philox_words
from selfsup.triton_ops import philox
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.philox import random_bits, random_bits_reference

SHAPES = [(1, 1), (3, 4), (5, 7), (2, 1030), (700, 3), (257, 5), (1, 0), (0, 5)]
KEYS = [(0, 0), (1, 2), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 0x7FFFFFFF), key_of(3, "mask")]


@pytest.mark.parametrize(("rows", "count"), SHAPES)
def test_reference_equals_the_stream(rows, count):
    ids = tag(2**22, torch.arange(rows)) + 2**33
    draws = stream(3, "mask", ids)
    assert torch.equal(random_bits_reference(ids, count, key_of(3, "mask"), 0), draws.bits(count))
    assert torch.equal(random_bits(ids, count, key_of(3, "mask"), -(-count // 4)), draws.bits(count))


def test_the_op_is_well_formed():
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.selfsup.random_bits, (torch.arange(5), 7, 1, 2, 0), test_utils=checks)


@pytest.mark.parametrize(("rows", "count"), SHAPES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("start", [0, 9, 2**32 - 300])
def test_every_path_equals_the_reference(device, rows, count, key, start):
    ids = tag(2**22, torch.arange(rows)) + 2**33
    got = random_bits(ids.to(device), count, key, start)
    assert got.shape == (rows, count)
    assert torch.equal(got.cpu(), random_bits_reference(ids, count, key, start))


def test_ids_may_have_gaps_in_memory(device):
    ids = torch.arange(10)[::2]
    assert torch.equal(random_bits(ids.to(device), 3, (1, 2)).cpu(), random_bits_reference(ids, 3, (1, 2), 0))


def test_words_are_made_on_the_device_of_the_ids(device, monkeypatch):
    """Which need not be the current one, where Triton launches unless it is told."""
    if not can_launch(torch.empty(0, device=device)):
        pytest.skip("the kernel runs on a GPU, or in the interpreter")
    told = []
    monkeypatch.setattr(philox, "on_device_of", lambda x: told.append(x.device) or nullcontext())
    random_bits(torch.arange(3, device=device), 5, (1, 2))
    assert told == [torch.arange(0, device=device).device]


@triton.jit
def randint4x(out_ptr, seed, N: tl.constexpr):
    offset = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, offset)
    tl.store(out_ptr + offset * 4, a.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 1, b.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 2, c.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 3, d.to(tl.uint32).to(tl.int64))


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 7, 2**62 + 2**31])
def test_tritons_own_randint4x_gives_the_kernels_words(device, seed):
    if not can_launch(torch.empty(0, device=device)):
        pytest.skip("Triton runs on a GPU, or in its interpreter")
    out = torch.empty(64, 4, dtype=torch.int64, device=device)
    randint4x[(1,)](out, seed, 64)
    zero = torch.zeros(64, dtype=torch.int64)
    words = philox_words((torch.arange(64), zero, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(out.cpu(), torch.stack(words, 1))


def test_the_kernel_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits):
    signature = {"ids_ptr": "*i64", "out_ptr": "*i64", "key": "i64", "start": "i32", "B": "i32", "N": "i32"}
    assert_fits(compile_ahead(philox._random_bits_kernel, signature, BLOCK=philox.BLOCK))
