from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from torch import nn

from selfsup.kernel.errors import ContractError
from selfsup.plugins.common.norm import BatchNorm, token_norm


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3), (3, 5, 4, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_one_process_is_torchs_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](5, 1e-3, 0.3, affine)
    ours = BatchNorm(5, eps=1e-3, momentum=0.3, affine=affine)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        x = torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = ours.train(training)(a), theirs.train(training)(b)
        assert torch.equal(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_scale_without_bias() -> None:
    norm = BatchNorm(3, bias=False)
    assert set(norm.state_dict()) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    x = torch.randn(8, 3) * 3 + 1
    torch.testing.assert_close(norm(x), (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())


def test_wrong_shapes() -> None:
    with pytest.raises(ContractError, match=r"batch norm of 3 channels got an input of shape \[2, 4\]"):
        BatchNorm(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm(3)(torch.zeros(1, 3))


def test_token_norms() -> None:
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(token_norm("rms", 8, 1e-6)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert [p.shape for p in token_norm("layer", 8, 1e-6).parameters()] == [(8,), (8,)]


SHARES = [(4, (3, 2)), (7, ()), (8, (3,))]  # rows of the first of two processes, out of 8; and further dimensions

# What each of the two does. The mean is far from zero, where a sum of squares would lose digits.
PROCESS = """
import os
import sys
import torch
import torch.distributed as dist
from selfsup.plugins.common.norm import BatchNorm

def run(rows, shape):
    torch.manual_seed(0)
    x = (torch.randn(8, 5, *shape) * 2 + 50).double()[rows].requires_grad_()
    probe = torch.randn(8, 5, *shape).double()[rows]
    norm = BatchNorm(5).double()
    torch.nn.init.normal_(norm.weight)
    y = norm(x)
    (y.sin() * probe).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, dict(norm.state_dict())]

if __name__ == "__main__":
    rank, folder, shares = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    out = [run(slice(n, 8) if rank else slice(0, n), shape) for n, shape in shares]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # as the command line does, and why: cli/main.py
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Values, gradients and running statistics, with equal and unequal shares of the rows, and none at all."""
    command = [sys.executable, "-c", PROCESS]
    processes = [Forked([*command, rank, tmp_path, SHARES]) for rank in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    here: dict[str, Any] = {"__name__": "here"}
    exec(PROCESS, here)
    for (_, shape), a, b in zip(SHARES, first, second, strict=True):
        y, dx, dweight, dbias, state = here["run"](slice(None), shape)
        torch.testing.assert_close(torch.cat([a[0], b[0]]), y)
        torch.testing.assert_close(torch.cat([a[1], b[1]]), dx)
        torch.testing.assert_close(a[2] + b[2], dweight)
        torch.testing.assert_close(a[3] + b[3], dbias)
        torch.testing.assert_close(a[4], state)
        torch.testing.assert_close(b[4], state)
