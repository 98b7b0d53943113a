"""The kernel of the blur compiles for GPUs that are not here, for every launch that the op can make."""

from __future__ import annotations

import pytest

from selfsup.triton_ops import augment_blur_kernels as module

SIZE, BLUR = 224, 23


@pytest.mark.parametrize("out", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("along_rows", "solarize", "channels"), [(False, False, 3), (True, True, 3), (True, False, 1)])
def test_the_blur_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits, along_rows, solarize, channels, out):
    kernel = module._blur_kernel
    signature = {"in_ptr": "*fp32", "out_ptr": f"*{out}", "sigma_ptr": "*fp32", "solarized_ptr": "*u8", "radius": "i32"}
    signature |= {name: "fp32" for name in kernel.arg_names if name.startswith(("mean_", "share_"))}
    shape = {"C": channels, "S": SIZE, "WIDE": module.triton.next_power_of_2(BLUR), "LINE": module.LINE}
    flags = {"ALONG_ROWS": along_rows, "SOLARIZE": solarize}
    assert_fits(compile_ahead(kernel, signature, **shape, **flags, **module.OPTIONS))
