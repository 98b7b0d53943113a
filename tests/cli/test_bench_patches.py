"""MAE's own form of taking and restoring patches gives what the references give."""

import pytest
import torch

from selfsup.cli import bench_patches
from selfsup.cli.bench_case import Draw
from selfsup.cli.bench_parity import error, step


@pytest.mark.parametrize("op", ["take_patches", "restore_patches"])
def test_maes_form_is_the_reference(op):
    (case,) = (case for case in bench_patches.cases(False) if case.op == op)
    arrays = case.make(Draw(torch.device("cpu"), torch.float64, 0))
    theirs = case.peers["mae's form"].load()
    assert error(step(theirs, arrays)(), step(case.reference, arrays)())[0] < 1e-12


def test_the_bytes_are_those_of_one_reading_and_one_writing():
    take, images, restore, loss = bench_patches.cases(True)
    row, narrow, patch = 1024 * 1024 * 2, 1024 * 512 * 2, 1024 * 768 * 2
    assert take.least == (49 + 49 + 49 + 196) * row
    assert images.least == 2 * 49 * patch
    assert restore.least == (49 + 196 + 196 + 49) * narrow
    assert loss.least == 3 * 147 * patch
