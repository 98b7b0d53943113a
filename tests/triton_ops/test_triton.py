"""Where Triton is not installed, ops are there all the same, by their CPU paths."""

from __future__ import annotations

import os
import subprocess
import sys

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
import selfsup.triton_ops as ops
from selfsup.plugins.objectives import bert, gpt, mae, simclr, wav2vec2
from selfsup.plugins.modalities import image

x = torch.randn(5, 3, requires_grad=True)
ops.nt_xent(x, x.detach().flip(0), temperature=0.1).backward()
assert x.grad.isfinite().all()
assert "triton" not in sys.modules
"""


def test_without_triton_all_can_be_imported_and_the_cpu_paths_run():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
