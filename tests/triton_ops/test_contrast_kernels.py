"""The kernels of contrastive losses: interpreted, they do what test_contrast.py asks; and they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from selfsup.triton_ops import contrast_kernels as kernels
from selfsup.triton_ops.contrast import contrast

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_the_kernels_interpreted_are_no_worse_than_torch():
    source = Path(__file__).with_name("test_contrast.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(source)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled(compile_ahead, kernel, kind, options, **flags):
    pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"x_ptr": f"*{kind}", "y_ptr": f"*{kind}", "row_ids_ptr": "*i64", "key_ids_ptr": "*i64"}
    return compile_ahead(kernel, pointers | {"N": "i32", "M": "i32"}, PRECISION="ieee", **options, **flags)


@pytest.mark.parametrize(
    ("kind", "width", "sigmoid"), [("bf16", 1024, False), ("fp16", 128, False), ("fp32", 48, True)]
)
def test_the_kernels_compile_for_gpus_that_are_not_here(monkeypatch, compile_ahead, spilled, kind, width, sigmoid):
    monkeypatch.setattr(torch.version, "hip", "7" if compile_ahead.backend == "hip" else None)
    flags, sides = {"D": width, "KIN": not sigmoid, "SIGMOID": sigmoid}, {"ROWS": True, "KEYS": not sigmoid}
    for kernel, options, more in (
        (kernels._sums_kernel, kernels._sums_options(KINDS[kind], width), {}),
        (kernels._gradient_kernel, kernels._gradient_options(KINDS[kind], width), sides),
    ):
        done = compiled(compile_ahead, kernel, kind, options, **flags, **more)
        room = 65_536 if compile_ahead.backend == "hip" else 101_376  # bytes, that a block may have on any of them
        assert done.metadata.shared <= room
        assert spilled(done) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(1, 1, 3), (257, 1023, 65), (129, 20_000, 128), (2048, 2048, 1024)]
)
def test_the_kernels_on_a_gpu_give_what_tiles_give_and_never_wait(kind, rows, keys, width):
    g = torch.Generator().manual_seed(0)
    x, partners, y = (
        F.normalize(torch.randn(n, width, generator=g), dim=-1).to(KINDS[kind]) for n in (rows, rows, keys)
    )
    ids = torch.arange(rows), torch.arange(keys) + rows // 2

    def values(device):
        arrays = [z.to(device).requires_grad_() for z in (x, partners, y)]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        losses, _ = contrast(*arrays, *(i.to(device, non_blocking=True) for i in ids), temperature=0.05)
        grads = torch.autograd.grad(losses.mean(), arrays)
        torch.cuda.set_sync_debug_mode("default")
        return [z.detach().cpu().float() for z in (losses, *grads)]

    first, again, tiles = values("cuda"), values("cuda"), values("cpu")
    # The kernels round each similarity's gradient to the type of the vectors before it enters a product.
    bound = 8 * torch.finfo(KINDS[kind]).eps if kind != "fp32" else 1e-5
    for a, b, c in zip(first, again, tiles, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() <= bound * c.norm() + 1e-12


def test_keys_are_divided_only_where_rows_are_too_few_to_fill_a_gpu():
    assert kernels._divided(blocks=512, keys=65_536, size=64) == 1
    assert kernels._divided(blocks=4, keys=65_536, size=64) == 66
    assert kernels._divided(blocks=1, keys=100, size=64) == 1


def test_vectors_of_any_width_are_aligned():
    x = torch.randn(5, 33)
    wide = kernels._aligned(x)
    assert (wide.shape, wide.is_contiguous()) == ((5, 48), True)
    assert torch.equal(wide[:, :33], x)
    assert not wide[:, 33:].any()
    assert kernels._aligned(wide) is wide
