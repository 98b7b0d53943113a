"""Ops are found by name, and arrays are drawn from a seed."""

import pytest
import torch

from selfsup.cli.bench_case import Case, Draw, find
from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import clip_loss
from selfsup.triton_ops.contrast_clip import clip_loss_reference
from selfsup.triton_ops.philox import random_bits

CPU = torch.device("cpu")


def test_an_op_and_its_reference_are_found_wherever_they_are():
    assert find("clip_loss") is clip_loss
    assert find("clip_loss", "_reference") is clip_loss_reference
    assert find("random_bits") is random_bits
    assert callable(find("linear_cross_entropy"))  # a function and its module have one name


def test_what_is_not_there_is_named():
    with pytest.raises(ContractError, match="no op 'nothing'"):
        find("nothing")
    with pytest.raises(ContractError, match="random_bits_slow"):
        find("random_bits", "_slow")


def test_a_case_calls_the_op_and_its_reference_alike():
    case = Case("clip_loss", "B=4", lambda draw: [draw.units(4, 8), draw.units(4, 8)], lambda op, x, y: op(x, y, 2.0))
    arrays = case.make(Draw(CPU, torch.float32, 0))
    assert case.ours(*arrays).item() == pytest.approx(case.reference(*arrays).item())
    assert case.name == "clip_loss B=4"


def test_flops_are_those_of_the_products():
    assert Case("x", "", lambda draw: [], lambda op: op, products=((2, 3, 5), (7, 1, 1))).flops == 2 * 30 + 2 * 7


def test_a_seed_gives_the_same_arrays_and_another_others():
    first, again, other = (Draw(CPU, torch.bfloat16, seed).normal(5, 3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.dtype, first.requires_grad) == (torch.bfloat16, True)


def test_units_are_units_and_near_their_partners():
    draw = Draw(CPU, torch.float32, 0)
    x = draw.units(50, 16)
    y = draw.units(50, 16, near=x)
    assert torch.allclose(y.norm(dim=1), torch.ones(50))
    s = (x @ y.T).detach()
    assert s.diagonal().mean() > 0.3 > s.mean() + 0.2


def test_a_subset_has_no_number_twice_and_rises():
    found = Draw(CPU, torch.float32, 0).subset(20, 9, 4)
    assert found.shape == (20, 4)
    assert (found.diff(dim=1) > 0).all()
    assert 0 <= found.min() <= found.max() < 9
