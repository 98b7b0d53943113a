"""random_bits: equal bits to the kernel's streams, by every road."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup.kernel.random import key_of, stream, tag
from selfsup.triton_ops import philox
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


INTERPRET = """
import torch
from selfsup.kernel.random import tag
from selfsup.triton_ops import _launch
from selfsup.triton_ops.philox import random_bits, random_bits_reference

assert _launch.INTERPRETED
torch.use_deterministic_algorithms(True)  # fills new memory with a poison, so that a lane left unwritten shows
for rows, count in {shapes}:
    ids = tag(2**22, torch.arange(rows)) + 2**33
    for key in {keys}:
        for start in (0, 9, 2**32 - 300):
            got, want = random_bits(ids, count, key, start), random_bits_reference(ids, count, key, start)
            assert got.shape == (rows, count) and torch.equal(got, want), (rows, count, key, start)
strided = torch.arange(10)[::2]
assert torch.equal(random_bits(strided, 3, (1, 2)), random_bits_reference(strided, 3, (1, 2), 0))
"""


def interpret(source: str, folder: Path) -> None:
    """Run this with Triton's interpreter, which has to be chosen before Triton is imported."""
    path = folder / "interpreted.py"
    path.write_text(source)
    done = subprocess.run(
        [sys.executable, str(path)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_kernel_interpreted_equals_the_reference(tmp_path):
    interpret(INTERPRET.format(shapes=SHAPES, keys=KEYS), tmp_path)


RANDINT = """
import torch, triton
import triton.language as tl
from selfsup.kernel.random import philox

@triton.jit
def draw(out_ptr, seed, N: tl.constexpr):
    offset = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, offset)
    tl.store(out_ptr + offset * 4, a.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 1, b.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 2, c.to(tl.uint32).to(tl.int64))
    tl.store(out_ptr + offset * 4 + 3, d.to(tl.uint32).to(tl.int64))

for seed in (0, 5, 2**40 + 7, 2**62 + 2**31):
    out = torch.empty(64, 4, dtype=torch.int64)
    draw[(1,)](out, seed, 64)
    zero = torch.zeros(64, dtype=torch.int64)
    words = philox((torch.arange(64), zero, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(out, torch.stack(words, 1)), seed
"""


def test_tritons_own_randint4x_gives_the_kernels_words(tmp_path):
    interpret(RANDINT, tmp_path)


def test_the_kernel_compiles_for_gpus_that_are_not_here(compile_ahead, spilled):
    signature = {"ids_ptr": "*i64", "out_ptr": "*i64", "key": "i64", "start": "i32", "B": "i32", "N": "i32"}
    compiled = compile_ahead(philox._random_bits_kernel, signature, BLOCK=philox.BLOCK)
    assert compiled.metadata.shared <= 4 * 8 * philox.BLOCK
    assert spilled(compiled) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("rows", "count"), SHAPES)
def test_the_kernel_on_a_gpu_equals_the_reference(rows, count):
    ids = tag(2**22, torch.arange(rows)) + 2**33
    for key in KEYS:
        got = random_bits(ids.cuda(), count, key, 9)
        assert torch.equal(got.cpu(), random_bits_reference(ids, count, key, 9))
