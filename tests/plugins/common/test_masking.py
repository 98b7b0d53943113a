from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfsup.kernel import stream
from selfsup.plugins.common.masking import Spans, capacity, hidden_count, pack, pick, random_mask, span_mask

PAPER = Spans(share=0.65, length=10, least=2)


def rows(lengths: list[int], total: int | None = None, ids: list[int] | None = None, spans: Spans = PAPER) -> Tensor:
    real = torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]
    draw = stream(0, "mask", torch.tensor(ids or range(len(lengths))))
    return span_mask(draw, real, spans)


@pytest.mark.parametrize(("frames", "share"), [(50, 0.507), (780, 0.490)])
def test_the_share_that_ends_up_hidden_is_the_definitions(frames: int, share: float) -> None:
    """0.507 and 0.490: the authors' procedure, simulated (overlaps make it less than 0.65)."""
    hidden = rows([frames] * 4000)
    assert abs(hidden.float().mean() - share) < 0.004


def test_the_number_of_spans_is_rounded_at_random() -> None:
    """15 frames in spans of 1: int(0.65 * 15 + U) is 9 in a quarter of the rows and 10 in the others."""
    counts = rows([15] * 4000, spans=PAPER._replace(length=1)).sum(1)
    assert set(counts.tolist()) == {9, 10}
    assert abs((counts == 10).float().mean() - 0.75) < 0.03


def test_every_start_is_equally_likely() -> None:
    """One span of 3 in 12 frames has ten starts; a middle frame is hidden three times as often as the first."""
    hidden = rows([12] * 20000, spans=Spans(0.01, 3, 1))
    assert (hidden.sum(1) == 3).all()
    assert torch.allclose(hidden.float().mean(0) * 10, torch.tensor([1, 2, *[3] * 8, 2, 1]).float(), atol=0.12)


def test_spans_are_whole_and_inside_the_real_frames() -> None:
    lengths = [200, 131, 40, 57]
    hidden = rows(lengths * 50, total=210)
    for row, length in zip(hidden, lengths * 50, strict=True):
        assert not row[length:].any()
        runs = "".join("x" if h else "." for h in row).split(".")
        assert min(len(run) for run in runs if run) >= 10


@pytest.mark.parametrize("frames", range(1, 45))
def test_short_utterances_keep_one_frame_hidden_and_one_visible(frames: int) -> None:
    hidden = rows([frames] * 50)
    assert hidden.any(1).all()
    if frames > 1:
        assert (~hidden).any(1).all()


def test_short_utterances_get_their_spans_shortened() -> None:
    """12 frames get two spans of 5, which hide 6 frames where they overlap most and 10 where they do not."""
    assert set(rows([12] * 500).sum(1).tolist()) == {6, 7, 8, 9, 10}


def test_a_row_of_padding_hides_nothing() -> None:
    assert not rows([0, 60])[0].any()


def test_a_row_is_masked_alike_in_any_batch() -> None:
    together = rows([90, 33, 400, 12], ids=[7, 3, 9, 5])
    assert torch.equal(rows([33], ids=[3])[0], together[1, :33])
    assert torch.equal(rows([12, 90], total=90, ids=[5, 7]), together[[3, 0], :90])


def test_rows_differ() -> None:
    assert len(rows([100] * 50).unique(dim=0)) == 50


@pytest.mark.parametrize("spans", [PAPER, Spans(0.8, 10, 2), Spans(0.3, 3, 4)])
def test_the_capacity_holds_every_row(spans: Spans) -> None:
    for total in (1, 2, 5, 19, 20, 21, 22, 30, 31, 46, 47, 100, 333):
        most = int(rows([*range(1, total + 1)] * (1 + 500 // total), total=total, spans=spans).sum(1).max())
        assert most <= capacity(total, spans) <= total


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
