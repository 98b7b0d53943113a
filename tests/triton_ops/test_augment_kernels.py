"""The kernels of augment: they compile for GPUs that are not here, for every launch that the op can make."""

from __future__ import annotations

import pytest

from selfsup.triton_ops import augment_kernels as kernels

BYTES = {"images_ptr", "flip_ptr", "greyed_ptr", "solarized_ptr"}
STRIDES = {"stride_b": "i64", "stride_c": "i32", "stride_h": "i32", "stride_w": "i32"}
SIZE = 224


def signature(kernel, out):
    """The type of every argument that is not known beforehand."""
    types = STRIDES | {"H": "i32", "W": "i32", "order_ptr": "*i64", "out_ptr": f"*{out}"}
    found = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            found[name] = types.get(name, "*u8" if name in BYTES else "*fp32")
        elif name in types or name.startswith(("mean_", "share_")):
            found[name] = types.get(name, "fp32")
    return found


@pytest.mark.parametrize("out", ["fp32", "bf16"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, channels, full, out):
    """Everything in one view, and nothing but the crop."""
    shape = {"C": channels, "S": SIZE, "TILE": kernels.TILE, **kernels.OPTIONS}
    flags = {"JITTER": full, "GREY": full and channels == 3, "BLUR": full, "SOLARIZE": full, "FLIP": full}
    assert_fits(compile_ahead(kernels._views_kernel, signature(kernels._views_kernel, out), **shape, **flags))
    if out == "fp32":
        assert_fits(compile_ahead(kernels._levels_kernel, signature(kernels._levels_kernel, out), FLIP=full, **shape))
