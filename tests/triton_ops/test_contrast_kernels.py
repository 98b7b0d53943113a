"""The kernels of contrastive losses: compiled for GPUs, bounded in memory, and safe far into it.

test_contrast.py has what they compute.
"""

from __future__ import annotations

import pytest
import torch

from selfsup.triton_ops import contrast_gradient_kernels as gradients
from selfsup.triton_ops import contrast_kernels as shared
from selfsup.triton_ops import contrast_pairs as pairs
from selfsup.triton_ops import contrast_sums_kernels as sums

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "sums": (sums._sums_kernel, {"COLUMNS": True, "ALONE": True}),
    "gradients": (gradients._gradient_kernel, {"KEYS": True, "ALONE": True}),
    "pairs": (pairs._pairs_kernel, {"GRADIENTS": True}),
}


def types_of(kernel, kind):
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: f"*{kind}" for name in ("x_ptr", "y_ptr", "out_ptr") if name in types}
    types |= {name: "*i64" for name in ("row_ids_ptr", "key_ids_ptr") if name in types}
    return types | {name: "i32" for name in kernel.arg_names if name.islower() and not name.endswith("_ptr")}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("kind", "width"), [("bf16", 1024), ("fp16", 48), ("fp32", 512)])
def test_the_kernels_compile_for_gpus_that_are_not_here(request, compile_ahead, assert_fits, name, kind, width):
    kernel, flags = KERNELS[name]
    more = {"gradients": {"RELATIVE": kind == "fp16"}, "pairs": {"RAISED": pairs.RAISED}, "sums": {}}[name]
    crowded = request.node.callspec.params["compile_ahead"][1] == 100
    options = shared.tile_options(KINDS[kind], width, crowded=crowded)
    types = types_of(kernel, kind) | ({"M": "i32"} if "M" in kernel.arg_names else {})
    assert_fits(compile_ahead(kernel, types, D=width, KIN=True, PRECISION="ieee", **flags, **more, **options))


def test_the_kernel_that_merges_compiles(compile_ahead, assert_fits):
    types = types_of(sums._merge_kernel, "fp32") | {"S": "i32", "L": "i32"}
    assert_fits(compile_ahead(sums._merge_kernel, types, CONTINUED=True, **sums.MERGED))
