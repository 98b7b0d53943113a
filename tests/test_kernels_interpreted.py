"""The kernels in Triton's interpreter: every test of tests/triton_ops that takes `device`, once more.

With half of the combinations of its parameters and half of its draws; --slow takes all combinations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).parent / "triton_ops"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run in these tests")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
def test_the_kernels_interpreted_do_what_the_cpu_paths_do(request):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(OPS)]
    command += ["--slow"] if request.config.getoption("--slow") else []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=OPS.parents[1])
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
