"""Ids to vectors."""

from __future__ import annotations

import torch

from selfsup.kernel.contracts import Signal
from selfsup.plugins.common.token_stem import Tokens


def test_latents_are_rows_of_the_table_and_targets_the_ids():
    stem = Tokens(11, 4)
    raw = Signal(torch.tensor([[3, 0, 10]]), torch.tensor([[1, 1, 2]]), torch.tensor([[0, 1, 0]]))
    tokens = stem(raw)
    assert torch.equal(tokens.x, stem.embed.weight[[3, 0, 10]][None])
    assert tokens.segments is raw.segments
    assert tokens.positions is raw.positions
    assert stem.targets(raw) is raw.x
    assert (stem.size, stem.width, stem.discrete) == (11, 4, True)


def test_the_table_begins_as_gpt2s():
    torch.manual_seed(0)
    weight = Tokens(1000, 100).embed.weight
    # Of N = 1e5 normal values the standard deviation is known to 1 / sqrt(2 N): five of these are 1.1 %.
    assert abs(weight.std().item() / 0.02 - 1) < 0.0112
    assert abs(weight.mean().item()) < 5 * 0.02 / 1e5**0.5
