"""Every op has a case, and every case is of an op."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import selfsup.triton_ops as ops
from selfsup.cli.bench_case import Draw, find
from selfsup.cli.bench_cases import cases
from selfsup.cli.bench_parity import error, exact, step

# What `selfsup.triton_ops` shows that is no op with a reference of its own.
NO_CASE = {"patch_mse_with_spread"}  # what patch_mse computes, which has one


def test_every_public_op_has_a_case_at_either_size():
    functions = {
        name for name in ops.__all__ if callable(getattr(ops, name)) and not isinstance(getattr(ops, name), type)
    }
    for full in (False, True):
        assert functions - NO_CASE <= {case.op for case in cases(full)}
    assert {case.op for case in cases(True)} == {case.op for case in cases(False)}


def test_names_of_cases_are_unique():
    for full in (False, True):
        names = [case.name for case in cases(full)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("case", cases(False), ids=lambda case: case.name)
def test_every_case_is_of_an_op_that_equals_its_reference(case):
    find(case.op), find(case.op, "_reference")
    arrays = exact(case.make(Draw(torch.device("cpu"), torch.float32, 0)))
    found, true = step(case.ours, arrays)(), step(case.truth or case.reference, arrays)()
    assert error(found, true)[0] < 1e-6
    assert case.least > 0


@pytest.mark.parametrize("case", cases(True), ids=lambda case: case.name)
def test_every_case_at_full_size_has_the_shapes_of_its_reference(case):
    """Without the memory that they would take."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        arrays = case.make(Draw(torch.device("cpu"), torch.bfloat16, 0))
        try:
            found, true = step(case.ours, arrays)(), step(case.reference, arrays)()
        except DataDependentOutputException:  # on a CPU some look at their labels, of which here are none
            return
        assert [None if x is None else x.shape for x in found] == [None if x is None else x.shape for x in true]
