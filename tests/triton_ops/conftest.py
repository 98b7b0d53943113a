"""Compile a kernel for a GPU that is not here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


@pytest.fixture(params=TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def compile_ahead(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """compile_ahead(kernel, {"x_ptr": "*fp32", ...}, BLOCK=128) -> the compiled kernel, for each target.

    What the kernel does not take, such as num_warps, is an option of the compiler. Pointers are as aligned as torch's.
    """
    triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile(kernel: Any, signature: Mapping[str, str], **constants: Any) -> Any:
        options = {k: constants.pop(k) for k in set(constants) - set(kernel.arg_names)}
        whole = {**signature, **dict.fromkeys(constants, "constexpr")}
        order = {name: whole[name] for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(order) if order[name].startswith("*")}
        source = ASTSource(kernel, order, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
        return triton.compile(source, target=GPUTarget(*request.param), options=options)

    compile.backend = request.param[0]
    return compile


@pytest.fixture
def spilled(tmp_path: Path) -> Callable[[Any], int]:
    """spilled(compiled) -> bytes of a thread's own memory, where registers go that do not fit."""

    def measure(compiled: Any) -> int:
        if "cubin" not in compiled.asm:
            return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])[1])
        from triton.backends import nvidia

        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"STACK:(\d+)", usage)[1])

    return measure
