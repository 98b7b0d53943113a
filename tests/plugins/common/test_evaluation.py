"""A model that was looked at is the model that it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from selfsup.plugins.common.evaluation import evaluating


class Counting(nn.Module):
    """Changes a buffer in every forward pass, whatever its mode, and draws from torch."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3).eval()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept_back", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen += len(x)
        self.kept_back += torch.rand(())
        return self.frozen(self.drop(self.norm(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_it(fails):
    model, x = Counting(), torch.randn(4, 3)
    model(x)
    before = copy.deepcopy({**model.state_dict(), "kept back": model.kept_back})
    draws = torch.get_rng_state()
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            out = model(x)
            assert not out.requires_grad
            assert torch.equal(out, model(x))  # nothing is dropped
            assert model.seen == 12
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    after = {**model.state_dict(), "kept back": model.kept_back}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), draws)
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert model(x).requires_grad
