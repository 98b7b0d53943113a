"""The plugin keeps the contract of objectives, and its puzzles are what the paper says."""

from __future__ import annotations

import torch
from selfsup_jigsaw import Jigsaw, distant

from selfsup.kernel import Tower, stream
from selfsup.testing import ObjectiveContract


class TestJigsaw(ObjectiveContract):
    name = "jigsaw"


class Wide(torch.nn.Module):
    width = 4


def test_tiles_come_from_their_cells():
    puzzle = Jigsaw(Tower(torch.nn.Identity(), Wide()), orders=5, tile=3)
    view = torch.arange(9.0).view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 1, 12, 12)
    tiles = puzzle.cut(view, puzzle.orders[:2], stream(0, "place", torch.arange(2)))
    assert tiles.shape == (2, 9, 1, 3, 3)
    assert torch.equal(tiles.amax((2, 3, 4)), puzzle.orders[:2].float())
    assert torch.equal(tiles.amin((2, 3, 4)), puzzle.orders[:2].float())


def test_orders_are_permutations_far_apart():
    orders = distant(100)
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(100, 9))
    apart = (orders[:, None] != orders[None]).sum(2) + 9 * torch.eye(100)
    assert apart.min() >= 6  # of 9; a hundred random ones come as near as 3
