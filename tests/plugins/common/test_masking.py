from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfsup.kernel import stream
from selfsup.plugins.common.masking import hidden_count, pack, pick, random_mask


def test_pack_and_pick_put_the_hidden_tokens_side_by_side() -> None:
    hidden = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    index, valid = pack(hidden, 4)
    x = torch.arange(10.0).view(2, 5, 1)
    assert valid.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(pick(x, index)[valid], x[hidden])


def scattered(
    lengths: list[int], total: int | None = None, ids: list[int] | None = None, share: float = 0.75
) -> Tensor:
    real = torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]
    return random_mask(stream(0, "mask", torch.tensor(ids or range(len(lengths)))), real, share)


@pytest.mark.parametrize(
    ("tokens", "share", "hidden"),
    # As MAE's int(tokens * (1 - share)) visible ones, but (1 - 0.9) * 10 is one token, not none.
    [(196, 0.75, 147), (49, 0.75, 37), (256, 0.75, 192), (10, 0.9, 9), (10, 0.4, 4), (3, 0.99, 2), (1, 0.5, 0)],
)
def test_the_count_is_exact(tokens: int, share: float, hidden: int) -> None:
    assert hidden_count(tokens, share) == hidden
    assert (scattered([tokens] * 200, share=share).sum(1) == hidden).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.75, 0.9])
def test_counts_of_padded_rows_are_their_own_and_fit(share: float) -> None:
    lengths = list(range(1, 200))
    hidden = scattered(lengths, share=share)
    assert hidden.sum(1).tolist() == [hidden_count(length, share) for length in lengths]
    assert not (hidden & (torch.arange(199) >= torch.tensor(lengths)[:, None])).any()
    shown = [length - hidden_count(length, share) for length in lengths]
    assert shown == sorted(shown)
    assert hidden.sum(1).tolist() == sorted(hidden.sum(1).tolist()), "so the longest row's counts hold every row's"


def test_a_row_of_padding_hides_no_token() -> None:
    assert not scattered([0, 8])[0].any()


def test_all_tokens_are_hidden_alike_often_and_independently() -> None:
    """3 of 4: each of the four sets a quarter of the time, within four standard errors of 20,000 draws."""
    hidden = scattered([4] * 20000)
    sets, counts = hidden.unique(dim=0, return_counts=True)
    assert len(sets) == 4
    assert ((counts / 20000 - 0.25).abs() < 4 * (0.25 * 0.75 / 20000) ** 0.5).all()


def test_a_row_is_hidden_alike_in_any_batch() -> None:
    together = scattered([90, 33, 400, 12], ids=[7, 3, 9, 5])
    assert torch.equal(scattered([33], ids=[3])[0], together[1, :33])
    assert torch.equal(scattered([12, 90], total=90, ids=[5, 7]), together[[3, 0], :90])
