"""Classes split across ranks: the loss and the gradients of one rank, on two and on four."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist

from selfsup.triton_ops.cross_entropy import cross_entropy, cross_entropy_reference
from selfsup.triton_ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

ROWS, WIDTH, CLASSES = 23, 5, 24
CASES = [
    ({}, None),
    ({"reduction": "none", "label_smoothing": 0.1}, None),
    ({"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 2.0, "scale": 1.5, "class_weights": True}, None),
    ({"reduction": "sum", "z_loss": 0.05, "class_weights": True}, 20),
    ({"label_smoothing": 0.1}, ROWS),
]


def arrays(kind: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,), (ROWS, CLASSES))
    parts = [torch.randn(shape, generator=g, dtype=torch.float64).to(kind).requires_grad_() for shape in shapes]
    labels = torch.randint(CLASSES, (ROWS,), generator=g)
    labels[torch.rand(ROWS, generator=g) < 0.3] = -100
    return [*parts, labels]


def given(options: dict[str, object]) -> dict[str, object]:
    weights = torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)
    return options | ({"class_weights": weights} if "class_weights" in options else {})


def gradients(loss: torch.Tensor, learned: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(1, 2, max(1, loss.numel()), dtype=loss.dtype).view_as(loss)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), learned)]


def on_rank(rank: int, world: int, place: str, kind: torch.dtype) -> None:
    """Raise unless this rank has the loss of one, and its part of the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    group, mine = dist.group.WORLD, slice(rank * CLASSES // world, (rank + 1) * CLASSES // world)
    tolerance = 1e-12 if kind == torch.float64 else 2e-5
    for options, capacity in CASES if kind == torch.float64 else CASES[1:4]:  # the interpreter is slow
        hidden, weight, bias, logits, labels = arrays(kind)
        want = gradients(
            linear_cross_entropy_reference(hidden, weight, labels, bias, **given(options)), [hidden, weight, bias]
        )
        part = [x[mine].detach().requires_grad_() for x in (weight, bias)]
        loss = linear_cross_entropy(hidden, part[0], labels, part[1], **given(options), capacity=capacity, group=group)
        found = gradients(loss, [hidden, *part])
        for a, b in zip(found, (*want[:2], want[2][mine], want[3][mine]), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        want = gradients(cross_entropy_reference(logits, labels, **given(options)), [logits])
        piece = logits[:, mine].detach().requires_grad_()
        found = gradients(cross_entropy(piece, labels, **given(options), group=group), [piece])
        for a, b in zip(found, (want[0], want[1][:, mine]), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    dist.destroy_process_group()


def run(world: int, place: str, kind: str, **environment: str) -> None:
    from forked import Forked  # which a new interpreter that runs this file does not find

    # What is compiled or interpreted is decided when Triton is imported.
    start = partial(subprocess.Popen, stderr=subprocess.PIPE, text=True) if environment else Forked
    commands = [[sys.executable, __file__, str(rank), str(world), place, kind] for rank in range(world)]
    more = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    ranks = [start(command, env=more) for command in commands]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, errors


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_as_one(tmp_path, world):
    run(world, str(tmp_path / "store"), "float64")


def test_ranks_together_are_as_one_by_kernels(tmp_path):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    run(2, str(tmp_path / "store"), "float32", TRITON_INTERPRET="1")


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4]))
