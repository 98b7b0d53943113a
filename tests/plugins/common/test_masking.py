from __future__ import annotations

import torch

from selfsup.plugins.common.masking import pack, pick


def test_pack_and_pick_put_the_hidden_tokens_side_by_side() -> None:
    hidden = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    index, valid = pack(hidden, 4)
    x = torch.arange(10.0).view(2, 5, 1)
    assert valid.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(pick(x, index)[valid], x[hidden])
