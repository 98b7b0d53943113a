"""What is wrong is seen to be wrong."""

import math

import pytest
import torch

from selfsup.cli import bench_parity as parity


def test_the_error_is_relative_and_the_worst_of_all_results():
    true = [torch.tensor(2.0).double(), torch.tensor([3.0, 4.0]).double()]
    assert parity.error([torch.tensor(2.0), torch.tensor([3.0, 4.0])], true) == (0.0, 0)
    assert parity.error([torch.tensor(2.2), torch.tensor([3.0, 4.5])], true)[0] == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad):
    assert parity.error([torch.tensor([1.0, bad])], [torch.ones(2).double()]) == (math.inf, 0)


def test_a_result_of_another_size_or_number_is_wrong():
    assert parity.error([torch.ones(3)], [torch.ones(2).double()])[0] == math.inf
    assert parity.error([], [torch.ones(2).double()])[0] == math.inf


def test_integers_must_be_equal():
    true = [torch.tensor([1, 2, 3, 4])]
    assert parity.error([torch.tensor([1, 2, 3, 4])], true)[0] == 0
    assert parity.error([torch.tensor([1, 2, 3, 5])], true)[0] == 1.25
    assert parity.error([torch.tensor([1, 2, 3, 5])], true, spare=0.25)[0] == 0


def test_a_gradient_that_is_not_there_is_counted_and_one_that_need_not_be_is_not():
    assert parity.error([torch.ones(2), None], [torch.ones(2).double(), torch.ones(1).double()]) == (0.0, 1)
    assert parity.error([torch.ones(2), torch.ones(1)], [torch.ones(2).double(), None]) == (0.0, 0)


def test_a_step_gives_outputs_and_gradients_that_weigh_each_element():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out, gradient = parity.step(lambda x: x * x, [x])()
    assert out.tolist() == [1, 4, 9]
    assert gradient.tolist() == [2 * 1, 2 * 2 * 2, 2 * 3 * 3]  # the gradients that arrive go from 1 to 3
    assert parity.step(lambda x: x.sum(), [x])()[0] == 6
    _, gradient = parity.step(lambda x: x.sum(), [x])()
    assert gradient.tolist() == [1, 1, 1]


def test_what_has_no_gradient_is_called_alone():
    assert [x.tolist() for x in parity.step(lambda x: (x, x + 1), [torch.zeros(1)])()] == [[0], [1]]


def test_arrays_in_float64_and_anew():
    x, index = torch.ones(2, dtype=torch.bfloat16, requires_grad=True), torch.arange(2)
    exact = parity.exact([x, index, 0.5])
    assert (exact[0].dtype, exact[0].requires_grad, exact[1] is index, exact[2]) == (torch.float64, True, True, 0.5)
    again = parity.anew([x, 0.5])
    assert again[0].is_leaf
    assert again[0].requires_grad
    assert again[0].data_ptr() != x.data_ptr()


def test_the_limit_is_twice_what_torch_errs_or_a_rounding():
    assert parity.limit(torch.bfloat16, 0.01, ours=True) == 0.02
    assert parity.limit(torch.bfloat16, 0.0, ours=True) == 2**-8
    assert parity.limit(torch.bfloat16, None, ours=True) == parity.limit(torch.bfloat16, math.inf, ours=True) == 2**-8
    assert parity.limit(torch.float32, 1e-7, ours=True) < 1e-5 < parity.limit(torch.float32, 1e-7, ours=False)


def test_the_coarsest_type_of_the_arrays_counts():
    half, single = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    assert parity.coarsest([half, single, 0.5]) == torch.bfloat16
    assert parity.coarsest([single, torch.arange(2)]) == torch.float32
    assert parity.coarsest([torch.arange(2)]) == torch.float32
