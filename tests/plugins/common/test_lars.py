"""LARS against the equations worked out in NumPy, and against torch's SGD where the two must agree."""

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.plugins.common.lars import BUFFER, LARS

RATES = (0.5, 0.25, 0.125)


def by_hand(w, grads, rates, *, momentum=0.9, decay=0.0, trust=1e-3, nesterov=False, adapt=True):
    """The equations of the module's docstring in float64, one parameter at a time."""
    w, v = np.array(w, np.float64), 0.0
    for g, rate in zip(grads, rates, strict=True):
        g = np.array(g, np.float64) + decay * w
        w_norm, g_norm = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
        ratio = trust * w_norm / g_norm if adapt and w_norm > 0 and g_norm > 0 else 1.0
        v = momentum * v + rate * ratio * g
        w = w - (momentum * v + rate * ratio * g if nesterov else v)
    return w, v


def train(w, grads, rates, **options):
    p = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = LARS([p], **options)
    for g, rate in zip(grads, rates, strict=True):
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return p.detach().numpy(), optimizer.state[p][BUFFER].numpy()


def test_three_steps_in_numbers():
    # |w| = 5, |g| = 1, trust 0.1: the ratio is 0.5, so v = 0.5 * 0.5 * g = [0.25, 0] and w = [2.75, 4].
    w, v = train([3.0, 4.0], [[1.0, 0.0]], [0.5], trust=0.1)
    assert w == pytest.approx([2.75, 4.0], abs=1e-15)
    assert v == pytest.approx([0.25, 0.0], abs=1e-15)
    # Then |g| = 2 and a halved rate: v = 0.9 * 0.25 + 0.25 * (0.1 * |w| / 2) * 2.
    length = np.hypot(2.75, 4.0)
    w, v = train([3.0, 4.0], [[1.0, 0.0], [2.0, 0.0]], [0.5, 0.25], trust=0.1)
    assert v == pytest.approx([0.225 + 0.025 * length, 0.0], abs=1e-15)
    assert w == pytest.approx([2.75 - 0.225 - 0.025 * length, 4.0], abs=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_changing_rates_equal_the_hand_computation(nesterov, adapt, decay):
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
    expected = by_hand(w, grads, RATES, decay=decay, nesterov=nesterov, adapt=adapt)
    found = train(w, grads, RATES, weight_decay=decay, nesterov=nesterov, adapt=adapt)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)


def test_the_rate_stands_inside_the_momentum():
    # Outside it, as in torch's SGD, a rate of 0 would hold the weights still; here the momentum goes on.
    w, _ = train([1.0], [[1.0], [0.0]], [0.5, 0.0], adapt=False)
    assert w == pytest.approx([1.0 - 0.5 - 0.45])


def test_at_a_constant_rate_without_adaptation_it_is_sgd():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5, 4)) for _ in range(2))
    optimizers = [
        LARS([ours], lr=0.1, weight_decay=0.01, adapt=False),
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01),
    ]
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(5, 4)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("w", "g"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0])])
def test_a_norm_of_zero_means_a_ratio_of_one(w, g):
    found, _ = train(w, [g], [0.5])
    assert found == pytest.approx(np.array(w) - 0.5 * np.array(g))


def test_groups_differ_and_parameters_without_gradient_stay():
    torch.manual_seed(0)
    matrix, bias, idle = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))
    start = [p.detach().double().numpy().copy() for p in (matrix, bias, idle)]
    optimizer = LARS([{"params": [matrix, idle], "weight_decay": 0.1}, {"params": [bias], "adapt": False}], lr=0.5)
    matrix.grad, bias.grad = torch.randn(4, 3), torch.randn(4)
    optimizer.step()
    expected = by_hand(start[0], [matrix.grad.numpy()], [0.5], decay=0.1)[0]
    np.testing.assert_allclose(matrix.detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(bias.detach(), start[1] - 0.5 * bias.grad.double().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(idle.detach(), start[2].astype(np.float32))
    assert idle not in optimizer.state


@pytest.mark.parametrize("nesterov", [False, True])
def test_found_inf_leaves_parameters_and_buffers_alone_whatever_the_gradient(nesterov):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 2))
    optimizer = LARS([p], lr=0.5, weight_decay=0.1, nesterov=nesterov)
    for bad in (torch.full((3, 2), torch.nan), torch.full((3, 2), torch.inf), torch.ones(3, 2)):
        p.grad = torch.randn(3, 2)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        before = p.detach().clone(), optimizer.state[p][BUFFER].clone()
        p.grad = bad
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(p, before[0])
        assert torch.equal(optimizer.state[p][BUFFER], before[1])


@pytest.mark.parametrize("nesterov", [False, True])
def test_found_inf_of_zero_changes_no_bit(nesterov):
    torch.manual_seed(0)
    start, grads = torch.randn(33, 7), torch.randn(5, 33, 7)
    found = []
    for flag in (None, torch.tensor(0.0)):
        p = nn.Parameter(start.clone())
        optimizer = LARS([p], lr=0.3, weight_decay=1e-4, nesterov=nesterov)
        optimizer.found_inf = flag
        for g in grads:
            p.grad = g
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_gradients_are_divided_by_the_scale():
    found = []
    for scale in (None, torch.tensor(1024.0)):
        p = nn.Parameter(torch.ones(2, 2))
        optimizer = LARS([p], lr=0.5, adapt=False)
        optimizer.grad_scale = scale
        p.grad = torch.full((2, 2), 3.0) * (1.0 if scale is None else scale)
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(2))
    optimizer = LARS([p], lr=0.5, adapt=False)

    def closure():
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert torch.equal(p.detach(), torch.full((2,), 0.5))
